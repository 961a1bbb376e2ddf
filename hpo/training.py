"""THE epoch loop. It serves search, refit and whatever else trains, and knows neither Optuna nor MLflow.

It asks for members and reports on them through two callables: `ask(n)` gives up to n new members, and
`report(member, metrics)` says whether a member goes on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hpo.data import Split
from hpo.errors import Interrupted
from hpo.seeds import derive
from hpo.stack import Member, Stack

Ask = Callable[[int], Iterable[Member]]
Report = Callable[[Member, dict[str, float]], bool]


def train(
    stack: Stack,
    train_split: Split,
    valid_split: Split | None,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    ask: Ask,
    report: Report,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Train whatever `ask` gives, `epochs` epochs each, until it gives nothing and the stack is empty.

    After each epoch `report` gets the member and its metrics over the whole validation split: `train_loss` (the mean
    over the epoch's batches), `valid_loss`, `valid_<metric>`. The splits are on the stack's device, preprocessed.
    Raises Interrupted, between two batches, as soon as `stopping` says so.
    """
    rounds = 0
    while True:
        for member in ask(stack.capacity - len(stack.members)):
            stack.join(member)
        if not stack.members:
            return
        losses, sizes = [], []
        for inputs, targets in batches(train_split, batch_size, order(len(train_split), seed, rounds % epochs)):
            if stopping():
                raise Interrupted("interrupted")
            losses.append(stack.step(inputs, targets))
            sizes.append(len(targets))
        train_losses = _mean(losses, sizes)
        valid = stack.evaluate(valid_split) if valid_split is not None else [{} for _ in train_losses]
        for member, train_loss, metrics in zip(list(stack.members), train_losses, valid, strict=True):
            result = {"train_loss": train_loss} | {f"valid_{name}": value for name, value in metrics.items()}
            member.history.append(result)
            member.epoch += 1
            if not report(member, result) or member.epoch >= epochs or member.fault is not None:
                stack.leave(member)
        rounds += 1


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


def batches(split: Split, batch_size: int, rows: Tensor) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
    """Yield (inputs, targets) of `batch_size` rows each, in the order of `rows` (N,); the last batch may be smaller.

    All rows are put in order at once: slicing them afterwards copies nothing.
    """
    sizes = [batch_size] * (len(rows) // batch_size)
    rest = len(rows) - sum(sizes)
    if rest == 1 and sizes:
        sizes[-1] += 1  # BatchNorm cannot train on one row: the one that is left over joins the batch before it
    elif rest:
        sizes.append(rest)
    rows = rows.to(split.targets.device)
    columns = [x[rows].split(sizes) for x in (*split.inputs.values(), split.targets)]
    for *inputs, targets in zip(*columns, strict=True):
        yield inputs, targets
