"""torch's process-wide settings: set for a block, and as before it at its end, however it ends."""

import os
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import pytest
import torch

from hpo.runner import opening
from hpo.training.torch_settings import torch_settings
from tests.cli import invoke
from tests.stacking import CPU

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def now() -> tuple[object, ...]:
    """Return all that a block could leave changed."""
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        os.environ.get(CUBLAS),
        tuple(torch.get_rng_state().tolist()),
    )


def newer() -> list[str]:
    """Return what the newer of torch's two ways says of TF32: products, convolutions, and what else the older sets."""
    b = torch.backends
    return [each.fp32_precision for each in (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul)]


@pytest.mark.parametrize("fails", [False, True])
def test_settings_are_those_that_are_asked_for_and_as_before_at_the_end(
    monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.delenv(CUBLAS, raising=False)
    before, threads = now(), torch.get_num_threads() + 1
    try:
        with torch_settings(CPU, precision="tf32", deterministic=True, threads=threads):
            assert now()[:6] == (threads, True, False, "highest", before[4], ":4096:8")  # TF32 is CUDA's
            torch.rand(3)
            torch.set_num_threads(threads + 1)  # also what the block itself sets
            if fails:
                raise KeyError("a bug")
    except KeyError:
        assert fails
    assert now() == before


def test_what_is_not_asked_for_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":16:8")
    before = now()
    with torch_settings(CPU):
        assert now() == before
    with torch_settings(CPU, deterministic=True):
        assert os.environ[CUBLAS] == ":16:8"
    assert now() == before


def test_warnings_in_place_of_determinism_are_restored_as_such() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch_settings(CPU, deterministic=False):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_on_cuda_tf32_is_allowed_and_the_generator_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the generators, and what the current device is, are stand-ins."""
    second, generators, current = torch.device("cuda:1"), {}, [torch.device("cuda:0")]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.tensor([device.index]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generators.update({device: state.item()}))
    before = now()
    with torch_settings(second, precision="tf32"):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        assert current[-1] == second  # streams, graphs and synchronizing take the current one
    assert now() == before
    assert torch.backends.cudnn.allow_tf32, "torch's own default"
    for precision in ("float32", "bf16"):
        with torch_settings(second, precision=precision):  # convolutions too: what is float32 is no TF32
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
        assert now() == before
    assert current[-1] == torch.device("cuda:0")
    assert generators == {second: 1}


@pytest.fixture
def cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device whose generators are stand-ins; TF32 is as before at the end."""
    for name in ("current_device", "set_device", "get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: torch.tensor([0]))
    b, allowed, before = torch.backends, torch.backends.cudnn.allow_tf32, newer()
    generic, older = b.fp32_precision, torch.get_float32_matmul_precision()
    yield torch.device("cuda:0")
    b.fp32_precision = generic
    torch.set_float32_matmul_precision(older)
    b.cudnn.allow_tf32 = allowed
    for each, value in zip((b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul), before, strict=True):
        each.fp32_precision = value


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("where", ["cuda.matmul", "cudnn.conv", "all"])
def test_an_objective_may_have_used_the_newer_way_to_say_tf32(
    cuda_without_a_gpu: torch.device, precision: Any, where: str
) -> None:
    """torch's older way cannot be read then: it raises."""
    b = torch.backends
    part: Any = b if where == "all" else attrgetter(where)(b)
    part.fp32_precision = "ieee" if where == "cudnn.conv" else "tf32"
    before = newer()
    with torch_settings(cuda_without_a_gpu, precision=precision):
        assert newer()[:3] == ["tf32" if precision == "tf32" else "ieee"] * 3
        assert torch.get_float32_matmul_precision() == ("high" if precision == "tf32" else "highest")
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    assert newer() == before


def test_every_command_that_trains_has_the_precision_of_the_study(study, monkeypatch):
    given, real = list[object](), opening.torch_settings

    def recorded(device, **settings):
        given.append(settings["precision"])
        return real(device, **settings)

    monkeypatch.setattr(opening, "torch_settings", recorded)
    path = study("trials: 2\nepochs: 1\nstack: 1\nprecision: bf16\nconfirm: {top: 1, seeds: 2}\nbaseline: false\n")
    for command in (["worker", path], ["run", path], ["export", path, "--trial", 0, "--out", "one"]):
        given.clear()
        invoke(*command)
        assert set(given) == {"bf16"}, command
