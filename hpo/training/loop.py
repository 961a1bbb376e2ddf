"""THE epoch loop. It serves search, refit and whatever else trains, and knows neither Optuna nor MLflow.

It asks for members and reports on them through two callables: `ask(n)` gives up to n new members, and
`report(stack, member, metrics)` says whether a member goes on.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from hpo.errors import Interrupted
from hpo.seeds import derive
from hpo.training.batches import Batches
from hpo.training.stack import Member, Stack, Stacks

Ask = Callable[[int], Iterable[Member]]
OnEpoch = Callable[[Stack, Member, dict[str, float]], bool]


def train(
    stacks: Stacks,
    train_feed: Batches,
    valid_feed: Batches | None,
    *,
    epochs: int,
    seed: int,
    ask: Ask,
    report: OnEpoch,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Train whatever `ask` gives, `epochs` epochs each, until it gives nothing and the stacks are empty.

    After each epoch `report` gets the member and its metrics over the whole validation split: `train_loss` (the mean
    over the epoch's batches), `valid_loss`, `valid_<metric>`. Raises Interrupted, between two batches, as soon as
    `stopping` says so.
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
            results = _epoch(
                stack, train_feed, valid_feed, order(len(train_feed), seed, rounds[stack] % epochs), stopping
            )
            for member, result in zip(list(stack.members), results, strict=True):
                member.history.append(result)
                member.epoch += 1
                if not report(stack, member, result) or member.epoch >= epochs or member.fault is not None:
                    stack.leave(member)
                    known.discard(member)


def _round(members: Sequence[Member]) -> int:
    """Return the round in which a stack of new members begins: those that go on from a checkpoint, where they were."""
    rounds = {member.joined + member.epoch for member in members}
    return rounds.pop() if len(rounds) == 1 else 0


def _epoch(
    stack: Stack, train_feed: Batches, valid_feed: Batches | None, rows: Tensor, stopping: Callable[[], bool]
) -> list[dict[str, float]]:
    """Train every member of `stack` on all batches of `rows` (N,); return their metrics."""
    losses, sizes = [], []
    for inputs, targets in train_feed.batches(stack.members[0].params["batch_size"], rows):
        if stopping():
            raise Interrupted("interrupted")
        losses.append(stack.step(inputs, targets))
        sizes.append(len(targets))
    train_losses = _mean(losses, sizes)
    valid = stack.evaluate(valid_feed) if valid_feed is not None else [{} for _ in train_losses]
    return [
        {"train_loss": train_loss} | {f"valid_{name}": value for name, value in metrics.items()}
        for train_loss, metrics in zip(train_losses, valid, strict=True)
    ]


def _mean(losses: Sequence[Tensor], sizes: Sequence[int]) -> list[float]:
    """Return the mean over all rows of `losses`, each (K,) and the mean over its batch of so many rows."""
    weights = torch.tensor(sizes, dtype=losses[0].dtype, device=losses[0].device)
    return (weights @ torch.stack(losses) / weights.sum()).tolist()


def order(n_rows: int, seed: int, rounds: int) -> Tensor:
    """Return the permutation (N,) of the training rows in one round: the same for all members of a stack.

    Rounds repeat after a trial's length, so that a trial that begins with a stack, or takes the place of one that ran
    to its end, sees the batches in the order in which it would have seen them alone.
    """
    generator = torch.Generator().manual_seed(derive(seed, "order", rounds))
    return torch.randperm(n_rows, generator=generator)
