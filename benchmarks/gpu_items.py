"""What the parts of `gpu.py` share: items with a budget of time, run one after the other, and the table of them.

An item is a function of a `Card`. It returns what was seen, a text or figures by name, and raises where that is wrong.
"""

import gc
import json
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hpo.export.files import finite

ROOT = Path(__file__).resolve().parent.parent
NOT_APPLICABLE = "not applicable (cpu)"
STATES = ("ok", "FAILED", "skipped", NOT_APPLICABLE)


@dataclass(frozen=True, kw_only=True)
class Card:
    """Where items run: on `device`, with small sizes where `small`, in `folder`, which is empty at first."""

    device: torch.device
    small: bool = False
    folder: Path

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has done what it was asked to."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    @property
    def dead(self) -> bool:
        """Whether nothing can be asked of the device in this process any more: some errors of CUDA's are for good."""
        try:
            self.wait()
        except Exception:
            return True
        return False

    def child(self, name: str, seconds: float, **environ: str) -> dict[str, Any]:
        """Return what the function `name` of gpu_children.py gives in a process of its own. Raises Wrong."""
        self.wait()
        empty_cache(self.device)
        command = [sys.executable, str(ROOT / "benchmarks/gpu_children.py"), name, "--device", str(self.device)]
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": python_path()} | environ,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Wrong(f"the process did not end in {seconds:.0f} s") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it printed nothing"]
            raise Wrong(f"exit status {done.returncode}: {said[-1][:300]}", "\n".join(said[-40:]))
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result


def empty_cache(device: torch.device) -> None:
    """Give back what torch holds of a GPU's memory and nobody uses: what comes next, or another process, needs it."""
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):  # torch 2.11 cannot, once a capture has failed
            torch.cuda.empty_cache()


def python_path() -> str:
    """Return a PYTHONPATH by which another process finds this checkout first."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


Seen = str | Mapping[str, Any]
"""What an item has seen; among figures, `seen` is a text, and `details` are figures for the JSON only."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """`seconds`: what it may take before it counts as failed. It is skipped where less than `needs` are left.

    `heavy`: it compiles, or starts processes; a test on a CPU leaves it out.
    """

    name: str
    run: Callable[[Card], Seen]
    seconds: float = 30.0
    needs: float = 3.0
    cuda_only: bool = False
    heavy: bool = False


@dataclass(kw_only=True)
class Result:
    """How an item ended: one of STATES. `details` are for the JSON only."""

    name: str
    state: str
    seconds: float = 0.0
    seen: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    trace: str = ""


@contextmanager
def noting() -> Iterator[list[str]]:
    """Within it a list takes what runs say (`logging.getLogger("hpo")`)."""

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    log, notes = logging.getLogger("hpo"), Notes()
    level = log.level
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.removeHandler(notes)
        log.setLevel(level)


class Wrong(Exception):
    """What was seen is not what it is to be; `trace` is what another process has printed."""

    def __init__(self, text: str, trace: str = "") -> None:
        super().__init__(text)
        self.trace = trace


class TimeUp(BaseException):
    """An item has used up its time. No Exception: nothing on the way is to take it for an error of its own."""


def require(holds: bool, text: str) -> None:
    """Raise Wrong with `text` unless it `holds`."""
    if not holds:
        raise Wrong(text)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block once it has taken so long. A timer that was set before is set again after it."""

    def end(number: int, frame: Any) -> None:
        raise TimeUp

    start, handler = time.monotonic(), signal.signal(signal.SIGALRM, end)
    before, _ = signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, before - (time.monotonic() - start)))


