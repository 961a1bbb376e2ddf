"""What MLflow will not take, over SQLite and over HTTP: names are made legal, the rest is set aside, nothing blocks."""

import json
import math
from functools import partial
from pathlib import Path

import pytest

from hpo.processes import this_process
from tests.mlflows import Mlflow, TrackerHere, by_default_in_sqlite, quietly, until

ILLEGAL = [
    "r2@5",
    "k[0]",
    "",
    ".",
    "..",
    "../x",
    "/a",
    "a/",
    "a//b",
    "a\\b",
    "a\nb",
    "a\n",
    "x" * 300,
    "\ud800",
    "r2#5",
]


def test_illegal_names_are_made_legal_stay_distinct_and_are_said_once(mlflow: Mlflow, said: list[str]) -> None:
    tracker = mlflow.tracker()
    tracker.start_study({}, {})
    tracker.start_trial(0, dict.fromkeys([*ILLEGAL, "plain"], "v"))
    for epoch in range(2):
        tracker.log_metrics(0, epoch, {name: float(place) for place, name in enumerate([*ILLEGAL, "valid_r2"])})
    tracker.end_trial(0, "COMPLETE")
    tracker.end_study("COMPLETE")
    run = mlflow.runs()["0"]
    assert sorted(run.data.metrics.values()) == [float(place) for place in range(len(ILLEGAL) + 1)]
    assert len(run.data.params) == len(ILLEGAL) + 1
    assert {"valid_r2"} < set(run.data.metrics)
    assert sum(name.startswith("r2_5") for name in run.data.metrics) == 2
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED"}
    assert sum("'r2@5'" in text for text in said) == 1
    assert len(said) == len(ILLEGAL)
    assert not mlflow.unsent()
    assert not mlflow.refused()


LINES = {
    "a number": b"123",
    "an empty object": b"{}",
    "an unknown verb": b'{"do": "nope", "trial": null, "time": 1}',
    "a method's name": b'{"do": "close"}',
    "another method's name": b'{"do": "all", "trial": null, "time": 1}',
    "no trial": b'{"do": "end", "time": 1, "status": "FINISHED", "tags": {}}',
    "a trial that is text": b'{"do": "start", "trial": "0\' or \'", "time": 1}',
    "a verb that is a list": b'{"do": [], "trial": 0, "time": 1}',
    "rows that are none": b'{"do": "metrics", "trial": 0, "time": 1, "rows": 5}',
    "a row too short": b'{"do": "metrics", "trial": 0, "time": 1, "rows": [["a", 1]]}',
    "a value that is text": b'{"do": "metrics", "trial": 0, "time": 1, "rows": [["a", "x", 1, 0]]}',
    "a value that is none": b'{"do": "metrics", "trial": 0, "time": 1, "rows": [["a", null, 1, 0]]}',
    "a value beyond floats": b'{"do": "metrics", "trial": 0, "time": 1, "rows": [["a", 1' + b"0" * 400 + b", 1, 0]]}",
    "a step beyond a database's": b'{"do": "metrics", "trial": 0, "time": 1, "rows": [["a", 1.0, 1, %d]]}' % 2**63,
    "a number too long to read": b"1" * 5000,
    "too deep": b"[" * 100_000,
    "an unknown status": b'{"do": "end", "trial": 0, "time": 1, "status": "NOPE", "tags": {}}',
    "ends of no state": b'{"do": "reconcile", "trial": null, "time": 1, "ends": {"0": ["NOPE", null]}}',
    "a folder outside": b'{"do": "folder", "trial": null, "time": 1, "folder": ".", "name": "../x"}',
    "not UTF-8": b'{"do": "\xff\xfe"}',
    "torn in the middle": b'{"do": "met{"do": "start", "trial": 0, "time": 1}',
    "10 MB of nothing": b'"' + b"x" * 10_000_000 + b'"',
}


