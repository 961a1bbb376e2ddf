"""Outboxes: each belongs to exactly one study, whatever the studies are named; those of older versions are adopted."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.processes import this_process
from hpo.tracking import outbox
from hpo.tracking.outbox import Outbox, halves, left_behind

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


def leave(file: Path, trial: int = 0, seconds_ago: float = 0.0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(item(trial)) + "\n")
    os.utime(file, (time.time() - seconds_ago, time.time() - seconds_ago))
    return file


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Return a function that has something done as a process does that is gone then."""

    def done_by_one(what: Callable[[], object]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(outbox, "this_process", lambda: GONE)
            what()

    return done_by_one


@pytest.mark.parametrize("form", ["now", "before"])
def test_each_study_adopts_its_own_and_no_other(tmp_path: Path, dead, form: str) -> None:
    def write() -> None:
        for number, study in enumerate(STUDIES):
            file = Outbox(tmp_path, study).file if form == "now" else tmp_path / f"{study[:100]}.{GONE}.jsonl"
            leave(file, number)

    dead(write)
    for number, study in enumerate(STUDIES):
        box = Outbox(tmp_path, study if form == "now" else study[:100])
        assert box.adopt() == 0
        assert [each["trial"] for each in box.items] == [number]
        box.items.clear()
        box.forget()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_longest_names_of_study_and_machine_have_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "this_process", lambda: f"{'h' * 64}-deadbeef-4026531836-4194304")
    box = Outbox(tmp_path, "ü" * 100)
    box.append(item())
    assert box.file.is_file()
    box.items.append(item())
    assert box.write()
    box.set_aside(item(), "why")
    assert box.refused.is_file()


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
    monkeypatch.setattr(outbox.socket, "gethostname", lambda: "node-1.cluster.local")
    leave(tmp_path / "mnist.node-1.cluster.local-aaaaaaaa-1-2.jsonl", seconds_ago=7200)
    assert left_behind(tmp_path, "mnist")
    assert not left_behind(tmp_path, "mnist.node-1")
    assert not left_behind(tmp_path, "mnist.node-1.cluster")


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    leave(tmp_path / "s" / f"{PLACE}-1.jsonl")
    leave(tmp_path / "s" / "elsewhere-1-2.jsonl")
    leave(tmp_path / "s" / "refused.jsonl", seconds_ago=7200)
    leave(tmp_path / "s" / f"{this_process()}.jsonl")
    assert left_behind(tmp_path, "s") == []


def test_of_what_is_adopted_the_studys_run_is_not_begun_again(tmp_path: Path, dead) -> None:
    """An older version's item of a study's start says texts and, without a word, that the run is open."""
    start = {"do": "start", "trial": None, "time": 1, "tags": {"a": "b"}, "texts": {"study.yaml": "x"}}
    file = tmp_path / f"s.{GONE}.jsonl"
    file.write_text(json.dumps(start) + "\n" + json.dumps({**start, "texts": {}, "status": "RUNNING"}) + "\n")
    box = Outbox(tmp_path, "s")
    box.adopt()
    assert [each["do"] for each in box.items] == ["start", "texts", "start"]
    assert not any("status" in each for each in box.items)


def test_a_kill_between_adopting_and_removing_loses_nothing(tmp_path: Path, dead, monkeypatch) -> None:
    dead(lambda: leave(Outbox(tmp_path, "s").file, 7))
    box = Outbox(tmp_path, "s")
    monkeypatch.setattr(outbox.Path, "unlink", lambda *args, **keys: (_ for _ in ()).throw(OSError("killed")))
    box.adopt()
    assert [each["trial"] for each in map(json.loads, box.file.read_text().splitlines())] == [7]


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
