"""Which trial is trained next: the rule of `pruner: halving`, over trials as a storage has them."""

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.search import schema
from hpo.search.effort import effort
from hpo.search.halving import Halving, HalvingPruner
from hpo.search.samplers import make_pruner
from hpo.search.seen import AtOneRung, SeenStudy
from hpo.study.spec import Plugin

STATES = {"W": TrialState.WAITING, "R": TrialState.RUNNING, "C": TrialState.COMPLETE, "P": TrialState.PRUNED}
STATES["F"] = TrialState.FAIL


def trial(number, state, values=(), **attrs) -> FrozenTrial:
    """Return a trial with these reports; a letter for its state."""
    of = STATES[state]
    made = create_trial(
        state=of,
        value=min(values) if of == TrialState.COMPLETE else None,
        intermediate_values=dict(enumerate(values)),
        user_attrs=attrs,
    )
    made.number = number
    return made


def paused(scores, epochs=2, start=0):
    """Return trials that are paused after so many epochs, at these scores, which they had reached before already."""
    return [trial(start + i, "W", [score + 1e-9] * (epochs - 1) + [score]) for i, score in enumerate(scores)]


def halving(epochs=16, cohorts=1, maximize=False, **keys) -> Halving:
    return Halving(HalvingPruner(epochs, **keys), cohorts, maximize=maximize)


def chosen(rule, trials, n=100, budget=None):
    choice = rule.choose(trials, n, len(trials) if budget is None else budget)
    return [each.number for each in choice.claim], choice.over


@pytest.mark.parametrize(
    ("epochs", "keys", "rungs"),
    [
        (50, {}, (5, 10, 20, 40)),
        (20, {}, (2, 4, 8, 16)),
        (16, {}, (2, 4, 8)),
        (3, {}, (2,)),
        (2, {}, ()),
        (1, {}, ()),
        (27, {"first": 1, "factor": 3}, (1, 3, 9)),
        (10, {"first": 10}, ()),
    ],
)
def test_rungs(epochs, keys, rungs):
    assert HalvingPruner(epochs, **keys).rungs == rungs


def test_trials_are_paused_at_each_rung_once():
    assert [halving().next_pause(since) for since in (0, 1, 2, 3, 4, 7, 8, 16)] == [2, 2, 4, 4, 8, 8, None, None]


def test_new_trials_come_before_paused_ones_and_retries_before_both():
    trials = [*paused([1, 2, 3, 4]), trial(4, "W"), trial(5, "W", retry_of=9), trial(6, "W")]
    assert chosen(halving(), trials, 2) == ([5, 4], False)
    assert chosen(halving(), trials, 5) == ([5, 4, 6, 0, 1], False)  # then the better half


def test_the_better_half_is_resumed_and_of_equals_the_first():
    trials = paused([3, 1, 2, 1])
    assert chosen(halving(), trials) == ([1, 3], False)
    assert chosen(halving(maximize=True), paused([3, 1, 2, 1])) == ([0, 2], False)


def test_one_that_was_resumed_counts_among_the_half():
    trials = [trial(0, "R", [1, 1, 1]), *paused([2, 3, 4], start=1)]
    assert chosen(halving(), trials) == ([1], False)
    trials = [trial(0, "C", [1] * 16), trial(1, "P", [2, 2, 2]), *paused([3, 4], start=2)]
    assert chosen(halving(finish=0), trials) == ([], True)


def test_nobody_is_resumed_from_a_rung_while_more_are_on_their_way_there():
    few = [*paused([1, 2]), trial(2, "R", [3]), trial(3, "R")]
    assert chosen(halving(), [*few, trial(4, "R", [1])]) == ([], False)
    assert chosen(halving(), few) == ([0], False)
    higher = [
        *paused([8, 9], epochs=4),
        *paused([3, 4, 5, 6], start=2),
        *(trial(6 + i, "R", [0] * 3) for i in range(3)),
    ]
    assert chosen(halving(reach=0), higher) == ([2], False)  # from the lower rung, of whose best four three train on
    assert chosen(halving(reach=0), higher[:-1]) == ([0, 2, 3], False)


