"""The journal: what was written stays, whatever the disk, kill -9, a power cut or an older version did to the file."""

import fcntl
import json
import os
import subprocess
import sys

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from hpo.errors import HpoError, StorageError
from hpo.search.retrying import RetryingStorage
from hpo.search.storage import open_storage

TORN = b'{"op_code":9,"worker_id":"w","trial_id":0,"user_attr":{"k":"\\u00e4 half of i'


@pytest.fixture
def path(tmp_path):
    """Return a journal with one study, `s`, and one trial that waits."""
    path = tmp_path / "j.log"
    study = optuna.create_study(study_name="s", storage=open_storage(f"journal:///{path}"))
    study.enqueue_trial({"x": 1.0})
    return path


def opened(path):
    return RetryingStorage(open_storage(f"journal:///{path}"), 0.0)


def trials(path):
    storage = opened(path)
    return storage.get_all_trials(storage.get_study_id_from_name("s"))


def write_one(path):
    optuna.load_study(study_name="s", storage=opened(path)).enqueue_trial({"x": 2.0})


@pytest.mark.parametrize(
    "tail",
    [TORN, TORN[:1], TORN + TORN, b"\0" * 5000, TORN + b"\0" * 100, b"\0" * 100 + TORN, b"\n\r\n", b"\0\0\n"],
    ids=["torn", "one byte", "torn twice", "NULs", "torn and NULs", "NULs and torn", "blank lines", "a line of NULs"],
)
def test_what_a_dead_writer_left_at_the_end_is_no_write_and_the_next_one_is(path, tail):
    with path.open("ab") as file:
        file.write(tail)
    assert len(trials(path)) == 1
    write_one(path)
    assert len(trials(path)) == 2
    assert all(json.loads(line.strip(b"\0")) for line in path.read_bytes().splitlines() if line.strip(b"\0"))


def test_a_record_whole_but_for_its_end_is_kept(path):
    path.write_bytes(path.read_bytes()[:-1])
    write_one(path)
    assert len(trials(path)) == 2


def test_lines_that_end_as_on_windows_are_read(path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    write_one(path)
    assert len(trials(path)) == 2


def test_what_an_older_version_appended_to_a_torn_line_is_read_and_the_torn_write_is_not(path):
    with path.open("ab") as file:
        file.write(TORN)
    record = {"op_code": 8, "worker_id": "w", "trial_id": 0, "user_attr": {"k": {"op_code": 1, "text": '{"op_code":'}}}
    JournalFileBackend(str(path)).append_logs([record])
    assert [trial.user_attrs for trial in trials(path)] == [{"k": {"op_code": 1, "text": '{"op_code":'}}]
    write_one(path)
    assert len(trials(path)) == 2


def test_an_empty_file_is_a_new_journal(tmp_path):
    (tmp_path / "j.log").touch()
    assert opened(tmp_path / "j.log").get_all_studies() == []


def test_a_line_that_is_damaged_is_named_and_the_file_left_alone(path):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b'{"op_code":X"\n', *lines[1:]]))
    before = path.read_bytes()
    message = (
        r"j.log line 2 holds no record of Optuna's \(b'{\"op_code\":X\"\\n'\); put back a copy .*, or remove that line"
    )
    with pytest.raises(StorageError, match=message):
        opened(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"notes\n", b"notes", b"[1, 2]\n", b'{"a": 1}\n', b"SQLite format 3\0\1\2", b'{"a"']
)
def test_another_programs_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "notes"
    path.write_bytes(content)
    with pytest.raises(
        StorageError, match=r"line 1 holds no record of Optuna's .* another program's, give another path"
    ):
        opened(path).create_new_study([optuna.study.StudyDirection.MINIMIZE])
    assert path.read_bytes() == content


FULL = """
import resource, sys
from contextlib import suppress
from hpo.errors import HpoError
from hpo.search.retrying import RetryingStorage
from hpo.search.storage import open_storage

storage = RetryingStorage(open_storage(sys.argv[1]), 0.0)
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    storage.set_trial_user_attr(0, "k", "x" * 200)
except HpoError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
if len(sys.argv) > 3:
    storage.set_trial_user_attr(0, "k", "after")
"""


