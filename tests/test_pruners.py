"""The pruner that a stack's members share decides as Optuna's does, asked one by one."""

import math
import random
from pathlib import Path

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState, create_trial

from hpo.search.pruners import SharedMedianPruner, SharedPercentilePruner
from hpo.study.spec import Plugin
from tests.searches import Opener

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


PRUNERS = {
    "successive_halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": lambda: optuna.pruners.HyperbandPruner(max_resource=20),
    "wilcoxon": optuna.pruners.WilcoxonPruner,
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=10, n_warmup_steps=1),
}


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    ("name", "others"),
    [
        pytest.param(name, others, id=f"{name}-{id}", marks=() if i % 2 == j else pytest.mark.slow)
        for i, name in enumerate(PRUNERS)
        for j, (others, id) in enumerate([(None, "one metric"), ({"size": False}, "two")])
    ],
)
def test_a_search_prunes_as_optuna_does(tmp_path: Path, name: str, others: dict[str, bool] | None) -> None:
    """Whatever a pruner keeps with the trials, and of several metrics on the one that leads."""
    opener = Opener(tmp_path)
    search = opener(pruner=Plugin(name=name), trials=40, epochs=20, others=others)
    plain = optuna.create_study(direction="maximize", pruner=PRUNERS[name](), study_name="s")
    draw, n_pruned = random.Random(2), 0
    while claims := search.ask_up_to(3):
        running = {claim.number: (plain.ask(), draw.random()) for claim in claims}
        for epoch in range(20):
            for number, (trial, level) in list(running.items()):
                value = level + draw.gauss(0, 0.2) + 0.05 * epoch
                trial.report(value, epoch)
                pruned = trial.should_prune()
                assert search.report(number, epoch, value) is not pruned
                if not pruned and epoch < 19:
                    continue
                del running[number]
                n_pruned += pruned
                plain.tell(trial, None if pruned else value, state=TrialState.PRUNED if pruned else TrialState.COMPLETE)
                search.prune(number) if pruned else search.complete(number, value, others and {"size": draw.random()})
    assert 0 < n_pruned < 40
    opener.close()
