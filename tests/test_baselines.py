"""Models that cost next to nothing and the default configuration, beside a network, in one reading of the test rows."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

import hpo
from hpo.errors import Interrupted
from hpo.runner import default, table_models
from hpo.runner.baselines import Form, fit_baselines, form_of, some_rows, value_of
from hpo.runner.outcome import outcome
from hpo.runner.refit import conclude
from hpo.runner.table_models import Absent
from hpo.search.beside import beside_in
from hpo.study.data import DataInfo, Split
from hpo.study.objective import Objective
from hpo.tracking.base import MemoryTracker
from tests.cli import invoke, refused, summary
from tests.databases import MLFLOW, rows
from tests.logged import recorded
from tests.searches import Told
from tests.test_own import OWN

NUMBERS = Form(n_classes=0, shape=(1,), are="numbers")


class Some(Objective):
    """What `form_of` looks at of an objective: its head."""

    def __init__(self, head=None):
        self._head = nn.Identity() if head is None else head

    def data(self):
        raise NotImplementedError

    def metrics(self):
        return {}

    def head(self):
        return self._head


def info(*names):
    return DataInfo(inputs={"x": (2,)}, input_dtypes={"x": "float32"}, class_names=names)


LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 0.1, 0.2]])
CLASSES = torch.tensor([0, 2])
FORMS = {
    "classes by name": (info("a", "b", "c"), {}, LOGITS, CLASSES, None, (3, "logits")),
    "probabilities": (info("a", "b", "c"), {}, LOGITS.softmax(1), CLASSES, None, (3, "probabilities")),
    "a loss that takes logits": (
        info("a", "b", "c"), {"loss": "cross_entropy"}, LOGITS.softmax(1), CLASSES, None, (3, "logits"),
    ),
    "classes without names": (info(), {}, LOGITS, CLASSES, None, (3, "logits")),
    "one logit": (info("a", "b"), {"loss": "bce"}, LOGITS[:, :1], torch.tensor([[0.0], [1.0]]), None, (2, "logits")),
    "one logit of a head": (info(), {}, LOGITS[:, :1], torch.tensor([[0.0], [1.0]]), nn.Sigmoid(), (2, "logits")),
    "one probability": (info("a", "b"), {}, torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), None, (2, "probabilities")),
    "two logits": (info("a", "b"), {}, LOGITS[:, :2], torch.tensor([0, 1]), None, (2, "logits")),
    "numbers": (info(), {"loss": "mse"}, LOGITS[:, :1], torch.tensor([[0.0], [1.0]]), None, (0, "numbers")),
    "counts": (info(), {}, LOGITS[:, 0], torch.tensor([4, 7]), None, (0, "numbers")),
    "several numbers": (info(), {}, LOGITS, LOGITS, None, (0, "numbers")),
    "images": (info(), {}, torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), None, (0, "numbers")),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_how_networks_say_what_they_predict_is_seen(case):
    about, params, outputs, targets, head, expected = FORMS[case]
    form = form_of(Some(head), about, params, outputs, targets)
    assert (form.n_classes, form.are) == expected
    assert form.shape == outputs.shape[1:]


REFUSED = {
    "labels": (
        info("a", "b", "c"),
        {},
        LOGITS,
        torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]),
        "more than one class",
    ),
    "labels without names": (info(), {"loss": "bce"}, LOGITS, torch.ones(2, 3), "more than one class"),
    "classes of pixels": (
        info("a", "b"),
        {},
        torch.zeros(2, 2, 4, 4),
        torch.zeros(2, 4, 4).long(),
        "more than one class",
    ),
    "an embedding": (info("a", "b", "c", "d"), {}, LOGITS, CLASSES, "of 4 classes the networks give 3 outputs"),
    "quantiles": (info(), {}, LOGITS, torch.tensor([0.5, 1.5]), "no prediction of each target"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_prediction_of_one_thing_has_no_baseline_and_says_why(case):
    about, params, outputs, targets, why = REFUSED[case]
    with pytest.raises(Absent, match=why):
        form_of(Some(), about, params, outputs, targets)


@pytest.mark.parametrize("are", ["logits", "probabilities"])
@pytest.mark.parametrize("shape", [(2,), (1,), ()])
def test_chances_become_the_outputs_that_a_network_would_have_given(are, shape):
    chances = np.array([[0.25, 0.75], [1.0, 0.0]])
    outputs = Form(n_classes=2, shape=shape, are=are).outputs(chances)
    assert outputs.shape == (2, *shape)
    wide = len(shape) and shape[0] == 2
    if are == "logits":
        outputs = outputs.softmax(1) if wide else outputs.sigmoid()
    assert outputs.reshape(2, -1).numpy() == pytest.approx(chances if wide else chances[:, 1:], abs=1e-6)


def table(n=400, seed=0):
    """Return rows whose class is decided by a category and a number, with gaps."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g)
    codes = torch.randint(0, 5, (n, 1), generator=g)
    y = ((codes[:, 0] == 3) | (x[:, 0] > 1)).long()
    x[::17, 1] = float("nan")
    return Split(inputs={"numeric": x, "categorical": codes}, targets=y)


