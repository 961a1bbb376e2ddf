"""`hpo studies`, `rename`, `delete` and `run --fresh`: what is stored is kept, and only what is meant is lost."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import hpo
from hpo.cli import studies as command
from hpo.errors import HpoError, InputError
from hpo.runner import keeping
from hpo.runner.refit import bundle_folder
from hpo.search import lease, schema
from hpo.search.budget import leases_in
from hpo.search.lease import at_work, working
from hpo.search.named import named, require_name
from hpo.search.storage import close_storage, exclusive, open_storage
from hpo.search.whole import renaming
from tests.cli import invoke, refused, summary
from tests.conftest import run_hpo
from tests.databases import rows
from tests.searches import Opener

Write = Callable[..., Path]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    made = Opener(tmp_path)
    yield made
    made.close()


def _all_states(url: str, name: str) -> None:
    """Make a study with a trial of each state, and all that a trial can have."""
    storage = open_storage(url)
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize")
    for key, value in {"hpo:identity": {"metric": "r2"}, "hpo:making": "0" * 32, "long": "x" * 5000}.items():
        study.set_user_attr(key, value)
    study_id = study._study_id
    storage.set_study_system_attr(study_id, "hpo:lease:a", 12.5)
    for i in range(5):
        study.enqueue_trial({"x": i / 10}, user_attrs={"place": i})
    for i in range(4):
        trial = study.ask({"x": optuna.distributions.FloatDistribution(0, 1)})
        trial.report(float(i), 0)
        trial.report(0.5, 1)
        storage.set_trial_system_attr(trial._trial_id, "hpo:lease", {"worker": "w", "lease": "a"})
        if i < 3:
            study.tell(trial, None if i else 0.7, state=[TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL][i])
    close_storage(storage)


def _whole(url: str, name: str) -> tuple[Any, ...]:
    storage = open_storage(url)
    study = optuna.load_study(study_name=name, storage=storage)
    found = [
        {key: value for key, value in vars(t).items() if key not in ("_trial_id", "trial_id")}
        for t in study.get_trials()
    ]
    attrs = storage.get_study_user_attrs(study._study_id), storage.get_study_system_attrs(study._study_id)
    close_storage(storage)
    return study.direction, *attrs, found


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgresql"])
def test_a_renamed_study_has_all_that_it_had(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = f"{kind}:///{tmp_path}/s" if kind != "postgresql" else request.getfixturevalue("server").database()
    _all_states(url, "one")
    before = _whole(url, "one")
    assert [trial["state"].name for trial in before[3]] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"]
    keeping.rename(named("one", url), "two")
    assert _whole(url, "two") == before
    storage = open_storage(url)
    assert [study.study_name for study in storage.get_all_studies()] == ["two"]
    close_storage(storage)


@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgresql"])
def test_a_deleted_study_leaves_nothing_and_others_as_they_were(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"{kind}:///{tmp_path}/s" if kind != "postgresql" else request.getfixturevalue("server").database()
    _all_states(url, "one")
    _all_states(url, "two")
    before = _whole(url, "two")
    keeping.delete(named("one", url), force=True)
    assert _whole(url, "two") == before
    if kind == "sqlite":
        tables = [name for (name,) in rows("select name from sqlite_master where type = 'table'", file=tmp_path / "s")]
        left = {name: rows(f"select count(*) from {name}", file=tmp_path / "s")[0][0] for name in tables}
        keeping.delete(named("two", url), force=True)
        assert left["trials"] == 5
        tables = [name for name in tables if name.startswith(("stud", "trial"))]
        assert [rows(f"select count(*) from {name}", file=tmp_path / "s")[0][0] for name in tables] == [0] * len(tables)


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_a_rename_that_fails_changes_nothing(kind: str, tmp_path: Path) -> None:
    url = f"{kind}:///{tmp_path}/s"
    _all_states(url, "one")
    _all_states(url, "other")
    before = _whole(url, "one")
    storage = open_storage(url)
    with exclusive(url, storage):
        with pytest.raises(ZeroDivisionError), renaming(storage, url, "one", "two", {schema.MAKING: "1"}):
            raise ZeroDivisionError
        with pytest.raises(InputError, match="'other' already"), renaming(storage, url, "one", "other", {}):
            pass
    assert sorted(study.study_name for study in storage.get_all_studies()) == ["one", "other"]
    close_storage(storage)
    assert _whole(url, "one") == before


def test_behind_grpc_a_rename_is_refused() -> None:
    storage = optuna.storages.InMemoryStorage()
    message = "do it on the machine that runs `hpo serve`"
    with pytest.raises(InputError, match=message), renaming(storage, "grpc://host:1", "one", "two", {}):
        pass


def test_moved_files_are_moved_back_where_the_storage_fails(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ZeroDivisionError), keeping._moving() as move:  # noqa: PT012
        move(tmp_path / "a", tmp_path / "b" / "c")
        raise ZeroDivisionError
    assert (tmp_path / "a").is_dir()
    with pytest.raises(HpoError, match="nothing was renamed"), keeping._moving() as move:
        move(tmp_path / "gone", tmp_path / "x")


def test_rename_takes_checkpoints_bundle_and_unsent_items_along(study: Write) -> None:
    path = study("tracking: http://127.0.0.1:9/\n")
    Path("mlruns/checkpoints/study").mkdir(parents=True)
    Path("mlruns/checkpoints/study/place-0.pt").write_text("x")
    done = run_hpo("run", path)
    assert done.returncode == 0, done.stderr
    printed = invoke("rename", path, "second")
    assert "study study in sqlite:///mlruns/optuna.db is second now" in printed
    assert "mlruns/bundles/study is mlruns/bundles/second now" in printed
    assert "later ones go to the experiment second" in printed
    assert Path("mlruns/checkpoints/second").is_dir()
    assert not Path("mlruns/checkpoints/study").exists()
    assert [file.parent.name for file in Path("mlruns/unsent").glob("*/*.sqlite")] == ["second"]
    found = summary(invoke("status", path, "--set", "name=second", "--json"))
    assert found["bundle"] == "mlruns/bundles/second"
    ((stored,),) = rows("select value_json from study_user_attributes where key = 'hpo:study_file'")
    assert json.loads(json.loads(stored))["name"] == "second"
    assert "all 3 trials are done" in invoke("run", path, "--set", "name=second", "--tracking", "off")


def test_rename_refuses_a_name_that_is_taken_none_or_the_one_of_a_folder(study: Write) -> None:
    invoke("run", study())
    invoke("run", study("epochs: 1\nname: other"))
    assert "has a study named 'other' already; give another name" in refused("rename", "study", "other")
    assert "the name must be letters, digits" in refused("rename", "study", "../up")
    assert "the name must be at most 128 bytes" in refused("rename", "study", "x" * 200)
    with pytest.raises(InputError, match="the name"):
        require_name("${HOME:-x}")
    Path("mlruns/bundles/gone").mkdir()
    assert "mlruns/bundles/gone is there already, of a study that is gone" in refused("rename", "study", "gone")
    assert "has no study 'stud'; did you mean \"study\"?" in refused("rename", "stud", "new")
    assert refused("rename", "study", "new", "--storage", "sqlite:///no.db").startswith("there is no storage")
    assert not Path("no.db").exists()


def test_a_study_that_workers_train_is_not_renamed_or_deleted(opener: Opener, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s.db"
    search = opener()
    assert search.ask() is not None
    for arguments in (["rename", "s", "t"], ["delete", "s", "--yes"]):
        message = refused(*arguments, "--storage", url)
        assert f"study 's' in {url} is being trained:\n  " in message
        assert f"-{os.getpid()}, whose lease holds until " in message
    assert summary(invoke("studies", "--storage", url, "--json"))["studies"][0]["state"] == "running"
    assert f"deleted: study s in {url}" in invoke("delete", "s", "--yes", "--force", "--storage", url)
    assert "no studies in" in invoke("studies", "--storage", url)


def test_nor_is_one_that_a_process_has_opened_to_train_it(
    opener: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its data may take long to load. A run trained under the new name, and wrote where another of its name did."""
    url, me = f"sqlite:///{tmp_path}/s.db", lease.this_process()
    other = f"{me.rpartition('-')[0]}-{os.getppid()}"
    monkeypatch.setattr(lease, "this_process", lambda: other)
    search = opener(train=True)
    monkeypatch.setattr(lease, "this_process", lambda: me)
    for arguments in (["rename", "s", "t"], ["delete", "s", "--yes"]):
        assert f"is being trained:\n  {other}, whose lease holds until " in refused(*arguments, "--storage", url)
    attrs = search.storage.get_study_system_attrs(search.study._study_id)
    assert at_work([], attrs, 60.0, time.time() + 20) == {}, "it does not renew its lease"
    monkeypatch.setattr(lease, "is_gone", lambda worker: worker == other)
    assert "is t now" in invoke("rename", "s", "t", "--storage", url)