def run_item(item: Item, card: Card, left: float) -> Result:
    """Run an item that may take `left` seconds at most, since the part's time is over then."""
    if item.cuda_only and not card.cuda:
        return Result(name=item.name, state=NOT_APPLICABLE)
    if left < item.needs:
        return Result(name=item.name, state="skipped", seen=f"{max(0.0, left):.0f} s left, it needs {item.needs:.0f}")
    start, result = time.monotonic(), Result(name=item.name, state="FAILED")
    try:
        with limited(min(item.seconds, left)):
            seen = item.run(card)
            card.wait()
        figures = {"seen": seen} if isinstance(seen, str) else dict(seen)
        result.seen, result.details = str(figures.pop("seen", "")), figures.pop("details", {})
        result.state, result.figures = "ok", figures
    except TimeUp:
        result.trace = traceback.format_exc()
        result.seen = f"not done in {item.seconds:.0f} s"
        if left < item.seconds:
            result.state, result.seen = "skipped", f"the time of the part was over after {left:.0f} s of it"
    except Exception as error:  # one that fails does not stop the others
        result.trace = getattr(error, "trace", "") or traceback.format_exc()
        text = (str(error).strip().splitlines() or [""])[0]
        result.seen = text if isinstance(error, Wrong) else f"{type(error).__name__}: {text}"
    result.seconds = time.monotonic() - start
    return result


Again = Callable[[Sequence[Item], float], Sequence[Result]]
"""Runs items in a new process, in so many seconds."""


def run_all(
    items: Sequence[Item],
    card: Card,
    seconds: float,
    write: Callable[[Sequence[Result]], None],
    spoilt: Callable[[], bool] = lambda: False,
    again: Again = lambda items, seconds: [],
) -> list[Result]:
    """Run `items` until `seconds` are over; `write` is given the results after each, so that a kill loses none.

    Once this process is `spoilt` for those that are left, or its device dead, they are run `again`.
    """
    end, results = time.monotonic() + seconds, list[Result]()
    for index, item in enumerate(items, start=1):
        results.append(run_item(item, card, end - time.monotonic()))
        last = results[-1]
        print(f"{last.state} | {last.seconds:.1f} s | {last.name} | {_short(last)}", file=sys.stderr, flush=True)
        write(results)
        if items[index:] and (spoilt() or card.dead):
            results += again(items[index:], end - time.monotonic())
            write(results)
            break
    return results


def save(part: str, card: Card, out: Path, results: Sequence[Result]) -> None:
    """Write results to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"part": part, "machine": machine(card), "items": [asdict(each) for each in results]}
    (out / f"{part}.json").write_text(json.dumps(finite(content), indent=1) + "\n")
    (out / f"{part}.md").write_text(markdown(part, card, results))


def saved(part: str, out: Path) -> list[Result]:
    """Return the results in the folder `out`, as far as there are any."""
    file = out / f"{part}.json"
    return [Result(**each) for each in json.loads(file.read_text())["items"]] if file.is_file() else []


@cache
def machine(card: Card) -> dict[str, Any]:
    """Return what figures are of."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(card.device) if card.cuda else f"CPU, {platform.machine()}",
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "small": card.small,
    }


def counted(results: Sequence[Result]) -> str:
    """Return how many items ended in which state."""
    return ", ".join(f"{n} {state}" for state in STATES if (n := sum(each.state == state for each in results)))


def markdown(part: str, card: Card, results: Sequence[Result]) -> str:
    """Return the table of the results, with a column for each figure that one of them has."""
    columns = [*dict.fromkeys(name for each in results for name in each.figures)]
    heads = ["item", "state", "s", *columns, "seen"]
    lines = [f"{part}: {', '.join(f'{key} {value}' for key, value in machine(card).items())}", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for each in results:
        figures = [shown(each.figures.get(name)) for name in columns]
        cells = [each.name, each.state, f"{each.seconds:.1f}", *figures, _short(each)]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join([*lines, "", counted(results), ""])


def shown(value: Any) -> str:
    """Return a figure as a person reads it: three digits, but whole numbers whole."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)


def _short(result: Result) -> str:
    text = " ".join(result.seen.split())
    return text if len(text) <= 240 else f"{text[:237]}..."
