"""THE epoch loop, with a stack that writes down what it was given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpo.data import Split
from hpo.errors import Interrupted
from hpo.stack import Member, Stack
from hpo.training import batches, order, train

N_ROWS, BATCH_SIZE = 10, 4


class Notebook(Stack):
    """Trains nothing. A member's loss on a batch is its mean target times the member's number."""

    def __init__(self, capacity=2, fault_at=None):
        self.capacity, self._members, self._fault_at = capacity, [], fault_at
        self.rounds, self.evaluated = [], []

    @property
    def members(self):
        return self._members

    def join(self, member):
        assert len(self._members) < self.capacity
        self._members.append(member)

    def leave(self, member):
        self._members.remove(member)

    def step(self, inputs, targets):
        self.rounds.append((tuple(m.number for m in self._members), inputs[0].tolist(), targets.tolist()))
        return torch.tensor([targets.mean() * m.number for m in self._members])

    def evaluate(self, split):
        self.evaluated.append(split)
        if self._fault_at is not None:
            for member in self._members:
                member.fault = "out of memory" if (member.number, member.epoch) == self._fault_at else member.fault
        return [{} if m.fault else {"loss": 0.5, "accuracy": m.number / 10} for m in self._members]

    def module(self, member):
        return nn.Identity()


def split(n=N_ROWS):
    return Split(inputs={"x": torch.arange(n), "y": -torch.arange(n)}, targets=torch.arange(n, dtype=torch.float32))


def members(*numbers):
    return [Member(number=n, seed=n, params={}) for n in numbers]


class Queue:
    """Gives out members as a search would, takes reports, and drops whom it is told to."""

    def __init__(self, waiting, drop=()):
        self.waiting, self.drop, self.asked, self.reports = list(waiting), set(drop), [], []

    def ask(self, n):
        self.asked.append(n)
        return [self.waiting.pop(0) for _ in range(min(n, len(self.waiting)))]

    def report(self, member, metrics):
        self.reports.append((member.number, member.epoch, metrics))
        return (member.number, member.epoch) not in self.drop


def go(stack, queue, valid=None, epochs=3, seed=0, **more):
    more |= {"batch_size": BATCH_SIZE, "epochs": epochs, "seed": seed}
    train(stack, split(), valid, ask=queue.ask, report=queue.report, **more)


def epochs_of(queue, number):
    return [epoch for n, epoch, _ in queue.reports if n == number]


def test_each_member_is_trained_its_epochs_and_no_more():
    stack, waiting = Notebook(), members(1, 2, 3)
    queue = Queue(waiting)
    go(stack, queue)
    assert [epochs_of(queue, n) for n in (1, 2, 3)] == [[1, 2, 3]] * 3
    assert [m.epoch for m in waiting] == [3, 3, 3]
    assert stack.members == []


def test_it_asks_for_as_many_as_there_is_room_for_until_there_are_none():
    queue = Queue(members(1, 2, 3), drop={(1, 1)})
    go(Notebook(capacity=2), queue, epochs=2)
    assert queue.asked == [2, 1, 1, 2]


def test_who_is_dropped_leaves_at_once_and_the_next_takes_its_place():
    stack, queue = Notebook(capacity=2), Queue(members(1, 2, 3), drop={(1, 1)})
    go(stack, queue, epochs=2)
    assert [numbers for numbers, _, _ in stack.rounds[::3]] == [(1, 2), (2, 3), (3,)]
    assert [epochs_of(queue, n) for n in (1, 2, 3)] == [[1], [1, 2], [1, 2]]


def test_a_member_with_a_fault_is_reported_once_and_leaves():
    stack, queue = Notebook(capacity=2, fault_at=(1, 1)), Queue(members(1, 2))
    go(stack, queue, split(3))
    assert epochs_of(queue, 1) == [1, 2]
    assert epochs_of(queue, 2) == [1, 2, 3]
    assert [set(metrics) for n, epoch, metrics in queue.reports if (n, epoch) == (1, 2)] == [{"train_loss"}]


def test_nothing_to_train_is_nothing_done():
    stack, queue = Notebook(), Queue([])
    go(stack, queue)
    assert (stack.rounds, queue.reports, queue.asked) == ([], [], [2])


def test_metrics_are_of_the_validation_split_and_kept_in_the_members_history():
    stack, (only,), valid = Notebook(), members(4), split(3)
    queue = Queue([only])
    go(stack, queue, valid, epochs=2)
    assert all(each is valid for each in stack.evaluated)
    (_, _, metrics), _ = queue.reports
    assert metrics == {"train_loss": pytest.approx(4 * 4.5), "valid_loss": 0.5, "valid_accuracy": 0.4}
    assert only.history == [metrics for _, _, metrics in queue.reports]


def test_without_a_validation_split_nothing_is_evaluated():
    stack, queue = Notebook(), Queue(members(1))
    go(stack, queue, None)
    assert stack.evaluated == []
    assert all(set(metrics) == {"train_loss"} for _, _, metrics in queue.reports)


def test_train_loss_is_the_mean_over_rows_not_over_batches():
    stack, queue = Notebook(), Queue(members(2))
    go(stack, queue, epochs=1)
    means = [sum(targets) / len(targets) for _, _, targets in stack.rounds]
    ((_, _, metrics),) = queue.reports
    assert metrics["train_loss"] == pytest.approx(2 * 4.5)
    assert 2 * sum(means) / len(means) != pytest.approx(2 * 4.5)


def test_every_round_goes_over_each_row_once_in_an_order_of_its_own():
    stack = Notebook()
    go(stack, Queue(members(1)), epochs=3)
    rows = [[row for _, x, _ in stack.rounds[start : start + 3] for row in x] for start in (0, 3, 6)]
    assert [sorted(each) for each in rows] == [list(range(N_ROWS))] * 3
    assert len({tuple(each) for each in rows}) == 3
    assert all(x == targets for _, x, targets in stack.rounds)


def test_the_same_seed_gives_the_same_batches_and_another_gives_others():
    stacks = [Notebook() for _ in range(3)]
    for stack, seed in zip(stacks, (5, 5, 6), strict=True):
        go(stack, Queue(members(1)), seed=seed)
    assert stacks[0].rounds == stacks[1].rounds
    assert stacks[0].rounds != stacks[2].rounds


def test_it_stops_between_two_batches():
    stack, queue = Notebook(), Queue(members(1))
    with pytest.raises(Interrupted, match="interrupted"):
        go(stack, queue, stopping=lambda: len(stack.rounds) == 4)
    assert len(stack.rounds) == 4
    assert epochs_of(queue, 1) == [1]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(0, 1000), st.integers(0, 50))
def test_an_order_is_a_permutation_that_seed_and_round_decide(n, seed, rounds):
    rows = order(n, seed, rounds)
    assert sorted(rows.tolist()) == list(range(n))
    assert torch.equal(rows, order(n, seed, rounds))


def test_orders_of_other_rounds_and_seeds_differ_and_leave_torchs_own_stream_alone():
    state = torch.get_rng_state()
    seen = {tuple(order(50, seed, r).tolist()) for seed in range(10) for r in range(10)}
    assert len(seen) == 100
    assert torch.equal(state, torch.get_rng_state())


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.integers(1, 40))
def test_batches_cover_each_row_once_and_keep_inputs_and_targets_together(n, batch_size):
    rows = order(n, 0, 0)
    made = list(batches(split(n), batch_size, rows))
    assert torch.cat([targets for _, targets in made]).tolist() == rows.tolist()
    for inputs, targets in made:
        assert torch.equal(inputs[0], targets.long())
        assert torch.equal(inputs[1], -targets.long())
    assert [len(targets) for _, targets in made[:-1]] == [batch_size] * (len(made) - 1)
    last = len(made[-1][1])
    assert 1 <= last <= batch_size + 1
    assert last > 1 or n == 1 or batch_size == 1  # BatchNorm cannot train on one row
