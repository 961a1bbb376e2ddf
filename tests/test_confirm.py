"""The best configurations trained again with fresh seeds: chosen by mean, stored as they come, said everywhere."""

import json
from pathlib import Path

import pytest
import torch

import hpo
from hpo.errors import HpoError, Interrupted, SpecError
from hpo.report.texts import as_markdown
from hpo.runner import again
from hpo.runner import confirm as confirming
from hpo.runner.outcome import outcome
from hpo.runner.prepare import prepare, prepare_values
from hpo.runner.refit import conclude
from hpo.search.confirmed import chosen, confirmation, confirmed_in, results_in, sentences
from hpo.search.retrained import Result
from hpo.seeds import derive
from hpo.tracking.base import MemoryTracker
from hpo.training.batches import make_batches
from hpo.training.loop import train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack
from tests.cli import invoke, refused, summary
from tests.databases import MLFLOW, rows
from tests.logged import recorded
from tests.searches import Told
from tests.test_own import OWN

TEXT = "epochs: 3\npruner: none\nstack: 1\n"


@pytest.fixture
def told(study):
    """Return a function that tells trials (learning rate, value); it gives plan, data and search of that study."""
    told = Told()

    def make(trials, confirm="{top: 2, seeds: 2}", text=TEXT):
        rates = ", ".join(f"{{learning_rate: {rate}}}" for rate, _ in trials)
        path = study(f"{text}confirm: {confirm}\ntrials: {len(trials)}\nstart_with: [{rates}]\n")
        return told(path, lambda claim: (dict(trials)[claim.params["learning_rate"]], 0))

    yield make
    told.close()


def end(plan, data, search, stopping=lambda: False):
    return conclude(plan, data, search, MemoryTracker(), stopping)


@pytest.fixture
def trained(monkeypatch):
    """Return the list of (trial, seed) of the members that are trained again."""
    seen = []
    plain = confirming._Run._note

    def note(self, results):
        seen.extend((self.top[key].number, self.run) for key in results)
        plain(self, results)

    monkeypatch.setattr(confirming._Run, "_note", note)
    return seen


LUCKY = [(0.001, 0.99), (0.05, 0.9), (0.09, 0.8)]
"""The first was lucky: with so low a rate it learns next to nothing in three epochs."""


def test_the_best_mean_wins_not_the_luckiest(told, trained):
    plan, data, search = told(LUCKY)
    done = end(plan, data, search)
    assert search.best().number == 0
    assert done.number == 1
    assert sorted(trained) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = confirmation(search, search.view())
    assert [each.number for each in found.configurations] == [1, 0]
    assert found.search_best.number == 0
    assert found.optimism == pytest.approx(0.99 - found.configurations[1].mean)
    assert chosen(search, search.view()).number == 1
    assert outcome(search, chosen(search, search.view())) == done
    assert [entry["number"] for entry in search.attrs["hpo:test_evaluations"]] == [1]
    again = end(plan, data, search)
    assert again == done
    assert len(trained) == 4
    assert len(search.view().everything) == 3  # the budget is untouched


def alone(plan, data, rate, run):
    """Return the curve of a member that nobody but itself is trained with."""
    batches = [
        make_batches(split, plan.objective.preprocess(data.train), plan.device) for split in (data.train, data.valid)
    ]
    params = plan.space.fixed | {"learning_rate": rate}
    member = Member(number=0, seed=derive(plan.spec.seed, "confirm", run), params=params)
    queue = [member]
    train(
        SingleStack(LoopStack(plan.task(data.info, len(data.train)))),
        *batches,
        epochs=plan.spec.epochs,
        seed=derive(plan.spec.seed, "confirm order", run),
        ask=lambda n: [queue.pop()] if queue else [],
        report=lambda stack, results: list(results),
    )
    return [metrics["valid_r2"] for metrics in member.history]


