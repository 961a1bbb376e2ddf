"""What is known of a study comes from one read of its trials; the end of a run does not read them over and over."""

import time

import pytest

from hpo.runner import study as studies
from hpo.search.retrying import RetryingStorage
from hpo.search.search import Search
from tests.cli import invoke, summary
from tests.searches import Opener


@pytest.fixture
def reads(monkeypatch):
    """Count who reads all trials of a study; `reads.clear()` starts again."""
    seen = []
    plain = RetryingStorage.get_all_trials

    def counted(self, study_id, deepcopy=True, states=None):
        if states is None:
            seen.append(study_id)
        return plain(self, study_id, deepcopy, states)

    monkeypatch.setattr(RetryingStorage, "get_all_trials", counted)
    return seen


def test_a_view_reads_once_however_much_it_is_asked(tmp_path, reads):
    opener = Opener(tmp_path)
    search = opener(trials=4)
    for tell in (lambda n: search.complete(n, 0.5), search.prune, lambda n: search.fail(n, "why")):
        tell(search.ask().number)
    running = search.ask().number
    reads.clear()
    seen = search.view()
    assert (seen.counts.complete, seen.counts.pruned, seen.counts.failed, seen.counts.running) == (1, 1, 1, 1)
    assert (seen.best().number, seen.best(0).value, seen.best(1)) == (0, 0.5, None)
    assert seen.ends == {0: ("COMPLETE", None), 1: ("PRUNED", None), 2: ("FAIL", "why")}
    assert seen.failures == [None, None, "why"]
    assert [trial.number for trial in seen.running] == [running]
    assert seen.n_claimed == 4
    assert (seen.value_of(0), seen.value_of(1)) == (0.5, None)
    assert set(seen.params_of(running)) == {"batch_size", "learning_rate", "n_hidden"}
    assert search.seconds_used(seen) > 0
    assert search.may_be_best(0.5)
    assert not search.may_be_best(0.4)
    assert seen.curves(0) == {}
    assert len(reads) == 1
    search.complete(running, 0.75)
    assert seen.counts.running == 1  # a view does not change
    assert search.view().best().number == running
    opener.close()


def test_the_end_of_a_run_reads_all_trials_once_and_again_before_a_refit(study, reads, monkeypatch):
    """It read them eight times."""
    at_the_end = []
    complete, work = Search.complete, studies.work

    def told(self, number, value, others):
        ours = complete(self, number, value, others)
        reads.clear()
        return ours

    def worked(*arguments):
        work(*arguments)
        at_the_end.append(len(reads))
        reads.clear()

    monkeypatch.setattr(Search, "complete", told)
    monkeypatch.setattr(studies, "work", worked)
    path = study("trials: 2\nepochs: 1\nstack: 1\npruner: none\n")
    assert summary(invoke("run", path, "--json"))["trials"]["complete"] == 2
    # weights settled, progress shown; asked for more, and under the lock; whether all is done
    assert at_the_end[0] <= 5
    assert len(reads) == 2
    reads.clear()
    invoke("run", path)
    assert len(reads) <= 2


@pytest.mark.parametrize(
    ("maximize", "curve"),
    [(True, [(2, 0.5), (3, 0.5), (4, 0.5), (5, 0.9)]), (False, [(2, 0.5), (3, 0.5), (4, 0.4), (5, 0.4)])],
)
def test_the_best_so_far_is_a_curve_over_the_trials_in_the_order_of_their_ends(tmp_path, maximize, curve):
    opener = Opener(tmp_path)
    search = opener(trials=6, maximize=maximize)
    numbers = [search.ask().number for _ in range(5)]
    assert search.view().best_so_far == []
    search.prune(numbers[4])
    search.complete(numbers[3], 0.5)
    search.fail(numbers[0], "why")
    search.complete(numbers[1], 0.4)
    search.complete(numbers[2], 0.9)
    seen = search.view().best_so_far
    assert [row[:2] for row in seen] == curve
    times = [ms for *_, ms in seen]
    assert times == sorted(times)
    assert all(abs(ms / 1000 - time.time()) < 600 for ms in times)
    opener.close()
