"""Loss and metrics of all members at once against `hpo.training.evaluation.measure`, member by member."""

import collections
import copy
import json
import operator
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)
from torchmetrics.regression import (
    ExplainedVariance,
    MeanAbsoluteError,
    MeanAbsolutePercentageError,
    MeanSquaredError,
    PearsonCorrCoef,
    R2Score,
    RelativeSquaredError,
)

from hpo.study.losses import cross_entropy
from hpo.study.objective import Objective
from hpo.training import metrics as measuring
from hpo.training.evaluation import measure
from hpo.training.faults import TrialError
from hpo.training.loss_params import RecordingParams, SharedParams, as_pythons
from hpo.training.metrics import Measuring

CPU = torch.device("cpu")
N, CLASSES = 60, 4
NUMBERS: dict[str, Callable[[], Metric]] = {
    "mse": MeanSquaredError,
    "rmse": lambda: MeanSquaredError(squared=False),
    "mae": MeanAbsoluteError,
    "r2": R2Score,
    "explained variance": ExplainedVariance,
    "pearson": PearsonCorrCoef,
    "mape": MeanAbsolutePercentageError,
    "relative squared error": RelativeSquaredError,
}
OF_CLASSES: dict[str, Callable[[], Metric]] = {
    "micro": lambda: MulticlassAccuracy(CLASSES, average="micro"),
    "macro": lambda: MulticlassAccuracy(CLASSES, average="macro"),
    "top 2": lambda: MulticlassAccuracy(CLASSES, top_k=2),
    "f1": lambda: MulticlassF1Score(CLASSES),
    "auroc of classes": lambda: MulticlassAUROC(CLASSES),
}
OF_TWO: dict[str, Callable[[], Metric]] = {
    "accuracy": BinaryAccuracy,
    "binary f1": BinaryF1Score,
    "auroc": BinaryAUROC,
}
METRICS = NUMBERS | OF_CLASSES | OF_TWO
LOSSES: dict[str, Callable[..., Tensor]] = {
    **dict.fromkeys(NUMBERS, lambda outputs, targets, params: F.mse_loss(outputs, targets)),
    **dict.fromkeys(OF_CLASSES, lambda outputs, targets, params: cross_entropy(outputs, targets, params["smoothing"])),
    **dict.fromkeys(
        OF_TWO, lambda outputs, targets, params: F.binary_cross_entropy_with_logits(outputs, targets.float())
    ),
}


class Measured(Objective):
    """Any of the metrics, with a loss that goes with it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def data(self):
        raise AssertionError("there is none")

    def build(self, params, info):
        raise AssertionError("there is none")

    def loss(self, outputs, targets, params):
        return LOSSES[self.name](outputs, targets, params)

    def metrics(self):
        return {self.name: METRICS[self.name]()}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def targets(name: str) -> Tensor:
    if name in OF_CLASSES:
        return random(N).mul(10).long().remainder(CLASSES)
    return (random(N, 1) > 0).long() if name in OF_TWO else random(N, 1)


def outputs(name: str, k: int, seed: int = 1) -> Tensor:
    """Return the outputs of `k` members (K, N, ...), some closer to the targets than others."""
    if name in OF_CLASSES:
        return F.one_hot(targets(name), CLASSES) + random(k, N, CLASSES, seed=seed)
    return targets(name) + random(k, N, 1, seed=seed) * torch.arange(1, k + 1).view(k, 1, 1)


def params(k: int) -> list[dict[str, Any]]:
    return [{"smoothing": 0.1 * n, "batch_size": 8} for n in range(k)]


def assert_each_as_alone(measuring: Measuring, name: str, outputs: Any, targets: Tensor, k: int) -> None:
    """Hold what the members are told at once against each one's own `measure`."""
    objective, everyone = Measured(name), params(k)
    numbers = {"smoothing": torch.tensor([each["smoothing"] for each in everyone])} if name in OF_CLASSES else {}
    got = measuring(outputs, targets, everyone, numbers, {"smoothing"})
    assert len(got) == k
    for number, each in enumerate(got):
        expected = measure(objective, outputs[number], targets, everyone[number], objective.metrics())
        assert each.keys() == expected.keys() == {"loss", name}
        assert each == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.parametrize("sizes", [(1, 1), (5, 5), (1, 5), (5, 1), (4, 2, 3)], ids=str)
