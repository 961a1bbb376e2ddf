"""The budget under any order of what can happen to a study: it ends with exactly `trials`, and its rows stay few."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from optuna.trial import FrozenTrial, TrialState

from hpo.search.budget import count, holders, refill
from hpo.search.starts import starts_in

OPEN = (TrialState.WAITING, TrialState.RUNNING)
CHUNK = 4
LISTS = ([], [{"x": 1}], [{"x": 2}, {"x": 1}], [{"x": 3}, {"x": 3}], [{"y": 1}, {"x": 1}, {"x": 2}])
"""What `start_with` is changed to."""


class Budget(RuleBasedStateMachine):
    """Workers that claim, end, die, give back and stall, while the study's `trials` are lowered and raised.

    The rows are those of a storage; each rule changes them as `Search` does, in its order. Workers read the queue
    at one moment and change it at another (`stale`), as they may where the storage has no lock.
    """

    def __init__(self):
        super().__init__()
        self.rows, self.trials, self.events = [], 3, 1
        self.seen, self.starts = None, LISTS[2]

    def add(self, fixed=None, **attrs):
        system = {} if fixed is None else {"fixed_params": fixed}
        self.rows.append(
            FrozenTrial(len(self.rows), TrialState.WAITING, None, None, None, {}, {}, attrs, system, {}, 0)
        )

    def held_against(self, rows):
        return starts_in(rows, holders(rows), self.starts)

    def counted(self, *states):
        return [trial for trial in holders(self.rows) if trial.state in states]

    def fill(self, rows):
        change = refill(rows, self.trials, self.held_against(rows), CHUNK)
        for slot, start in change.queue:
            self.add(place=slot, **({} if start is None else {"start_with": start, "fixed": self.starts[start]}))
        for trial in change.withdraw:
            row = self.rows[trial.number]
            row.user_attrs["withdrawn"] = True
            if row.state in OPEN:
                row.state = TrialState.FAIL

    @rule()
    def look_for_work(self):
        self.events += 1
        self.fill(self.rows)
        starts = self.held_against(self.rows)
        if starts.untried:  # there must be no room for them
            assert len(holders(self.rows)) >= self.trials
            assert not any(map(starts.gives_way, holders(self.rows)))

    @rule()
    def read_the_queue(self):
        self.seen = list(self.rows)

    @precondition(lambda self: self.seen is not None)
    @rule()
    def look_for_work_as_it_was_read(self):
        self.events += 1
        self.fill(self.seen)
        self.seen = None

    @precondition(lambda self: self.counted(TrialState.WAITING))
    @rule(data=st.data())
    def claim(self, data):
        data.draw(st.sampled_from(self.counted(TrialState.WAITING))).state = TrialState.RUNNING

    @precondition(lambda self: self.running())
    @rule(data=st.data(), state=st.sampled_from([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]))
    def end(self, data, state):
        data.draw(st.sampled_from(self.running())).state = state

    def running(self):
        """Return the rows that are RUNNING, also those whose place a successor has taken: their workers may be back."""
        return [trial for trial in self.rows if trial.state == TrialState.RUNNING]

    @precondition(lambda self: self.counted(TrialState.RUNNING))
    @rule(data=st.data(), succeeded=st.booleans(), ended=st.booleans(), twice=st.booleans())
    def die_or_be_given_back(self, data, succeeded, ended, twice):
        """Without `succeeded` its retries are spent; without `ended` who took its place was killed in between."""
        trial = data.draw(st.sampled_from(self.counted(TrialState.RUNNING)))
        keys = ("place", "start_with")
        for _ in range(succeeded * (1 + twice)):
            self.events += 1
            kept = {k: trial.user_attrs[k] for k in keys if k in trial.user_attrs}
            self.add(retry_of=trial.number, **kept, fixed={**trial.system_attrs.get("fixed_params", {}), "drawn": 0.5})
        if ended or not succeeded:
            trial.state = TrialState.FAIL

    @rule(trials=st.integers(1, 9))
    def change_trials(self, trials):
        self.trials = trials

    @rule(starts=st.sampled_from(LISTS))
    def change_start_with(self, starts):
        self.starts = starts

    @invariant()
    def a_place_is_held_once(self):
        held = [trial.user_attrs["place"] for trial in holders(self.rows)]
        assert len(held) == len(set(held))

    @invariant()
    def rows_are_few(self):
        assert len(self.rows) <= self.events * (CHUNK + 1)

    def teardown(self):
        """Let one worker do what is left: it must come to an end, at exactly `trials`."""
        for trial in self.running():
            trial.state = TrialState.COMPLETE
        done, rows = len(holders(self.rows)) - len(self.counted(TrialState.WAITING)), len(self.rows)
        for _ in range(9 + len(self.rows)):
            if count(holders(self.rows), self.trials).unfinished == 0:
                break
            if not self.counted(TrialState.WAITING):
                self.fill(self.rows)
            self.counted(TrialState.WAITING)[0].state = TrialState.COMPLETE
        self.fill(self.rows)
        assert count(holders(self.rows), self.trials).finished == max(self.trials, done)
        assert len(self.rows) - rows <= self.trials
        assert not [trial for trial in self.rows if trial.state in OPEN]


TestBudget = Budget.TestCase
TestBudget.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)