def fitted(form, train, preprocess=None, **keys):
    return fit_baselines(form, train, nn.Identity() if preprocess is None else preprocess, 0, **keys)


def test_categories_are_categories_to_each_model_and_gaps_are_gaps():
    form = Form(n_classes=2, shape=(2,), are="logits")
    found, absent = fitted(form, table())
    assert absent == []
    assert [each.name for each in found] == ["majority class", "logistic regression", "HistGradientBoosting"]
    test = table(seed=1)
    accuracy = MulticlassAccuracy(2, average="micro")
    values = [value_of(Some(), "accuracy", each.predict(test), test.targets, {}, accuracy) for each in found]
    assert values[0] == pytest.approx(float((test.targets == 0).float().mean()))
    assert values[1] > 0.87  # a number in place of the category reaches 0.78
    assert values[2] > 0.97
    unknown = Split(inputs={**test.inputs, "categorical": test.inputs["categorical"] + 100}, targets=test.targets)
    assert all(torch.isfinite(each.predict(unknown)).all() for each in found)


def test_the_mean_is_there_for_images_and_nothing_is_said_of_tables():
    images = Split(inputs={"pixels": torch.zeros(6, 1, 4, 4)}, targets=torch.arange(6.0)[:, None])
    found, absent = fitted(NUMBERS, images)
    assert [each.name for each in found] == ["mean of the targets"]
    assert found[0].predict(images).tolist() == [[2.5]] * 6
    assert absent == []


def test_of_several_targets_each_has_its_mean_and_boosting_says_that_it_takes_one():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    train = Split(inputs={"x": x}, targets=torch.stack([x.sum(1), x[:, 0]], 1))
    found, absent = fitted(Form(n_classes=0, shape=(2,), are="numbers"), train)
    assert [each.name for each in found] == ["mean of the targets", "linear regression"]
    assert torch.allclose(found[0].predict(train)[0], train.targets.mean(0), atol=1e-6)
    assert torch.allclose(found[1].predict(train), train.targets, atol=1e-4)
    assert absent == ["no HistGradientBoosting: it predicts one number a row"]


def test_of_many_rows_a_sample_is_fitted_to_and_that_is_said():
    found, _ = fitted(Form(n_classes=2, shape=(2,), are="logits"), table(), most=100)
    assert [each.note for each in found] == ["", *["fitted to 100 of 400 rows"] * 2]
    assert torch.equal(some_rows(10, 10, 0), torch.arange(10))
    assert len(some_rows(10, 4, 0).unique()) == 4


def test_steps_and_trees_that_would_take_long_are_left_out_and_that_is_said(monkeypatch):
    monkeypatch.setattr(table_models, "_SECONDS", 0.0)
    found, _ = fitted(Form(n_classes=2, shape=(2,), are="logits"), table())
    assert [each.note for each in found] == ["", "not converged", "1 of 100 trees"]