@pytest.mark.parametrize("name", METRICS)
def test_each_member_has_what_it_has_alone_at_first_and_later(name: str, sizes: tuple[int, ...]) -> None:
    """The first call tries which way a metric allows, the others go it, with as many members as there are then."""
    made = Measuring(Measured(name), CPU)
    for seed, k in enumerate(sizes, start=1):
        assert_each_as_alone(made, name, outputs(name, k, seed), targets(name), k)


@pytest.mark.filterwarnings("ignore:The variance of predictions")
@pytest.mark.parametrize("first", [True, False], ids=["in the first epoch", "in a later one"])
@pytest.mark.parametrize("name", METRICS)
def test_a_member_with_nan_touches_no_other(name: str, first: bool) -> None:
    made, given = Measuring(Measured(name), CPU), outputs(name, 4)
    if not first:
        assert_each_as_alone(made, name, given, targets(name), 4)
    given[2] = torch.nan
    assert_each_as_alone(made, name, given, targets(name), 4)
    assert_each_as_alone(made, name, outputs(name, 4, seed=2), targets(name), 4)


@pytest.mark.parametrize("name", ["mse", "rmse", "mae", "r2"])
def test_members_are_columns_of_a_regression_metric(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is known that a metric allows it, there is no loop over the members."""
    made = Measuring(Measured(name), CPU)
    made(outputs(name, 5), targets(name), params(5), {}, {"smoothing"})
    monkeypatch.setattr(measuring, "_one_by_one", None)
    calls, real = [], METRICS[name]().__class__.update

    def update(self: Metric, *given: Tensor) -> None:
        calls.append(given[0].shape)
        real(self, *given)

    monkeypatch.setattr(METRICS[name]().__class__, "update", update)
    assert_each_as_alone(made, name, outputs(name, 5, seed=2), targets(name), 5)
    assert calls[0] == (N, 5)
    assert calls[1:] == [(N, 1)] * 5  # those of the reference


def test_several_targets_are_no_columns_of_their_own() -> None:
    given, expected = random(3, N, 2), random(N, 2, seed=4)
    made = Measuring(Measured("r2"), CPU)
    for seed in (0, 1):
        assert_each_as_alone(made, "r2", given + seed, expected, 3)


def test_several_outputs_are_measured_by_the_first() -> None:
    """The loss sees them all."""

    class Two(Measured):
        def loss(self, outputs, targets, params):
            return F.mse_loss(outputs["mean"], targets) + outputs["spread"].square().mean()

    objective = Two("rmse")
    everything = {"mean": outputs("rmse", 3), "spread": random(3, N, 1, seed=7)}
    got = Measuring(objective, CPU)(everything, targets("rmse"), params(3), {}, {"smoothing"})
    for number, each in enumerate(got):
        alone = {name: x[number] for name, x in everything.items()}
        expected = measure(objective, alone, targets("rmse"), {}, objective.metrics())
        assert each == pytest.approx(expected, rel=1e-5)


def test_members_with_label_smoothings_of_their_own_have_losses_of_their_own() -> None:
    same = outputs("micro", 1).expand(3, N, CLASSES)
    everyone = params(3)
    numbers = {"smoothing": torch.tensor([each["smoothing"] for each in everyone])}
    got = Measuring(Measured("micro"), CPU)(same, targets("micro"), everyone, numbers, {"smoothing"})
    torchs = [F.cross_entropy(same[0], targets("micro"), label_smoothing=0.1 * n).item() for n in range(3)]
    assert [each["loss"] for each in got] == pytest.approx(torchs, rel=1e-5)
    assert len({each["micro"] for each in got}) == 1


READERS: dict[str, Callable[[Any], Any]] = {
    "json": lambda params: json.dumps(params),
    "json, indented": lambda params: json.dumps(params, indent=1),
    "dict": dict,
    "literal": lambda params: {**params},
    "call": lambda params: (lambda **given: given)(**params),
    "dict of dict": lambda params: dict(params, more=1),
    "update": lambda params: {}.update(params),
    "or": lambda params: params | {},
    "ror": lambda params: {} | params,
    "ior": lambda params: operator.ior({}, params),
    "repr": repr,
    "format": lambda params: f"{params}",
    "equal": lambda params: params == {"a": 1},
    "equal, the other way": lambda params: operator.eq({"a": 1}, params),
    "unequal": lambda params: params != {"a": 1},
    "list": list,
    "set": set,
    "reversed": lambda params: list(reversed(params)),
    "sorted": sorted,
    "len": len,
    "keys": lambda params: params.keys(),
    "values": lambda params: params.values(),
    "items": lambda params: params.items(),
    "copy": copy.copy,
    "own copy": lambda params: params.copy(),
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "popitem": lambda params: params.popitem(),
    "class": lambda params: type("Made", (), params),
    "ordered": collections.OrderedDict,
    "names": lambda params: SimpleNamespace(**params),
}
"""Ways to read all params, in C most of them."""
OF_ONE: dict[str, Callable[[Any], Any]] = {
    "key": lambda params: params["b"],
    "get": lambda params: params.get("b"),
    "in": lambda params: "b" in params,
    "setdefault": lambda params: params.setdefault("b", 3),
    "pop": lambda params: params.pop("b"),
    "itemgetter": operator.itemgetter("b"),
    "text": lambda params: operator.mod("%(b)s", params),
    "format_map": lambda params: "{b}".format_map(params),
    "chain": lambda params: collections.ChainMap(params)["b"],
    "eval": lambda params: eval("b", {}, params),
}


@pytest.mark.parametrize("way", READERS | OF_ONE)
def test_whatever_way_a_loss_reads_its_params_it_is_seen(way: str) -> None:
    given, read = {"a": 1, "b": 2}, (READERS | OF_ONE)[way]
    recording = RecordingParams(given)
    assert isinstance(recording, dict)
    read(recording)
    assert recording.names == (set(given) if way in READERS else {"b"})
    with pytest.raises(TrialError, match=r"the loss reads the param '[ab]' on some rows only"):
        read(SharedParams(given, {}, ()))
    read(SharedParams(given, {}, recording.names))
    assert given == {"a": 1, "b": 2}


def test_params_of_a_loss_give_what_a_dict_gives() -> None:
    given = {"a": 1, "b": 2}
    for way, read in READERS.items():
        if way not in ("class", "pickle"):
            assert repr(read(RecordingParams(given))) == repr(read(dict(given))), way
    with pytest.raises(TypeError, match="__dict__"):
        vars(RecordingParams(given))


@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (lambda params: params.setdefault("c", 1.0), False),
        (lambda params: params.update(c=2, d="x"), False),
        (lambda params: params.update(a=1), False),
        (lambda params: params.pop("c", None), False),
        (lambda params: params.pop("a", None), True),
        (lambda params: params.update(a=1.0), True),
        (lambda params: params.update(c=params.get("c", 0) + 1), True),
        (lambda params: params.update(c=torch.ones(())), True),
        (lambda params: operator.ior(params, {"b": 3}), True),
        (lambda params: params.clear(), True),
        (lambda params: operator.delitem(params, "a") if "a" in params else None, True),
    ],
)
def test_what_each_call_of_a_loss_writes_alike_is_no_change(write: Callable[[Any], Any], changes: bool) -> None:
    recording = RecordingParams({"a": 1, "b": 2})
    write(recording)
    write(recording)
    assert recording.changes == changes


BOOL, WHOLE = torch.tensor([True, False]), torch.tensor([3, 4])
SINGLE, DOUBLE = torch.tensor([0.7, 0.1]), torch.tensor([0.7, 0.1], dtype=torch.float64)
EXPRESSIONS: dict[str, Callable[[Any], Tensor]] = {
    "bool": lambda w: w * BOOL,
    "of a number of it": lambda w: (1 + 2 * w) * BOOL,
    "from the right": lambda w: BOOL * w + 1,
    "whole": lambda w: WHOLE / w,
    "power": lambda w: WHOLE**w,
    "a sum": lambda w: BOOL.sum() * w,
    "single": lambda w: w * SINGLE,
    "a mean in single precision": lambda w: w * SINGLE.mean(),
    "double": lambda w: w * DOUBLE,
    "both": lambda w: w * DOUBLE + w * BOOL,
    "where": lambda w: torch.where(BOOL, w, DOUBLE),
    "compared": lambda w: (w < WHOLE).sum(),
    "two": lambda w: (w - 0.5 * w) * WHOLE,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_number_as_a_tensor_gives_the_types_and_digits_that_pythons_gives(name: str) -> None:
    numbers = torch.tensor([0.3, 0.7], dtype=torch.float64)

    def of(number: Tensor) -> Tensor:
        with as_pythons({"w": number}):
            return EXPRESSIONS[name](number)

    most = 2e-7 if name == "power" else 1e-15  # torch has another kernel for a power that is a number
    for got, number in zip(torch.func.vmap(of)(numbers), numbers.tolist(), strict=True):
        torch.testing.assert_close(got, EXPRESSIONS[name](number), rtol=most, atol=0)


def test_a_loss_in_double_precision_with_a_weight_by_a_mask_is_as_alone() -> None:
    class Weighted(Measured):
        def loss(self, outputs, targets, params):
            return ((outputs - targets).square() * (1 + params["w"] * (targets > 0))).mean()

    objective, given, expected = Weighted("mse"), random(3, N, 1).double(), random(N, 1, seed=4).double()
    everyone = [{"w": 0.3 * n} for n in range(3)]
    numbers = {"w": torch.tensor([each["w"] for each in everyone], dtype=torch.float64)}
    got = Measuring(objective, CPU)(given, expected, everyone, numbers, {"w"})
    for each, outputs, params in zip(got, given, everyone, strict=True):
        assert each["loss"] == pytest.approx(measure(objective, outputs, expected, params, {})["loss"], rel=1e-14)


@pytest.mark.parametrize("params", [{"loss": "bce"}, {}], ids=["by the loss", "by the head"])
def test_logits_are_no_probabilities_where_all_of_them_lie_between_0_and_1(params: dict[str, Any]) -> None:
    objective = Measured("binary f1")
    if not params:
        objective.head = torch.nn.Sigmoid  # type: ignore[method-assign, assignment]
    outputs = torch.linspace(0.1, 0.4, N).unsqueeze(1)  # each is the second class
    targets = torch.ones(N, 1, dtype=torch.long)
    found = measure(objective, outputs, targets, params, objective.metrics())
    assert found["binary f1"] == 1.0
    stacked = torch.stack([outputs, -outputs])
    assert [each["binary f1"] for each in Measuring(objective, CPU)(stacked, targets, [params] * 2, {}, params)] == [
        1.0,
        0.0,
    ]


def test_one_that_is_left_of_several_is_measured_as_one() -> None:
    objective = Measured("pearson")
    outputs, targets = torch.randn(3, N, 1), torch.randn(N, 1)
    measuring_all = Measuring(objective, CPU)
    several = measuring_all(outputs, targets, [{}] * 3, {}, ())
    assert measuring_all(outputs[:1], targets, [{}], {}, ())[0]["pearson"] == pytest.approx(
        several[0]["pearson"], abs=1e-6
    )
