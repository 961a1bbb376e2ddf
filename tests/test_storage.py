"""The storage: safe for several processes at once, and one line for everything that can be wrong with its address."""

import errno
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import optuna
import psutil
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._rdb import storage as rdb
from optuna.trial import TrialState
from sqlalchemy import text

from hpo.errors import HpoError, StorageError
from hpo.search import storage as storages
from hpo.search import versions
from hpo.search.address import exists
from hpo.search.storage import exclusive, open_storage
from tests import warm

N_PROCESSES, N_QUEUED = 8, 60

PEER = """
import sys
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState
from hpo.search.storage import open_storage

print("started", flush=True)
sys.stdin.readline()
storage = open_storage(sys.argv[1])
storage.get_all_studies()
print("opened", flush=True)
sys.stdin.readline()
study = storage.get_study_id_from_name("queue")
claimed, left = [], True
while left:
    waiting = [t for t in storage.get_all_trials(study, deepcopy=False) if t.state == TrialState.WAITING]
    left = bool(waiting)
    for trial in waiting:
        try:
            if storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                claimed.append(trial.number)
                break
        except UpdateFinishedTrialError:
            pass
print(*claimed, flush=True)
"""


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    """Let processes open one fresh database at the same moment, then claim its queue; return what each said."""
    url = f"sqlite:///{tmp_path_factory.mktemp('peers')}/optuna.db"
    processes = [warm.Popen(url, code=PEER, stdin=subprocess.PIPE) for _ in range(N_PROCESSES)]
    started = [process.stdout.readline() for process in processes]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    opened = [process.stdout.readline() for process in processes]
    storage = open_storage(url)
    study = optuna.create_study(study_name="queue", storage=storage)
    for _ in range(N_QUEUED):
        study.enqueue_trial({})
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [process.communicate(timeout=60) for process in processes]
    storage.engine.dispose()
    claimed, errors = [out.split() for out, _ in ends], [error for _, error in ends]
    return {"started": started, "opened": opened, "claimed": claimed, "errors": errors}


def test_processes_that_open_one_fresh_database_at_once_all_work(peers):
    assert peers["started"] == ["started\n"] * N_PROCESSES
    assert peers["opened"] == ["opened\n"] * N_PROCESSES, peers["errors"]


def test_no_queued_trial_is_claimed_by_two_processes(peers):
    claimed = sorted(int(number) for numbers in peers["claimed"] for number in numbers)
    assert claimed == list(range(N_QUEUED)), peers["errors"]
    assert sum(bool(numbers) for numbers in peers["claimed"]) > 1, "one process had it all: nothing was contended"


@pytest.fixture
def database(tmp_path):
    """Return the open storage at `<tmp_path>/optuna.db`."""
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    yield storage
    storage.remove_session()
    storage.engine.dispose()


def test_no_queued_trial_is_claimed_by_two_threads(database):
    study = optuna.create_study(study_name="queue", storage=database)
    for _ in range(20):
        study.enqueue_trial({})
    ids = [t._trial_id for t in study.trials]
    claimed, barrier = [], threading.Barrier(4)

    def claim():
        barrier.wait()
        for trial_id in ids:
            try:
                if database.set_trial_state_values(trial_id, TrialState.RUNNING):
                    claimed.append(trial_id)
            except UpdateFinishedTrialError:
                pass
        database.remove_session()

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == ids


def test_a_transaction_takes_the_write_lock_when_it_begins_and_readers_go_on(database, tmp_path):
    with sqlite3.connect(tmp_path / "optuna.db", timeout=0.05, isolation_level=None) as other:
        with database.engine.begin() as connection:
            connection.execute(text("select 1"))
            with pytest.raises(sqlite3.OperationalError, match="database is locked"):
                other.execute("BEGIN IMMEDIATE")
            assert other.execute("select count(*) from studies").fetchone() == (0,)
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


def test_a_relative_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not exists("sqlite:///out/deep/optuna.db")
    open_storage("sqlite:///out/deep/optuna.db").engine.dispose()
    assert Path("out/deep/optuna.db").is_file()
    assert exists("sqlite:///out/deep/optuna.db")


def test_an_absolute_folder_that_is_not_there_is_refused(tmp_path):
    message = f"cannot be opened: there is no folder {tmp_path}/gone; make it, or give another"
    with pytest.raises(StorageError, match=message):
        open_storage(f"sqlite:///{tmp_path}/gone/optuna.db")
    assert not (tmp_path / "gone").exists()


def test_a_file_where_the_folder_should_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot be opened: out is not a folder \(File exists\)"):
        open_storage("sqlite:///out/optuna.db")
    with pytest.raises(StorageError, match=r"cannot be opened: out/deep is not a folder \(Not a directory\)"):
        open_storage("sqlite:///out/deep/optuna.db")
    with pytest.raises(StorageError, match=f"there is no folder {tmp_path}/out; make it"):
        open_storage(f"sqlite:///{tmp_path}/out/optuna.db")


