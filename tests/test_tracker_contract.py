"""One contract for all trackers, asserted: none, in memory, MLflow over SQLite and over HTTP."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpo.tracking.base import STATUS, MemoryTracker, NullTracker, Row, Tracker
from hpo.tracking.mlflow import MlflowTracker
from tests.mlflows import Mlflow, in_store, tell


@dataclass
class Seen:
    """What a tracker holds of a study, by trial (None: the study); NaN as text, since it equals nothing."""

    ends: dict[int | None, str] = field(default_factory=dict)
    errors: dict[int | None, str] = field(default_factory=dict)
    params: dict[int | None, dict[str, str]] = field(default_factory=dict)
    curves: dict[int | None, dict[str, dict[int, float | str]]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    best: int | None = None
    data: str = ""
    lineage: dict[int, str] = field(default_factory=dict)


def _shown(value: float) -> float | str:
    return "nan" if math.isnan(value) else value


def _of_memory(tracker: MemoryTracker) -> Seen:
    curves: dict[int | None, dict[str, dict[int, float | str]]] = {}
    for trial, rows in tracker.metrics.items():
        for step, metrics in rows:
            for key, value in metrics.items():
                curves.setdefault(trial, {}).setdefault(key, {})[step] = _shown(value)
    return Seen(
        ends={trial: state for trial, (state, _) in tracker.ended.items()},
        errors={trial: error for trial, (_, error) in tracker.ended.items() if error},
        params={trial: {key: str(value) for key, value in params.items()} for trial, params in tracker.params.items()},
        curves=curves,
        files={file.name: file.read_text() for folder in tracker.folders for file in folder.iterdir()},
        tags={key: value for key, value in tracker.tags.items() if key == "hpo.stack"},
        best=tracker.best,
        data=tracker.data.get("digest", ""),
        lineage={t: tags["hpo.retry_of"] for t, tags in tracker.trial_tags.items() if "hpo.retry_of" in tags},
    )


def _of_mlflow(mlflow: Mlflow) -> Seen:
    seen = Seen()
    for mark, run in mlflow.runs().items():
        trial, tags = None if mark == "study" else int(mark), run.data.tags
        if "hpo.state" in tags:
            assert run.info.status == STATUS[tags["hpo.state"]]
            seen.ends[trial] = tags["hpo.state"]
        if "hpo.error" in tags:
            seen.errors[trial] = tags["hpo.error"]
        if run.data.metrics:
            curves = {key: mlflow.curve(mark, key) for key in run.data.metrics}
            seen.curves[trial] = {key: {step: _shown(x) for step, x in curve} for key, curve in curves.items()}
        if trial is None:
            seen.files = {Path(name).name: mlflow.text("study", name) for name in mlflow.files("study", "bundle")}
            seen.tags = {key: value for key, value in tags.items() if key == "hpo.stack"}
            seen.data = "".join(each.dataset.digest for each in run.inputs.dataset_inputs)
        elif tags.get("hpo.best") == "true":
            assert seen.best is None, "two are the best"
            seen.best = trial
        if "hpo.retry_of" in tags:
            assert trial is not None
            seen.lineage[trial] = tags["hpo.retry_of"]
        if trial is not None or run.data.params:
            seen.params[trial] = run.data.params
    return seen


Opened = tuple[Callable[[], Tracker], Callable[[], Seen]]


@pytest.fixture(params=["null", "memory", "sqlite", "http"])
def opened(request: pytest.FixtureRequest, no_warning: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    """Return a function that opens the study's tracker, and one that looks at what is there then."""
    monkeypatch.chdir(tmp_path)
    if request.param == "null":
        return NullTracker, Seen
    if request.param == "memory":
        memory = MemoryTracker()
        return lambda: memory, lambda: _of_memory(memory)
    mlflow = in_store(request.param, request, tmp_path)
    cls = MlflowTracker if request.param == "sqlite" else None
    return lambda: mlflow.tracker(cls), lambda: _of_mlflow(mlflow)


def expected(tracker: Tracker, **what: object) -> Seen:
    """Return what must be seen: all of it, or nothing where there is no tracker."""
    return Seen() if isinstance(tracker, NullTracker) else Seen(**what)  # type: ignore[arg-type]


