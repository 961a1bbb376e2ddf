"""Outboxes: each of exactly one study; a kill, a full disk, damage lose nothing; older versions' are adopted."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.processes import this_process
from hpo.tracking import leftovers, outbox
from hpo.tracking.items import halves, is_item, merged
from hpo.tracking.leftovers import left_behind
from hpo.tracking.outbox import Outbox
from tests.databases import rows

PLACE, _, _ = this_process().rpartition("-")
GONE = f"{PLACE}-999999999"
STUDIES = [
    "mnist",
    "mnist.v2",
    "mnist.v2.1",
    "a",
    "a.b-123",
    "a.b-deadbeef-1-2",
    f"a.{GONE}",
    "mnist v2",
    "v2",
    "n" * 200,
]


def item(trial: int = 0) -> dict[str, object]:
    return {"do": "end", "trial": trial, "time": 1, "status": "FINISHED", "tags": {}}


def metrics(trial: int | None, step: int) -> dict[str, object]:
    return {"do": "metrics", "trial": trial, "time": 1, "rows": [["a", 1.0, 1, step]]}


def leave(file: Path, trial: int = 0, seconds_ago: float = 0.0) -> Path:
    """Leave an outbox as an older version wrote it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(item(trial)) + "\n")
    os.utime(file, (time.time() - seconds_ago, time.time() - seconds_ago))
    return file


def leave_database(folder: Path, study: str, *items: dict[str, object], making: str = "") -> Path:
    box = Outbox(folder, study, making)
    for each in items:
        box.append(each)
    box.close()
    return box.file


