"""Train and validation rows divided again, or in folds: each row once, by classes, test untouched."""

from itertools import pairwise

import pytest
import torch

from hpo.errors import InputError
from hpo.study.data import Data, Split
from hpo.study.splits import fold, resplit


def data_of(targets, n_train=60, class_names=()):
    """Return data whose only input numbers the rows; the last 20 are the test split."""
    x = torch.arange(len(targets), dtype=torch.float32)[:, None]
    ends = (0, n_train, len(targets) - 20, len(targets))
    parts = [Split(inputs={"x": x[i:j]}, targets=targets[i:j]) for i, j in pairwise(ends)]
    return Data(train=parts[0], valid=parts[1], test=parts[2], class_names=class_names)


CLASSES = data_of((torch.arange(100) % 4 == 0).long(), class_names=("many", "few"))
AS_FLOATS = data_of((torch.arange(100) % 4 == 0).float()[:, None], class_names=("many", "few"))
NUMBERS = data_of(torch.arange(100, dtype=torch.float32)[:, None])


def rows(split):
    return split.inputs["x"][:, 0].int().tolist()


@pytest.mark.parametrize("data", [CLASSES, AS_FLOATS, NUMBERS])
def test_resplit_draws_as_many_rows_each_and_no_row_of_test(data):
    first, same, other = (resplit(data, seed) for seed in (1, 1, 2))
    assert (len(first.train), len(first.valid)) == (60, 20)
    assert sorted(rows(first.train) + rows(first.valid)) == list(range(80))
    assert first.test is data.test
    assert rows(first.train) == rows(same.train) != rows(other.train)
    assert torch.equal(first.valid.targets, torch.cat([data.train.targets, data.valid.targets])[rows(first.valid)])


@pytest.mark.parametrize("data", [CLASSES, AS_FLOATS])
def test_classes_have_the_same_shares_in_each_part(data):
    assert [int(resplit(data, seed).valid.targets.sum()) for seed in range(5)] == [5] * 5
    assert [int(fold(data, 5, i, 0).valid.targets.sum()) for i in range(5)] == [4] * 5


@pytest.mark.parametrize("data", [CLASSES, NUMBERS])
def test_each_row_is_for_validation_in_one_fold(data):
    parts = [fold(data, 7, i, 3) for i in range(7)]
    assert sorted(row for part in parts for row in rows(part.valid)) == list(range(80))
    assert all(sorted(rows(part.train) + rows(part.valid)) == list(range(80)) for part in parts)
    assert rows(fold(data, 7, 0, 3).valid) == rows(parts[0].valid) != rows(fold(data, 7, 0, 4).valid)


def test_a_class_of_few_rows_is_no_hindrance():
    lonely = data_of(torch.tensor([1] + [0] * 99), class_names=("a", "b"))
    assert len(resplit(lonely, 0).valid) == 20
    assert len(fold(lonely, 5, 0, 0).valid) == 16
    tiny = data_of(torch.arange(100) % 30, n_train=78, class_names=tuple(map(str, range(30))))
    assert len(resplit(tiny, 0).valid) == 2  # of 30 classes


def test_as_many_folds_as_rows_leave_one_out_and_more_are_refused():
    assert len(fold(NUMBERS, 80, 5, 0).valid) == 1
    with pytest.raises(InputError, match=r"confirm\.folds: must be at most 80, the rows of train and validation"):
        fold(NUMBERS, 81, 0, 0)