def test_the_highest_rung_is_resumed_first():
    trials = [*paused([5, 6, 7, 8]), *paused([1, 2], epochs=4, start=4), *paused([3], epochs=8, start=6)]
    assert chosen(halving(reach=0), trials)[0] == [4]  # half of one is none, of three one; of seven three, which are on
    assert chosen(halving(reach=0), [trial(0, "R", [9] * 8), *trials[1:]])[0] == [6, 4, 5]


def test_who_may_catch_up_is_resumed_too():
    """Good trials have gained 2 since the rung before: whoever is within that of the best is not given up."""
    trials = [trial(i, "W", [score + 2, score + 2, score, score]) for i, score in enumerate([1, 1.5, 2, 2.5, 2.9, 9])]
    assert chosen(halving(), trials) == ([0, 1, 2, 3, 4], False)
    assert chosen(halving(reach=0), trials) == ([0, 1, 2], False)
    falls = [trial(i, "W", [score, score, score, score + 1]) for i, score in enumerate([1, 1.1, 2, 3, 4, 5])]
    assert chosen(halving(), falls) == ([0, 1, 2], False)  # none has gained anything


def test_without_reach_equals_of_the_best_are_one_in_factor_the_first_first():
    trials = [trial(n, "W", [0.5] * 8, trained=[[0.0, 1.0]], paused_at=8) for n in range(20)]
    assert chosen(halving(reach=0, first=8), trials)[0] == [*range(10)]
    assert chosen(halving(reach=1, first=8), trials)[0] == [*range(20)]


def test_a_score_is_the_best_so_far_and_one_that_failed_is_the_worst():
    trials = [trial(0, "W", [5, 9]), trial(1, "W", [6, 6]), trial(2, "F", [1, 1]), trial(3, "F", [])]
    assert chosen(halving(), trials) == ([0], False)
    nan = [trial(0, "W", [float("nan"), float("nan")]), trial(1, "W", [float("nan"), 7]), *paused([8, 9], start=2)]
    assert chosen(halving(), nan) == ([1, 2], False)


def test_one_that_ended_early_is_at_every_rung():
    trials = [trial(0, "C", [1, 1, 1]), *paused([2, 3], epochs=8, start=1)]
    assert chosen(halving(finish=0), trials) == ([], True)  # the one of three that goes on has ended, by `patience`


def test_when_nothing_else_is_left_the_best_few_are_finished_and_then_it_is_over():
    at_8 = [trial(0, "C", [1] * 16), *paused([2, 3, 4], epochs=8, start=1)]
    trials = [*at_8, *paused([5, 6], epochs=4, start=4)]
    assert chosen(halving(), trials) == ([1], False)  # the better half
    ended = [trial(0, "C", [1] * 16), trial(1, "C", [2] * 16), *trials[2:]]
    assert chosen(halving(), ended) == ([2], False)  # the third of the best three, and not the fourth
    ended[2] = trial(2, "R", [3] * 9)
    assert chosen(halving(), ended) == ([], False)  # it may be seen to be worse than they are
    ended[2] = trial(2, "C", [3] * 16)
    assert chosen(halving(), ended) == ([], True)
    assert chosen(halving(finish=9), ended) == ([3], False)


def test_without_a_complete_trial_the_best_one_is_finished_whatever_finish_says():
    assert chosen(halving(finish=0, reach=0), [trial(0, "W", [1, 1], trained=[[0.0, 1.0]], paused_at=2)]) == (
        [0],
        False,
    )