def leave(mlflow: Mlflow, *lines: bytes) -> Path:
    """Leave an outbox as a process of this machine does that was killed."""
    place, _, _ = this_process().rpartition("-")
    file = mlflow.outbox / mlflow.study / f"{place}-999999999.jsonl"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\n".join(lines) + b"\n")
    return file


def metrics(trial: int, *rows: list[object]) -> bytes:
    return json.dumps({"do": "metrics", "trial": trial, "time": 1, "rows": rows}).encode()


def test_lines_that_are_no_items_are_set_aside_and_the_rest_is_sent(mlflow: Mlflow, said: list[str]) -> None:
    left = leave(mlflow, metrics(0, ["a", 1.0, 1, 0]), *LINES.values(), metrics(0, ["a", 2.0, 1, 1]))
    tracker = mlflow.tracker()
    tracker.end_trial(0, "COMPLETE")
    tracker.end_study("COMPLETE")
    assert mlflow.curve("0", "a") == [(0, 1.0), (1, 2.0)]
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED"}
    assert not left.exists()
    assert not mlflow.unsent()
    assert len(mlflow.refused().splitlines()) == len(LINES)
    assert any("refused.jsonl" in text for text in said)
    assert len(said) <= 2


@by_default_in_sqlite
def test_a_line_that_a_kill_cut_short_is_left_out_without_a_word(mlflow: Mlflow) -> None:
    left = leave(mlflow, metrics(0, ["a", 1.0, 1, 0]))
    with left.open("ab") as file:
        file.write(b'{"do": "metrics", "tri')
    mlflow.tracker().end_study("COMPLETE")
    assert mlflow.curve("0", "a") == [(0, 1.0)]
    assert not mlflow.refused()


def test_of_a_batch_only_what_is_refused_is_set_aside(mlflow: Mlflow, said: list[str]) -> None:
    tracker = mlflow.tracker()
    tracker.start_study({}, {})
    tracker.start_trial(0, {"changed": 1, "same": 1}, is_new=True)
    tracker.log_params(0, {"same": 1, "changed": 2, "new": 3})
    tracker.log_metrics(0, 0, {"a": 1.0})
    tracker.end_trial(0, "COMPLETE")
    tracker.end_study("COMPLETE")
    assert mlflow.runs()["0"].data.params == {"changed": "1", "same": "1", "new": "3"}
    assert mlflow.curve("0", "a") == [(0, 1.0)]
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED"}
    (kept,) = map(json.loads, mlflow.refused().splitlines())
    assert kept["item"]["params"] == {"changed": "2"}
    assert "Changing param values is not allowed" in kept["why"]
    (text,) = said
    assert "refused" in text
    assert "refused.jsonl" in text
    assert "trial 0" in text