@pytest.mark.parametrize("stack", [1, 4])
def test_each_is_trained_as_it_would_be_alone_from_a_seed_that_no_trial_has(told, stack):
    plan, data, search = told(LUCKY, text=TEXT.replace("stack: 1", f"stack: {stack}"))
    end(plan, data, search)
    found = confirmation(search, search.view())
    for each in found.configurations:
        for run, result in enumerate(each.results):
            curve = alone(plan, data, LUCKY[each.number][0], run)
            assert result.value == pytest.approx(max(curve), abs=1e-5)
            assert result.epoch == curve.index(max(curve))
    seeds = {derive(plan.spec.seed, "confirm", run) for run in range(2)}
    assert not seeds & {search.view().seed_of(n) for n in range(3)}


def test_equal_configurations_count_once_and_the_budget_of_top_goes_to_others(told, trained):
    plan, data, search = told([(0.05, 0.9), (0.05, 0.9), (0.09, 0.8)])
    end(plan, data, search)
    assert {number for number, _ in trained} == {0, 2}


def test_what_was_trained_before_an_interruption_is_not_trained_twice(told, trained):
    plan, data, search = told(LUCKY)
    with pytest.raises(Interrupted, match="each seed that was done is stored, run the same command again to resume"):
        end(plan, data, search, stopping=lambda: len(trained) >= 3)
    assert len(trained) == 3
    assert search.attrs.get("hpo:test_evaluations") is None
    assert chosen(search, search.view()) is None
    assert "confirming: 3 of 4 trainings done" in invoke("status", "study.yaml")
    with recorded() as said:
        end(plan, data, search)
    assert len(trained) == 4
    assert len(set(trained)) == 4
    resumed = confirmation(search, search.view()).configurations
    for each in resumed:
        for run, result in enumerate(each.results):  # as without an interruption
            assert result.value == pytest.approx(max(alone(plan, data, LUCKY[each.number][0], run)), abs=1e-5)
    assert "  3 of 4 trainings were done before" in said
    assert "confirming:" not in invoke("status", "study.yaml")


def test_more_trials_keep_what_is_still_among_the_best(told, trained):
    told(LUCKY[1:])
    plan, data, search = told(LUCKY[1:])
    end(plan, data, search)
    before = results_in(search.attrs["hpo:confirmed"], search.attrs["hpo:confirmed"]["top"][0])
    trained.clear()
    plan, data, search = told([*LUCKY[1:], (0.07, 0.95)])
    assert chosen(search, search.view()) is None
    end(plan, data, search)
    assert sorted(trained) == [(2, 0), (2, 1)]
    stored = search.attrs["hpo:confirmed"]
    assert results_in(stored, stored["top"][1]) == before


def test_more_seeds_are_added_to_those_there_are(told, trained):
    end(*told(LUCKY))
    trained.clear()
    end(*told(LUCKY, "{top: 2, seeds: 3}"))
    assert sorted(trained) == [(0, 2), (1, 2)]


def test_of_several_that_come_to_the_end_one_confirms(told, trained):
    from concurrent.futures import ThreadPoolExecutor

    plan, data, search = told(LUCKY)
    _, _, other = told(LUCKY)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda each: end(plan, data, each), (search, other))
    assert first == second
    assert len(trained) == 4


def test_one_that_fails_with_a_fresh_seed_loses(told):
    plan, data, search = told(LUCKY)
    plain, seen = plan.objective.build, []

    def build(params, info):
        network = plain(params, info)
        seen.append(params["learning_rate"])
        if params["learning_rate"] == 0.05 and seen.count(0.05) == 2:  # of the one that would win, the second seed
            network.weight.data.fill_(float("nan"))
        return network

    plan.objective.build = build
    assert end(plan, data, search).number == 0
    found = confirmation(search, search.view())
    assert found.configurations[1].n_failed == 1
    assert found.chances == [1.0, 0.0]
    assert sentences(found, "r2")[-1] == "Of trial 1, 1 of 2 trainings failed."


