"""The pruner that a stack's members share decides as Optuna's does, asked one by one."""

import math

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from hpo.search.pruners import SharedMedianPruner, SharedPercentilePruner

VALUES = st.lists(st.one_of(st.floats(-2, 2), st.sampled_from([0.0, math.nan, math.inf])), min_size=0, max_size=6)
KEYS = st.fixed_dictionaries(
    {
        "n_startup_trials": st.integers(0, 4),
        "n_warmup_steps": st.integers(0, 3),
        "interval_steps": st.integers(1, 3),
        "n_min_trials": st.integers(1, 3),
    }
)


def told(study: optuna.Study, curve: list[float], state: TrialState) -> None:
    value = 1.0 if state == TrialState.COMPLETE else None
    study.add_trial(create_trial(state=state, value=value, intermediate_values=dict(enumerate(curve))))


@pytest.mark.filterwarnings("ignore:All-NaN", "ignore:invalid value")
@given(
    finished=st.lists(st.tuples(VALUES, st.sampled_from([TrialState.COMPLETE, TrialState.PRUNED])), max_size=8),
    running=st.lists(VALUES, min_size=1, max_size=5),
    keys=KEYS,
    percentile=st.sampled_from([None, 0.0, 30.0, 100.0]),
    direction=st.sampled_from(["minimize", "maximize"]),
)
@settings(max_examples=300, deadline=None)
def test_the_decisions_are_optunas_also_while_trials_become_complete(
    finished, running, keys, percentile, direction
) -> None:
    study = optuna.create_study(direction=direction)
    if percentile is None:
        ours, plain = SharedMedianPruner(**keys), optuna.pruners.MedianPruner(**keys)
    else:
        ours, plain = (cls(percentile, **keys) for cls in (SharedPercentilePruner, optuna.pruners.PercentilePruner))
    trials = [create_trial(state=TrialState.RUNNING, intermediate_values=dict(enumerate(curve))) for curve in running]
    for curve, state in [([], TrialState.PRUNED), *finished]:
        told(study, curve, state)
        for trial in trials:
            assert ours.prune(study, trial) is bool(plain.prune(study, trial))


def test_of_a_stack_the_percentile_is_computed_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from hpo.search import pruners

    computed = []
    plain = pruners._get_percentile_intermediate_result_over_trials
    monkeypatch.setattr(
        pruners,
        "_get_percentile_intermediate_result_over_trials",
        lambda *what: computed.append(what[2]) or plain(*what),
    )
    study = optuna.create_study()
    told(study, [0.5, 0.4], TrialState.COMPLETE)
    pruner = SharedMedianPruner(n_startup_trials=1)
    for step in range(2):
        for _ in range(64):
            pruner.prune(
                study, create_trial(state=TrialState.RUNNING, intermediate_values=dict.fromkeys(range(step + 1), 0.1))
            )
    told(study, [0.3, 0.2], TrialState.COMPLETE)
    pruner.prune(study, create_trial(state=TrialState.RUNNING, intermediate_values={0: 0.1}))
    assert computed == [0, 1, 0]