WRONG = {
    "one class": (Form(n_classes=2, shape=(2,), are="logits"), torch.zeros(400).long(), "no logistic regression: "),
    "many columns": (NUMBERS, None, "there are more than 500 columns"),
    "many classes": (Form(n_classes=101, shape=(101,), are="logits"), None, "there are more than 100 classes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_fitted_is_said_in_a_line_and_the_rest_is_there(case):
    form, targets, why = WRONG[case]
    train = table()
    if case == "many columns":
        train = Split(inputs={"x": torch.zeros(400, 501)}, targets=torch.zeros(400, 1))
    found, absent = fitted(form, Split(inputs=train.inputs, targets=train.targets if targets is None else targets))
    assert found[0].name in ("majority class", "mean of the targets")
    assert why in absent[0]
    assert all("\n" not in each for each in absent)


@pytest.mark.parametrize("targets", [torch.tensor([0.5, 1.0]), torch.tensor([0, 2]), torch.tensor([-1, 1])])
def test_targets_that_are_no_classes_are_said(targets):
    with pytest.raises(Absent, match="the targets are not the classes 0 to 1"):
        fitted(Form(n_classes=2, shape=(1,), are="logits"), Split(inputs={"x": torch.zeros(2, 1)}, targets=targets))


def test_a_preprocess_that_fails_costs_only_the_models_that_need_it():
    class Broken(nn.Module):
        def forward(self, *inputs):
            raise SystemExit("no")

    found, absent = fitted(Form(n_classes=2, shape=(2,), are="logits"), table(), Broken())
    assert len(found) == 1
    assert absent == ["no linear model and no gradient boosting: SystemExit: no"]


# A whole study.


@pytest.fixture
def told(study):
    """Return a function that tells trials (learning rate, value, best epoch); it gives plan, data and search."""
    told = Told()

    def make(trials, text="", start=""):
        rates = start or ", ".join(f"{{learning_rate: {rate}}}" for rate, _, _ in trials)
        path = study(f"epochs: 5\npruner: none\nstack: 1\n{text}trials: {len(trials)}\nstart_with: [{rates}]\n")
        left = list(trials)
        return told(path, lambda claim: left.pop(0)[1:])

    yield make
    told.close()


def end(plan, data, search, stopping=lambda: False):
    return conclude(plan, data, search, MemoryTracker(), stopping)


def test_the_whole_is_said_by_each_command_the_report_python_mlflow_and_the_bundle(study):
    path = study(f"tracking: sqlite:///{MLFLOW}\n")
    printed = invoke("run", path, "--json")
    found = summary(printed)["baselines"]
    assert [each["name"] for each in found["models"]] == [
        "mean of the targets",
        "linear regression",
        "HistGradientBoosting",
    ]
    assert found["best"] == "linear regression"
    assert found["difference"]["by"] < 0
    assert "Linear regression is better than the network, by" in printed.replace("\n", " ")
    assert "it took " in printed
    said = hpo.open_study(path).baselines
    assert said.as_dict() == found
    lines = said.sentences()
    assert len(lines) == 3
    assert set(lines) <= set(invoke("status", path).splitlines())
    assert summary(invoke("status", path, "--json"))["baselines"] == found
    folder = Path("mlruns/bundles/study")
    assert json.loads((folder / "bundle.json").read_text())["baselines"] == found
    assert all(f"- {line}" in (folder / "MODEL.md").read_text() for line in lines)
    invoke("report", path, "--no-baselines", "--out", "r.html")
    invoke("report", path, "--out", "r.md")
    assert all(line in Path("r.html").read_text() for line in lines)
    assert "Linear regression is better than the network" in Path("r.md").read_text()
    test = summary(printed)["test"]
    assert found["network"] == test["r2"]
    metrics = dict(
        rows("SELECT key, value FROM metrics WHERE key LIKE 'baseline_%' OR key LIKE 'default_%'", file=MLFLOW)
    )
    assert metrics.keys() == {"baseline_r2", "baseline_loss", "baseline_seconds", "default_r2", "default_loss"}
    assert metrics["baseline_r2"] == pytest.approx(found["models"][1]["metrics"]["r2"])
    (note,) = [value for (value,) in rows("SELECT value FROM tags WHERE key = 'mlflow.note.content'", file=MLFLOW) if "Linear regression is" in value]  # fmt: skip  # noqa: E501
    assert note


def test_it_is_one_reading_of_the_test_rows_and_changes_nothing_of_what_is_exported(study):
    found = {}
    for name, text in {"with": "", "without": "baseline: false\n"}.items():
        path = study(f"name: {name}\n{text}", f"{name}.yaml")
        done = summary(invoke("run", path, "--json"))
        assert done["test_evaluations"] == 1
        weights = torch.load(Path("mlruns/bundles") / name / "model.pt", weights_only=True)["model_state_dict"]
        found[name] = done["test"], weights, done["baselines"]
    assert found["with"][0] == found["without"][0]
    assert all(torch.equal(x, found["without"][1][n]) for n, x in found["with"][1].items())
    assert found["with"][2] is not None
    assert found["without"][2] is None
    assert hpo.open_study("without.yaml").baselines is None
    assert "baselines" not in json.loads(Path("mlruns/bundles/without/bundle.json").read_text())


def test_the_key_is_true_or_false(study):
    assert "baseline: must be a boolean, but got 'maybe'" in refused("run", study("baseline: maybe\n"))


def test_an_objective_that_trains_itself_and_a_function_have_none(study, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    assert summary(invoke("run", study("objective: own.py\n"), "--json"))["baselines"] is None
    (tmp_path / "f.py").write_text("def f(trial):\n    return trial.suggest_float('x', 0, 1)\n")
    assert summary(invoke("run", study("name: f\nobjective: f.py:f\nepochs: 1\n"), "--json"))["baselines"] is None


def test_the_default_configuration_that_won_says_so(told):
    plan, data, search = told([(0.05, 0.9, 2), (0.09, 0.8, 2)])
    assert end(plan, data, search).beside.default.is_best
    assert "(trial 0) was itself the best" in outcome(search, search.best()).beside.default_text


def test_a_default_configuration_that_was_a_trial_is_refitted_for_its_own_epochs(told):
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)])
    found = end(plan, data, search).beside
    assert found.default.number == 0
    assert found.default.epochs == 4
    assert found.default.gain_on_validation == pytest.approx(0.1)
    assert found.default.network == found.network
    assert found.default.difference.by == pytest.approx(found.network - found.default.metrics["r2"], abs=1e-6)
    assert beside_in(search.attrs["hpo:result"]["baselines"]) == found


