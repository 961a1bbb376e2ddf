"""`benchmarks/gpu.py`: its check on a GPU, where there is one (`pytest -m gpu`); on the CPU what applies there.

What only CUDA has runs on the stand-ins of `tests.graphs`, so that it has run before a GPU is there.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from hpo.stacks import sizing
from hpo.stacks.vmap_stack import VmapStack
from hpo.study.data import data_home
from tests.conftest import ROOT
from tests.graphs import Capture, Graph, NoWaiting, graphs  # noqa: F401  # a fixture
from tests.stacking import CPU

sys.path.append(str(ROOT / "benchmarks"))
try:
    import gpu
    import gpu_check
    import gpu_children
    import gpu_items
    import gpu_study
    import gpu_training
    from gpu_items import Card, Item, Result, Wrong
finally:
    sys.path.remove(str(ROOT / "benchmarks"))  # its modules' names are everyday ones

ITEMS = {item.name: item for item in gpu_check.ITEMS}
FAST = (
    "versions",
    "path, graph: padded widths, adam, float32",
    "equal: mlp, adam",
    "leave, join, resize: padded widths",
    "whole epochs: padded widths",
    "dropout, graph",
    "feed: resident or streamed",
    "checkpoint: resumed here and on the CPU",
    "every optimizer of torch.optim",
)
"""Of the items that apply to a CPU one of each kind, but for those that compile or start processes."""
REPLAYED = (
    *("path, graph: mlp, adam, float32", "path, graph: embedding, adam, float32"),
    *("equal: BatchNorm1d, adam", "dropout, graph", "whole epochs: conv + BatchNorm"),
)
FAILS = "CUDA error: operation failed due to a previous error during capture"
needs_california = pytest.mark.skipif(
    not (data_home() / "sklearn/cal_housing_py3.pkz").is_file(), reason="California Housing is not in HPO_DATA_HOME"
)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.chdir(tmp_path)
    return Card(device=CPU, small=True, folder=tmp_path)


def states(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    return {each.name: (each.state, each.seen) for each in results}


def run(card: Card, names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Run items of `check`; return how they ended, and what was seen. A CPU has four minutes for one, a GPU its own."""
    long = {} if card.cuda else {"seconds": 240.0}
    return states([gpu_items.run_item(replace(ITEMS[name], **long), card, 240.0) for name in names])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.filterwarnings("default", "ignore:.*TensorFloat32 tensor cores")  # an error here would end a compilation
@pytest.mark.parametrize("name", ITEMS)
def test_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", gpu_items.python_path())
    with FileLock(Path(tempfile.gettempdir()) / "hpo-gpu.lock"):  # one of them fills the card
        assert ITEMS[name].run(Card(device=torch.device("cuda:0"), folder=tmp_path))


# On a CPU.


@pytest.mark.slow
def test_what_applies_to_a_cpu_is_ok_there(card: Card) -> None:
    ended = run(card, FAST)
    assert {name: state for name, (state, _) in ended.items()} == dict.fromkeys(FAST, "ok"), ended
    only_cuda = [item.name for item in gpu_check.ITEMS if item.cuda_only]
    assert len(only_cuda) > 8
    assert {state for state, _ in run(card, only_cuda).values()} == {"not applicable (cpu)"}


@pytest.mark.parametrize("name", [*REPLAYED[:-1], pytest.param(REPLAYED[-1], marks=pytest.mark.slow)])
def test_steps_that_are_replayed_are_ok(graphs: type[Capture], card: Card, name: str) -> None:  # noqa: F811
    state, seen = run(card, [name])[name]
    assert state == "ok", seen
    assert Graph.made
    assert "replayed" in seen or name.startswith("dropout")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["path, graph: mlp, adam, float32", "equal: mlp, sgd"])
def test_a_step_that_is_not_replayed_has_failed_with_the_reason(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    card: Card,
    name: str,
) -> None:
    monkeypatch.setattr(graphs, "fails", FAILS)
    state, seen = run(card, [name])[name]
    assert state == "FAILED"
    assert f"not replayed from a CUDA graph: RuntimeError: {FAILS}" in seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "which"),
    [
        *(("equal: mlp, sgd", which) for which in ("weights", "optimizer", "losses")),
        ("leave, join, resize: mlp", "weights"),
        ("checkpoint: resumed here and on the CPU", "optimizer"),
    ],
)
def test_a_step_that_trains_otherwise_has_failed(
    monkeypatch: pytest.MonkeyPatch, card: Card, name: str, which: str
) -> None:
    real = VmapStack.step

    def step(self: VmapStack, inputs: Any, targets: Any) -> Any:
        losses = real(self, inputs, targets)
        if which == "losses":
            return losses + 1e-6
        state = self._slots.state
        part = state.weights if which == "weights" else next(iter(state.optimizer.values()))
        with torch.no_grad():
            next(iter(part.values())).add_(1e-6)
        return losses

    monkeypatch.setattr(VmapStack, "step", step)
    state, seen = run(card, [name])[name]
    assert state == "FAILED"
    assert "differs by" in seen


