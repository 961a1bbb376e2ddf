"""THE epoch loop. It serves search, refit and whatever else trains, and knows neither Optuna nor MLflow.

It asks for members and reports on them through two callables, both for many at once: `ask(n)` returns up to n new
members, `report(stack, results)` which members of a stack to keep after an epoch. As Vizier's suggest and update.
"""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hpo.seeds import derive
from hpo.training.batches import Batches
from hpo.training.stack import Member, Stack, Stacks

Ask = Callable[[int], Iterable[Member]]
Results = Mapping[Member, dict[str, float]]
"""An epoch's metrics of all members of a stack, in the order of its members."""
OnEpoch = Callable[[Stack, Results], Collection[Member]]
"""Takes a stack's results of an epoch; returns the members to keep training."""


def train(
    stacks: Stacks,
    train_batches: Batches,
    valid_batches: Batches | None,
    *,
    epochs: int,
    seed: int,
    ask: Ask,
    report: OnEpoch,
    stopping: Callable[[], bool] = lambda: False,
    orders: Sequence[int] | None = None,
) -> None:
    """Train whatever `ask` returns, `epochs` epochs each, until it returns nothing and the stacks are empty.

    After each epoch of a stack `report` is called once, with the metrics of each of its members: `train_loss` (the mean
    over the epoch's batches), and over the whole validation split `valid_loss` and `valid_<metric>`. A member that it
    does not return, that has a fault, or that has trained for `epochs` epochs leaves its stack. Raises Interrupted,
    between two batches, as soon as `stopping` says so. `orders` are the rounds whose orders of rows a stack's rounds
    have; by default their own.
    """
    rounds: dict[Stack, int] = {}
    known: set[Member] = set()
    while True:
        stacks.join(ask(stacks.free))
        if not stacks.active:
            return
        for stack in stacks.active:
            new = [member for member in stack.members if member not in known]
            known.update(new)
            rounds[stack] = _round(new) if len(new) == len(stack.members) else rounds[stack] + 1
            for member in new:
                member.joined = (rounds[stack] - member.epoch) % epochs if member.epoch else rounds[stack]
            of_round = rounds[stack] % epochs if orders is None else orders[rounds[stack]]
            rows = order(len(train_batches), seed, of_round)
            with _no_subnormals():
                results = _epoch(stack, train_batches, valid_batches, rows, stopping)
            for member, metrics in results.items():
                member.history.append(metrics)
                member.rounds.append(of_round)
                member.epoch += 1
            kept = set(report(stack, results))
            for member in results:
                if member not in kept or member.epoch >= epochs or member.fault is not None:
                    stack.leave(member)
                    known.discard(member)


@contextmanager
def _no_subnormals() -> Iterator[None]:
    """Have this thread's CPU take numbers below 1e-38 (in double precision: 2e-308) for 0 within this.

    A CPU computes with them many times slower, and training is full of them: what an optimizer remembers of a unit that
    has died shrinks step by step. TensorFlow and XLA do so too.
    """
    was = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)  # False where a CPU cannot: then they are slow
    try:
        yield
    finally:
        torch.set_flush_denormal(was)


def _round(members: Sequence[Member]) -> int:
    """Return the round in which a stack of new members begins: the one after their checkpoints', if they have any."""
    rounds = {member.joined + member.epoch for member in members}
    return rounds.pop() if len(rounds) == 1 else 0


def _epoch(
    stack: Stack, train_batches: Batches, valid_batches: Batches | None, rows: Tensor, stopping: Callable[[], bool]
) -> dict[Member, dict[str, float]]:
    """Train every member of `stack` on all batches of `rows` (N,); return their metrics."""
    train_losses = stack.epoch(train_batches, rows, stopping)
    valid = stack.evaluate(valid_batches) if valid_batches is not None else [{} for _ in train_losses]
    return {
        member: {"train_loss": train_loss} | {f"valid_{name}": value for name, value in metrics.items()}
        for member, train_loss, metrics in zip(stack.members, train_losses, valid, strict=True)
    }


def order(n_rows: int, seed: int, rounds: int) -> Tensor:
    """Return the permutation (N,) of the training rows in one round: the same for all members of a stack.

    Rounds repeat after a trial's length, so that a trial that begins with a stack, or takes the place of one that ran
    to its end, sees the batches in the order in which it would have seen them alone.
    """
    generator = torch.Generator().manual_seed(derive(seed, "order", rounds))
    return torch.randperm(n_rows, generator=generator)