def test_where_all_fail_the_study_says_so_and_reads_no_test(told):
    plan, data, search = told(LUCKY)
    plain = plan.objective.build

    def build(params, info):
        network = plain(params, info)
        network.weight.data.fill_(float("nan"))
        return network

    plan.objective.build = build
    message = "none of the 2 best configurations could be trained again: train_loss became nan in epoch 1"
    with pytest.raises(HpoError, match=message):
        end(plan, data, search)
    assert search.attrs.get("hpo:test_evaluations") is None


def given_rows(plan, monkeypatch):
    """Return the list of the train splits that `preprocess` was fitted on, as sets of rows."""
    seen = []
    plain = plan.objective.preprocess

    def preprocess(train):
        seen.append({tuple(row.tolist()) for row in train.inputs["features"]})
        return plain(train)

    monkeypatch.setattr(plan.objective, "preprocess", preprocess)
    return seen


def test_resplit_fits_preprocess_and_trains_all_on_another_split_for_each_seed(told, trained, monkeypatch):
    plan, data, search = told(LUCKY, "{top: 2, seeds: 3, resplit: true}")
    seen = given_rows(plan, monkeypatch)
    end(plan, data, search)
    assert trained == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    splits, refit = seen[:3], seen[3]
    assert all(len(rows) == 200 and rows < refit for rows in splits)
    assert len({frozenset(rows) for rows in splits}) == 3
    found = confirmation(search, search.view())
    assert found.overlap == pytest.approx(50 / 200)
    assert "each with a validation split of its own" in sentences(found, "r2")[0]


def test_folds_train_each_fold_for_each_seed(told, trained, monkeypatch):
    plan, data, search = told(LUCKY, "{top: 2, seeds: 1, folds: 5}")
    seen = given_rows(plan, monkeypatch)
    end(plan, data, search)
    assert len(trained) == 10
    assert [len(rows) for rows in seen] == [200] * 5 + [250]
    assert set.intersection(*seen[:5]) == set()
    found = confirmation(search, search.view())
    assert found.overlap == pytest.approx(1 / 4)
    assert "1 fresh seed, 5 folds each" in sentences(found, "r2")[0]


def test_results_of_other_splits_are_others(told, trained):
    end(*told(LUCKY))
    trained.clear()
    plan, data, search = told(LUCKY, "{top: 2, seeds: 2, resplit: true}")
    assert chosen(search, search.view()) is None
    end(plan, data, search)
    assert len(trained) == 4


RULES = [
    ("best", None, [0.1, 0.5, 0.5, 0.2, 0.3], Result(value=0.5, epoch=1)),
    ("last", None, [0.1, 0.5, 0.5, 0.2, 0.3], Result(value=0.3, epoch=4)),
    ("best", 2, [0.1, 0.5, 0.5, 0.2], Result(value=0.5, epoch=1)),
    ("last", 2, [0.1, 0.5, 0.5, 0.2], Result(value=0.2, epoch=3)),
    ("best", 3, [0.1, 0.5, 0.5, 0.2], None),
    ("best", None, [0.1, 0.2, 0.3, 0.4], None),
    ("best", None, [0.1, float("nan")], Result(fault="valid_r2 became nan in epoch 2", epoch=1)),
]


@pytest.mark.parametrize(("value", "patience", "curve", "expected"), RULES)
def test_a_training_ends_by_the_studys_own_rules(study, value, patience, curve, expected):
    plan = prepare(study(f"epochs: 5\nvalue: {value}\n" + (f"patience: {patience}\n" if patience else "")))
    history = [{"train_loss": 1.0, "valid_loss": 1.0, "valid_r2": x} for x in curve]
    member = Member(number=0, seed=0, params={}, epoch=len(curve), history=history)
    assert confirming.result_of(plan, member) == expected


