"""THE epoch loop, with a stack that writes down what it was given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpo.errors import Interrupted
from hpo.study.data import Split
from hpo.training.batches import Batches
from hpo.training.loop import order, train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Stack, Stacks, Task
from tests.stacking import CPU, INFO, Built, asking, keep_all, sines, trained

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

    def checkpoint(self, member):
        raise AssertionError("the loop keeps nothing")

    def evaluate(self, batches):
        self.evaluated.append(batches)
        if self._fault_at is not None:
            for member in self._members:
                member.fault = "out of memory" if (member.number, member.epoch) == self._fault_at else member.fault
        return [{} if m.fault else {"loss": 0.5, "accuracy": m.number / 10} for m in self._members]

    def module(self, member):
        return nn.Identity()


def rows(n=N_ROWS):
    targets = torch.arange(n, dtype=torch.float32)
    return Batches(Split(inputs={"x": torch.arange(n), "y": -torch.arange(n)}, targets=targets), torch.device("cpu"))


def members(*numbers, batch_size=BATCH_SIZE):
    return [Member(number=n, seed=n, params={"batch_size": batch_size}) for n in numbers]


class Queue:
    """Gives out members as a search would, takes reports, and drops whom it is told to."""

    def __init__(self, waiting, drop=()):
        self.waiting, self.drop, self.asked, self.reports = list(waiting), set(drop), [], []
        self.batches = []

    def ask(self, n):
        self.asked.append(n)
        return [self.waiting.pop(0) for _ in range(min(n, len(self.waiting)))]

    def report(self, stack, results):
        assert list(results) == list(stack.members)
        self.batches.append([member.number for member in results])
        self.reports += [(member.number, member.epoch, metrics) for member, metrics in results.items()]
        return [member for member in results if (member.number, member.epoch) not in self.drop]


def go(stack, queue, valid=None, epochs=3, seed=0, **more):
    stacks = stack if isinstance(stack, Stacks) else SingleStack(stack)
    train(stacks, rows(), valid, epochs=epochs, seed=seed, ask=queue.ask, report=queue.report, **more)


def orders_of(stack):
    """Return the rows of each of a notebook's rounds, as they came."""
    taken = [row for _, x, _ in stack.rounds for row in x]
    return [taken[start : start + N_ROWS] for start in range(0, len(taken), N_ROWS)]


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
    go(stack, queue, rows(3))
    assert epochs_of(queue, 1) == [1, 2]
    assert epochs_of(queue, 2) == [1, 2, 3]
    assert [set(metrics) for n, epoch, metrics in queue.reports if (n, epoch) == (1, 2)] == [{"train_loss"}]


def test_the_members_of_a_stack_are_reported_together_once_an_epoch():
    queue = Queue(members(1, 2, 3), drop={(1, 1)})
    go(Notebook(capacity=2), queue, epochs=2)
    assert queue.batches == [[1, 2], [2, 3], [3]]


def test_nothing_to_train_is_nothing_done():
    stack, queue = Notebook(), Queue([])
    go(stack, queue)
    assert (stack.rounds, queue.reports, queue.asked) == ([], [], [2])


def test_metrics_are_of_the_validation_split_and_kept_in_the_members_history():
    stack, (only,), valid = Notebook(), members(4), rows(3)
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
    orders = orders_of(stack)
    assert [sorted(each) for each in orders] == [list(range(N_ROWS))] * 3
    assert len({tuple(each) for each in orders}) == 3
    assert all(x == targets for _, x, targets in stack.rounds)


def test_the_same_seed_gives_the_same_batches_and_another_gives_others():
    stacks = [Notebook() for _ in range(3)]
    for stack, seed in zip(stacks, (5, 5, 6), strict=True):
        go(stack, Queue(members(1)), seed=seed)
    assert stacks[0].rounds == stacks[1].rounds
    assert stacks[0].rounds != stacks[2].rounds


def test_it_stops_between_two_batches():
    stack, queue = Notebook(), Queue(members(1))
    with pytest.raises(Interrupted, match="interrupted; run the same command again"):
        go(stack, queue, stopping=lambda: len(stack.rounds) == 4)
    assert len(stack.rounds) == 4
    assert epochs_of(queue, 1) == [1]


def subnormals_are_zero():
    return bool(torch.tensor([1e-30]) * torch.tensor([1e-10]) == 0)


class Subnormals(Notebook):
    """Writes down whether numbers too small for full precision are 0 in its steps and evaluations."""

    def __init__(self):
        super().__init__()
        self.are_zero = []

    def _look(self):
        self.are_zero.append(subnormals_are_zero())

    def step(self, inputs, targets):
        self._look()
        return super().step(inputs, targets)

    def evaluate(self, batches):
        self._look()
        return super().evaluate(batches)


@pytest.mark.parametrize("was", [False, True])
def test_subnormal_numbers_are_zero_while_it_trains_and_as_they_were_otherwise(was):
    if not torch.set_flush_denormal(was):
        pytest.skip("this CPU always computes with subnormal numbers")
    stack, outside = Subnormals(), []

    def report(stack, results):
        outside.append(subnormals_are_zero())
        return results

    def trained(number, **more):
        ask = Queue(members(number)).ask
        train(SingleStack(stack), rows(), rows(4), epochs=2, seed=7, ask=ask, report=report, **more)

    try:
        trained(1)
        with pytest.raises(Interrupted):
            trained(2, stopping=lambda: len(stack.are_zero) > 8)
        outside.append(subnormals_are_zero())
    finally:
        torch.set_flush_denormal(False)
    assert stack.are_zero == [True] * 9
    assert outside == [was] * 3