@pytest.mark.parametrize(
    ("go_on", "room"),
    [
        pytest.param(go_on, room, id=f"{name}-{room}", marks=() if room in by_default else pytest.mark.slow)
        for go_on, name, by_default in ((False, "run again", (0, 1000)), (True, "the same process", (1, 100)))
        for room in (0, 1, 100, 1000)
    ],
)
def test_a_file_that_may_not_grow_costs_the_write_that_had_no_room_and_no_more(path, room, go_on):
    size = path.stat().st_size
    command = [sys.executable, "-c", FULL, f"journal:///{path}", str(size + room), *["go on"] * go_on]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "the storage's disk is full (" in done.stdout or room == 1000, done.stderr
    if not go_on:
        assert path.stat().st_size == size or room == 1000
        write_one(path)
    (trial, *more) = trials(path)
    assert len(more) == (not go_on)
    assert trial.user_attrs.get("k") == ("after" if go_on else "x" * 200 if room == 1000 else None)


def test_a_full_disk_costs_the_write_that_had_no_room_and_no_more(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no small disk can be made here, which needs root")
    try:
        storage = opened(disk / "j.log")
        study = optuna.create_study(study_name="s", storage=storage)
        filler = disk / "filler"
        filler.write_bytes(bytes(40_000))
        with pytest.raises(HpoError, match=r"the storage's disk is full \(.*No space left on device\); make room"):
            all(study.enqueue_trial({"x": 1.0}) is None for _ in range(1000))
        n = len(trials(disk / "j.log"))
        filler.unlink()
        study.enqueue_trial({"x": 1.0})
        assert len(trials(disk / "j.log")) == len(study.trials) == n + 1 > 10
    finally:
        subprocess.run(["umount", disk], check=True)


WRITER = """
import sys
from hpo.search.storage import open_storage

storage = open_storage(sys.argv[1])
n = 0
while True:
    storage.set_trial_user_attr(int(sys.argv[2]), "n", [n] * 3000)
    print(n, flush=True)
    n += 1
"""


def test_writers_that_are_killed_while_they_write_lose_nothing_that_they_were_told_is_written(path):
    write_one(path)
    told = {}
    for _ in range(4):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITER, f"journal:///{path}", n], stdout=subprocess.PIPE, text=True)
            for n in ("0", "1")
        ]
        for number, writer in enumerate(writers):
            for _ in range(5):
                told[number] = int(writer.stdout.readline())
        for writer in writers:
            writer.kill()
        for number, writer in enumerate(writers):
            told[number] = max([told[number], *map(int, writer.stdout.read().split())])
            writer.wait()
            writer.stdout.close()
        for trial in trials(path):
            values = set(trial.user_attrs["n"])
            assert values in ({told[trial.number]}, {told[trial.number] + 1})
    write_one(path)
    assert len(trials(path)) == 3


HOLDER = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, b"") if sys.argv[2] == "" else os.pwrite(file, sys.argv[2].encode(), os.fstat(file).st_size)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_its_process_and_those_of_older_versions_block_nobody(path):
    os.symlink(path, f"{path}.lock")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, TORN.decode()], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    write_one(path)
    assert len(trials(path)) == 2


def test_a_holder_that_is_stopped_is_waited_for_no_longer_than_that(path, said, monkeypatch):
    monkeypatch.setattr("hpo.search.journal.ANSWER_SECONDS", 0.2)
    storage = opened(path)
    (trial,) = storage.get_all_trials(storage.get_study_id_from_name("s"))
    storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for step in range(3):
            storage.set_trial_intermediate_value(trial._trial_id, step, 0.5)
    why = f"another process held {path} for 0.2 s"
    assert said == [f"the storage does not answer ({why}): training continues, what is reported is kept"]
    storage._seconds = 60.0
    storage.set_trial_user_attr(trial._trial_id, "k", 1)
    assert said[1:] == ["the storage is back after 0 s"]
    assert trials(path)[0].intermediate_values == {0: 0.5, 1: 0.5, 2: 0.5}
    storage.close()


def test_a_journal_that_is_deleted_or_replaced_while_in_use_is_written_no_more(path):
    storage = opened(path)
    path.rename(f"{path}.old")
    with pytest.raises(StorageError, match=r"cannot be read any more \(No such file or directory\); put it back"):
        storage.set_trial_user_attr(0, "k", 1)
    optuna.create_study(study_name="other", storage=opened(path)).enqueue_trial({})
    before = path.read_bytes()
    with pytest.raises(StorageError, match="was replaced by another file while in use"):
        storage.set_trial_user_attr(0, "k", 1)
    assert path.read_bytes() == before


def test_a_journal_that_became_shorter_is_said(path):
    storage = opened(path)
    os.truncate(path, 10)
    with pytest.raises(StorageError, match=r"has become shorter, 10 bytes in place of \d+; put back a copy"):
        storage.get_all_studies()