class TestCohorts:
    def test_the_next_is_opened_once_nothing_is_left_of_the_one_before(self):
        new = [trial(n, "W") for n in range(9)]
        rule = halving(cohorts=3)
        assert chosen(rule, new, 9)[0] == [0, 1, 2]
        trials = [*paused([1, 2, 3]), *new[3:]]
        assert chosen(rule, trials)[0] == [0]
        trials[0] = trial(0, "R", [1, 1, 1])
        assert chosen(rule, trials) == ([], False)
        trials[0] = trial(0, "C", [1] * 16)
        assert chosen(rule, trials)[0] == [3, 4, 5]
        trials[3] = trial(3, "R")
        assert chosen(rule, trials)[0] == [4, 5]

    def test_what_is_not_queued_yet_is_asked_for(self):
        trials = [*paused([1, 2, 3]), trial(3, "W")]
        choice = halving(cohorts=2).choose(trials, 5, 12)
        assert ([t.number for t in choice.claim], choice.n_to_queue) == ([3], 2)  # a cohort of six

    def test_all_trials_of_all_cohorts_are_started(self):
        rule, done = halving(cohorts=3), []
        while len(done) < 10:
            choice = rule.choose([*done, *(trial(n, "W") for n in range(len(done), 10))], 1, 10)
            done.append(trial(choice.claim[0].number, "C", [1] * 16))
        assert rule.choose(done, 1, 10).over

    @pytest.mark.parametrize(
        ("trials", "at_once", "learns", "cohorts"),
        [(100, 1, True, 3), (100, 25, True, 3), (100, 26, True, 1), (100, 1, False, 1), (29, 1, True, 1)],
    )
    def test_how_many_there_are(self, trials, at_once, learns, cohorts):
        assert Halving.cohorts_for(trials, at_once, learns) == cohorts


def test_trials_that_were_paused_at_other_rungs_are_not_lost():
    trials = paused([1, 2, 3, 4], epochs=3)
    assert chosen(halving(first=2), trials) == ([0, 1], False)
    assert chosen(halving(first=4), trials) == ([0, 1, 2, 3], False)  # below the first rung: they are trained to it


class TestSamplersSee:
    def trials(self):
        low = paused([n + 10 for n in range(12)])
        return [*low, *paused([n + 1 for n in range(10)], epochs=4, start=12), trial(22, "C", [0.5] * 16)]

    def test_the_highest_rung_that_enough_have_reached(self):
        see = AtOneRung(halving(), 16, maximize=False)
        seen = see(self.trials())
        assert [t.number for t in seen] == list(range(12, 23))
        assert {t.state for t in seen} == {TrialState.COMPLETE}
        assert [t.value for t in seen] == [*(n + 1 for n in range(10)), 0.5]
        assert [t.value for t in AtOneRung(halving(), 16, maximize=False)(paused(range(10)))] == list(range(10))
        assert see(paused(range(9))) == []

    def test_whole_trials_with_their_own_values(self):
        rule = Halving(HalvingPruner(16), 1, maximize=False, value="last")
        whole = [trial(n, "C", [1.0] * 15 + [n + 2.0]) for n in range(10)]
        for each in whole:
            each.value = each.intermediate_values[15]
        assert [t.value for t in AtOneRung(rule, 16, maximize=False)(whole)] == [n + 2.0 for n in range(10)]

    def test_neither_the_failed_nor_the_resumed_as_unknown_but_new_ones(self):
        see = AtOneRung(halving(), 16, maximize=False)
        more = [trial(30, "R", [7] * 5), trial(31, "R"), trial(32, "F", [1] * 8), trial(33, "W")]
        seen = {t.number: (t.state.name, t.value) for t in see([*self.trials(), *more]) if t.number >= 30}
        assert seen == {30: ("COMPLETE", 7.0), 31: ("RUNNING", None)}

    def test_adopted_trials_as_they_are(self):
        adopted = trial(0, "C", [3.0], **{"hpo:adopted": "s#1"})
        assert AtOneRung(halving(), 16, maximize=False)([adopted]) == [adopted]

    def test_a_study_of_them_gives_them_by_state(self):
        study = optuna.create_study()
        for each in self.trials()[12:]:
            study.add_trial(each)
        seen = SeenStudy(study, AtOneRung(halving(), 16, maximize=False))
        assert len(seen.get_trials()) == 11
        assert len(seen.get_trials(states=(TrialState.COMPLETE,))) == 11
        assert seen.get_trials(states=(TrialState.RUNNING,)) == []
        assert study.get_trials(states=(TrialState.COMPLETE,))[0].value == 0.5


