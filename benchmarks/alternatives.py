"""What decides the documented figures of rows 3 and 5: their recipes in plain torch, with one thing changed at a time.

    python benchmarks/alternatives.py [--row 5] [--only NAME ...] [--seeds 10]

As the documents train: torch's DataLoader shuffles, by the generator that the weights were drawn from. Of row 5 MSE of
training (mean over the batches) in the first and the last epoch, and of validation: of all its rows, and of those near,
without a feature beyond ten deviations. Of row 3 R2 of training and of test. Each is the median of all seeds and their
range, then the first seed's, which is row 5's own. `rounding` trains that seed alone, with deviations that differ in
the seventh digit.
"""

import argparse
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from reproduction import SEED, objective_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

FAR = 10.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`biased`: the deviation without Bessel's correction."""

    widths: tuple[int, ...]
    optimizer: type[torch.optim.Optimizer]
    learning_rate: float
    batch_size: int
    epochs: int
    biased: bool = False
    drop_last: bool = False
    shuffle: bool = True
    init: str = "torch"
    rounding: bool = False


THREE = Recipe(widths=(24, 24), optimizer=torch.optim.Adam, learning_rate=1e-3, batch_size=64, epochs=10, biased=True)
FIVE = Recipe(widths=(50, 40), optimizer=torch.optim.SGD, learning_rate=0.02, batch_size=32, epochs=20)


def alternatives(recipe: Recipe) -> dict[str, Recipe]:
    """Return what is changed in either row."""
    bessel = "with Bessel's correction" if recipe.biased else "without Bessel's correction"
    return {
        "as documented": recipe,
        bessel: replace(recipe, biased=not recipe.biased),
        "last batch dropped": replace(recipe, drop_last=True),
        "rows in file order": replace(recipe, shuffle=False),
        "He's initialisation": replace(recipe, init="he"),
        "Glorot's initialisation": replace(recipe, init="glorot"),
    }


RECIPES: Mapping[int, Mapping[str, Recipe]] = {
    3: alternatives(THREE) | {"batches of 32": replace(THREE, batch_size=32), "12 epochs": replace(THREE, epochs=12)},
    5: alternatives(FIVE)
    | {
        "rounding": replace(FIVE, rounding=True),
        "rate 0.01": replace(FIVE, learning_rate=0.01),
        "rate 0.01 and rounding": replace(FIVE, learning_rate=0.01, rounding=True),
    },
}


@dataclass(frozen=True)
class Rows:
    """Features (N, 8), unscaled, and targets (N, 1): of training, and of validation (row 5) or test (row 3)."""

    x: Tensor
    y: Tensor
    other_x: Tensor
    other_y: Tensor

    def scaled(self, recipe: Recipe, nudge: int) -> "Rows":
        """`nudge`: by how many steps of 1e-7 the deviations are off."""
        mean, deviation = self.x.mean(0), self.x.std(0, correction=0 if recipe.biased else 1)
        deviation = deviation * (1 + nudge * 1e-7)
        return Rows((self.x - mean) / deviation, self.y, (self.other_x - mean) / deviation, self.other_y)

    @property
    def near(self) -> Tensor:
        """Which of the other rows have all features within FAR deviations, once they are scaled."""
        return (self.other_x.abs() <= FAR).all(1)


def rows_of(row: int) -> Rows:
    if row == 3:
        data = objective_of("california_housing").data().for_refit()
        return Rows(data.train.inputs["features"], data.train.targets, data.test.inputs["features"], data.test.targets)
    data = objective_of("california_housing", model="mlp", split="quarter").data()
    return Rows(data.train.inputs["features"], data.train.targets, data.valid.inputs["features"], data.valid.targets)


def network(recipe: Recipe) -> nn.Sequential:
    one, two = recipe.widths
    layers = nn.Sequential(nn.Linear(8, one), nn.ReLU(), nn.Linear(one, two), nn.ReLU(), nn.Linear(two, 1))
    if recipe.init != "torch":
        fill = nn.init.kaiming_normal_ if recipe.init == "he" else nn.init.xavier_uniform_
        for linear in layers[::2]:
            fill(linear.weight)
            nn.init.zeros_(linear.bias)
    return layers


def trained(recipe: Recipe, rows: Rows, seed: int) -> tuple[nn.Module, list[float]]:
    """Return the network and the mean of its batches' losses by epoch."""
    n = range(len(rows.x))  # their numbers alone go through the DataLoader: the same order, at half the time
    loader = DataLoader(
        n, recipe.batch_size, shuffle=recipe.shuffle, drop_last=recipe.drop_last, collate_fn=torch.tensor
    )
    torch.manual_seed(seed)
    model, means = network(recipe), []
    optimizer = recipe.optimizer(model.parameters(), lr=recipe.learning_rate)
    for _ in range(recipe.epochs):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = F.mse_loss(model(rows.x[batch]), rows.y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(statistics.fmean(losses))
    return model, means


def figures(row: int, recipe: Recipe, rows: Rows, seed: int) -> list[float]:
    """Return the figures under HEADS."""
    model, means = trained(recipe, rows, seed)
    with torch.no_grad():
        squared, other = (model(rows.x) - rows.y) ** 2, (model(rows.other_x) - rows.other_y) ** 2
    if row == 3:
        pairs = ((squared, rows.y), (other, rows.other_y))
        return [1 - (each.mean() / y.var(correction=0)).item() for each, y in pairs]
    return [means[0], means[-1], other.mean().item(), other[rows.near].mean().item()]


HEADS = {3: ("R2, train", "R2, test"), 5: ("first epoch", "last epoch", "validation", "validation, near")}


def cells(found: Sequence[Sequence[float]]) -> list[str]:
    return [*map(spread, zip(*found, strict=True)), " ".join(f"{value:.4f}" for value in found[0])]


def spread(values: Sequence[float]) -> str:
    """Return median and range, and how many seeds diverged."""
    numbers = [value for value in values if not math.isnan(value)] or [math.nan]
    diverged = sum(map(math.isnan, values))
    said = f"{statistics.median(numbers):.3f} ({min(numbers):.3f} to {max(numbers):.3f})"
    return f"{said}, {diverged} diverged" if diverged else said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", type=int, choices=RECIPES, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the recipes, by their names in the table")
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    row, recipes = arguments.row, RECIPES[arguments.row]
    if unknown := [name for name in arguments.only or () if name not in recipes]:
        parser.error(f"row {row} has no recipe {unknown[0]!r}; it has {', '.join(recipes)}")
    rows = rows_of(row)
    if row == 5:
        near = rows.scaled(FIVE, 0).near
        print(f"{(~near).sum()} of {len(near)} validation districts are beyond {FAR:g} deviations\n")
    heads = ("recipe", *HEADS[row], f"seed {SEED}", "seconds")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in arguments.only or recipes:
        recipe, start = recipes[name], time.perf_counter()
        runs = [(SEED, n) if recipe.rounding else (SEED + n, 0) for n in range(arguments.seeds)]
        found = [figures(row, recipe, rows.scaled(recipe, nudge), seed) for seed, nudge in runs]
        print(f"| {' | '.join([name, *cells(found), f'{time.perf_counter() - start:.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
