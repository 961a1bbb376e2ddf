"""What the tests of `search` and `lease` share: opening one study several times, as workers do."""

import time

from hpo.runner.prepare import prepare
from hpo.runner.progress import Progress
from hpo.search.clock import SYSTEM, Clock
from hpo.search.opening import open_search
from hpo.stopping import StopToken
from hpo.study.space import build
from hpo.study.spec import Plugin, StudySpec, parse_param

PARAMS = {
    "learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True},
    "n_hidden": {"type": "int", "low": 4, "high": 8},
    "batch_size": 16,
}


class HandClock:
    """A clock that stands still until it is moved: `clock` is what a study is opened with."""

    def __init__(self):
        self._seconds, self._start, self._set = 0.0, time.time(), 0.0
        self.clock = Clock(monotonic=lambda: self._seconds, now=lambda: self._start + self._set + self._seconds)

    def move(self, seconds):
        self._seconds += seconds

    def set_date(self, seconds):
        """Set the date forward, which is not the passing of time."""
        self._set += seconds


class StopWhen(StopToken):
    """Asks to stop as soon as `condition` holds: between two batches, or, if `in_time`, at the end of the epoch."""

    def __init__(self, condition, in_time=False):
        super().__init__()
        self._condition, self._in_time = condition, in_time

    def requested(self):
        return bool(self._condition())

    def immediate(self):
        return not self._in_time and self.requested()


class Told:
    """Makes studies whose trials have come to given values, as if they had been trained; and closes them."""

    def __init__(self):
        self._searches = []

    def __call__(self, path, end_of):
        """Return plan, data and search of a study file; `end_of` gives a claim's value and best epoch, or is None."""
        plan = prepare(path)
        search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
        self._searches.append(search)
        while end_of is not None and (claim := search.ask()) is not None:
            value, epoch = end_of(claim)
            search.annotate(claim.number, {"best_epoch": epoch, "metrics": {"valid_r2": value}})
            search.complete(claim.number, value)
        return plan, plan.load_data(), search

    def close(self):
        for search in self._searches:
            search.close()


class Opener:
    """Opens the study `s` in `<folder>/s.db` at each call, as another worker or a second run would."""

    def __init__(self, folder):
        self._folder, self._searches = folder, []

    def __call__(self, params=PARAMS, maximize=True, others=None, defaults=None, clock=SYSTEM, **keys):
        opening = {name: keys.pop(name) for name in ("make", "train", "wait") if name in keys}
        keys = {
            "name": "s",
            "objective": "o",
            "storage": f"sqlite:///{self._folder}/s.db",
            "trials": 5,
            "epochs": 3,
            "pruner": Plugin(name="none"),
        } | keys
        spec = StudySpec(**keys)
        space, faults = build({name: parse_param(entry) for name, entry in params.items()}, spec.start_with)
        assert not faults
        ways = {"maximize": maximize, "others": others, "defaults": defaults}
        search = open_search(spec, space, "accuracy", **ways, **opening, clock=clock)
        if search is not None:
            self._searches.append(search)
        return search

    def close(self):
        for search in self._searches:
            search.close()


def claims(search):
    """Claim and complete all that is left; return the claims."""
    done = []
    while (claim := search.ask()) is not None:
        assert search.complete(claim.number, float(claim.number))
        done.append(claim)
    return done


def stored(search, number):
    """Return a trial as the storage has it, whether it has a place in the budget or not."""
    return next(t for t in search.study.get_trials() if t.number == number)


class Quiet(Progress):
    """Counts the epochs of all trials."""

    def __init__(self):
        self.epochs = 0

    def trial_started(self, number, params):
        pass

    def epoch_ended(self, number, epoch, epochs, metrics):
        self.epochs += 1

    def trial_paused(self, number, epoch):
        pass

    def trial_ended(self, number, state, value, reason, seconds=None):
        pass