def drained(box: Outbox) -> list[dict]:
    """Return what is in an outbox, one after the other as it would be sent."""
    items = []
    while (batch := box.first()) is not None:
        items.append(batch.item)
        box.replace(batch)
    return items


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Return a function that has something done as a process does that is gone then."""

    def done_by_one(what: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(outbox, "this_process", lambda: GONE)
            what()

    return done_by_one


@pytest.mark.parametrize("form", ["now", "0.1", "before"])
def test_each_study_adopts_its_own_and_no_other(tmp_path: Path, dead, form: str) -> None:
    def write() -> None:
        for number, study in enumerate(STUDIES):
            if form == "now":
                leave_database(tmp_path, study, item(number))
            else:
                new, old = tmp_path / study / f"{GONE}.jsonl", tmp_path / f"{study[:100]}.{GONE}.jsonl"
                leave(new if form == "0.1" else old, number)

    dead(write)
    for number, study in enumerate(STUDIES):
        box = Outbox(tmp_path, study[:100] if form == "before" else study)
        assert box.adopt() == 0
        assert [each["trial"] for each in drained(box)] == [number]
        box.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_study_of_another_making_adopts_nothing_of_its_namesake(tmp_path: Path, dead) -> None:
    """Two storages may have a study of one name, and be run in one folder."""
    dead(lambda: [leave_database(tmp_path, "s", item(n), making=making) for n, making in enumerate(("a1", "b2"))])
    for number, making in enumerate(("a1", "b2")):
        box = Outbox(tmp_path, "s", making)
        box.adopt(own=True)
        assert [each["trial"] for each in drained(box)] == [number]
        box.close()


def test_the_longest_names_of_study_and_machine_have_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "this_process", lambda: f"{'h' * 64}-deadbeef-4026531836-4194304")
    box = Outbox(tmp_path, "ü" * 100, "f" * 32)
    box.append(item())
    assert box.file.is_file()
    box.set_aside(item(), "why")
    assert box.refused.is_file()
    box.close()


@pytest.mark.parametrize(
    ("name", "studies"),
    [
        ("mnist.elsewhere-aaaaaaaa-1-2", ["mnist"]),
        ("mnist.mac-7", ["mnist"]),
        ("mnist.v2.elsewhere-aaaaaaaa-1-2", ["mnist.v2"]),  # or mnist, of a machine v2.elsewhere? not touched by it
        ("mnist.notes", []),
        ("mnist", []),
    ],
)
def test_an_older_outbox_of_another_machine_goes_where_it_certainly_belongs(
    tmp_path: Path, name: str, studies: list[str]
) -> None:
    file = leave(tmp_path / f"{name}.jsonl", seconds_ago=7200)
    adopting = [study for study in ("mnist", "mnist.v2", "v2", "mnist.v2.elsewhere") if left_behind(tmp_path, study)]
    assert adopting == studies
    assert file.exists()


def test_an_older_outbox_of_this_machine_is_known_though_its_name_has_dots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leftovers.socket, "gethostname", lambda: "node-1.cluster.local")
    leave(tmp_path / "mnist.node-1.cluster.local-aaaaaaaa-1-2.jsonl", seconds_ago=7200)
    assert left_behind(tmp_path, "mnist")
    assert not left_behind(tmp_path, "mnist.node-1")
    assert not left_behind(tmp_path, "mnist.node-1.cluster")


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    for process in (f"{PLACE}-1", "elsewhere-1-2", this_process()):
        leave(tmp_path / "s" / f"{process}.jsonl")
        leave(tmp_path / "s" / f"study.{process}.sqlite")
    leave(tmp_path / "s" / "refused.jsonl", seconds_ago=7200)
    assert left_behind(tmp_path, "s") == []


def test_another_machines_outbox_is_adopted_when_nothing_was_written_for_an_hour(tmp_path: Path) -> None:
    file = leave_database(tmp_path, "s", item(3)).rename(tmp_path / "s/study.elsewhere-1-2.sqlite")
    log = leave(file.with_name(f"{file.name}-wal"))
    log.write_bytes(b"")
    for seconds, found in ((0, []), (7200, [])):
        os.utime(file, (time.time() - seconds,) * 2)
        assert left_behind(tmp_path, "s") == found  # its log is new
    os.utime(log, (time.time() - 7200,) * 2)
    assert left_behind(tmp_path, "s") == [file]
    box = Outbox(tmp_path, "s")
    box.touch()  # nothing is there to touch
    box.adopt()
    assert [each["trial"] for each in drained(box)] == [3]
    box.close()


def test_a_database_that_its_process_has_open_is_not_adopted_even_where_it_seems_to_be_gone(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from hpo.tracking import outbox\n"
        f"outbox.this_process = lambda: {GONE!r}\n"
        f"box = outbox.Outbox(Path({str(tmp_path)!r}), 's'); box.append({item(5)!r})\n"
        "print('open', flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    box = Outbox(tmp_path, "s")
    assert left_behind(tmp_path, "s")
    box.adopt()
    assert drained(box) == []
    process.kill()
    process.communicate()
    box.adopt()
    assert [each["trial"] for each in drained(box)] == [5]
    box.close()


def test_of_what_is_adopted_the_studys_run_is_not_begun_again(tmp_path: Path) -> None:
    """An older version's item of a study's start says texts and, without a word, that the run is open."""
    start = {"do": "start", "trial": None, "time": 1, "tags": {"a": "b"}, "texts": {"study.yaml": "x"}}
    file = tmp_path / f"s.{GONE}.jsonl"
    file.write_text(json.dumps(start) + "\n" + json.dumps({**start, "texts": {}, "status": "RUNNING"}) + "\n")
    box = Outbox(tmp_path, "s")
    box.adopt()
    items = drained(box)
    assert [each["do"] for each in items] == ["start", "texts", "start"]
    assert not any("status" in each for each in items)
    box.close()


def test_what_a_process_of_the_same_name_left_is_taken_as_left(tmp_path: Path) -> None:
    """In containers every process may have the same name."""
    leave_database(tmp_path, "s", {"do": "start", "trial": None, "time": 1, "tags": {}, "status": "RUNNING"}, item(1))
    leave(tmp_path / "s" / f"{this_process()}.jsonl", trial=2)
    box = Outbox(tmp_path, "s")
    box.adopt()
    assert len(box) == 2  # its own, as it was
    box.close()
    box = Outbox(tmp_path, "s")
    assert box.adopt(own=True) == 0
    items = drained(box)
    assert [each["do"] for each in items] == ["start", "end", "end"]
    assert all(each.get("left") for each in items)
    assert "status" not in items[0]
    box.close()


def test_a_kill_between_adopting_and_removing_loses_nothing(tmp_path: Path, dead, monkeypatch) -> None:
    dead(lambda: leave_database(tmp_path, "s", item(7)))
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "remove", lambda file: (_ for _ in ()).throw(OSError("killed")))
        box = Outbox(tmp_path, "s")
        box.adopt()
        box.close()
    again = Outbox(tmp_path, "s")
    assert [each["trial"] for each in drained(again)] == [7]
    again.close()


WRITES = """
import itertools, json, sys
from pathlib import Path
from hpo.tracking.outbox import Outbox
box = Outbox(Path(sys.argv[1]), "s")
for n in itertools.count():
    box.append({"do": "end", "trial": n, "time": 1, "status": "FINISHED", "tags": {"t": "x" * 500}})
    print("+", n, flush=True)
    if n % 3 == 2:  # two of three are sent, so that some stay
        for _ in range(2):
            batch = box.first()
            print("-", batch.item["trial"], flush=True)
            box.replace(batch)
