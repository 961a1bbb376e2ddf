"""Splits out of torch's datasets and loaders: the same rows in the same order, whatever the loader would do to them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import hpo
from hpo.errors import DataError
from hpo.study.data import Split
from tests.conftest import run_hpo

X = torch.arange(700.0).reshape(350, 2)
Y = torch.arange(350) % 3


class Rows(Dataset):
    """Rows of whatever `make(index)` gives."""

    def __init__(self, make, n=350):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index >= self.n:
            raise IndexError
        return self.make(index)


class Stream(IterableDataset):
    def __iter__(self):
        return ((X[i], int(Y[i])) for i in range(350))


SOURCES = {
    "tensors": TensorDataset(X, Y),
    "a list": [(X[i], int(Y[i])) for i in range(350)],
    "arrays": Rows(lambda i: (X[i].numpy().astype(np.float64), int(Y[i]))),
    "a mapping": Rows(lambda i: {"features": X[i], "label": Y[i]}),
    "a stream": Stream(),
    "a shuffling loader": DataLoader(TensorDataset(X, Y), batch_size=32, shuffle=True, drop_last=True),
    "a loader in order": DataLoader(TensorDataset(X, Y), batch_size=32),
    "a loader that drops": DataLoader(TensorDataset(X, Y), batch_size=32, drop_last=True),
    "a loader of no batches": DataLoader(TensorDataset(X, Y), batch_size=None),
    "a loader of a stream": DataLoader(Stream(), batch_size=10),
}


@pytest.mark.parametrize("disk", [False, True], ids=["in memory", "on disk"])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_row_is_read_once_and_in_order(source, disk, tmp_path: Path) -> None:
    split = Split.from_dataset(source, keep_in=tmp_path / "rows" if disk else None)
    assert list(split.inputs) == ["features"]
    assert torch.equal(split.inputs["features"], X)
    assert split.inputs["features"].dtype == torch.float32
    assert torch.equal(split.targets, Y)
    assert bool(list(tmp_path.rglob("*.bin"))) == disk


def test_names_targets_and_several_inputs() -> None:
    pairs = Rows(lambda i: ((X[i], X[i, :1]), float(Y[i])))
    split = Split.from_dataset(pairs)
    assert {name: x.shape for name, x in split.inputs.items()} == {"input0": (350, 2), "input1": (350, 1)}
    assert split.targets.shape == (350, 1)
    assert list(Split.from_dataset(pairs, inputs=["wide", "deep"]).inputs) == ["wide", "deep"]
    many = Rows(lambda i: {"label": Y[i], "a": X[i], "b": X[i], "id": i})
    split = Split.from_dataset(many, inputs=["b"], targets="label")
    assert list(split.inputs) == ["b"]
    assert torch.equal(split.targets, Y)


@pytest.mark.parametrize(
    ("source", "keys", "text"),
    [
        (5, {}, "must be a torch.utils.data.Dataset or DataLoader, but is a int"),
        (Rows(lambda i: X[i]), {}, r"a row must be \(input, ..., target\) or a mapping of names"),
        (Rows(lambda i: (X[i], "cat")), {}, "targets of a row must be a tensor, an array or a number"),
        (Rows(lambda i: (object(), 1)), {}, "cannot be put together: .*object"),
        (Rows(lambda i: (torch.zeros(i + 1), 1)), {}, "cannot be put together"),
        (Rows(lambda i: (torch.zeros(1 + i // 256), 1)), {}, r"features is \(2,\) float32 in batch 1, but \(1,\) flo"),
        (Rows(lambda i: (X[i], 1), n=0), {}, "gives no rows"),
        (Rows(lambda i: {"y": Y[i]}), {}, "has the target alone"),
        (Rows(lambda i: {"x": X[i], "y": Y[i]}), {"targets": "z"}, "a row has no 'z'; it has x, y"),
        (Rows(lambda i: {"x": X[i], "y": Y[i]}), {"inputs": ["w"]}, "a row has no 'w'; it has x, y"),
        (TensorDataset(X, Y), {"inputs": ["a", "b"]}, "a row has 1 inputs, but inputs names 2: a, b"),
    ],
)
def test_what_cannot_be_used_is_named(source, keys, text) -> None:
    with pytest.raises(DataError, match=text):
        Split.from_dataset(source, **keys)


OBJECTIVE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import hpo


class Blobs(hpo.Objective):
    defaults = {"learning_rate": 0.1, "batch_size": 50}
    space = {"learning_rate": {"type": "float", "low": 1e-2, "high": 1.0, "log": True}}

    def data(self):
        y = torch.arange(600) % 3
        x = torch.randn(600, 4, generator=torch.Generator().manual_seed(0)) + 3 * F.one_hot(y, 4)
        parts = (slice(0, 400), slice(400, 500), slice(500, 600))
        loaders = [DataLoader(TensorDataset(x[p], y[p]), batch_size=32, shuffle=True) for p in parts]
        names = ("train", "valid", "test")
        splits = [hpo.Split.from_dataset(each, keep_in=f"rows/{name}") for each, name in zip(loaders, names)]
        return hpo.Data(train=splits[0], valid=splits[1], test=splits[2], class_names=("a", "b", "c"))

    def build(self, params, info):
        return nn.Linear(info.n_features, info.n_classes)

    def loss(self, outputs, targets, params):
        return F.cross_entropy(outputs, targets)

    def metrics(self):
        return {"accuracy": MulticlassAccuracy(3, average="micro")}
"""


