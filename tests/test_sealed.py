"""The test split is out of reach until the search is over, and rows that it repeats are counted."""

from pathlib import Path

import pytest
import torch

from hpo.errors import InputError
from hpo.runner.prepare import prepare
from hpo.runner.study import check
from hpo.study import catalog
from hpo.study.data import Data, Split
from hpo.study.loading import load
from hpo.study.sealed import repeated, sealed, sealing
from tests.cli import invoke, refused
from tests.conftest import LINEAR
from tests.test_own import OWN

MESSAGE = (
    "the test split is read once, after the search: the objective must not use data().test in build, loss, metrics"
)


def split(*rows, target=0.0):
    return Split(inputs={"x": torch.tensor(rows)}, targets=torch.full((len(rows), 1), target))


DATA = Data(train=split([1.0, 2.0]), valid=split([3.0, 4.0]), test=split([5.0, 6.0]), class_names=("a",))


def test_sealed_data_has_all_but_its_test_split():
    kept = sealed(DATA)
    assert kept.train is DATA.train
    assert (kept.info, kept.class_names, list(kept.splits)) == (DATA.info, ("a",), ["train", "valid"])
    assert len(kept.for_refit().train) == 2
    assert "5." not in repr(vars(kept))
    for data in (kept, sealed(kept), kept.for_refit()):
        with pytest.raises(InputError, match="the test split is read once, after the search"):
            assert data.test


def test_an_objective_has_its_data_back_afterwards(study):
    plan = prepare(study())
    objective = plan.objective
    with sealing(objective), sealing(objective):
        assert len(objective.data().train) == 200
        with pytest.raises(InputError):
            assert objective.data().test
    assert len(objective.data().test) == 50
    assert "data" not in vars(objective)
    assert len(plan.load_data().test) == 50


PEEK = "self.data().test.targets.sum()"
WHERE = {
    "build": ("def build(self, params, info):\n", f"def build(self, params, info):\n        {PEEK}\n"),
    "loss": (
        "def loss(self, outputs, targets, params):\n",
        f"def loss(self, outputs, targets, params):\n        {PEEK}\n",
    ),
    "preprocess": (
        "    def metrics(self):",
        f"    def preprocess(self, train):\n        {PEEK}\n\n    def metrics(self):",
    ),
    "head": ("    def metrics(self):", f"    def head(self):\n        {PEEK}\n\n    def metrics(self):"),
    "later": (
        "        loss = F.mse_loss(outputs, targets)\n",
        "        self.n = getattr(self, 'n', 0) + 1\n        loss = F.mse_loss(outputs, targets)\n"
        f"        if self.n > 20:\n            {PEEK}\n",
    ),
}


@pytest.mark.parametrize("where", ["build", "loss", "preprocess", "later"])
@pytest.mark.parametrize("stack", [1, 3])
def test_an_objective_that_looks_at_the_test_split_in_the_search_stops_the_study(study, tmp_path, where, stack):
    old, new = WHERE[where]
    assert old in LINEAR
    (tmp_path / "linear.py").write_text(LINEAR.replace(old, new))
    path = study(f"stack: {stack}\n")
    assert MESSAGE in refused("run", path)
    if where != "later":
        assert "0 complete" in invoke("status", path)
        assert MESSAGE in refused("check", path)


def test_so_does_one_that_trains_itself(study, tmp_path):
    (tmp_path / "own.py").write_text(
        OWN.replace(
            "def train(self, params, report):\n", "def train(self, params, report):\n        self.data().test\n"
        )
    )
    path = study("objective: own.py\npruner: none\n")
    assert MESSAGE in refused("run", path)
    assert "0 complete" in invoke("status", path)


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
