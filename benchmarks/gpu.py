"""hpo on a GPU, checked and measured within half an hour: one part a call, since a GPU is lent for minutes.

    python benchmarks/gpu.py --part check|training|study --out FOLDER [--seconds 480] [--data FOLDER]
        [--device cuda|cpu] [--small] [--only TEXT ...]

`check`: is what runs there right? Each item is ok or FAILED, and says what was seen. `training`: ms per model and epoch
beside the documented loop. `study`: whole studies. A part is one process, so that it makes one CUDA context and uses
one cache of compiled code; only what may spoil that (a failed capture, a full card) has a process of its own.

Each item has a budget, and is skipped, which is said, when too little time is left; an item that fails does not stop
the others. The table comes last; it is written to FOLDER too, with JSON, after each item. The exit status is 1 if an
item FAILED. No MLflow and no network are used; data comes from `--data`, else HPO_DATA_HOME: `pack_for_gpu.py` brings
both it and the packages that a machine with a GPU may not have. `--device cpu --small` tries all of it without a GPU:
what only CUDA has is "not applicable (cpu)".
"""

import argparse
import faulthandler
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_items import ROOT, Card, Item, Result, markdown, python_path, run_all, save, saved

SECONDS: Mapping[str, float] = {"check": 240.0, "training": 480.0, "study": 480.0}
"""How long each part may take, unless --seconds says otherwise."""
GRACE, SOONER = 40.0, 5.0
"""Seconds after which a process is ended that hangs where no signal reaches it; one that it started so much sooner."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part's items. `finish` adds what can only be said of several results: ratios. `spoilt`: see `run_all`."""

    items: Sequence[Item]
    finish: Callable[[Sequence[Result]], None] = lambda results: None
    spoilt: Callable[[], bool] = lambda: False


def part_of(name: str, card: Card) -> Part:
    """Return the part of that name; what it imports takes its time only where it is run."""
    if name == "check":
        import gpu_check

        return Part(items=gpu_check.ITEMS, spoilt=gpu_check.spoilt)
    if name == "training":
        import gpu_training

        return Part(items=gpu_training.items(card), finish=gpu_training.finish)
    import gpu_study

    return Part(items=gpu_study.items(card), finish=gpu_study.finish)


def run_part(given: argparse.Namespace, card: Card, out: Path) -> list[Result]:
    """Run what is wanted of a part; return the results, which are in `out` too."""
    part, end = part_of(given.part, card), time.monotonic() + given.seconds
    wanted = [item for item in part.items if not given.only or any(text in item.name for text in given.only)]
    if given.after is not None:
        wanted = wanted[[item.name for item in wanted].index(given.after) + 1 :]

    def write(results: Sequence[Result]) -> None:
        part.finish(results)
        save(given.part, card, out, results)

    def again(items: Sequence[Item], seconds: float) -> Sequence[Result]:
        """Run the last of the wanted items in a new process; one that ends it has failed, those after it run again."""
        start, after = time.monotonic(), wanted[-len(items) - 1].name
        print(f"a new process for the items after {after}", file=sys.stderr, flush=True)
        (out / "again" / f"{given.part}.json").unlink(missing_ok=True)
        for_it = str(max(1.0, seconds - SOONER))
        options = ["--part", given.part, "--device", given.device, "--seconds", for_it, "--after", after]
        options += ["--small"] * given.small + (["--only", *given.only] if given.only else [])
        command = [sys.executable, __file__, *options, "--out", str(out / "again")]
        over = False
        try:  # else this process would end first, and leave that one on the card
            limit = max(1.0, seconds + GRACE / 2)
            status = subprocess.run(command, stdout=subprocess.DEVNULL, check=False, timeout=limit).returncode
            how = f"its process ended with status {status}"
        except subprocess.TimeoutExpired:
            over, how = True, f"its process had not ended after {limit:.0f} s"
        results = saved(given.part, out / "again")
        if left := items[len(results) :]:
            results.append(Result(name=left[0].name, state="FAILED", seen=how))
        if over:
            results += [
                Result(name=each.name, state="skipped", seen="the time of the part was over") for each in left[1:]
            ]
        elif left[1:]:
            results += again(left[1:], seconds - (time.monotonic() - start))
        return results

    return run_all(wanted, card, end - time.monotonic(), write, part.spoilt, again)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(SECONDS), required=True)
    parser.add_argument("--seconds", type=float, help="how long it may take (check: 240, training and study: 480)")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the part's JSON and table")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--data", type=Path, help="the folder of the data, as HPO_DATA_HOME")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only items whose name has one of these in it")
    parser.add_argument("--after", metavar="ITEM", help="only items after the one of that name")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the script")
    if given.data is not None:
        os.environ["HPO_DATA_HOME"] = str(given.data.resolve())
    elif "HPO_DATA_HOME" in os.environ:
        os.environ["HPO_DATA_HOME"] = str(Path(os.environ["HPO_DATA_HOME"]).resolve())
    sys.path.insert(0, str(ROOT))  # hpo may not be installed
    os.environ["PYTHONPATH"] = python_path()  # nor for workers
    given.seconds, out = given.seconds or SECONDS[given.part], given.out.resolve()
    faulthandler.dump_traceback_later(given.seconds + GRACE, exit=True, file=sys.__stderr__)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, chdir(name):
        device = torch.device("cuda:0" if given.device == "cuda" else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)
        card = Card(device=device, small=given.small, folder=Path(name))
        results = run_part(given, card, out)
    faulthandler.cancel_dump_traceback_later()
    failed = [each for each in results if each.state == "FAILED"]
    for each in failed[:3]:
        print(f"FAILED {each.name}: {each.seen}\n{each.trace[-1000:]}", file=sys.stderr, flush=True)
    print(markdown(given.part, card, results))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