def test_a_study_of_loaders_is_run_and_resumed_streamed_from_disk(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blobs.py").write_text(OBJECTIVE)
    (tmp_path / "s.yaml").write_text(
        "objective: blobs.py\ntrials: 2\nepochs: 2\ntracking: off\nloading: {resident: false}\n"
        "stack: 1\nbaseline: false\n"
    )
    done = run_hpo("run", "s.yaml")
    assert done.returncode == 0, done.stderr
    done = run_hpo("run", "s.yaml", "--trials", "3")
    assert done.returncode == 0, done.stderr
    study = hpo.open_study("s.yaml")
    assert study.counts.complete == 3
    assert study.best.value > 0.9


def test_a_loader_that_draws_some_rows_gives_these() -> None:
    rows = TensorDataset(X, Y)
    for loader in (
        DataLoader(rows, 2, sampler=SubsetRandomSampler([7, 3, 300])),
        DataLoader(rows, batch_sampler=BatchSampler(SubsetRandomSampler([7, 3, 300]), 2, drop_last=True)),
    ):
        split = Split.from_dataset(loader)
        assert torch.equal(split.inputs["features"], X[[7, 3, 300]])
        assert torch.equal(split.targets, Y[[7, 3, 300]])


class InPairs(BatchSampler):
    pass


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(X, Y), 2, sampler=WeightedRandomSampler([1.0] * 350, 50)),
        DataLoader(TensorDataset(X, Y), batch_sampler=InPairs(SequentialSampler(X), 2, drop_last=False)),
    ],
)
def test_a_loader_that_draws_rows_in_a_way_of_its_own_is_refused(loader: DataLoader) -> None:
    with pytest.raises(DataError, match=r"draws its rows by a (Weighted|InPairs).* give the dataset itself"):
        Split.from_dataset(loader)


def test_splits_that_are_kept_in_one_folder_stay_apart(tmp_path: Path) -> None:
    one = Split.from_dataset(TensorDataset(X, Y), keep_in=tmp_path)
    other = Split.from_dataset(TensorDataset(-X, Y), keep_in=tmp_path)
    again = Split.from_dataset(TensorDataset(X, Y), keep_in=tmp_path)  # as another process reads it
    assert torch.equal(one.inputs["features"], X)
    assert torch.equal(other.inputs["features"], -X)
    assert torch.equal(again.inputs["features"], X)
    assert len(list(tmp_path.iterdir())) == 3, "what is equal is there once"
    with pytest.raises(DataError):
        Split.from_dataset(Rows(lambda i: (X[i, : 1 + i // 256], 1)), keep_in=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3, "nothing is left of what failed"
