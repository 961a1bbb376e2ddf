"""The test split is out of reach until the search is over."""

import pytest
import torch

from hpo.errors import InputError
from hpo.runner.prepare import prepare
from hpo.study.data import Data, Split
from hpo.study.sealed import sealed, sealing
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