class TestContract:
    """Every tracker holds in the end what it was told, however often; one that is none holds nothing."""

    @pytest.mark.parametrize("times", [1, 2])
    def test_a_whole_study(self, opened: Opened, times: int) -> None:
        open_it, look = opened
        for _ in range(times):
            tracker = open_it()
            tell(tracker)
        train = {epoch: 1.0 / (epoch + 1) for epoch in range(4)}
        valid = [dict.fromkeys(range(4), 0.5)] * 2 + [dict.fromkeys(range(4), "nan")]
        assert look() == expected(
            tracker,
            ends={0: "COMPLETE", 1: "PRUNED", 2: "FAIL", None: "COMPLETE"},
            errors={2: "train_loss became nan; see postgresql://bob:***@h/d"},  # what was told has the password
            params={trial: {"lr": "0.1", "n": str(trial)} for trial in range(3)},
            curves={trial: {"train_loss": train, "valid_loss": valid[trial]} for trial in range(3)},
            tags={"hpo.stack": "one trial at a time"},
        )

    def test_a_run_id_is_text_or_nothing(self, opened: Opened) -> None:
        tracker = opened[0]()
        tracker.start_study({}, {})
        tracker.start_trial(0, {})
        assert tracker.close() is True
        run = tracker.run_of(0)
        assert run is None if isinstance(tracker, NullTracker) else (isinstance(run, str) and run)
        assert tracker.run_of(1) is None

    def test_what_is_told_together_is_all_there(self, opened: Opened) -> None:
        open_it, look = opened
        tracker = open_it()
        with tracker.together():
            for trial in range(3):
                tracker.start_trial(trial, {"n": trial})
                with tracker.together():
                    tracker.log_metrics(trial, 0, {"a": float(trial)})
        with tracker.together():
            tracker.end_trial(1, "PRUNED")
        assert tracker.close() is True
        assert look() == expected(
            tracker,
            ends={1: "PRUNED"},
            params={trial: {"n": str(trial)} for trial in range(3)},
            curves={trial: {"a": {0: float(trial)}} for trial in range(3)},
        )

    def test_params_that_become_known_later_are_added(self, opened: Opened) -> None:
        open_it, look = opened
        tracker = open_it()
        tracker.start_trial(0, {"a": 1})
        tracker.log_params(0, {"b": 2})
        assert tracker.close() is True
        assert look() == expected(tracker, params={0: {"a": "1", "b": "2"}})

    def test_a_folder_is_kept_and_replaced_by_what_is_in_it_later(self, opened: Opened, tmp_path: Path) -> None:
        open_it, look = opened
        (tmp_path / "b").mkdir()
        for text in ("one", "two", "two"):
            (tmp_path / "b/model.pt").write_text(text)
            tracker = open_it()
            tracker.start_study({}, {})
            tracker.log_folder(tmp_path / "b", "bundle")
            assert tracker.end_study("COMPLETE") is True
            assert look() == expected(tracker, ends={None: "COMPLETE"}, files={"model.pt": text})

    def test_reconcile_and_end_agree(self, opened: Opened) -> None:
        """One that is open is ended, one with another end corrected, a right one left, one without a run not made."""
        open_it, look = opened
        tracker = open_it()
        tracker.start_study({}, {})
        for trial in range(6):
            tracker.start_trial(trial, {})
        ends = {
            0: ("COMPLETE", None),
            1: ("PRUNED", None),
            2: ("FAIL", "worker w died"),
            3: ("INTERRUPTED", "worker w died"),
            4: ("INTERRUPTED", "worker w died"),
            9: ("COMPLETE", None),
        }
        tracker.end_trial(0, "COMPLETE")
        tracker.end_trial(2, "INTERRUPTED", "worker w died")
        tracker.end_trial(3, "FAIL", "worker w died")
        for _ in range(2):
            tracker.reconcile(ends)
            assert tracker.close() is True
            assert look() == expected(
                tracker,
                ends={0: "COMPLETE", 1: "PRUNED", 2: "FAIL", 3: "INTERRUPTED", 4: "INTERRUPTED"},
                errors=dict.fromkeys((2, 3, 4), "worker w died"),
                params={trial: {} for trial in range(6)},
            )

    def test_what_a_study_found_is_there_once_and_what_it_finds_later_has_a_name_of_its_own(
        self, opened: Opened
    ) -> None:
        open_it, look = opened
        data = {"name": "iris", "digest": "d1", "source": "{}", "schema": "{}", "profile": "{}"}
        for best, trials in ((0, 1), (0, 1), (1, 2)):
            tracker = open_it()
            tracker.start_study({}, {}, {"trials": trials, "seed": 1})
            tracker.log_data(data)
            for trial in range(trials):
                tracker.start_trial(trial, {}, tags={"hpo.retry_of": "0"} if trial else None)
            tracker.log_curve("best", [Row(n, 1.0 / (n + 1), 1000 + n) for n in range(trials)])
            tracker.log_params(None, {"best.trial": best})
            tracker.mark_best(best)
            assert tracker.close() is True
        assert look() == expected(
            tracker,
            params={
                None: {"trials": "1", "seed": "1", "best.trial": "0", "trials_2": "2", "best.trial_2": "1"},
                0: {},
                1: {},
            },
            curves={None: {"best": {0: 1.0, 1: 0.5}}},
            best=1,
            data="d1",
            lineage={1: "0"},
        )

    def test_a_study_that_is_run_again_is_open_until_it_ends(self, opened: Opened) -> None:
        open_it, look = opened
        for state in ("INTERRUPTED", "COMPLETE"):
            tracker = open_it()
            tracker.start_study({}, {})
            tracker.log_metrics(None, 3, {"test_r2": 0.5})
            assert tracker.end_study(state) is True
            assert look() == expected(tracker, ends={None: state}, curves={None: {"test_r2": {3: 0.5}}})
