"""Whoever refuses a storage, or a study in it, keeps nothing of it open: Python 3.13 warns of each such connection."""

import sqlite3
from contextlib import closing

import optuna
import psutil
import pytest

from hpo.errors import InputError, StorageError
from hpo.search.identity import stored_file
from hpo.search.storage import open_storage
from tests.cli import invoke
from tests.searches import PARAMS, Opener


def open_files(folder):
    """Return which files in `folder` this process has open, however long the garbage collector waits."""
    return {file.path for file in psutil.Process().open_files() if file.path.startswith(str(folder))}


@pytest.fixture
def opened(tmp_path):
    opener = Opener(tmp_path)
    yield opener
    opener.close()


@pytest.fixture
def made(opened, tmp_path):
    """Make the study `s` and close it; return what opens it."""
    opened()
    opened.close()
    assert not open_files(tmp_path)
    return opened


@pytest.mark.parametrize("change", [{"seed": 3}, {"maximize": False}, {"params": PARAMS | {"batch_size": 32}}])
def test_a_study_that_is_another_one(made, tmp_path, change):
    with pytest.raises(InputError, match="has another study named 's'") as caught:
        made(**change)
    assert not open_files(tmp_path), caught  # whose traceback would keep what was opened alive


def test_a_study_that_hpo_did_not_make(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("hpo.search.opening._MAKING_SECONDS", 0.0)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path}/s.db")
    optuna.create_study(study_name="s", storage=storage)
    storage.remove_session()
    storage.engine.dispose()
    with pytest.raises(InputError, match="was not made by hpo") as caught:
        opened()
    assert not open_files(tmp_path), caught


def test_a_study_that_is_not_there(made, tmp_path):
    assert made(make=False, name="t") is None
    assert not open_files(tmp_path)


def test_a_study_that_cannot_be_made(made, tmp_path, monkeypatch):
    def refuse(*arguments, **keys):
        raise ValueError("no")

    monkeypatch.setattr(optuna, "create_study", refuse)
    with pytest.raises(ValueError, match="no") as caught:
        made()
    assert not open_files(tmp_path), caught


@pytest.mark.parametrize("name", ["s", "t"])
def test_a_study_whose_file_is_not_stored(made, tmp_path, name):
    with pytest.raises(InputError, match=r"was not started by|has no study 't'") as caught:
        stored_file(f"sqlite:///{tmp_path}/s.db", name)
    assert not open_files(tmp_path), caught


@pytest.mark.parametrize(
    ("sql", "text"),
    [
        ("UPDATE alembic_version SET version_num = 'v99'", "runtime optuna version"),
        ("DROP TABLE version_info; CREATE TABLE other (id INTEGER)", "another program's database"),
    ],
)
def test_a_database_that_is_not_to_be_used(made, tmp_path, sql, text):
    with closing(sqlite3.connect(tmp_path / "s.db")) as database:
        database.executescript(sql)
    for refused in (made, lambda: open_storage(f"sqlite:///{tmp_path}/s.db")):
        with pytest.raises(StorageError, match=text) as caught:
            refused()
        assert not open_files(tmp_path), caught


def test_a_study_that_was_only_looked_at(study, tmp_path):
    path = study()
    invoke("run", path)
    invoke("check", path)
    assert not open_files(tmp_path)
