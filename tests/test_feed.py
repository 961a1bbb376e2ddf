"""A split's way into the networks: the same batches whether it lies on the device, prepared or raw, or streams."""

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.study.data import Split, batch_sizes
from hpo.study.spec import Loading
from hpo.training import batches
from hpo.training.batches import Batches, make_batches
from hpo.training.loop import order, train
from hpo.training.loop_stack import LoopStack
from hpo.training.stack import Member, SingleStack, Task
from tests.graphs import OnStream, Stream
from tests.stacking import CPU, INFO, Toy, asking, keep_all

N_ROWS = 41


class Prepare(nn.Module):
    """Bytes to floats, and the second input, if there is one, scaled by what was learned; other in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(255.0))
        self.dropout = nn.Dropout(0.5)

    def forward(self, pixels, extra=None):
        x = self.dropout(pixels.to(self.scale.dtype) / self.scale)
        return x if extra is None else (x, extra * 2)


def raw(n_inputs: int = 2, n: int = N_ROWS) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 2), dtype=torch.uint8, generator=generator)
    inputs = {"pixels": pixels, "extra": torch.randn(n, 4, generator=generator)}
    targets = pixels.float().mean((1, 2)).unsqueeze(1) / 255
    return Split(inputs=dict(islice(inputs.items(), n_inputs)), targets=targets)


def ways(split: Split) -> dict[str, Batches]:
    """Return the same rows in every way that they may reach the networks."""
    prepare = Prepare().eval()
    return {
        "as a CPU has it": make_batches(split, Prepare().train(), CPU),
        "resident, prepared": Batches(split.through(prepare), CPU),
        "resident, raw": Batches(split, CPU, prepare),
        "streamed, prepared": Batches(split.through(prepare), CPU, resident=False),
        "streamed, raw": Batches(split, CPU, prepare, resident=False),
    }


WAYS = list(ways(raw()))


def assert_same(got, expected) -> None:
    got, expected = list(got), list(expected)
    assert len(got) == len(expected)
    for (inputs, targets), (own_inputs, own_targets) in zip(got, expected, strict=True):
        for a, b in zip([*inputs, targets], [*own_inputs, own_targets], strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def plainly(split: Split, parts) -> list:
    """Return the batches of these rows, each prepared by hand."""
    prepare, made = Prepare().eval(), []
    for rows in parts:
        out = prepare(*(x[rows] for x in split.inputs.values()))
        made.append(([out] if isinstance(out, torch.Tensor) else list(out), split.targets[rows]))
    return made


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n_inputs", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 8, 40, 41, 100])
def test_batches_are_the_rows_in_their_order(way: str, n_inputs: int, batch_size: int) -> None:
    split, rows = raw(n_inputs), order(N_ROWS, 3, 0)
    got = ways(split)[way].epoch(batch_size, rows)
    assert_same(got, plainly(split, rows.split(batch_sizes(N_ROWS, batch_size))))


@pytest.mark.parametrize("way", WAYS)
def test_each_epoch_has_an_order_of_its_own_and_one_that_was_broken_off_leaves_nothing(way: str) -> None:
    split = raw()
    given = ways(split)[way]
    next(iter(given.epoch(8, order(N_ROWS, 3, 5))))
    for r in range(3):
        rows = order(N_ROWS, 3, r)
        assert_same(given.epoch(8, rows), plainly(split, rows.split(batch_sizes(N_ROWS, 8))))


@pytest.mark.parametrize("way", WAYS)
def test_chunks_are_all_rows_in_their_own_order_and_head_the_first_of_them(way: str) -> None:
    split = raw()
    given, rows = ways(split)[way], torch.arange(N_ROWS)
    assert_same(given.chunks(7), plainly(split, rows.split(7)))  # the last has fewer, be it only one
    head = given.head(5)
    assert list(head.inputs) == list(split.inputs)
    assert_same([(list(head.inputs.values()), head.targets)], plainly(split, [rows[:5]]))
    assert len(given) == N_ROWS
    assert torch.equal(given.targets, split.targets)


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "sizes"),
    [
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),  # BatchNorm cannot train on one row
        (8, 4, [4, 4]),
        (5, 4, [5]),
        (3, 4, [3]),
        (1, 4, [1]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_a_row_that_would_be_left_over_joins_the_batch_before(n_rows: int, batch_size: int, sizes: list[int]) -> None:
    assert batch_sizes(n_rows, batch_size) == sizes


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.integers(1, 40), st.booleans())
def test_batches_cover_each_row_once_and_keep_inputs_and_targets_together(n, batch_size, resident):
    rows = order(n, 0, 0)
    split = Split(inputs={"x": torch.arange(n), "y": -torch.arange(n)}, targets=torch.arange(n, dtype=torch.float32))
    made = list(Batches(split, CPU, resident=resident).epoch(batch_size, rows))
    assert torch.cat([targets for _, targets in made]).tolist() == rows.tolist()
    for inputs, targets in made:
        assert torch.equal(inputs[0], targets.long())
        assert torch.equal(inputs[1], -targets.long())
    assert [len(targets) for _, targets in made[:-1]] == [batch_size] * (len(made) - 1)
    last = len(made[-1][1])
    assert 1 <= last <= batch_size + 1
    assert last > 1 or n == 1 or batch_size == 1  # BatchNorm cannot train on one row


class Brightness(Toy):
    """The mean of an image, from its pixels."""

    def build(self, params, info):
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))


def curve(way: str) -> list[dict[str, float]]:
    """Return what each epoch of a training run reports whose data come in that way."""
    task = Task(objective=Brightness(), info=INFO, device=CPU, n_rows=N_ROWS, epochs=3)
    params = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 8}
    member, given = Member(number=0, seed=0, params=params), ways(raw(1))[way]
    train(
        SingleStack(LoopStack(task)),
        given,
        ways(raw(1, 20))[way],
        epochs=3,
        seed=1,
        ask=asking([member]),
        report=keep_all,
    )
    return member.history


def test_a_training_run_has_the_same_curve_in_every_way() -> None:
    curves = [curve(way) for way in WAYS]
    assert len(curves[0]) == 3
    assert all(each == curves[0] for each in curves)


def test_what_preprocessing_would_blow_up_stays_as_it_is_on_another_device() -> None:
    """On `meta`, a device without memory: bytes that become floats are prepared batch by batch, floats once."""
    meta = torch.device("meta")
    pixels, floats = raw(1), raw(1).through(Prepare().eval())
    grows, stays = make_batches(pixels, Prepare(), meta), make_batches(floats, nn.Identity(), meta)
    assert next(iter(grows._split.inputs.values())).dtype == torch.uint8
    assert next(iter(stays._split.inputs.values())).dtype == torch.float32
    for each in (grows, stays):
        (x,), targets = next(each.epoch(8, order(N_ROWS, 0, 0)))
        assert (x.dtype, x.device, targets.device) == (torch.float32, meta, meta)


@pytest.mark.parametrize(("free", "resident"), [(1.99, False), (2.01, True)])
def test_data_lies_on_a_gpu_where_it_takes_at_most_half_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, free: float, resident: bool
) -> None:
    split = Split(inputs={"x": torch.zeros(100, 5)}, targets=torch.zeros(100))
    made = list[bool]()
    monkeypatch.setattr(batches, "free_bytes", lambda device: free * 100 * 5 * 4)
    monkeypatch.setattr(batches, "Batches", lambda *given, resident=True, loading=None: made.append(resident))
    make_batches(split, nn.Identity(), torch.device("cuda"))
    assert made == [resident]


def test_one_preprocessing_serves_all_splits_wherever_they_lie() -> None:
    """Train, validation and test go through the same module, and the bundle holds it afterwards."""
    prepare, meta = Prepare(), torch.device("meta")
    for n in (N_ROWS, 20):
        assert len(make_batches(raw(1, n), prepare, meta)) == n
    assert prepare.scale.device == CPU


@pytest.mark.parametrize(
    "loading",
    [
        Loading(resident=False),
        Loading(resident=False, num_workers=1, prefetch_factor=3, persistent_workers=False),
        Loading(resident=False, num_workers=1, non_blocking=False),
    ],
)
def test_however_it_is_loaded_the_batches_are_the_same(loading: Loading) -> None:
    split = Split(inputs={"x": torch.arange(40.0).reshape(20, 2)}, targets=torch.arange(20))
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    plain, streamed = (make_batches(split, nn.Identity(), CPU, each) for each in (Loading(), loading))
    for _ in range(2):
        pairs = list(zip(plain.epoch(6, rows), streamed.epoch(6, rows), strict=True))
        assert len(pairs) == 4
        for (one, target), (other, other_target) in pairs:
            assert torch.equal(one[0], other[0])
            assert torch.equal(target, other_target)


@pytest.mark.parametrize("piece", [1, 3 * 16 * 8, 1 << 28])
def test_rows_are_put_in_order_in_pieces_that_take_no_more_memory(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """The whole split once more would not fit beside data that takes half of a GPU."""
    split = Split(inputs={"x": torch.arange(82.0).reshape(41, 2)}, targets=torch.arange(41))  # 8 bytes of inputs a row
    rows = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    expected = list(Batches(split, CPU).epoch(16, rows))
    monkeypatch.setattr(batches, "_PIECE", piece)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if func._schema.name == "aten::index":
                largest = max(largest, len(out))
            return out

    with Watch():
        got = list(Batches(split, CPU).epoch(16, rows))
    assert largest == {1: 16, 3 * 16 * 8: 41, 1 << 28: 41}[piece]
    for (one, target), (other, other_target) in zip(got, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(target, other_target)


def test_what_streams_to_a_gpu_is_copied_beside_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stream of its own, for which the step waits; and its memory is kept until the step is done."""
    here, seen = Stream(), list[tuple[str, Stream]]()
    for name, stand_in in {"Stream": Stream, "stream": OnStream, "current_stream": lambda device: Stream.now}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(Stream, "now", here, raising=False)
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: seen.append((f"{self is here} waits", other)))
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: seen.append(("kept", stream)))
    monkeypatch.setattr(Batches, "_moved", lambda self, x: seen.append(("copied", Stream.now)) or x)
    monkeypatch.setattr(batches, "_computes_beside", lambda device: True)
    batches._copying_stream.cache_clear()
    rows, reverse = raw(n=10), torch.arange(10).flip(0)
    got = []
    for inputs, targets in Batches(rows, CPU, resident=False).epoch(5, reverse):
        got.append((inputs, targets))
        n = len(inputs) + 1
        beside = seen[0][1]
        assert beside is not here
        assert seen[:n] == [("copied", beside)] * n
        assert seen[n : 2 * n + 1] == [("True waits", beside), *[("kept", here)] * n]
        assert Stream.now is here
        seen.clear()
    batches._copying_stream.cache_clear()
    assert torch.equal(torch.cat([targets for _, targets in got]), rows.targets[reverse])
