"""A trial's learning curves: stored with it however it ends, plain JSON, read without MLflow, also of older trials."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import RDBStorage
from sqlalchemy.exc import DataError

from hpo.errors import HpoError, StorageError
from hpo.runner.prepare import prepare
from hpo.search.curves import curves_of, from_json, to_json
from hpo.search.opening import open_search
from tests.cli import invoke
from tests.searches import Opener, stored

ALL = {"train_loss", "valid_loss", "valid_r2"}


def view_of(path):
    """Return the study of a study file as a report would see it."""
    plan = prepare(path)
    search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize, make=False)
    try:
        return search.view()
    finally:
        search.close()


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), st.lists(st.floats())))
def test_curves_survive_plain_json(curves):
    text = json.dumps(to_json(curves), allow_nan=False)
    back = from_json(json.loads(text))
    assert {name: list(map(repr, values)) for name, values in back.items()} == {
        name: list(map(repr, values)) for name, values in curves.items()
    }


def test_an_epoch_that_did_not_report_a_metric_has_nan_there():
    curves = curves_of([{"a": 1}, {"a": 2, "b": 3.5}, {"b": 4.5}])
    assert curves["a"][:2] == [1.0, 2.0]
    assert curves["b"][1:] == [3.5, 4.5]
    assert math.isnan(curves["a"][2])
    assert math.isnan(curves["b"][0])


@pytest.mark.parametrize("stack", [1, 3])
def test_each_trial_has_all_metrics_of_all_epochs_and_needs_no_mlflow(study, stack):
    path = study(f"trials: 3\nepochs: 4\npruner: none\nstack: {stack}\n")
    invoke("run", path)
    seen = view_of(path)
    for trial in seen.complete:
        curves = seen.curves(trial.number)
        assert set(curves) == ALL
        assert {len(values) for values in curves.values()} == {4}
        assert curves["valid_r2"] == list(trial.intermediate_values.values())
        assert {name: values[trial.user_attrs["best_epoch"]] for name, values in curves.items()} == (
            trial.user_attrs["metrics"]
        )


def test_a_pruned_trial_has_the_epochs_that_it_was_trained(study):
    path = study("stack: 1\ntrials: 2\nepochs: 4\npruner:\n  name: threshold\n  lower: 2.0\n  n_warmup_steps: 1\n")
    with pytest.raises(HpoError, match="no complete trial to choose from: 2 pruned"):
        invoke("run", path)
    seen = view_of(path)
    assert seen.counts.pruned == 2
    assert {len(values) for values in seen.curves(0).values()} == {2}
    assert set(seen.curves(0)) == ALL


def test_a_trial_that_failed_by_nan_says_so_in_its_curves(study):
    path = study("stack: 1\ntrials: 1\nepochs: 4\nparams:\n  kind: nan\n")
    with pytest.raises(HpoError, match="train_loss became nan"):
        invoke("run", path)
    seen = view_of(path)
    assert seen.counts.failed == 1
    assert set(seen.curves(0)) == ALL
    assert math.isnan(seen.curves(0)["train_loss"][-1])


def test_a_trial_that_resumes_from_a_checkpoint_has_the_epochs_before_it(study, monkeypatch):
    from hpo.runner import worker

    path = study("trials: 1\nepochs: 6\nstack: 1\ncheckpoint_every: 0.001s\n")
    asked = worker._Worker._report
    epochs = []

    def interrupted_after_three(self, stack, results):
        epochs.extend(results.values())
        if len(epochs) == 4:
            raise RuntimeError("a bug")
        return asked(self, stack, results)

    monkeypatch.setattr(worker._Worker, "_report", interrupted_after_three)
    with pytest.raises(RuntimeError, match="a bug"):
        invoke("run", path)
    monkeypatch.setattr(worker._Worker, "_report", asked)
    assert "resumes after epoch 3" in invoke("run", path)
    seen = view_of(path)
    (trial,) = seen.complete
    curves = seen.curves(trial.number)
    assert {len(values) for values in curves.values()} == {6}
    assert curves["train_loss"][:3] == [metrics["train_loss"] for metrics in epochs[:3]]


@pytest.fixture
def opened(tmp_path):
    opener = Opener(tmp_path)
    yield opener
    opener.close()


def test_of_an_older_or_running_trial_the_studys_metric_is_known(opened):
    search = opened()
    number = search.ask().number
    assert search.view().curves(number) == {}
    for epoch, value in enumerate((0.5, 0.75)):
        search.report(number, epoch, value)
    assert search.view().curves(number) == {"valid_accuracy": [0.5, 0.75]}
    with pytest.raises(KeyError):
        search.view().curves(99)


@pytest.mark.parametrize("wrong", [1, [1.0], {"a": 1}, {"a": ["x"]}, {"a": [True]}, {"a": [None]}, {"a": {"b": 1}}])
def test_what_is_stored_as_curves_and_is_none_is_refused_where_it_is_read(opened, wrong):
    search = opened()
    number = search.ask().number
    search.storage.set_trial_user_attr(stored(search, number)._trial_id, "curves", wrong)
    search.complete(number, 1.0)
    seen = search.view()
    assert seen.best().number == number
    with pytest.raises(StorageError, match=r"trial 0 of study 's' .*: its curves: .*; hpo did not write that"):
        seen.curves(number)


def test_a_storage_that_takes_no_such_text_costs_the_curves_and_not_the_trial(study, monkeypatch):
    from hpo.search import retrying

    write_to_database, set_trial_user_attr = retrying.write_to_database, RDBStorage.set_trial_user_attr

    def refuse(storage, batch):
        if any(key == "curves" for _, key in batch.user_attrs):
            raise DataError("insert", {}, ValueError("too long"))
        return write_to_database(storage, batch)

    def refuse_one(self, trial_id, key, value):
        if key == "curves":
            raise DataError("insert", {}, ValueError("too long"))
        set_trial_user_attr(self, trial_id, key, value)

    monkeypatch.setattr(retrying, "write_to_database", refuse)
    monkeypatch.setattr(RDBStorage, "set_trial_user_attr", refuse_one)
    done = invoke("run", study("stack: 1\ntrials: 1\nepochs: 2\n"))
    assert "curves of the trial with the id 1 is not stored: too long" in done
    seen = view_of(Path("study.yaml"))
    assert seen.counts.complete == 1
    assert set(seen.curves(0)) == {"valid_r2"}
