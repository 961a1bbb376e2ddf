"""A search that `stop` ends while trials are in training: one, a stack, paused ones, interrupted ones."""

import pytest
from optuna.trial import TrialState

from hpo.search import schema
from tests.cli import invoke, refused, summary
from tests.searches import StopWhen
from tests.test_pausing import HALVING, Study

REACHED = "stop: {target: -1000}\n"
"""An R2 that any trial has."""


def agree(done):
    """Hold that storage, tracker and screen know one end of each trial that was started, and nothing is left."""
    view = done.view
    ends = {t.number: t.state.name for t in view.trials}
    assert view.counts.unfinished == 0
    assert not any(t.state in (TrialState.WAITING, TrialState.RUNNING) for t in view.everything)
    assert {number: state for number, (state, _) in done.tracker.ended.items() if number in ends} == ends
    assert sorted((n, state) for n, state, *_ in done.screen.ended if n in ends) == sorted(ends.items())
    return ends


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("stack", "n"), [(1, 1), pytest.param(3, 3, marks=pytest.mark.slow)])
def test_no_new_trial_is_started_and_those_in_training_are_trained_to_their_end(stack, n):
    done = Study("s", f"pruner: none\nstack: {stack}\n{REACHED}").run()
    assert agree(done) == dict.fromkeys(range(n), "COMPLETE")
    assert {len(curve) for curve in done.curves().values()} == {8}
    assert sum("the search is stopped after" in line for line in done.said) == 1
    again = done.run()
    assert len(again.screen.started) == n


@pytest.mark.parametrize("stack", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_is_paused_is_pruned(stack):
    done = Study("s", f"{HALVING}stack: {stack}\n{REACHED}").run()
    ends = agree(done)
    assert set(ends.values()) == {"COMPLETE", "PRUNED"}
    assert done.tracker.paused == set()
    assert not list(done.folder.glob("place-*"))
    assert done.view.stopped.rule == "target"
    if stack == 1:
        whole = Study("whole", f"{HALVING}stack: 1\n").run()
        assert done.view.effort.epochs < whole.view.effort.epochs
        curves = whole.curves()
        assert all(curves[slot][: len(curve)] == curve for slot, curve in done.curves().items())


def test_an_interrupted_trial_is_resumed_and_nothing_else():
    """One of two trials that are trained at once reaches the target; then both are interrupted."""
    study, ended = Study("s", f"pruner: none\nstack: 2\n{REACHED}patience: 1\n"), []
    stop = StopWhen(lambda: bool(study.screen.ended) and not ended, in_time=True)
    study.run(stop=stop)
    ended.append(1)
    before = {t.number for t in study.view.everything if t.state == TrialState.COMPLETE}
    assert before
    done = study.run()
    ends = agree(done)
    assert set(ends.values()) == {"COMPLETE"}
    retries = [t.user_attrs.get(schema.RETRY_OF) for t in done.view.trials]
    assert len(retries) - retries.count(None) == len(ends) - len(before)


def test_the_command_line_says_why_and_finishes_what_is_left(study):
    path = study(f"epochs: 2\ntrials: 6\npruner: none\nstack: 1\nbaseline: false\n{REACHED}")
    said = invoke("run", path)
    assert "the search is stopped after 1 of 6 trials: trial 0 has reached the target -1000, with " in said
    assert "stopped │ after 1 of 6 trials: trial 0 has reached the target -1000" in said
    assert "--set stop=false  # search on" in said
    assert "bundle" in said
    status = invoke("status", path)
    assert "1 of 6 trials done (1 complete, 0 pruned, 0 failed), 0 running, 0 waiting" in status
    assert "stopped after 1 of 6 trials: trial 0 has reached the target -1000" in status
    assert summary(invoke("status", path, "--json"))["stopped"]["rule"] == "target"
    again = invoke("run", path)
    assert "the search was stopped after 1 of 6 trials: trial 0 has reached the target -1000" in again
    assert "are done" not in again
    raised = summary(invoke("run", path, "--trials", "9", "--json"))
    assert (raised["trials"]["complete"], raised["trials"]["waiting"], raised["stopped"]["trials"]) == (1, 0, 9)
    markdown = invoke("report", path, "--format", "md", "--out", "-")
    assert "1 of 1 trials done: 1 complete, 0 pruned, 0 failed; the search was stopped after 1 of 9 trials" in markdown
    on = summary(invoke("run", path, "--set", "stop=false", "--json"))
    assert (on["trials"]["complete"], on["stopped"]) == (6, None)


def test_rules_that_can_never_hold_are_warned_of(study):
    path = study("epochs: 1\ntrials: 2\npruner: none\nstop: {no_gain: 2, target: 98, terminator: emmr}\n")
    said = invoke("check", path)
    assert "stop.no_gain: 2 never holds in a study of 2 trials; lower it" in said
    assert "stop.target: 98 is never reached: r2 is at most 1" in said
    assert "stop.terminator: emmr needs 30 complete trials, so it never ends a study of 2; raise `trials`" in said


def test_a_terminator_needs_a_param_that_every_trial_has(study):
    path = study("trials: 50\nparams: {learning_rate: 0.1}\nstop: {terminator: true}\n")
    said = refused("check", path)
    assert "stop.terminator: regret_bound needs a param that is searched in every trial, and the space has none" in said
