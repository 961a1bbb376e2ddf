"""`time` in the study file: the whole run aims to end in it, and at least one trial is finished."""

import json
import math
import time
from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.runner.deadline import EXPORT_SECONDS, Deadline, seconds_behind, set_end
from hpo.runner.prepare import prepare
from hpo.runner.worker import work
from hpo.search import schema
from hpo.search.opening import open_search
from hpo.study.spec import UNBOUNDED
from hpo.tracking.base import MemoryTracker
from hpo.training.stack import Member
from tests.cli import invoke
from tests.conftest import run_hpo
from tests.screens import Screen

TIMED = "objective: linear.py\ntime: {}\nepochs: 3\ntracking: off\n"


def opened(text):
    Path("study.yaml").write_text(text)
    plan = prepare(Path("study.yaml"))
    return plan, open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)


def test_with_a_time_and_without_trials_there_are_as_many_as_fit(study):
    study()
    Path("study.yaml").write_text(TIMED.format("30s"))
    assert prepare(Path("study.yaml")).spec.trials == UNBOUNDED
    assert prepare(Path("study.yaml")).spec.budget_text == "as many trials as fit in 30 s"
    Path("study.yaml").write_text(TIMED.format("30s") + "trials: 7\n")
    assert prepare(Path("study.yaml")).spec.trials == 7


@pytest.mark.parametrize("value", ["soon", "0", "-3m", "[1]", ".inf", "true"])
def test_a_time_that_is_none_is_refused(study, value):
    study()
    Path("study.yaml").write_text(TIMED.format(value))
    with pytest.raises(SpecError, match=r"study\.yaml:2: time: must be"):
        prepare(Path("study.yaml"))


def test_a_run_ends_in_its_time_with_a_model_and_is_done_then(study, monkeypatch):
    study()
    monkeypatch.setenv("LINEAR_SECONDS", "0.02")
    Path("study.yaml").write_text(TIMED.format("18s") + "pruner: none\n")
    done = run_hpo("run", "study.yaml")
    assert done.returncode == 0, done.stderr
    assert "the study's time (18 s) is over" in done.stdout + done.stderr
    assert "1000000" not in done.stdout
    about = json.loads(Path("mlruns/bundles/study/bundle.json").read_text())
    assert about["metrics"]["test"]
    said = invoke("status", Path("study.yaml"))
    assert "of as many trials as fit in 18 s done" in said
    assert "waiting" not in said
    again = run_hpo("run", "study.yaml")
    assert again.returncode == 0, again.stderr
    assert json.loads(Path("mlruns/bundles/study/bundle.json").read_text()) == about  # nothing was trained again


def test_the_first_trial_has_no_deadline_and_the_others_leave_time_for_the_refit(study):
    study()
    plan, search = opened(TIMED.format("100s") + "trials: 2\npruner: none\n")
    set_end(plan, search)
    assert search.attrs[schema.ENDS] == pytest.approx(time.time() + 100, abs=5)
    assert Deadline(plan, search)() == math.inf
    work(plan, plan.load_data(), search, MemoryTracker(), Screen())
    behind = seconds_behind(plan, search.view())
    assert EXPORT_SECONDS < behind < EXPORT_SECONDS + 20
    assert Deadline(plan, search)() - time.monotonic() == pytest.approx(100 - behind, abs=20)
    search.remember(schema.ENDS, time.time() - 5)  # a worker that joins after a killed run counts from now
    assert Deadline(plan, search)() - time.monotonic() == pytest.approx(100 - behind, abs=20)
    search.close()


def test_a_first_trial_that_would_take_all_of_the_time_is_complete_with_the_epochs_it_has(study, monkeypatch):
    study()
    monkeypatch.setenv("LINEAR_SECONDS", "0.02")
    plan, search = opened(TIMED.format("3s").replace("epochs: 3", "epochs: 5000"))
    since = time.monotonic()
    set_end(plan, search)
    work(plan, plan.load_data(), search, MemoryTracker(), Screen())
    seen = search.view()
    assert time.monotonic() - since < 8  # 5,000 epochs take minutes
    [trial] = seen.complete
    assert 1 <= len(trial.intermediate_values) < 5000
    assert seen.best().epoch < len(trial.intermediate_values)
    search.close()


def test_a_first_trial_is_not_ended_where_a_paused_one_was_better(study):
    study()
    plan, search = opened(TIMED.format("1s") + "pruner: {name: halving, first: 1}\n")
    deadline = Deadline(plan, search)
    ended = search.ask()
    search.report(ended.number, 0, 0.5)
    search.pause(ended.number)
    member = Member(number=1, seed=0, params={}, epoch=1)
    time.sleep(0.5)
    worse, better = (0.4, 0.6) if plan.maximize else (0.6, 0.4)
    assert not deadline.must_end(member, worse, time.monotonic() - 1)
    assert deadline.must_end(member, better, time.monotonic() - 1)
    search.close()


def test_a_confirmation_is_kept_time_for_but_not_all_of_it(study):
    study()
    plan, search = opened(TIMED.format("2s") + "trials: 2\npruner: none\nconfirm: {top: 2, seeds: 9}\n")
    work(plan, plan.load_data(), search, MemoryTracker(), Screen())
    assert seconds_behind(plan, search.view()) == pytest.approx(1.2)
    search.close()


def test_the_time_of_a_study_that_was_killed_is_what_is_left(study):
    study()
    _, search = opened(TIMED.format("100s"))
    search.remember(schema.TIMED_OUT, 100.0)
    assert search.seconds_left(100.0) == 0.0
    assert search.seconds_left(200.0) == pytest.approx(200.0, abs=1)
    search.close()


def test_a_trial_that_was_interrupted_is_resumed_before_new_ones(study):
    study()
    _, search = opened(TIMED.format("100s"))
    first = search.ask()
    search.give_back(first.number, "interrupted")
    search.close()
    _, search = opened(TIMED.format("100s"))
    resumed = search.ask()
    assert resumed.retry_of == first.number
    assert resumed.params == first.params
    search.close()


def test_nothing_is_kept_for_a_refit_before_a_trial_is_complete(study):
    study()
    plan, search = opened(TIMED.format("100s"))
    assert seconds_behind(plan, search.view()) == 0.0
    search.close()