def test_one_that_was_no_trial_is_trained_as_one_to_know_its_epochs(told):
    plan, data, search = told([(0.04, 0.8, 1)], text="sampler: random\n", start="{kind: good}")
    n_trials = len(search.view().everything)
    with recorded() as said:
        found = end(plan, data, search).beside.default
    assert found.number is None
    assert 1 <= found.epochs <= 5
    assert found.gain_on_validation is not None
    assert found.metrics["r2"] != 0
    assert "training the default configuration, to compare the best of the search with it" in said
    assert len(search.view().everything) == n_trials == 1


def test_one_that_would_take_long_is_compared_on_validation_only(told, monkeypatch):
    monkeypatch.setattr(default, "SECONDS", 0.0)
    monkeypatch.setattr(default, "SHARE", 0.0)
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)])
    found = end(plan, data, search).beside
    assert found.default.metrics is None
    assert found.default.gain_on_validation == pytest.approx(0.1)
    assert "On validation" in found.default_text
    assert "more than a tenth of the search" in found.default_text


def test_one_whose_training_fails_costs_nothing_else(told):
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)])
    plain = plan.objective.build

    def build(params, info):
        network = plain(params, info)
        if params["learning_rate"] == 0.01:
            network.weight.data.fill_(float("nan"))
        return network

    plan.objective.build = build
    done = end(plan, data, search)
    assert done.number == 1
    assert done.beside.difference is not None
    assert "the default configuration, trained from scratch on train + validation, failed" in done.beside.default.why