def test_who_works_on_a_study(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    search = opener()
    first, second = search.ask(), search.ask()
    now = time.time()

    def held(at: float = now, me: str = lease.this_process()) -> list[str]:
        monkeypatch.setattr(lease, "this_process", lambda: me)
        attrs = search.storage.get_study_system_attrs(search.study._study_id)
        return list(working(search.study.get_trials(), leases_in(attrs), 60.0, at))

    mine = held()
    assert len(mine) == 1
    assert held(at=now + 3600) == [], "its lease has run out"
    for claim in (first, second):
        search.complete(claim.number, 0.5)
    assert held() == [], "this process, between two studies"
    assert held(me="another") == mine, "a worker that exports has no running trial"
    assert held(me="another", at=now + 20) == [], "it does not renew its lease"
    monkeypatch.setattr(lease, "is_gone", lambda worker: True)
    assert held(me="another") == [], "it has ended"


def test_fresh_keeps_the_old_study_and_starts_a_new_one(study: Write) -> None:
    path = study()
    assert "is kept as" not in invoke("run", path, "--fresh"), "there is none yet"
    message = refused("run", study("epochs: 1"))
    assert "has another study named 'study':\n  epochs is 1 here, 2 there\n" in message
    assert "hpo run FILE --fresh, or hpo.run(…, fresh=True)\n" in message
    assert "\nor delete that one: hpo delete study --storage sqlite:///mlruns/optuna.db" in message
    printed = invoke("run", study("epochs: 1"), "--fresh")
    assert "study study is kept as study-1; a new one starts" in printed
    assert "study study is kept as study-2" in invoke("run", path, "--fresh", "--workers", "2")
    listed = summary(invoke("studies", "--json"))["studies"]
    assert {each["study"]: each["trials"]["finished"] for each in listed} == {"study": 3, "study-1": 3, "study-2": 3}
    assert {each["state"] for each in listed} == {"done"}
    assert sorted(folder.name for folder in Path("mlruns/bundles").iterdir() if folder.is_dir()) == [
        "study",
        "study-1",
        "study-2",
    ]
    assert hpo.open_study("study-1").bundle == Path("mlruns/bundles/study-1")


def test_fresh_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def runs(**keys: object) -> hpo.Study:
        return hpo.run({"objective": "iris"}, trials=2, epochs=1, tracking="off", quiet=True, **keys)

    runs()
    again = runs(fresh=True, seed=7)
    assert again.name == "iris"
    assert hpo.open_study("iris-1").counts.finished == 2


def test_delete_asks_on_a_terminal_and_needs_yes_elsewhere(
    study: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = study()
    invoke("run", path)
    Path("mlruns/checkpoints/study").mkdir(parents=True, exist_ok=True)
    Path("mlruns/checkpoints/study/mine.txt").write_text("mine")
    Path("mlruns/checkpoints/study/place-0.pt").write_text("")
    assert "(3 of 3 trials) is deleted for good; confirm with --yes" in refused("delete", path)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    for answer in ("n", ""):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        with pytest.raises(HpoError, match="nothing was deleted"):
            command.delete(str(path), None, bundle=False, yes=False, force=False)
    assert "study in sqlite:///mlruns/optuna.db: done, 3 of 3 trials, r2 " in capsys.readouterr().out
    printed = invoke("delete", path, "--yes")
    assert "deleted: study study in sqlite:///mlruns/optuna.db" in printed
    assert "deleted: checkpoints in mlruns/checkpoints/study, but for files that are not hpo's" in printed
    assert "kept: its bundle in mlruns/bundles/study (--bundle deletes it)" in printed
    assert [file.name for file in Path("mlruns/checkpoints/study").iterdir()] == ["mine.txt"]
    invoke("run", path)
    assert "deleted: bundle in mlruns/bundles/study" in invoke("delete", "study", "--yes", "--bundle")
    assert not Path("mlruns/bundles/study").exists()


def test_studies_lists_whatever_is_there_and_makes_nothing(study: Write) -> None:
    assert refused("studies").startswith("there is no storage sqlite:///mlruns/optuna.db; give the one of")
    assert not Path("mlruns").exists()
    invoke("run", study())
    invoke("run", study("trials: 5"), "--set", "name=half", "--trials", "1")
    storage = open_storage("sqlite:///mlruns/optuna.db")
    optuna.create_study(study_name="plain", storage=storage).add_trial(optuna.create_trial(value=1.0))
    evil = optuna.create_study(study_name="../../up", storage=storage)
    evil.set_user_attr(schema.IDENTITY, {"metric": "r2"})
    close_storage(storage)
    listed = {each["study"]: each for each in summary(invoke("studies", "--json"))["studies"]}
    assert {name: each["state"] for name, each in listed.items()} == {
        "study": "done",
        "half": "done",
        "plain": "not hpo's",
        "../../up": "unreadable",
    }
    assert listed["study"]["objective"] == "linear.py"
    assert listed["study"]["direction"] == "maximize"
    assert listed["study"]["best"]["value"] is not None
    assert "the name must be letters" in refused("delete", "../../up", "--yes")
    assert "was not made by hpo" in refused("rename", "plain", "x")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hpo", "studies"], capture_output=True, text=True, check=True
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not {"torch", "mlflow", "pandas"} & imported


def test_the_folders_are_those_that_runs_write(study: Write) -> None:
    from hpo.runner.prepare import prepare

    plan = prepare(study("output: elsewhere"), {})
    assert keeping.bundle_of(plan.spec) == bundle_folder(plan) == Path("elsewhere/bundles/study")
    assert keeping.checkpoints_of(plan.spec, "b") == Path("elsewhere/checkpoints/b")


@pytest.mark.parametrize(
    "attrs",
    [
        {"hpo:identity": {"params": [1], "metric": 5}},
        {"hpo:identity": {"objective": "", "params": {"x": {"type": "float", "low": "a"}}}},
        {"hpo:identity": {}, "hpo:study_file": "[1]", "hpo:result": {"bundle": 7, "test": 5}},
        {"hpo:identity": {"options": [1]}, "hpo:study_file": '{"timeout": 5}', "hpo:timed_out": "x"},
        {"hpo:identity": {}, "hpo:study_file": '{"trials": "x", "output": 5, "name": "../z"}', "hpo:making": "../*"},
    ],
)
def test_whatever_a_storage_holds_can_be_listed_renamed_and_deleted(attrs: dict[str, Any], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/s"
    storage = open_storage(url)
    study = optuna.create_study(study_name="odd", storage=storage)
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    study.add_trial(optuna.create_trial(value=1.0))
    two = optuna.create_study(study_name="two", storage=storage, directions=["minimize", "maximize"])
    two.set_user_attr("hpo:identity", {})
    close_storage(storage)
    listed = {
        each["study"]: each["state"] for each in summary(invoke("studies", "--storage", url, "--json"))["studies"]
    }
    assert listed == {"odd": "unfinished", "two": "not hpo's"}
    keeping.rename(named("odd", url), "odder")
    keeping.delete(named("odder", url))
    assert [each["study"] for each in summary(invoke("studies", "--storage", url, "--json"))["studies"]] == ["two"]