def test_a_folder_that_cannot_be_made_is_said(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", refuse)
    message = r"cannot be opened: out cannot be made \(Read-only file system\); give another `storage` and `output`"
    with pytest.raises(StorageError, match=message):
        open_storage("sqlite:///out/optuna.db")


def test_a_folder_where_the_file_should_be_is_refused(tmp_path):
    (tmp_path / "optuna.db").mkdir()
    with pytest.raises(StorageError, match=r"optuna.db cannot be opened: "):
        open_storage(f"sqlite:///{tmp_path}/optuna.db")


@pytest.mark.parametrize("url", ["sqlite:///:memory:", "sqlite://"])
def test_a_database_in_memory_is_refused(url):
    with pytest.raises(
        StorageError, match=r"names no file, so nothing would be kept; write sqlite:///mlruns/optuna.db"
    ):
        open_storage(url)


@pytest.mark.parametrize("url", ["optuna.db", "nosuch://host/db", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(StorageError, match=r"is not a database address; write sqlite:///path/to/file.db, postgr"):
        open_storage(url)


def test_a_driver_that_is_missing_is_named():
    with pytest.raises(StorageError, match=r"its driver is not installed \(.*oracledb.*\); pip install it"):
        open_storage("oracle+oracledb://bob:s3cret@h/d")


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as db:
        db.execute("create table runs (id integer)")
    db.close()
    before = path.read_bytes()
    message = r"is another program's database \(it has tables runs, but none of Optuna's\); give a database of its own"
    with pytest.raises(StorageError, match=message):
        open_storage(f"sqlite:///{path}")
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("this is no database, however long it is " * 50)
    with pytest.raises(StorageError, match=r"cannot be opened: file is not a database; is it a database at all\?"):
        open_storage(f"sqlite:///{tmp_path}/notes.txt")


def test_the_lock_keeps_others_out_and_says_for_how_long(tmp_path, monkeypatch):
    monkeypatch.setattr(storages, "BUSY_SECONDS", 0.1)
    url = f"sqlite:///{tmp_path}/optuna.db"
    message = r"another process held .*optuna.db.lock for 0.1 s"
    with exclusive(url), pytest.raises(StorageError, match=message), exclusive(url):
        raise AssertionError("two hold the lock")
    with exclusive(url):
        assert (tmp_path / "optuna.db.lock").exists()


@pytest.mark.parametrize(
    "url", ["journal://path", "journal:///", "grpc://host", "grpc://", "grpc://h:port", "grpc://h:1/x"]
)
def test_what_is_no_address_of_a_file_or_server_is_refused(url):
    with pytest.raises(
        StorageError, match=r"names no file; write journal:///|is not the address of a server; write grpc://"
    ):
        open_storage(url)


def test_a_server_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(storages, "CONNECT_SECONDS", 0.2)
    with pytest.raises(StorageError, match="no server answers there; start one: hpo serve STUDY --port 1"):
        open_storage("grpc://127.0.0.1:1")
    with pytest.raises(StorageError, match="cannot be opened"):
        open_storage("postgresql://127.0.0.1:1/db")


def test_sqlite_on_a_network_file_system_is_refused(tmp_path, monkeypatch):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    with pytest.raises(StorageError, match=r"lies on a network file system \(nfs4\), where SQLite loses data"):
        open_storage(f"sqlite:///{tmp_path}/optuna.db")


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_deleted_or_replaced_while_it_is_in_use_is_said(tmp_path, replaced):
    file = tmp_path / "o.db"
    storage = open_storage(f"sqlite:///{file}")
    try:
        storage.get_all_studies()
        file.unlink()
        if replaced:
            sqlite3.connect(file).close()
            file.touch()
        with pytest.raises(HpoError, match=r"o.db was deleted or replaced while it was in use") as said:
            storage.get_all_studies()
        assert said.value.exit_status == 1
    finally:
        storages.close_storage(storage)


IMPORTS_ALEMBIC = """
import sys
from hpo.search.storage import open_storage
open_storage(sys.argv[1])
print("alembic.migration" in sys.modules)
"""


def test_the_newest_version_of_the_tables_is_the_one_that_alembic_finds():
    storage = rdb.RDBStorage("sqlite://", skip_compatibility_check=True)
    script = storage._version_manager._create_alembic_script()
    assert versions.newest() == script.get_current_head() is not None


def test_alembic_makes_the_tables_of_a_new_database_and_is_not_imported_for_one_that_has_them(tmp_path):
    url = f"sqlite:///{tmp_path}/new.db"
    for expected in (True, False):
        done = subprocess.run([sys.executable, "-c", IMPORTS_ALEMBIC, url], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(expected)
    version = sqlite3.connect(tmp_path / "new.db").execute("SELECT version_num FROM alembic_version").fetchall()
    assert version == [(versions.newest(),)]