@dataclass(frozen=True, kw_only=True)
class Pretended(Card):
    """A card that says that it is a GPU, on the CPU."""

    @property
    def cuda(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class Event:
    """As torch.cuda.Event."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


@pytest.fixture
def pretended(card: Card, monkeypatch: pytest.MonkeyPatch) -> Card:
    """Return a card on which the calls of torch.cuda that measure, and forbid to wait, do so as far as a CPU has it."""
    modes: list[NoWaiting] = []

    def forbid(mode: str) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)
        if mode == "error":
            modes.append(NoWaiting())
            modes[-1].__enter__()

    for name, stand_in in {
        "set_sync_debug_mode": forbid,
        "Event": Event,
        "reset_peak_memory_stats": lambda device: None,
        "max_memory_reserved": lambda device: 2**30,
        "get_device_name": lambda device: "a pretended one",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return Pretended(device=CPU, small=True, folder=card.folder)


@pytest.mark.slow
def test_a_step_that_waits_for_the_gpu_has_failed(
    graphs: type[Capture],  # noqa: F811
    pretended: Card,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, real = "no wait in a step, graph", VmapStack.step
    state, seen = run(pretended, [name])[name]
    assert state == "ok", seen
    assert seen.startswith("20 steps without a wait; captured, replayed from a CUDA graph")
    monkeypatch.setattr(VmapStack, "step", lambda self, *batch: torch.tensor(real(self, *batch).tolist()))
    state, seen = run(pretended, [name])[name]
    assert state == "FAILED"
    assert "would wait for the GPU" in seen


# What has a process of its own.


@pytest.mark.slow
def test_a_capture_while_batches_are_loaded(graphs: type[Capture]) -> None:  # noqa: F811
    assert "losses as alone to" in gpu_children.prefetching(CPU)


@pytest.mark.parametrize("poisoned", [pytest.param(each, marks=pytest.mark.slow) for each in (False, True)])
def test_a_second_stack_after_a_capture_that_failed(
    graphs: type[Capture],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    poisoned: bool,
) -> None:
    monkeypatch.setattr("hpo.stacks.recording._fails_ever_after", lambda: poisoned)
    seen = gpu_children.forbidden(CPU)
    assert "operation not permitted when stream is capturing" in seen
    assert ("an earlier one failed in this process" in seen) == poisoned
    assert gpu_check.spoilt() == poisoned


@pytest.mark.slow
def test_stacks_are_halved_where_there_is_no_memory(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    real = VmapStack.step

    def step(self: VmapStack, inputs: Any, targets: Any) -> Any:
        if self.capacity > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, inputs, targets)

    monkeypatch.setattr(gpu_children, "WIDTH", 16)
    monkeypatch.setattr(sizing, "free_bytes", lambda device: 1)  # a full card, as the estimate sees it
    monkeypatch.setattr(VmapStack, "step", step)
    seen = gpu_children.full(CPU, 8)
    assert seen.startswith("stacks of 8, then 4, 2; 8 trials complete; OutOfMemoryError: CUDA out of memory")


def test_large_data_lies_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_children.large(CPU, 130 << 20) == "130 rows"


def test_the_one_gpu_that_is_visible(monkeypatch: pytest.MonkeyPatch, graphs: type[Capture]) -> None:  # noqa: F811
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # by version
        monkeypatch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)
    for name, stand_in in {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device: "it",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert gpu_children.visible(CPU).startswith("CUDA_VISIBLE_DEVICES 3: it, captured, replayed from a CUDA graph")


@pytest.mark.parametrize(("named", "first"), [(None, "0"), ("3", "3"), ("GPU-5,1", "GPU-5")])
def test_one_gpu_is_made_visible_to_the_process_that_checks_it(
    card: Card, monkeypatch: pytest.MonkeyPatch, named: str | None, first: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(Card, "child", lambda self, name, seconds, **environ: {"seen": f"{name} {environ}"})
    assert ITEMS["cuda:0 under CUDA_VISIBLE_DEVICES"].run(card) == f"visible {{'CUDA_VISIBLE_DEVICES': '{first}'}}"


@pytest.mark.slow
def test_what_a_process_fails_with_is_said(card: Card) -> None:
    with pytest.raises(Wrong, match=r"exit status 1: gpu_items.Wrong: 0 are visible of 7"):
        card.child("visible", 60.0, CUDA_VISIBLE_DEVICES="7")


# What is measured.


@pytest.mark.slow
@needs_california
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # the profiler's
def test_training_is_measured_beside_the_documented_loop(pretended: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_training, "_seconds", lambda card: 0.05)
    wanted = [item for item in gpu_training.items(pretended) if item.name.startswith("california")][:4]
    results = [gpu_items.run_item(item, pretended, 60.0) for item in wanted]
    gpu_training.finish(results)
    gpu_training._ready.clear()
    gpu_training.bench_of.cache_clear()
    assert [each.state for each in results] == ["ok"] * 4, states(results)
    assert [each.name.partition(": ")[2] for each in results] == [
        "documented loop, cpu",
        "documented loop, one CPU core",
        "one at a time, not compiled",
        "stack of 1, captured",
    ]
    assert results[0].figures["x documented"] == 1
    assert all(each.figures["ms"] > 0 for each in results)
    measured = {"ms by events", "kernels per step", "us per step", "host us per step", "MiB", "evaluate ms", "join s"}
    assert measured <= results[3].figures.keys()
    assert results[3].figures["capture s"] == 0
    assert results[3].seen == "captured"


@pytest.mark.slow
@needs_california
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # the profiler's
def test_training_is_measured_as_studies_train(
    graphs: type[Capture],  # noqa: F811
    pretended: Card,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many steps at once."""
    monkeypatch.setattr(gpu_training, "_seconds", lambda card: 0.05)
    (item,) = [item for item in gpu_training.items(pretended) if item.name == "california: stack of 4, captured"]
    result = gpu_items.run_item(item, pretended, 120.0)
    gpu_training._ready.clear()
    gpu_training.bench_of.cache_clear()
    assert result.state == "ok", result.trace
    assert result.seen == "captured, replayed from a CUDA graph"
    assert result.figures["capture s"] > 0
    assert len(Graph.made) == 3  # of each batch size, and of 16 steps
    assert max(graph.n_replays for graph in Graph.made) >= 3 * (16512 // 64 // 16)


@pytest.mark.slow
@needs_california
def test_a_study_is_timed_by_its_parts(card: Card) -> None:
    items = gpu_study.items(card)
    results = [gpu_items.run_item(item, card, 100.0) for item in (items[0], items[-1])]
    gpu_study.finish(results)
    assert [each.state for each in results] == ["ok"] * 2, states(results)
    stacked = results[-1].figures
    assert (stacked["trials"], stacked["epochs of trials"]) == (8, 16)
    parts = [stacked[f"{part} s"] for part in ("epochs", "stacks", "evaluate", "sizing", "refit", "bookkeeping")]
    assert all(part > 0 for part in parts)
    assert sum(parts) == pytest.approx(stacked["s"], rel=1e-3)
    assert results[-1].details["best by second"][-1][1] == pytest.approx(stacked["best"])
    documented = results[0].figures["ms per epoch"]
    assert stacked["x documented"] == pytest.approx(documented / stacked["ms per epoch"])


# Items, budgets, the table.


def ends(how: str, **more: Any) -> Item:
    def run(card: Card) -> Any:
        if how == "figures":
            return {"seen": "two", "ms": 2.0, "details": {"more": 1}}
        if how == "hangs":
            time.sleep(20)
        if how == "bug":
            raise KeyError("a bug")
        gpu_items.require(how != "wrong", "it is | wrong")
        return how

    return Item(name=how, run=run, **more)


SEVERAL = (
    *(ends("fine"), ends("wrong"), ends("bug"), ends("cuda", cuda_only=True), ends("hangs", seconds=0.2)),
    *(ends("long", needs=1000.0), ends("figures")),
)
EXPECTED = {
    "fine": ("ok", "fine"),
    "wrong": ("FAILED", "it is | wrong"),
    "bug": ("FAILED", "KeyError: 'a bug'"),
    "cuda": ("not applicable (cpu)", ""),
    "hangs": ("FAILED", "not done in 0 s"),
    "long": ("skipped", "10 s left, it needs 1000"),
    "figures": ("ok", "two"),
}


def test_an_item_that_fails_or_hangs_does_not_stop_the_others(card: Card) -> None:
    written: list[int] = []
    results = gpu_items.run_all(SEVERAL, card, 10.4, lambda results: written.append(len(results)))
    assert states(results) == EXPECTED
    assert written == [1, 2, 3, 4, 5, 6, 7]  # after each, so that a kill loses none
    assert "KeyError" in results[2].trace
    assert (results[-1].figures, results[-1].details) == ({"ms": 2.0}, {"more": 1})


def test_what_has_no_time_left_is_skipped(card: Card) -> None:
    assert (
        states(gpu_items.run_all([ends("hangs", needs=0.0)], card, 0.2, lambda results: None))["hangs"][0] == "skipped"
    )


def test_a_timer_that_was_set_before_is_set_again() -> None:
    before = signal.setitimer(signal.ITIMER_REAL, 100.0)
    try:
        with gpu_items.limited(5.0):
            pass
        assert 90.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_items_that_are_left_in_a_process_that_is_spoilt_run_in_another(card: Card) -> None:
    asked: list[str] = []

    def again(items: Sequence[Item], seconds: float) -> list[Result]:
        assert 5.0 < seconds < 10.0
        asked.extend(item.name for item in items)
        return [Result(name=item.name, state="ok") for item in items]

    spoilt: Callable[[], bool] = iter([False, True]).__next__
    results = gpu_items.run_all(SEVERAL[:4], card, 10.0, lambda results: None, spoilt, again)
    assert asked == ["bug", "cuda"]
    assert [each.name for each in results] == ["fine", "wrong", "bug", "cuda"]


@pytest.mark.parametrize("items", [SEVERAL[:1], SEVERAL])
def test_the_table_comes_last_and_the_status_says_whether_an_item_failed(
    items: Sequence[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "part_of", lambda name, card: gpu.Part(items=items))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("HPO_DATA_HOME", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    options = ["--part", "check", "--device", "cpu", "--out", str(tmp_path), "--seconds", "10.4", "--data", "."]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == (1 if len(items) > 1 else 0)
    table = (tmp_path / "check.md").read_text()
    assert capsys.readouterr().out == table + "\n"
    assert states(gpu_items.saved("check", tmp_path)) == {item.name: EXPECTED[item.name] for item in items}
    if len(items) > 1:
        assert "| item | state | s | ms | seen |" in table
        assert "it is / wrong" in table
        assert table.rstrip().endswith("2 ok, 3 FAILED, 1 skipped, 1 not applicable (cpu)")


@pytest.mark.slow
def test_what_is_left_runs_in_a_new_process_and_one_that_ends_that_has_failed(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is a stand-in, which runs one item more, or ends before it has written anything."""
    names = ["a", "b", "c", "d", "e"]
    items = [Item(name=name, run=lambda card: "here") for name in names]
    monkeypatch.setattr(gpu, "part_of", lambda name, card: gpu.Part(items=items, spoilt=lambda: True))
    commands: list[list[str]] = []

    def start(command: list[str], **more: Any) -> Any:
        commands.append(command)
        if len(commands) == 1:  # runs b, and dies in c
            gpu_items.save("check", card, tmp_path / "again", [Result(name="b", state="ok")])
        if len(commands) == 3:
            gpu_items.save("check", card, tmp_path / "again", [Result(name="e", state="FAILED")])
        return subprocess.CompletedProcess(command, 1 if len(commands) == 3 else -6)

    monkeypatch.setattr(gpu.subprocess, "run", start)
    given = argparse.Namespace(part="check", device="cpu", seconds=100.0, small=True, only=None, after=None)
    results = gpu.run_part(given, card, tmp_path)
    assert states(results) == {
        "a": ("ok", "here"),
        "b": ("ok", ""),
        "c": ("FAILED", "its process ended with status -6"),
        "d": ("FAILED", "its process ended with status -6"),
        "e": ("FAILED", ""),
    }
    assert [command[command.index("--after") + 1] for command in commands] == ["a", "c", "d"]
    given.after = "d"
    assert [each.name for each in gpu.run_part(given, card, tmp_path)] == ["e"]


def test_a_process_that_does_not_end_is_ended_before_this_one_is(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would stay on the card. What it has not come to is skipped."""
    items = [Item(name=name, run=lambda card: "here") for name in ("a", "b", "c", "d")]
    monkeypatch.setattr(gpu, "part_of", lambda name, card: gpu.Part(items=items, spoilt=lambda: True))
    limits = []

    def start(command: list[str], *, timeout: float, **more: Any) -> Any:
        limits.append((float(command[command.index("--seconds") + 1]), timeout))
        gpu_items.save("check", card, tmp_path / "again", [Result(name="b", state="ok")])
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", start)
    given = argparse.Namespace(part="check", device="cpu", seconds=100.0, small=True, only=None, after=None)
    results = states(gpu.run_part(given, card, tmp_path))
    assert results.pop("c")[0] == "FAILED"
    assert results == {"a": ("ok", "here"), "b": ("ok", ""), "d": ("skipped", "the time of the part was over")}
    ((seconds, timeout),) = limits
    assert seconds < 100 - gpu.SOONER  # so that its own processes are ended by then too
    assert 100 < timeout < 100 + gpu.GRACE


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", list(gpu.SECONDS))
def test_all_of_it_runs_on_a_cpu(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    options = ["--part", part, "--device", "cpu", "--small", "--out", str(tmp_path), "--seconds", "1000"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 0, (tmp_path / f"{part}.md").read_text()