"""


@pytest.mark.parametrize("n_lines", [1, 40, 900, 2500])
def test_killed_at_any_moment_nothing_is_lost_and_the_order_is_kept(tmp_path: Path, n_lines: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITES, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(n_lines)]
    process.send_signal(signal.SIGKILL)
    lines += [line for line in process.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
    added = {int(n) for sign, n in map(str.split, lines) if sign == "+"}
    sent = {int(n) for sign, n in map(str.split, lines) if sign == "-"}
    box = Outbox(tmp_path, "s")
    assert box.adopt() == 0
    got = [each["trial"] for each in drained(box)]
    assert got == sorted(set(got)), "order kept, and none twice"
    assert added - sent <= set(got) <= added | {max(added) + 1}, "what was said to be in it is there"
    assert len(set(got) & sent) <= 1, "only the one that was being removed may be sent again"
    box.close()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_full_disk_moves_it_to_memory_and_back(tmp_path: Path) -> None:
    box = Outbox(tmp_path, "s")
    box.append(item(0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        for number in range(1, 500):
            box.append(item(number))
        assert box.where.startswith("memory only, as long as this process runs, since")
        assert not box.save()
        first = box.first()
        assert first is not None
        box.replace(first)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert box.save()
    assert box.where == str(box.file)
    box.close()
    again = Outbox(tmp_path, "s")
    assert [each["trial"] for each in drained(again)] == list(range(1, 500))
    again.close()
    assert not (tmp_path / "s").exists()


def test_a_folder_that_cannot_be_made_costs_the_file_only(tmp_path: Path) -> None:
    (tmp_path / "unsent").write_text("in the way")
    box = Outbox(tmp_path / "unsent", "s")
    for number in range(3):
        box.append(item(number))
    box.close()  # what is only in memory stays there
    assert [each["trial"] for each in drained(box)] == [0, 1, 2]
    box.close()
    assert (tmp_path / "unsent").read_text() == "in the way"


def test_a_damaged_database_is_kept_apart_and_said(tmp_path: Path, dead) -> None:
    dead(lambda: leave_database(tmp_path, "s", *map(item, range(300))))
    (file,) = left_behind(tmp_path, "s")
    content = bytearray(file.read_bytes())
    content[: len(content) // 2] = b"\x7f" * (len(content) // 2)
    file.write_bytes(content)
    box = Outbox(tmp_path, "s")
    assert box.adopt() == 1
    assert not left_behind(tmp_path, "s")
    assert re.search(r"not a database.*it is kept as .*\.damaged", box.refused.read_text())
    assert file.with_name(f"{file.name}.damaged").read_bytes() == content
    box.append(item(1))
    assert [each["trial"] for each in drained(box)] == [1]
    box.close()


def test_a_database_that_a_kill_left_empty_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / f"s/study.{GONE}.sqlite").write_bytes(b"")
    box = Outbox(tmp_path, "s")
    assert box.adopt() == 0
    assert drained(box) == []
    box.close()
    assert not (tmp_path / "s").exists()


def test_metrics_of_one_trial_are_sent_together_up_to_what_mlflow_takes(tmp_path: Path) -> None:
    box = Outbox(tmp_path, "s")
    for step in range(1000):
        box.append(metrics(0, step))
        box.append(metrics(None, step))
    box.append(item(0))
    box.append(metrics(0, 1000))
    batches = drained(box)
    assert [(each["trial"], len(each.get("rows", []))) for each in batches] == [
        (0, 900),
        (None, 900),
        (0, 100),  # with the trial's end; what was told after that is sent after it
        (None, 100),
        (0, 1),
    ]
    assert [each["do"] for each in batches] == ["metrics", "metrics", "end", "metrics", "metrics"]
    steps = [row[3] for each in batches for row in each.get("rows", []) if each["trial"] == 0]
    assert steps == list(range(1001))
    box.close()


def test_what_replaces_an_item_stands_in_its_place(tmp_path: Path) -> None:
    box = Outbox(tmp_path, "s")
    for number in range(3):
        box.append(item(number))
    first = box.first()
    assert first is not None
    box.replace(first, [item(10), item(11)])
    second = box.first()
    assert second is not None
    box.replace(second, [item(12)])
    trials = [each["trial"] for each in drained(box)]
    assert (sorted(trials[:2]), trials[2:]) == ([11, 12], [1, 2])
    box.close()


def test_kinds_that_are_to_wait_are_passed_over(tmp_path: Path) -> None:
    box = Outbox(tmp_path, "s")
    box.append({"do": "texts", "trial": None, "time": 1, "texts": {"a": "b"}})
    box.append(item(1))
    first = box.first(without=("texts", "folder"))
    assert first is not None
    assert first.item["do"] == "end"
    assert len(box) == 2
    assert [each["do"] for each in drained(box)] == ["texts", "end"]
    box.close()


def test_a_bundle_that_moves_with_its_outbox_before_it_is_sent_is_found(tmp_path: Path, dead) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    names = here / "bundles" / "s", here / "unsent-too", tmp_path / "elsewhere"

    def write() -> None:
        box = Outbox(here / "unsent", "s")
        box.append(*({"do": "folder", "trial": None, "time": 1, "folder": str(path), "name": "b"} for path in names))
        first = box.first()
        assert first is not None
        box.replace(first, [first.item])  # as what is to be sent in parts
        box.close()

    dead(write)
    here.rename(there)
    box = Outbox(there / "unsent", "s")
    box.adopt()
    expected = [there / "bundles" / "s", there / "unsent-too", tmp_path / "elsewhere"]
    assert [each["folder"] for each in drained(box)] == [str(path) for path in expected]
    box.close()


def test_a_commit_is_in_the_file_at_once(tmp_path: Path) -> None:
    box = Outbox(tmp_path, "s")
    box.append(item(4))
    copy = tmp_path / "copy.sqlite"
    for side in ("", "-wal"):
        copy.with_name(f"{copy.name}{side}").write_bytes(box.file.with_name(f"{box.file.name}{side}").read_bytes())
    assert rows("select trial from items", file=copy) == [(4,)]
    drained(box)
    box.close()


def test_halves_say_together_what_the_whole_says() -> None:
    whole = {"do": "start", "trial": 0, "time": 1, "params": dict.fromkeys("abc", "1"), "tags": {"t": "1", "u": "2"}}
    parts, single = [whole], []
    while parts:
        part = parts.pop()
        divided = halves(part)
        single += [] if divided else [part]
        parts += divided
    assert len(single) == 5
    assert {key for part in single for key in part["params"] | part["tags"]} == {*"abctu"}
    assert all(len(part["params"]) + len(part["tags"]) == 1 for part in single)
    rows = [["a", 1.0, 1, step] for step in range(5)]
    assert [row for half in halves({"do": "metrics", "rows": rows}) for row in half["rows"]] == rows


STARTED: dict[str, object] = {"do": "start", "trial": 0, "time": 1, "params": {"a": "1"}, "is_new": True}
ENDED = {**item(), "time": 9, "tags": {"hpo.state": "COMPLETE"}}


@pytest.mark.parametrize("name", ["my öbj #1.py", "100% 🎉.py", "-a.py", "(copy).py", "report"])
def test_what_an_objectives_file_may_be_called_is_taken_again(name: str) -> None:
    assert is_item({"do": "texts", "trial": None, "time": 1, "texts": {name: "text"}})


@pytest.mark.parametrize("name", ["", ".", "..", "../a.py", "/a.py", "a\\b.py", "a\0b.py", "n" * 256])
def test_what_is_no_name_of_one_file_is_no_item(name: str) -> None:
    assert not is_item({"do": "texts", "trial": None, "time": 1, "texts": {name: "text"}})


def test_all_of_a_trial_is_one_item() -> None:
    whole = merged(merged(STARTED, metrics(0, 3)) or {}, ENDED)
    assert whole == {
        "do": "end",
        "trial": 0,
        "time": 1,
        "ended": 9,
        "is_new": True,
        "params": {"a": "1"},
        "rows": [["a", 1.0, 1, 3]],
        "tags": {"hpo.state": "COMPLETE"},
        "status": "FINISHED",
    }
    assert is_item(json.loads(json.dumps(whole)))
    assert not any(is_item({**whole, key: "x"}) for key in ("params", "rows", "tags", "ended"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (ENDED, metrics(0, 1)),
        (STARTED, {**STARTED, "params": {"a": "2"}}),
        (STARTED, {**metrics(0, 1), "again": True}),
        ({**STARTED, "tries": 1}, metrics(0, 1)),
        ({**STARTED, "trial": None}, metrics(None, 1)),
        (metrics(None, 1), {**ENDED, "trial": None}),
        ({"do": "folder", "trial": None, "time": 1, "folder": ".", "name": "b"}, metrics(None, 1)),
        ({**metrics(0, 1), "rows": [["a", 1.0, 1, 0]] * 500}, {**metrics(0, 1), "rows": [["a", 1.0, 1, 0]] * 401}),
    ],
)
def test_what_is_sent_one_by_one(one: dict[str, object], other: dict[str, object]) -> None:
    assert merged(one, other) is None