def test_interrupted_in_it_the_test_rows_are_not_read_and_nothing_is_lost(told, monkeypatch):
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)])
    asked = []
    with recorded() as said, pytest.raises(Interrupted):
        end(plan, data, search, stopping=lambda: asked.append(1) or any("the default config" in each for each in said))
    assert search.attrs.get("hpo:test_evaluations") is None
    assert end(plan, data, search).n_tests == 1


def test_an_ensemble_is_compared_as_one_and_the_default_with_a_single_network(told):
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)], text="ensemble: 3\n")
    done = end(plan, data, search)
    assert done.beside.network == done.test["r2"]
    assert done.beside.default.network != done.beside.network
    assert "of one network" in done.beside.default_text


def test_a_metric_that_knows_networks_only_leaves_the_result_as_it_is(told):
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)])
    plain, seen = plan.objective.loss, []

    def loss(outputs, targets, params):
        if not outputs.requires_grad and not seen.append(1) and len(seen) > 2:
            raise KeyError("only of the network: once to see what it takes, once in the test")
        return plain(outputs, targets, params)

    plan.objective.loss = loss
    done = end(plan, data, search)
    assert done.test.keys() == {"loss", "r2"}
    assert all("loss" not in each.metrics for each in done.beside.baselines)
    assert done.beside.difference is not None


def test_of_many_test_rows_as_many_are_measured_and_that_is_said(told, monkeypatch):
    from hpo.runner import beside

    monkeypatch.setattr(beside, "MOST_MEASURED", 20)
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)])
    done = end(plan, data, search)
    assert (done.beside.rows, done.beside.of_rows) == (20, 50)
    assert done.beside.network != done.test["r2"]
    assert "20 of 50 test rows" in done.beside.verdict


def test_a_study_that_had_ended_without_is_not_read_again(told):
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)], text="baseline: false\n")
    end(plan, data, search)
    plan, data, search = told([(0.01, 0.7, 3), (0.09, 0.8, 1)])
    done = end(plan, data, search)
    assert done.n_tests == 1
    assert done.beside is None


def test_an_exported_trial_has_baselines_and_nothing_of_the_search(study):
    path = study()
    invoke("run", path)
    found = summary(invoke("export", path, "--trial", 1, "--out", "one", "--json"))["baselines"]
    assert found["default"] is None
    assert len(found["models"]) == 3
    assert json.loads(Path("one/bundle.json").read_text())["baselines"] == found


def test_the_interval_of_an_accuracy_is_about_that_of_its_rows(told):
    """By groups of rows it is what the variance of the rows' own differences gives."""
    from hpo.runner.beside import _Measuring

    class Share(Some):
        def metrics(self):
            return {"accuracy": BinaryAccuracy()}

    plan, _, _ = told([(0.05, 0.9, 2)])
    plan = plan.__class__(**{**vars(plan), "given": Share(), "metric": "accuracy", "maximize": True})
    g = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, (2000,), generator=g)
    ours, theirs = (((torch.rand(2000, generator=g) < p).long() == 1) for p in (0.9, 0.85))
    outputs = [torch.where(right, targets, 1 - targets).float() for right in (ours, theirs)]
    batches = type("Rows", (), {"targets": targets})
    found = _Measuring(plan, {"loss": "mse"}, Split(inputs={"x": targets}, targets=targets), batches, nn.Identity())
    found._slow = False
    difference = found._difference(*outputs)
    row = ours.float() - theirs.float()
    assert difference.by == pytest.approx(float(row.mean()), abs=1e-6)
    width = 2 * 2.09 * float(row.std()) / 2000**0.5
    assert difference.interval.high - difference.interval.low == pytest.approx(width, rel=0.4)