def test_rounds_repeat_after_a_trials_length_and_members_note_in_which_they_joined():
    """Who takes the place of one that ran to its end sees the batches that it would see alone; no other does."""
    stack, waiting = Notebook(capacity=2), members(1, 2, 3, 4, 5)
    go(stack, Queue(waiting, drop={(2, 1)}), epochs=3)
    alone = [order(N_ROWS, 0, r).tolist() for r in range(3)]
    assert orders_of(stack) == [alone[r % 3] for r in range(7)]
    present = [numbers for numbers, _, _ in stack.rounds[::3]]
    assert present == [(1, 2), (1, 3), (1, 3), (3, 4), (4, 5), (4, 5), (5,)]
    assert [member.joined for member in waiting] == [0, 0, 1, 3, 4]


def test_a_stack_that_was_empty_begins_with_the_first_round():
    stack, waiting = Notebook(capacity=1), members(1, 2)
    go(stack, Queue(waiting, drop={(1, 2)}), epochs=3)
    assert [member.joined for member in waiting] == [0, 0]
    assert orders_of(stack) == [order(N_ROWS, 0, r).tolist() for r in (0, 1, 0, 1, 2)]


class Pair(Stacks):
    """Two notebooks, for odd and for even members, that are trained side by side."""

    def __init__(self):
        self.both = {1: Notebook(), 0: Notebook()}

    @property
    def free(self):
        return 3 - sum(len(stack.members) for stack in self.active)

    def join(self, members):
        for member in members:
            self.both[member.number % 2].join(member)

    @property
    def active(self):
        return [stack for stack in self.both.values() if stack.members]


def test_stacks_side_by_side_have_batch_sizes_and_rounds_of_their_own():
    pair = Pair()
    queue = Queue([member for n in (1, 2, 3, 4, 6) for member in members(n, batch_size=4 + (n + 1) % 2)], drop={(2, 1)})
    go(pair, queue, epochs=2)
    odd, even = pair.both[1], pair.both[0]
    assert [len(targets) for _, _, targets in odd.rounds] == [4, 4, 2] * 2
    assert [numbers for numbers, _, _ in even.rounds[::2]] == [(2,), (4,), (4, 6), (6,)]
    assert orders_of(odd) == [order(N_ROWS, 0, r).tolist() for r in (0, 1)]
    assert [epochs_of(queue, n) for n in (1, 2, 3, 4, 6)] == [[1, 2], [1], [1, 2], [1, 2], [1, 2]]


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


def test_members_that_go_on_see_the_rounds_that_they_would_have_seen():
    targets = torch.arange(6.0)
    batches = Batches(Split(inputs={"x": targets.unsqueeze(1)}, targets=targets), CPU)

    def rounds(members, epochs=4):
        notebook = Notebook(capacity=2)
        train(
            SingleStack(notebook),
            batches,
            None,
            epochs=epochs,
            seed=3,
            ask=asking(members),
            report=keep_all,
        )
        return [tuple(targets) for _, _, targets in notebook.rounds]

    def member(number, epoch=0, joined=0):
        return Member(number=number, seed=0, params={"batch_size": 6}, epoch=epoch, joined=joined)

    whole = rounds([member(1), member(2)])
    assert len(whole) == 4
    assert rounds([member(1, epoch=2), member(2, epoch=2)]) == whole[2:]
    assert rounds([member(1, epoch=1, joined=2)]) == [whole[3], whole[0], whole[1]]
    late = member(2, epoch=3, joined=0)  # its stack begins with round 0, since they do not agree
    assert rounds([member(1), late]) == whole
    assert late.joined == 1


class Thawing(nn.Module):
    """A backbone that is trained from step 5 on: by requires_grad, or else by what forward lets through."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.steps = how, 0
        self.backbone, self.last = nn.Linear(6, 4), nn.Linear(4, 1)
        self.backbone.requires_grad_(how == "detach")

    def train(self, mode: bool = True) -> "Thawing":
        if self.how == "train" and mode:
            self.backbone.requires_grad_(self.steps >= 5)
        return super().train(mode)

    def forward(self, x):
        if self.how == "forward" and self.training:
            self.backbone.requires_grad_(self.steps >= 5)
        h = self.backbone(x).tanh()
        h = h.detach() if self.how == "detach" and self.steps < 5 else h
        self.steps += self.training
        return self.last(h)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adadelta"])
@pytest.mark.parametrize("capacity", [1, 4])
@pytest.mark.parametrize("how", ["train", "forward"])
def test_a_frozen_layer_is_trained_once_it_is_no_more_frozen(how, capacity, optimizer):
    def weights(how):
        objective = Built(lambda params: Thawing(how))
        task = Task(objective=objective, info=INFO, device=CPU, n_rows=20, epochs=4)
        params = {"optimizer": optimizer, "learning_rate": 0.01, "batch_size": 4, "max_grad_norm": 0.1}
        several = [Member(number=n, seed=n, params=params) for n in range(capacity)]
        return trained(LoopStack(task, capacity), several, sines(20), sines(5, seed=1), epochs=4)

    got, expected = weights(how), weights("detach")
    for number, state in expected.items():
        assert got[number].keys() == state.keys()
        for name, weight in state.items():
            torch.testing.assert_close(got[number][name], weight, rtol=0, atol=1e-12)