def test_an_objective_that_trains_itself_is_confirmed_too(study, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    path = study(f"{TEXT}objective: own.py\nconfirm: {{top: 2, seeds: 2}}\npatience: 1\n")
    found = summary(invoke("run", path, "--json"))["confirmed"]
    assert [len(each["values"]) for each in found["configurations"]] == [2, 2]


def test_the_whole_is_said_by_each_command_the_report_python_mlflow_and_the_bundle(study):
    path = study(f"{TEXT}confirm: {{top: 2, seeds: 3}}\ntracking: sqlite:///{MLFLOW}\n")
    printed = invoke("run", path, "--json")
    found = summary(printed)["confirmed"]
    assert found["how"] == {"top": 2, "seeds": 3, "resplit": False, "folds": None}
    assert "standard deviation" in printed
    assert "95% interval of the mean" in printed
    said = hpo.open_study(path).confirmed
    params = found.pop("params")
    assert said.as_dict() == found
    assert params["learning_rate"] == hpo.open_study(path).trials["params_learning_rate"][found["number"]]
    lines = sentences(said, "r2")
    status = invoke("status", path).splitlines()
    assert set(lines) <= set(status)
    assert summary(invoke("status", path, "--json"))["confirmed"] == found | {"params": params}
    about = json.loads(Path("mlruns/bundles/study/bundle.json").read_text())
    assert about["confirmed"] == found | {"said": lines}
    card = Path("mlruns/bundles/study/MODEL.md").read_text()
    assert all(f"- {line}" in card for line in lines)
    invoke("report", path, "--format", "md", "--out", "r.md")
    report = Path("r.md").read_text()
    assert "## How sure" in report
    assert "95% interval" in report
    assert f"| {found['number']} |" in report
    invoke("report", path, "--format", "json", "--out", "r.json")
    assert json.loads(Path("r.json").read_text())["confirmed"] == found | {"params": params, "said": lines}
    invoke("report", path, "--out", "r.html")
    assert "chance of best" in Path("r.html").read_text()
    metrics = {
        key: value for key, value in rows("SELECT key, value FROM metrics WHERE key LIKE 'confirmed_%'", file=MLFLOW)
    }
    assert metrics["confirmed_mean"] == pytest.approx(found["mean"])
    assert metrics.keys() == {
        f"confirmed_{name}" for name in ("mean", "std", "low", "high", "chance_of_best", "optimism")
    }


def test_a_study_that_confirms_nothing_stores_and_says_nothing(study):
    path = study(TEXT)
    assert summary(invoke("run", path, "--json"))["confirmed"] is None
    assert hpo.open_study(path).confirmed is None
    assert "confirmed" not in json.loads(Path("mlruns/bundles/study/bundle.json").read_text())


def test_an_export_shows_the_trial_that_was_confirmed(study):
    path = study(f"{TEXT}confirm: {{top: 3, seeds: 2}}\n")
    ended = summary(invoke("run", path, "--json"))
    printed = invoke("export", path, "--out", "again", "--json")
    found = summary(printed)
    number = ended["confirmed"]["number"]
    assert found["confirmed"]["number"] == found["exported"]["number"] == number
    assert json.loads(Path("again/bundle.json").read_text())["trial"] == number
    other = next(n for n in (0, 1, 2) if n != number)
    found = summary(invoke("export", path, "--trial", other, "--out", "other", "--json"))
    assert found["exported"]["number"] == other
    assert found["confirmed"] is None


def test_what_other_code_has_confirmed_counts_no_more(study):
    path = study(f"{TEXT}confirm: {{top: 2, seeds: 2}}\n")
    before = summary(invoke("run", path, "--json"))["confirmed"]
    file = Path("linear.py")
    file.write_text(file.read_text().replace("F.mse_loss(outputs, targets)", "F.mse_loss(outputs * 0.9, targets)"))
    printed = invoke("run", study(f"{TEXT}confirm: {{top: 2, seeds: 3}}\n"), "--json")
    assert "is confirmed again: its seeds were trained by the former code" in " ".join(printed.split())
    after = summary(printed)["confirmed"]
    assert all(
        set(a["values"]).isdisjoint(b["values"]) for a in after["configurations"] for b in before["configurations"]
    )


def test_a_study_that_is_done_is_confirmed_once_the_file_asks_for_it(study):
    invoke("run", study(TEXT))
    found = summary(invoke("run", study(f"{TEXT}confirm: true\n"), "--json"))["confirmed"]
    assert len(found["configurations"]) == 3
    assert found["how"]["seeds"] == 5


@pytest.mark.parametrize(
    ("confirm", "message"),
    [
        ("{seeds: 0}", "confirm.seeds: must be greater than or equal to 1, but got 0"),
        ("{seeds: 1}", "confirm: seeds must be at least 2, but got 1: one result says nothing of how much they differ"),
        ("{top: 0}", "confirm.top: must be greater than or equal to 1, but got 0"),
        ("{top: 4}", "confirm.top: must be at most 3, the number of trials, but got 4"),
        ("{folds: 1}", "confirm.folds: must be greater than or equal to 2, but got 1"),
        (
            "{folds: 3, resplit: true}",
            "confirm: resplit and folds exclude each other; drop one, but got both (folds: 3)",
        ),
        ("7", "confirm: must be true, false or a mapping of top, seeds, resplit, folds, but got 7"),
        ("{folds: 251}", "confirm.folds: must be at most 250, the rows of train and validation, but got 251"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_trial(study, confirm, message):
    path = study(f"confirm: {confirm}\n")
    assert message in refused("check", path)
    assert message in refused("run", path)


def test_a_function_cannot_be_confirmed():
    values = {"objective": "x", "confirm": True}
    with pytest.raises(SpecError, match="confirm: a function's seeds are its own, so it cannot be trained with fresh"):
        prepare_values("study", values, {}, lambda trial: 0.0)


@pytest.mark.parametrize(
    "stored",
    [
        None,
        3,
        {"top": ["a"]},
        {"top": ["a"], "how": {"top": 1, "seeds": 2}, "overlap": 0, "configurations": {"a": {"number": 0, "value": 1}}},
        {
            "top": ["a"],
            "how": {"top": 1, "seeds": 2},
            "overlap": 0,
            "configurations": {
                "a": {"number": 0, "value": 1, "results": {"0": [float("inf"), 0], "1": "x", "z": [1, 2]}}
            },
        },
    ],
)
def test_what_others_wrote_into_the_storage_is_no_confirmation(stored):
    assert confirmed_in(stored, maximize=True) is None


def test_a_second_reading_of_the_test_split_is_shown(study):
    path = study(TEXT)
    first = invoke("run", path, "--json")
    assert summary(first)["test_evaluations"] == 1
    assert "was read" not in first
    printed = invoke("export", path, "--trial", "0", "--formats", "torchscript", "--json")
    said = "the test split was read 2 times: the more often, the less it says"
    assert said in " ".join(printed.split())
    assert summary(printed)["test_evaluations"] == 2
    assert said in invoke("status", path)
    assert summary(invoke("status", path, "--json"))["test_evaluations"] == 2
    assert json.loads(Path("mlruns/bundles/study-trial-0/bundle.json").read_text())["n_test_evaluations"] == 2
    invoke("report", path, "--format", "md", "--out", "r.md")
    assert "The test set was read 2 times" in Path("r.md").read_text()


def test_where_no_seed_changes_anything_that_is_said(study, tmp_path):
    (tmp_path / "own.py").write_text(OWN.replace("report.seed % 2**32", "0"))
    path = study(f"{TEXT}objective: own.py\nconfirm: {{top: 2, seeds: 2}}\n")
    assert "No seed has changed any result" in " ".join(invoke("run", path).split())


def test_the_report_leads_with_what_was_confirmed_and_its_params(told):
    plan, data, search = told(LUCKY)
    end(plan, data, search)
    study = hpo.open_study("study", plan.spec.storage)
    facts = study._facts()
    assert (facts.best.number, facts.confirmed["number"]) == (0, 1)
    assert facts.confirmed["params"]["learning_rate"] == 0.05
    text = as_markdown(facts)
    assert f"Confirmed with fresh seeds: r2 **{facts.confirmed['mean']:.6g}**, trial 1" in text
    assert "which is not the best trial now" not in text
    search.remember("hpo:result", {**search.attrs["hpo:result"], "number": 0})
    assert "which is not the best trial now" in as_markdown(study._facts())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_where_a_stack_has_no_memory_smaller_ones_are_trained(told, trained, monkeypatch, said, error):
    plan, data, search = told(LUCKY, text=TEXT.replace("stack: 1", "stack: 4"))
    plain, raised = again.train, []

    def once(*args, **keys):
        if not raised:
            raised.append(True)
            raise error
        plain(*args, **keys)

    monkeypatch.setattr(again, "train", once)
    end(plan, data, search)
    assert sorted(trained) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert any(line.startswith("training in a stack failed") for line in said)
    for each in confirmation(search, search.view()).configurations:
        curve = alone(plan, data, LUCKY[each.number][0], 0)
        assert each.results[0].value == pytest.approx(max(curve), abs=1e-5)


def test_the_default_configuration_has_the_same_seeds_where_it_is_none_of_the_best(told, trained):
    plan, data, search = told([(0.001, 0.1), (0.05, 0.9), (0.09, 0.8)])
    end(plan, data, search)
    assert sorted(trained) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    found = confirmation(search, search.view())
    assert [each.number for each in found.configurations] == [2, 1]
    assert found.default.number == 0
    assert [each.value for each in found.default.results] == [
        pytest.approx(max(alone(plan, data, 0.001, run)), abs=1e-5) for run in range(2)
    ]
    gains = [a - b for a, b in zip(found.winner.values, found.default.values, strict=True)]
    assert found.gain.by == pytest.approx(sum(gains) / 2)
    assert found.gain.interval.low < found.gain.by < found.gain.interval.high
    assert "The default configuration comes to a mean r2 of" in " ".join(sentences(found, "r2"))
    assert confirmed_in(search.attrs["hpo:confirmed"], maximize=True).as_dict() == found.as_dict()
    trained.clear()
    end(plan, data, search)
    assert not trained


def test_a_default_configuration_that_is_no_trial_is_confirmed_too_and_never_chosen(study):
    path = study(
        f"{TEXT}confirm: {{top: 1, seeds: 2}}\nparams: {{learning_rate: {{type: float, low: 1e-5, high: 1e-4}}}}\n"
    )
    done = summary(invoke("run", path, "--json"))
    found = done["confirmed"]
    assert [each["number"] for each in found["configurations"]] == [found["number"]]
    assert found["default"]["number"] is None
    assert len(found["default"]["values"]) == 2
    assert found["default"]["gain"]["by"] < 0  # its rate is 0.05, from which the search was kept
    assert done["baselines"]["default"]["trial"] is None
    assert "default configuration" in " ".join(hpo.open_study(path).baselines.sentences())


def test_a_default_configuration_that_wins_says_that_the_search_gained_nothing(told):
    plan, data, search = told([(0.09, 0.9), (0.001, 0.8)])
    end(plan, data, search)
    found = confirmation(search, search.view())
    assert found.is_default
    assert found.gain is None
    assert "It is the default configuration: the search gained nothing over that." in sentences(found, "r2")
    assert found.as_dict()["default"]["gain"] is None


def test_without_baselines_only_the_best_are_trained_again(told, trained):
    plan, data, search = told([(0.001, 0.1), (0.05, 0.9), (0.09, 0.8)], text=f"{TEXT}baseline: false\n")
    end(plan, data, search)
    assert {number for number, _ in trained} == {1, 2}
    found = confirmation(search, search.view())
    assert found.default is None
    assert found.as_dict()["default"] is None
    assert "default" not in search.attrs["hpo:confirmed"]


@pytest.mark.parametrize(
    "default", ["no such", {"a": 1}, *(pytest.param(each, marks=pytest.mark.slow) for each in (None, 1, []))]
)
def test_what_others_wrote_of_the_default_configuration_is_left_out(told, default):
    plan, data, search = told(LUCKY)
    end(plan, data, search)
    stored = {**search.attrs["hpo:confirmed"], "default": default}
    assert confirmed_in(stored, maximize=True).default is None