@pytest.mark.parametrize("times", [1, 2])
@by_default_in_sqlite
@pytest.mark.usefixtures("through_client")
def test_a_new_trial_whose_first_item_fails_has_one_run(
    mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, times: int, said: list[str]
) -> None:
    """Its run was made before the rest of the item failed: the next time it is looked for."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    plain, errors = MlflowClient.log_batch, [ConnectionError("cut"), MlflowException("no", INVALID_PARAMETER_VALUE)]

    def log_batch(self: MlflowClient, *arguments: object, **keys: object) -> None:
        if keys.get("params") and len(errors) > 2 - times:
            raise errors.pop()
        plain(self, *arguments, **keys)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    tracker = mlflow.tracker()
    tracker.start_study({}, {})
    with tracker.together():
        tracker.start_trial(0, {"lr": 1}, is_new=True)
        tracker.log_metrics(0, 0, {"a": 1.0})
        tracker.end_trial(0, "COMPLETE")
        tracker.log_metrics(None, 0, {"later": 1.0})
    until(lambda: len(errors) == 2 - times)
    assert tracker.end_study("COMPLETE")
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED"}
    assert mlflow.runs()["0"].data.params == {"lr": "1"}
    assert mlflow.curve("0", "a") == [(0, 1.0)]


@pytest.mark.parametrize(
    ("value", "kept"), [(math.nan, math.nan), (math.inf, 1.7976931348623157e308), (-math.inf, -1.7976931348623157e308)]
)
@by_default_in_sqlite
def test_values_that_are_no_numbers_are_taken_as_mlflow_takes_them(mlflow: Mlflow, value: float, kept: float) -> None:
    tracker = mlflow.tracker()
    tracker.log_metrics(0, 0, {"a": value})
    tracker.end_study("COMPLETE")
    ((step, got),) = mlflow.curve("0", "a")
    assert (step, got) == (0, kept) or (math.isnan(got) and math.isnan(kept))


@by_default_in_sqlite
def test_texts_of_any_length_and_kind_are_taken(mlflow: Mlflow) -> None:
    tracker = mlflow.tracker()
    tracker.start_study({"hpo.huge": "é" * 100_000, "hpo.empty": ""}, {})
    params = {"empty": "", "long": "v" * 100_000, "odd": "a\ud800b", **{f"p{i}": i for i in range(250)}}
    tracker.start_trial(0, params)
    tracker.end_trial(0, "FAIL", "x" * 100_000 + "\ud800")
    tracker.end_study("COMPLETE")
    run = mlflow.runs()["0"]
    assert len(run.data.params) == len(params)
    assert run.data.params["empty"] == ""
    assert run.data.params["long"] == "v" * 6000
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FAILED"}
    assert not mlflow.refused()


@pytest.mark.parametrize("again", [False, True], ids=["same tracker", "next tracker"])
def test_a_run_that_is_deleted_while_it_is_written_to_is_restored(mlflow: Mlflow, again: bool, said: list[str]) -> None:
    tracker = mlflow.tracker()
    tracker.start_study({}, {})
    tracker.start_trial(0, {"lr": 1})
    tracker.start_trial(1, {"lr": 2})
    until(lambda: tracker.run_of(1))
    with quietly():
        mlflow.client.delete_run(mlflow.runs()["0"].info.run_id)
    if again:
        tracker.close()
        tracker = mlflow.tracker()
    tracker.log_metrics(0, 0, {"a": 1.0})
    tracker.log_metrics(1, 0, {"a": 2.0})
    for trial in range(2):
        tracker.end_trial(trial, "COMPLETE")
    tracker.end_study("COMPLETE")
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED", "1": "FINISHED"}
    assert (mlflow.curve("0", "a"), mlflow.curve("1", "a")) == ([(0, 1.0)], [(0, 2.0)])
    assert [text for text in said if "restored" in text and "trial 0" in text]
    assert len(said) == 1


@by_default_in_sqlite
@pytest.mark.parametrize("again", [False, True], ids=["same tracker", "next tracker"])
def test_the_best_trials_run_is_restored_where_it_was_deleted(mlflow: Mlflow, again: bool, said: list[str]) -> None:
    """The study's description links to it."""
    tracker = mlflow.tracker()
    tracker.start_study({}, {})
    tracker.start_trial(0, {"lr": 1})
    tracker.end_trial(0, "COMPLETE")
    until(lambda: tracker.run_of(0))
    if again:
        tracker.close()
        tracker = mlflow.tracker()
    with quietly():
        mlflow.client.delete_run(mlflow.runs()["0"].info.run_id)
    tracker.mark_best(0)
    assert tracker.end_study("COMPLETE")
    assert mlflow.runs()["0"].data.tags["hpo.best"] == "true"
    assert said == ["tracking: the run of trial 0 was deleted, but is still written to: it is restored"]
    assert not mlflow.refused()


@by_default_in_sqlite
def test_an_experiment_that_is_deleted_while_it_is_written_to_is_restored(mlflow: Mlflow, said: list[str]) -> None:
    tracker = mlflow.tracker()
    tracker.start_study({}, {})
    tracker.start_trial(0, {})
    until(lambda: tracker.run_of(0))
    with quietly():
        mlflow.client.delete_experiment(mlflow.experiment.experiment_id)
    tracker.start_trial(1, {})
    for trial in range(2):
        tracker.log_metrics(trial, 0, {"a": 1.0})
        tracker.end_trial(trial, "COMPLETE")
    tracker.end_study("COMPLETE")
    assert mlflow.experiment.lifecycle_stage == "active"
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED", "1": "FINISHED"}
    assert said == [f"tracking: the experiment {mlflow.study!r} was deleted, but is still written to: it is restored"]
    assert not mlflow.refused()


