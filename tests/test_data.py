"""Data that an objective hands over: what is refused, what refitting adds, and what a fingerprint sees."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hpo.errors import DataError
from hpo.study.data import Data, DataInfo, Split, data_home


def split(n, start=0.0):
    """Return `n` rows of two inputs, whose values count on from `start`."""
    x = start + torch.arange(n * 2, dtype=torch.float32).reshape(n, 2)
    return Split(inputs={"x": x, "code": torch.arange(n * 3).reshape(n, 3, 1)}, targets=torch.arange(n) % 2)


@pytest.fixture
def data():
    return Data(
        train=split(4),
        valid=split(3, 100.0),
        test=split(2, 200.0),
        feature_names=("a", "b"),
        class_names=("no", "yes", "maybe"),
    )


def with_value(data, name, column, value):
    """Return `data` with `value` in row 1 of one column of one split."""
    old = data.splits[name]
    columns = {key: x.clone() for key, x in {**old.inputs, "targets": old.targets}.items()}
    columns[column] = columns[column].to(torch.float32) if isinstance(value, float) else columns[column]
    columns[column][1] = value
    targets = columns.pop("targets")
    return replace(data, **{name: Split(inputs=columns, targets=targets)})


def test_good_data_passes_its_check(data):
    assert data.checked("mine") is data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("name", "column", "n_rows"),
    [
        ("train", "x", 4),
        ("valid", "code", 3),
        ("test", "targets", 2),
    ],
)
def test_nan_and_infinity_are_refused(data, name, column, n_rows, value):
    with pytest.raises(DataError) as caught:
        with_value(data, name, column, value).checked("mine")
    assert str(caught.value) == (
        f"objective mine: in its {name} split, {column} holds NaN or infinity in 1 of "
        f"{n_rows} rows (the first: row 1); drop or impute them"
    )


def test_a_row_with_several_nan_is_counted_once(data):
    x = torch.zeros(4, 2)
    x[2:] = float("nan")
    broken = replace(data, train=replace(data.train, inputs={"x": x}))
    with pytest.raises(DataError, match=r"in 2 of 4 rows \(the first: row 2\)"):
        broken.checked("mine")


@pytest.mark.parametrize("name", ["train", "valid", "test"])
def test_an_empty_split_is_refused(data, name):
    with pytest.raises(DataError, match=f"^objective mine: its {name} split is empty$"):
        replace(data, **{name: split(0)}).checked("mine")


def test_columns_of_unequal_lengths_are_refused(data):
    short = Split(inputs={"x": torch.zeros(4, 2), "code": torch.zeros(3, 3)}, targets=torch.zeros(4))
    message = "^objective mine: in its valid split, code has 3 rows, but targets has 4$"
    with pytest.raises(DataError, match=message):
        replace(data, valid=short).checked("mine")


def test_info_says_what_a_network_must_know(data):
    assert data.info == DataInfo(
        inputs={"x": (2,), "code": (3, 1)},
        input_dtypes={"x": "float32", "code": "int64"},
        feature_names=("a", "b"),
        class_names=("no", "yes", "maybe"),
        class_counts=(2, 2, 0),
    )
    assert (data.info.n_features, data.info.n_classes) == (2, 3)


def test_a_refit_trains_on_train_and_valid_and_leaves_the_rest(data):
    refit = data.for_refit()
    assert torch.equal(refit.train.inputs["x"], torch.cat([data.train.inputs["x"], data.valid.inputs["x"]]))
    assert refit.train.inputs["code"].shape == (7, 3, 1)
    assert refit.train.targets.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert (refit.valid, refit.test, refit.class_names) == (data.valid, data.test, data.class_names)
    assert len(data.train) == 4


def test_equal_data_has_an_equal_fingerprint(data):
    copy = with_value(data, "train", "code", data.train.inputs["code"][1])
    assert copy.fingerprint() == data.fingerprint()
    assert len(data.fingerprint()) == 16
    assert int(data.fingerprint(), 16) >= 0


@pytest.mark.parametrize("name", ["train", "valid", "test"])
@pytest.mark.parametrize("column", ["x", "code", "targets"])
def test_a_fingerprint_changes_with_any_tensor(data, name, column):
    assert with_value(data, name, column, 77).fingerprint() != data.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.view(torch.int32),
        lambda x: x.reshape(2, 4),
        lambda x: x.flip(0),
    ],
    ids=["dtype", "shape", "order"],
)
def test_a_fingerprint_sees_more_than_the_values(data, change):
    inputs = {**data.train.inputs, "x": change(data.train.inputs["x"])}
    changed = replace(data, train=replace(data.train, inputs=inputs))
    assert changed.fingerprint() != data.fingerprint()


def test_a_fingerprint_does_not_depend_on_how_a_tensor_lies_in_memory(data):
    x = data.train.inputs["x"].T.contiguous().T
    changed = replace(data, train=replace(data.train, inputs={**data.train.inputs, "x": x}))
    assert not x.is_contiguous()
    assert changed.fingerprint() == data.fingerprint()


class Halves(nn.Module):
    """A preprocessing of two inputs, which remembers how many rows it was given at a time."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x, code):
        self.rows.append(len(x))
        return x / 2, code.flatten(1)


@pytest.mark.parametrize(("rows", "chunks"), [(2, [2, 2, 1]), (8192, [5])])
def test_a_split_goes_through_a_module_some_rows_at_a_time(rows, chunks):
    module, before = Halves(), split(5)
    after = before.through(module, rows=rows)
    assert module.rows == chunks
    assert torch.equal(after.inputs["x"], before.inputs["x"] / 2)
    assert after.inputs["code"].shape == (5, 3)
    assert torch.equal(after.targets, before.targets)


def test_a_module_of_one_input_may_return_one_tensor():
    one = Split(inputs={"x": torch.ones(3, 2)}, targets=torch.zeros(3))
    after = one.through(nn.Linear(2, 4))
    assert after.inputs["x"].shape == (3, 4)
    assert not after.inputs["x"].requires_grad


def test_no_preprocessing_leaves_a_split_as_it_is():
    before = split(3)
    assert before.through(nn.Identity()) is before


def test_a_split_moves_to_a_device_whole():
    moved = split(3).to(torch.device("meta"))
    assert {x.device.type for x in (*moved.inputs.values(), moved.targets)} == {"meta"}


@pytest.mark.parametrize(("value", "home"), [("/somewhere", "/somewhere"), ("~/x", "~/x"), ("", "~/.cache/hpo")])
def test_data_lies_where_the_environment_says(monkeypatch, value, home):
    monkeypatch.setenv("HPO_DATA_HOME", value)
    assert data_home() == Path(home).expanduser()
