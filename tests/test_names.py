"""Whose `objectives` is whose: a user's own folder or module of that name, and ours, do not get in each other's way."""

import sys
from pathlib import Path

import pytest

from hpo.study.loading import load
from tests.conftest import LINEAR, ROOT


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder; what a test imports from it, and the search path, are forgotten after it.

    The checkout is not on the search path, as with a plain install.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(ROOT))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("objectives", "linear", "beside", "hpo_objective_linear", "hpo_objective_iris"):
            del sys.modules[name]


def loaded(objective: str, folder: Path) -> str:
    """Return the file of the class that `objective` names, or what is wrong."""
    found, faults = load(objective, {}, folder)
    return str(sys.modules[type(found).__module__].__file__) if found is not None else faults[0].message


OURS = str(ROOT / "objectives" / "breast_cancer.py")


@pytest.mark.parametrize("with_init", [True, False])
def test_a_users_folder_named_objectives_and_ours_both_work(folder: Path, with_init: bool) -> None:
    (folder / "objectives").mkdir()
    (folder / "objectives" / "linear.py").write_text(LINEAR)
    if with_init:
        (folder / "objectives" / "__init__.py").write_text("")
    theirs = str(folder / "objectives" / "linear.py")
    assert loaded("objectives.linear:Linear", folder) == theirs
    assert loaded("objectives.linear", folder) == theirs
    assert loaded("breast_cancer", folder) == OURS


def test_a_users_module_objectives_is_found(folder: Path) -> None:
    (folder / "objectives.py").write_text(LINEAR)
    assert loaded("objectives:Linear", folder) == str(folder / "objectives.py")
    assert loaded("breast_cancer", folder) == OURS


def test_a_plain_module_is_found_beside_the_study_file_and_in_the_current_folder(folder: Path) -> None:
    (folder / "linear.py").write_text(LINEAR)
    (folder / "sub").mkdir()
    (folder / "sub" / "beside.py").write_text(LINEAR)
    assert loaded("linear:Linear", folder / "sub") == str(folder / "linear.py")
    assert loaded("linear", folder) == str(folder / "linear.py")
    assert loaded("beside:Linear", folder / "sub") == str(folder / "sub" / "beside.py")


def test_a_module_that_is_named_as_one_of_ours_is_reached_by_its_file(folder: Path) -> None:
    (folder / "iris.py").write_text(LINEAR.replace("class Linear", "class Mine"))
    assert loaded("iris.py:Mine", folder) == str(folder / "iris.py")
    assert "has no objective and no function 'Mine'" in loaded("iris:Mine", folder)


def test_an_objective_written_for_version_0_1_is_still_imported(folder: Path) -> None:
    old = LINEAR.replace(
        "from hpo.study.data import Data, Split\nfrom hpo.study.objective import Objective\n",
        "from hpo.data import Data, Split\nfrom hpo.objective import Objective\n"
        "from objectives.datasets import tabular_splits\nfrom objectives.models import MLP, Standardize\n",
    )
    assert old != LINEAR
    (folder / "linear.py").write_text(old)
    assert loaded("linear.py", folder) == str(folder / "linear.py")
