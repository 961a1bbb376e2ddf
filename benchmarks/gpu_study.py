"""The items of `gpu.py --part study`: whole studies, as `hpo run` does them, and where their time goes.

Trials per second are without the refit, which the documented study has not.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import throughput
from gpu_items import ROOT, Card, Item, Result, Seen, empty_cache, noting, require
from throughput import Bench

import hpo
from hpo.runner import study as studies
from hpo.stacks.pool import Pool
from hpo.stacks.sizing import Sizing
from hpo.stacks.vmap_stack import VmapStack
from hpo.stacks.vmap_step import VmapStep
from hpo.training import loop
from hpo.training.loop_stack import LoopStack

PARTS: Sequence[tuple[Any, str, str]] = (
    (loop, "_epoch", "epochs"),
    (VmapStack, "evaluate", "evaluate"),
    (LoopStack, "evaluate", "evaluate"),
    (Pool, "join", "stacks"),
    (VmapStep, "prepare", "stacks"),
    (Sizing, "choose", "sizing"),
    (Sizing, "given", "sizing"),
    (studies, "conclude", "refit"),
)
"""The functions that are timed, and what their time counts as; that of all others is bookkeeping."""
WHOLE = ("sizing", "refit")
"""Parts that all within them counts as."""
GOAL = 0.487
"""The validation RMSE that TabM's authors report for the published search, after 21 min 34 s on an A100."""
DOCUMENTED = "documented"


class Clock:
    """Seconds of a run by part, each without the parts within it."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.seconds = dict.fromkeys(("epochs", "stacks", "evaluate", "sizing", "refit", "bookkeeping"), 0.0)
        self.best: list[tuple[float, float]] = []
        """When a better value of the metric that is watched was reached, and which."""
        self._inside = ["bookkeeping"]
        self.start = self._since = time.perf_counter()

    def _switch(self) -> None:
        self._card.wait()  # what a GPU was asked to do belongs to the part that asked it
        now = time.perf_counter()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count a block as a part's, unless it is within one that counts whole."""
        self._switch()
        self._inside.append(self._inside[-1] if self._inside[-1] in WHOLE else part)
        try:
            yield
        finally:
            self._switch()
            self._inside.pop()

    def watched(self, results: Mapping[Any, Mapping[str, float]], key: str) -> None:
        """Note the best value so far of an epoch's metrics of the search."""
        values = [metrics[key] for metrics in results.values() if key in metrics]
        if values and self._inside[-1] == "bookkeeping" and (not self.best or min(values) < self.best[-1][1]):
            self.best.append((time.perf_counter() - self.start, min(values)))

    def end(self) -> float:
        """Return how long all of it took."""
        self._switch()
        return time.perf_counter() - self.start


@contextmanager
def timing(clock: Clock, key: str) -> Iterator[None]:
    """Within it the functions of PARTS are timed; `key`: the metric that is watched."""

    def timed(real: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            with clock.within(part):
                result = real(*arguments, **more)
            if real is epoch:
                clock.watched(result, key)
            return result

        return call

    epoch = loop._epoch
    with ExitStack() as stack:
        for owner, name, part in PARTS:
            real = getattr(owner, name)
            stack.callback(setattr, owner, name, real)
            setattr(owner, name, timed(real, part))
        yield


def run(card: Card, study: Any, metric: str, folder: Path, **overrides: Any) -> dict[str, Any]:
    """Run a study to its end; return its figures."""
    empty_cache(card.device)
    folder.mkdir(parents=True)
    with noting() as said, chdir(folder):
        clock = Clock(card)
        with timing(clock, f"valid_{metric}"):
            done = hpo.run(study, quiet=True, tracking="off", device=str(card.device), **overrides)
        total = clock.end()
        counts, best = done.counts, done.best
        n_epochs = int(done.trials["epochs"].sum())
    require(counts.finished > 0 and best is not None, f"no trial was finished: {counts}")
    search = total - clock.seconds["refit"]
    figures = {
        "trials": counts.finished,
        "epochs of trials": n_epochs,
        "s": total,
        "s per trial": search / counts.finished,
    }
    figures |= {"ms per epoch": search / n_epochs * 1000, "x documented": None}
    figures |= {f"{part} s": seconds for part, seconds in clock.seconds.items()}
    details = {"best by second": clock.best, "notes": said}
    seen = dict.fromkeys(text for text in said if "stack" in text or "out of memory" in text)
    return figures | {"best": best.value, "details": details, "seen": "; ".join(seen)}


def documented(card: Card, name: str) -> Seen:
    """Plain Optuna over the documented loop: two trials of five epochs, without MLflow."""
    trials, epochs = (1, 1) if card.small else (2, 5)
    folder = card.folder / f"{name}-documented"
    folder.mkdir()
    with chdir(folder):
        bench = Bench(name, str(card.device), 1)
        spent = throughput.documented_study(bench, trials, epochs, None)
    return {
        "trials": trials,
        "epochs of trials": trials * epochs,
        "s": spent["seconds"],
        "s per trial": spent["seconds"] / trials,
        "ms per epoch": spent["seconds"] / trials / epochs * 1000,
        "x documented": None,
        "epochs s": spent["epochs"],
        "seen": f"{epochs} epochs a trial, of {bench.case.epochs}",
    }


def stacked(card: Card, name: str, k: int, trials: int) -> Seen:
    """A study of a case with stacks of k, 50 epochs a trial."""
    spec = throughput.spec_of(name, str(card.device), trials, k)
    spec |= {"epochs": 2} if card.small else {}
    del spec["device"]
    return run(card, spec, "loss", card.folder / f"{name}-{k}")


def published(card: Card, seconds: float) -> Seen:
    """The search that TabM's authors report: when its validation RMSE was reached, if it was."""
    path = ROOT / "studies/california_mlp_published.yaml"
    sizes = {"trials": 2, "epochs": 2} if card.small else {"trials": 20, "timeout": seconds}
    figures = run(card, path, "rmse", card.folder / "published", **sizes)
    reached = next((when for when, value in figures["details"]["best by second"] if value <= GOAL), None)
    figures[f"s to {GOAL}"] = reached
    return figures


def items(card: Card) -> list[Item]:
    """Return the studies, in the order in which they are worth their time."""
    sizes = ((1, 2), (4, 8)) if card.small else ((256, 256), (64, 256), (1, 8))
    first = Item(name=f"california: {DOCUMENTED}", run=partial(documented, name="california"), needs=15.0, seconds=60.0)
    last = Item(name="california_mlp_published", run=partial(published, seconds=120.0), needs=60.0, seconds=240.0)
    stacks = [
        Item(
            name=f"california: stack: {k}",
            run=partial(stacked, name="california", k=k, trials=trials),
            needs=30.0,
            seconds=200.0,
        )
        for k, trials in sizes
    ]
    return [first, stacks[0], last, *stacks[1:]]


def finish(results: Sequence[Result]) -> None:
    """Add how many times as many epochs of trials a second each study does as the documented one."""
    base = next((each for each in results if each.name.endswith(DOCUMENTED) and each.state == "ok"), None)
    for each in results:
        if base is not None and each.name.startswith("california: ") and each.figures.get("ms per epoch"):
            each.figures["x documented"] = base.figures["ms per epoch"] / each.figures["ms per epoch"]
