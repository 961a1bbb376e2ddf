"""The best trial looked at on validation, and scikit-learn's models beside it (`hpo.runner.judging`)."""

import textwrap

import pytest
import torch

from hpo.runner import judging
from hpo.runner.judging import judge
from hpo.search.opening import open_stored
from hpo.study.data import Split
from hpo.study.draft import read
from tests.cli import invoke

CLASSES = '''
"""Three kinds of points; the targets as `KIND` has them."""

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from hpo.study.data import Data, Split
from hpo.study.objective import Objective

KIND = "three"


class Points(Objective):
    defaults = {"learning_rate": 0.05, "batch_size": 50}
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True}}

    def data(self):
        x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] > 0).long() if KIND == "two" else x[:, :3].argmax(1)
        if KIND == "two":
            y = y.float()[:, None]
        if KIND == "images":
            x = x.reshape(300, 1, 2, 2)
        parts = [slice(0, 200), slice(200, 250), slice(250, 300)]
        train, valid, test = (Split(inputs={"features": x[p]}, targets=y[p]) for p in parts)
        test = Split(inputs=test.inputs, targets=test.targets)
        return Data(train=train, valid=valid, test=test, class_names=("a", "b") if KIND == "two" else ("a", "b", "c"))

    def build(self, params, info):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 1 if KIND == "two" else 3))

    def loss(self, outputs, targets, params):
        if KIND == "two":
            return F.binary_cross_entropy_with_logits(outputs, targets)
        return F.cross_entropy(outputs, targets)

    def metrics(self):
        return {"accuracy": BinaryAccuracy() if KIND == "two" else MulticlassAccuracy(3, average="micro")}
'''


@pytest.fixture
def judged(study):
    """Return a function that runs a study of the objective with that text, and judges its best trial."""

    def run(text="", then="", baselines=None, **replaced):
        path = study(f"objective: points.py\n{textwrap.dedent(text)}")
        code = CLASSES
        for old, new in replaced.items():
            code = code.replace({"kind": '"three"'}[old], new)
        (path.parent / "points.py").write_text(code)
        invoke("run", path)
        if then:
            (path.parent / "points.py").write_text(code.replace(*then))
        search = open_stored(read(path).spec)
        try:
            return judge(path, {}, search, search.view(), baselines), search.view().best()
        finally:
            search.close()

    return run


@pytest.mark.parametrize("kind", ["three", "two"])
def test_the_confusion_is_that_of_the_weights_that_were_kept(judged, kind):
    found, best = judged(kind=f'"{kind}"')
    counts = torch.tensor(found["confusion"]["counts"])
    assert counts.sum() == 50 == found["n_valid"]
    assert found["confusion"]["classes"] == ["a", "b", "c"][: len(counts)]
    assert counts.diagonal().sum() / 50 == pytest.approx(best.value, abs=1e-6)
    assert found["measured"]["accuracy"] == pytest.approx(best.value, abs=1e-6)
    majority, linear, boosting = found["baselines"]["rows"]
    assert majority["name"] == "majority class"
    assert majority["value"] < linear["value"]
    assert "HistGradientBoosting" in boosting["name"]
    assert linear["name"] == "logistic regression"
    assert 0.9 < linear["value"] <= 1.0
    assert 0.7 < boosting["value"] <= 1.0
    assert found["notes"] == []


def test_a_class_that_the_network_never_predicts_has_its_column(judged):
    found, _ = judged("epochs: 1\ntrials: 1\nparams: {learning_rate: 1.0e-9}")
    assert [len(row) for row in found["confusion"]["counts"]] == [3, 3, 3]


def test_of_images_there_are_no_baselines(judged):
    found, best = judged(kind='"images"')
    assert found["baselines"] == {"absent": "they need a table: numbers or categories, a row for each example"}
    assert found["measured"]["accuracy"] == pytest.approx(best.value, abs=1e-6)


def test_many_rows_have_baselines_only_when_asked_for(judged, monkeypatch):
    monkeypatch.setattr(judging, "MOST_ROWS", 100)
    assert judged()[0]["baselines"]["absent"].startswith("there are more than 100 rows to train on; --baselines")
    assert judged(baselines=True)[0]["baselines"]["rows"]
    assert judged(baselines=False)[0]["baselines"] == {"absent": "they were not asked for (--no-baselines)"}


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (("manual_seed(0)", "manual_seed(1)"), "the data is not what the study was run with"),
        (('{"accuracy"', '{"exactness"'), "the objective's metric is exactness by now"),
        (("def data(self):", "def data(self):\n        raise SystemExit(7)"), "data failed: SystemExit: 7"),
        (("class Points", "class Points("), "points.py cannot be imported"),
    ],
    ids=["data", "metric", "exit", "syntax"],
)
def test_what_has_changed_is_said_in_one_line(judged, then, said):
    found, _ = judged(then=then)
    assert said in found["absent"]
    assert "\n" not in found["absent"]


def test_other_networks_have_no_weights_but_baselines(judged):
    found, _ = judged(then=("nn.Linear(4, 1 if", "nn.ReLU(), nn.Linear(4, 1 if"))
    assert "does not fit the network" in found["weights"]
    assert "confusion" not in found
    assert found["baselines"]["rows"]
    assert found["notes"] == ["The code of the objective has changed since the study was run."]


def test_the_test_split_is_never_looked_at(judged, monkeypatch):
    seen = []

    def recorded(call):
        def record(*given, **keys):
            (split,) = (each for each in given if isinstance(each, Split))
            seen.append(split.inputs["features"])
            return call(*given, **keys)

        return record

    for name in ("make_batches", "taken", "fit_baselines"):
        monkeypatch.setattr(judging, name, recorded(getattr(judging, name)))
    found, _ = judged()
    assert found["measured"]
    assert found["baselines"]["rows"]
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert [len(each) for each in seen] == [50, 50, 200]
    assert torch.equal(seen[0], x[200:250])
    assert torch.equal(seen[1], x[200:250])
    assert torch.equal(seen[2], x[:200])
