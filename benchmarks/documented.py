"""Every documented model trained as its document says, beside the figure that the document gives.

    python benchmarks/documented.py [--only ROW ...] [--seeds 10] [--seed 42]

Rows are those of the user's table (1 to 19). What is random is trained with `--seeds` seeds, `--seed` and those that
follow it: each is an initialisation and an order of the rows, the split stays the document's. Rows 16, 18 and 19 have
three at most. Rows 1 to 14 take about a quarter of an hour on one CPU core, all of them over an hour. Data comes from
HPO_DATA_HOME. `--picture FILE.png` draws row 11's probabilities by epoch.

The documented figure is one draw. Even from the same recipe all ten of ours are worse once in eleven times. So a row of
1 to 14 that would be worse is trained with four times the seeds, and those are what is printed and judged.

The verdict on a figure is by the range of ours over the seeds:
- yes: the documented figure lies in our range, or ours are better (then they are so at the median too);
- worse: our whole range is worse than the documented figure by more than half a unit of its last printed digit, or a
  seed's figure is NaN;
- a figure that does not hang on chance must be the same to its last printed digit, for every seed;
- of a model that is only said to train, the loss must fall by a tenth at the least with more than half of the seeds.
The exit status is 1 if any figure is worse.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import documented_large as large
import documented_small as small
import torch
from reproduction import SEED, Figure, Rows, Seeds

ROWS: Mapping[int, tuple[str, Callable[[Seeds], Rows]]] = {
    1: ("logic_gates", small.logic_gates),
    2: ("iris", small.iris),
    3: ("california_housing mlp 24, 24", small.california),
    4: ("california_housing linear", small.california_linear),
    5: ("california_housing mlp 50, 40", small.california_mlp),
    6: ("california_housing wide_and_deep", small.wide_and_deep),
    7: ("the same, two inputs", small.two_inputs),
    8: ("the same, auxiliary output", small.auxiliary_output),
    9: ("breast_cancer", small.breast_cancer),
    10: ("synthetic_binary blobs", small.blobs),
    11: ("synthetic_binary moons, circles", small.two_classes),
    12: ("the same, relu_tanh", small.relu_tanh),
    13: ("california_housing, loss quartic", small.quartic),
    14: ("mnist", large.mnist),
    15: ("fashion_mnist 300, 100", large.fashion_mnist),
    16: ("the study of it, 5 trials", large.fashion_study),
    17: ("fashion_mnist 512, 512", large.fashion_512),
    18: ("covertype, our study", large.covertype),
    19: ("image_csv, VGG16 at 64 x 64", large.image_csv),
}
QUICK = 14
"""The last row that is trained with more seeds where the first ones leave it worse."""
FEW = {16: 3, 18: 3, 19: 3}
"""How many seeds the rows have at most that take the longest for one."""
HEADS = (
    "row",
    "what",
    "figure",
    "documented",
    "median",
    "range",
    "seeds",
    "documented among ours",
    "verdict",
    "seconds",
)


def picture(file: Path) -> None:
    """Draw row 11: the mean probability of class 1 of each class's validation rows, by epoch, of the first seed."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(small.PICTURES), figsize=(9, 3.2), sharey=True)
    for axis, (shape, points) in zip(axes, small.PICTURES.items(), strict=True):
        for values, name in zip(zip(*points, strict=True), ("class 0", "class 1"), strict=True):
            axis.plot(range(1, len(values) + 1), values, label=f"rows of {name}")
        axis.set(title=shape, xlabel="epoch", ylim=(0, 1))
    axes[0].set_ylabel("mean probability of class 1")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=int, choices=ROWS, metavar="ROW", help="rows by number, 1 to 19")
    parser.add_argument("--seeds", type=int, default=10, help="how many seeds; rows 16, 18 and 19 have 3 at most")
    parser.add_argument("--seed", type=int, default=SEED, help="the first seed")
    parser.add_argument("--picture", type=Path, help="a file to draw row 11 into")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds must be 1 or more, it is {arguments.seeds}")
    seeds = tuple(range(arguments.seed, arguments.seed + arguments.seeds))
    print(f"seeds {seeds[0]} to {seeds[-1]}, torch {torch.__version__}, one thread\n")
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
    n_worse = sum(print_row(number, seeds[: FEW.get(number)]) for number in arguments.only or ROWS)
    if arguments.picture is not None and small.PICTURES:
        picture(arguments.picture)
    print(f"\nfigures worse than documented: {n_worse}")
    sys.exit(1 if n_worse else 0)


def print_row(number: int, seeds: Seeds) -> int:
    """Run one row and print its figures; return how many are worse."""
    what, run = ROWS[number]
    start = time.perf_counter()
    figures = list(run(seeds))
    if number <= QUICK and worse(figures):
        figures = list(run(tuple(range(seeds[0], seeds[0] + 4 * len(seeds)))))
    head, seconds = [str(number), what], f"{time.perf_counter() - start:.0f}"
    for each in figures:
        print(f"| {' | '.join([*head, *each.cells(), seconds])} |")
        head, seconds = ["", ""], ""
    sys.stdout.flush()
    return worse(figures)


def worse(figures: Sequence[Figure]) -> int:
    return sum(each.verdict == "worse" for each in figures)


if __name__ == "__main__":
    main()