class TestFirstRung:
    def test_one_that_says_nothing_is_noticed_once(self):
        rule, flat = halving(), [trial(n, "W", [5.0, 5.0, 5.0, 1.0 + n]) for n in range(40)]
        assert rule.doubt(flat[:9]) is None  # too few to say so
        doubt = rule.doubt(flat[:10])
        assert "rank correlation 0.00 of 10 trials" in doubt
        assert "`first`, which is 2" in doubt
        assert rule.doubt(flat) is None
        against = [trial(n, "W", [20.0 - n, 20.0 - n, 9.0, 1.0 + n / 10]) for n in range(10)]
        assert "rank correlation -1.00" in halving().doubt(against)

    def test_it_is_looked_at_again_when_more_trials_are_there(self):
        good, rule = paused([n + 1.0 for n in range(12)], epochs=4), halving()
        assert rule.doubt(good) is None
        flat = [trial(n, "W", [5.0, 5.0, 5.0, 1.0 + n]) for n in range(20, 50)]
        assert rule.doubt(flat[:21]) is None
        assert rule.doubt(flat) is not None


@pytest.mark.parametrize(
    ("keys", "at", "said"),
    [
        ({"first": 0}, "first", "must be auto, or a whole number of at least 1, but is 0"),
        ({"first": "soon"}, "first", "must be auto, or a whole number of at least 1, but is 'soon'"),
        ({"first": 2.5}, "first", "must be int | str, but got 2.5"),
        ({"factor": 1}, "factor", "must be at least 2, but is 1"),
        ({"factor": True}, "factor", "must be int, but got True"),
        ({"finish": -1}, "finish", "must be at least 0, but is -1"),
        ({"reach": float("nan")}, "reach", "must be at least 0, but is nan"),
        ({"reach": "far"}, "reach", "must be float, but got 'far'"),
        ({"cohorts": 0}, "cohorts", "must be auto, or a whole number of at least 1, but is 0"),
        ({"memory": -1}, "memory", "must be a number of MiB of at least 0, but is -1"),
        ({"frist": 2}, "frist", 'unknown key of the pruner halving; did you mean "first"?'),
        ({"epochs": 2}, "epochs", "unknown key of the pruner halving"),
    ],
)
def test_a_key_that_is_wrong_is_a_fault(keys, at, said):
    _, faults = make_pruner(Plugin(name="halving", **keys), 20)
    assert [(fault.path, fault.message.split("; known")[0]) for fault in faults] == [(("pruner", at), said)]


def test_it_is_not_wrapped():
    _, faults = make_pruner(Plugin(name="patient", patience=2, wrapped_pruner={"name": "halving"}), 20)
    assert [fault.path for fault in faults] == [("pruner", "wrapped_pruner")]


def test_effort():
    spans = [[0.0, 1.0]]
    trials = [
        trial(0, "C", [1] * 16, trained=spans * 3, paused_at=8),
        trial(1, "P", [1] * 4, trained=spans * 2, paused_at=4),
        trial(2, "W", [1] * 2, trained=spans, paused_at=2),
        trial(3, "C", [1] * 5, restarted=1),  # by `patience`: nothing was saved of it
        trial(4, "P", [1] * 3),
        trial(5, "W"),
        trial(7, "F", [1] * 2),
        trial(6, "P"),
    ]
    trials[-1].system_attrs = {f"{schema.CONSTRAINT}n_parameters": 0.5}  # never trained, which is not pruning's doing
    found = effort(trials, 16)
    assert found.as_dict() == {
        "epochs": 32,
        "without": 16 + 16 + 16 + 5 + 16 + 2,
        "paused": 6,
        "resumed": 4,
        "promoted": 2,
        "restarted": 1,
    }
    assert found.text() == (
        "32 of 71 epochs trained (45%); 6 times paused, 4 times resumed, 2 trials promoted; 1 resumed from scratch"
    )
    assert effort([trial(0, "C", [1] * 16)], 16).text() == ""