@pytest.mark.parametrize("code", ["TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "PERMISSION_DENIED"])
@pytest.mark.usefixtures("through_client")
def test_what_may_pass_keeps_everything_in_order(
    mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, code: str, said: list[str]
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2

    error = MlflowException("not now", error_code=getattr(databricks_pb2, code))
    with monkeypatch.context() as patch:

        def not_now(*args: object, **keys: object) -> None:
            raise error

        patch.setattr(MlflowClient, "log_batch", not_now)
        tracker = mlflow.tracker(TrackerHere)
        tracker.start_study({}, {})
        for epoch in range(3):
            tracker.log_metrics(0, epoch, {"a": float(epoch)})
        assert not tracker.end_study("COMPLETE")
    assert len(said) == 1
    assert "does not work" in said[0]
    assert not mlflow.refused()
    assert mlflow.tracker().end_study("COMPLETE")
    assert mlflow.curve("0", "a") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert len(said) == 1, "the next run has nothing to say"


@pytest.mark.usefixtures("through_client")
def test_one_item_that_a_server_cannot_digest_does_not_block_for_ever(
    mlflow: Mlflow, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """An answer 500 to one item, while others are taken, is a refusal once it has come some times."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    plain, answers = MlflowClient.log_batch, []

    def log_batch(self: MlflowClient, run: str, metrics=(), **keys: object) -> None:
        if any(metric.key == "poison" for metric in metrics):
            answers.append(run)
            raise MlflowException("failed with error code 413")
        plain(self, run, metrics=metrics, **keys)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr(TrackerHere, "RETRY_SECONDS", 60.0)  # each tracker tries it once, and at its close
    for trial in range(4):
        tracker = mlflow.tracker(TrackerHere)
        tracker.log_metrics(trial, 0, {"a": 1.0, "poison": 2.0})
        tracker.end_trial(trial, "COMPLETE")
        until(partial(len, answers))  # the first has come: the next is at the close
        if tracker.end_study("COMPLETE"):  # at first it may pass by itself: it is kept for the next run
            break
    assert 0 < trial < 3
    assert "refused something of trial 0" in said[-1]
    assert [set(mlflow.runs()[str(n)].data.metrics) for n in range(trial + 1)] == [{"a"}] * (trial + 1)
    assert set(mlflow.statuses().values()) == {"FINISHED"}
    assert "poison" in mlflow.refused()
    assert not mlflow.unsent()


def test_files_that_their_store_does_not_take_hold_up_nothing_else(
    mlflow: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from mlflow import MlflowClient

    (tmp_path / "b").mkdir()
    (tmp_path / "b/model.pt").write_text("m")
    with monkeypatch.context() as patch:

        def not_now(*args: object, **keys: object) -> None:
            raise PermissionError("no access to the bucket")

        patch.setattr(MlflowClient, "log_artifacts", not_now)
        tracker = mlflow.tracker(TrackerHere)
        tracker.start_study({}, {})
        tracker.log_folder(tmp_path / "b", "bundle")
        tracker.log_metrics(0, 0, {"a": 1.0})
        tracker.end_trial(0, "COMPLETE")
        assert not tracker.end_study("COMPLETE")
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED"}
    assert len(said) == 1
    assert "no access to the bucket" in said[0]
    assert mlflow.tracker().close()
    assert len(said) == 1, "the next run has nothing to say"
    assert mlflow.files("study", "bundle") == ["bundle/model.pt"]
    assert mlflow.statuses() == {"study": "FINISHED", "0": "FINISHED"}
    assert not mlflow.unsent()
