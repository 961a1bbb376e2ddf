"""What of a study's data flatters its results is said: rows that two splits have, columns that say the target."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hpo.runner.prepare import prepare
from hpo.runner.study import check
from hpo.study import catalog
from hpo.study.data import Data, Split
from hpo.study.leaks import repeated, telling
from hpo.study.loading import load
from tests.cli import invoke
from tests.conftest import LINEAR


def split(*rows, target=0.0):
    return Split(inputs={"x": torch.tensor(rows)}, targets=torch.full((len(rows), 1), target))


DATA = Data(train=split([1.0, 2.0]), valid=split([3.0, 4.0]), test=split([5.0, 6.0]), class_names=("a",))


def test_rows_of_test_that_are_in_train_or_validation_are_counted():
    assert repeated(DATA) == (0, 0)
    both = Data(
        train=split([1.0, 2.0], [9.0, 9.0]), valid=split([3.0, 4.0]), test=split([3.0, 4.0], [1.0, 2.0], [2.0, 1.0])
    )
    assert repeated(both) == (2, 0)
    other = Data(train=both.train, valid=both.valid, test=split([3.0, 4.0], [1.0, 2.0], target=1.0))
    assert repeated(other) == (0, 0), "with another target it is another row"
    assert repeated(Data(train=both.test, valid=both.test, test=DATA.test)) == (0, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float64, torch.bfloat16, torch.int64])
def test_whatever_the_type_equal_rows_are_found_and_others_are_not(dtype):
    x = (torch.randn(900, 3, 5, generator=torch.Generator().manual_seed(0)) * 50).to(torch.int8).to(dtype)
    targets = torch.arange(900)
    parts = [Split(inputs={"x": x[i:j]}, targets=targets[i:j]) for i, j in ((0, 500), (500, 700), (690, 900))]
    assert repeated(Data(train=parts[0], valid=parts[1], test=parts[2])) == (10, 0)


def test_a_run_and_a_check_say_so(study, tmp_path, said):
    text = LINEAR.replace("slice(250, 300)]", "slice(247, 300)]")
    (tmp_path / "linear.py").write_text(text)
    path = study()
    invoke("run", path)
    check(prepare(path))
    assert sum(line.startswith("3 of 53 test rows equal a row of train or validation") for line in said) == 2
    assert not any("validation rows equal" in line for line in said)
    (tmp_path / "linear.py").write_text(LINEAR.replace("slice(200, 250)", "slice(150, 200)"))
    check(prepare(path, {"name": "twice"}))
    assert sum(line.startswith("50 of 50 validation rows equal a row of train") for line in said) == 1


TRUTH_TABLES = {"logic_gates"}
"""Four rows are all there are: they are the train, the validation and the test split."""


@pytest.mark.parametrize("name", [name for name in catalog.names() if name not in TRUTH_TABLES])
def test_no_objective_of_ours_has_a_row_in_two_splits(name):
    objective, _ = load(name, {}, Path())
    if objective is None or name == "covertype":
        pytest.skip("it has no data of its own" if objective is None else "it takes seconds; benchmarks hold it")
    in_test, in_valid = repeated(objective.data())
    assert in_test == 0
    assert in_valid == (1 if name == "iris" else 0)


N = 300
NOISE = np.random.default_rng(0).normal(size=N)
CLASSES = (NOISE + np.random.default_rng(1).normal(size=N) > 0).astype(float)


def table(targets, **columns):
    part = Split(
        inputs={"numbers": torch.tensor(np.stack([*columns.values()], axis=1))}, targets=torch.tensor(targets)[:, None]
    )
    return Data(train=part, valid=part, test=part, feature_names=tuple(columns))


@pytest.mark.parametrize(
    ("targets", "column"),
    [
        (CLASSES, CLASSES * 3 - 1),
        (CLASSES, np.where(CLASSES == 1, np.nan, 2.0)),
        (CLASSES, CLASSES * 2 + (np.arange(N) % 2)),
        (NOISE, NOISE * 1.19),
        (NOISE, -np.exp(NOISE)),
        (NOISE, np.round(NOISE, 1)),
        (NOISE, np.where(np.arange(N) % 3 == 0, np.nan, NOISE)),
    ],
    ids=["copy", "missing", "finer", "scaled", "falling", "rounded", "some missing"],
)
def test_a_column_that_alone_says_the_target_is_found(targets, column):
    assert telling(table(targets, honest=NOISE[::-1], leak=column)) == ["leak"]


@pytest.mark.parametrize(
    ("targets", "column"),
    [
        (CLASSES, NOISE),
        (CLASSES, np.where(np.arange(N) == 7, 1 - CLASSES, CLASSES)),
        (CLASSES, np.arange(N, dtype=float)),
        ((np.arange(N) < 3).astype(float), (np.arange(N) < 3) * 1.0),
        (NOISE, NOISE + np.random.default_rng(2).normal(size=N) / 100),
        (NOISE, np.ones(N)),
        (NOISE, np.where(np.arange(N) < 200, np.nan, NOISE)),
        (NOISE, np.full(N, np.nan)),
    ],
    ids=["noise", "all but one", "numbered", "three of a class", "nearly", "constant", "mostly missing", "missing"],
)
def test_one_that_does_not_is_not(targets, column):
    assert telling(table(targets, column=column)) == []


def test_of_many_rows_the_one_that_differs_is_seen():
    targets = (np.arange(9000) % 2).astype(float)
    leak = targets.copy()
    assert telling(table(targets, leak=leak)) == ["leak"]
    leak[8500] = 1 - leak[8500]
    assert telling(table(targets, leak=leak)) == []


def test_pictures_texts_of_many_columns_and_several_targets_are_not_looked_at():
    targets = torch.tensor(CLASSES)
    for x in (targets[:, None, None].float(), targets[:, None].expand(N, 2000), targets[:, None] * 1j):
        part = Split(inputs={"x": x}, targets=targets)
        assert telling(Data(train=part, valid=part, test=part)) == []
    part = Split(inputs={"x": targets[:, None], "y": targets[:, None]}, targets=targets[:, None].expand(N, 2))
    assert telling(Data(train=part, valid=part, test=part)) == []
    part = Split(inputs={"x": targets[:, None], "y": targets[:, None]}, targets=targets)
    assert telling(Data(train=part, valid=part, test=part)) == ["x[0]", "y[0]"]


def test_a_table_with_such_a_column_is_searched_and_that_is_said(study, tmp_path, said):
    frame = pd.DataFrame({"a": NOISE, "outcome": np.where(CLASSES == 1, "won", "lost"), "y": CLASSES.astype(int)})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    path = study("objective: tabular\noptions: {file: rows.csv, target: y}\nepochs: 1\ntrials: 1\n")
    line = "outcome alone tells the target in each of the 180 rows of train"
    check(prepare(path))
    assert [line in each for each in said].count(True) == 1
    check(prepare(path, {"options.drop": "[outcome]"}))
    assert [line in each for each in said].count(True) == 1


@pytest.mark.parametrize("name", ["breast_cancer", "iris", "california_housing"])
def test_no_column_of_the_real_tables_does(name):
    assert telling(load(name, {}, Path())[0].data()) == []
