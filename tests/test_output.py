"""`output`: where checkpoints, bundles and what could not be sent go, whoever writes or looks for them."""

import json
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import hpo
from tests.cli import invoke, refused, summary
from tests.conftest import run_hpo, start_hpo
from tests.databases import rows

ELSEWHERE = "output: elsewhere\nstorage: sqlite:///elsewhere/optuna.db\n"
Write = Callable[..., Path]


def files(pattern: str) -> list[str]:
    return sorted(str(path) for path in Path("elsewhere").glob(pattern))


def test_nothing_is_written_into_mlruns_and_all_is_found_again(study: Write) -> None:
    path = study(f"{ELSEWHERE}tracking: sqlite:///elsewhere/mlflow.db\n")
    bundle = "elsewhere/bundles/study"
    assert summary(invoke("run", path, "--json"))["bundle"] == bundle
    assert files("checkpoints/study/*") == ["elsewhere/checkpoints/study/best.pt"]
    assert summary(invoke("status", path, "--json"))["bundle"] == bundle
    assert hpo.open_study(path).bundle == Path(bundle)
    assert summary(invoke("export", path, "--json"))["bundle"] == bundle
    assert summary(invoke("export", path, "--trial", "0", "--json"))["bundle"] == f"{bundle}-trial-0"
    assert files("bundles/*/model.pt") == [f"{bundle}-trial-0/model.pt", f"{bundle}/model.pt"]
    invoke("repair", path)
    assert not Path("mlruns").exists()


def test_it_is_no_part_of_what_a_study_is(study: Write) -> None:
    invoke("run", study("storage: sqlite:///s.db"))
    again = summary(invoke("run", study("storage: sqlite:///s.db\noutput: elsewhere\ntrials: 4\n"), "--json"))
    assert again["trials"]["complete"] == 4
    assert again["bundle"] == "elsewhere/bundles/study"


def test_the_api_takes_it_too(study: Write) -> None:
    study()
    done = hpo.run({"objective": "linear.py"}, output="elsewhere", storage="sqlite:///s.db", tracking="off", trials=1)
    assert done.bundle == Path("elsewhere/bundles/linear")
    assert not Path("mlruns").exists()


@pytest.mark.slow
def test_a_study_of_the_same_name_in_another_storage_takes_nothing_of_this_one(study: Write) -> None:
    path = study("storage: sqlite:///one.db")
    done = summary(invoke("run", path, "--json"))
    left = Path("mlruns/checkpoints/study/place-1.pt")
    left.touch()
    said = refused("run", study("storage: sqlite:///two.db\nseed: 5\n"))
    assert "mlruns has the checkpoints of another study named 'study', in sqlite:////" in said
    assert "give this one another `name`, or another `output`" in said
    left.unlink()
    said = invoke("run", study("storage: sqlite:///two.db\nseed: 5\n"))
    assert "mlruns has the bundle of another study named 'study'" in said
    again = invoke("run", study("storage: sqlite:///one.db"), "--json")
    assert "is no more what this study has exported" in again
    assert summary(again)["test"] == done["test"]
    Path("one.db").unlink()
    left.touch()
    invoke("run", study("storage: sqlite:///two.db\nseed: 5\n"))  # that study is no more
    invoke("delete", "study", "--storage", "sqlite:///two.db")
    assert not list(Path("mlruns/checkpoints").glob(".*.json"))


def test_a_bundle_that_is_no_more_the_studys_is_exported_again(study: Write) -> None:
    path = study()
    done = summary(invoke("run", path, "--json"))
    model, about = (Path(done["bundle"]) / name for name in ("model.torchscript.pt", "bundle.json"))
    whole = about.read_text()
    model.write_bytes(model.read_bytes()[:1000])
    assert summary(invoke("status", path, "--json"))["bundle"] is None
    said = invoke("run", path)
    assert f"{done['bundle']} is no more what this study has exported" in said
    assert hpo.load_bundle(done["bundle"])
    for key, value in (("trial", 99), ("seed", 1), ("value", 0.5)):
        about.write_text(json.dumps(json.loads(about.read_text()) | {key: value}))
        assert "is no more what this study has exported" in invoke("run", path)
    assert len(about.read_text().splitlines()) == len(whole.splitlines())
    assert "is no more" not in invoke("run", path)


@pytest.mark.slow
def test_what_could_not_be_sent_is_kept_there_and_sent_from_there(study: Write) -> None:
    path = study(f"{ELSEWHERE}trials: 1\ntracking: sqlite:///elsewhere/mlflow.db\n")
    done = run_hpo("run", path, "--tracking", "http://127.0.0.1:9/")
    assert done.returncode == 0, done.stderr
    assert files("unsent/study/*.sqlite")
    assert "all 1 trials are done" in run_hpo("run", path).stdout
    assert not files("unsent/*")
    runs = rows("select name, status from runs order by name", file="elsewhere/mlflow.db")
    assert runs == [("study", "FINISHED"), ("trial 0 (best)", "FINISHED")]
    assert not Path("mlruns").exists()


def wait_for_epochs(seconds: float = 90) -> None:
    """Wait until some epochs are reported, so that each worker is in the middle of a trial, or nearly."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if Path("elsewhere/optuna.db").is_file():
            try:
                if rows("select count(*) from trial_intermediate_values", file="elsewhere/optuna.db") > [(3,)]:
                    return
            except sqlite3.OperationalError:
                pass  # its tables are not made yet
        time.sleep(0.2)
    raise AssertionError("no trial has reported an epoch")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_run_resumes_from_its_checkpoints(study: Write, workers: int) -> None:
    path = study(f"{ELSEWHERE}epochs: 60\nstack: 1\npruner: none\n")
    process = start_hpo("run", path, "--workers", workers, LINEAR_SECONDS="0.05")
    wait_for_epochs()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert files("checkpoints/study/place-*.pt")
    again = run_hpo("run", path, "--workers", workers)
    assert again.returncode == 0, again.stderr
    assert "resumes after epoch" in again.stdout
    assert files("checkpoints/study/*") == ["elsewhere/checkpoints/study/best.pt"]
    assert not Path("mlruns").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no folders")
@pytest.mark.parametrize("output", ["linear.py/deep", "/proc/none"])
def test_what_cannot_be_written_is_said_before_the_first_trial(study: Write, output: str) -> None:
    path = study(f"output: {output}\nstorage: sqlite:///kept.db\n")
    assert f"output: {output}/bundles cannot be written (" in refused("check", path)
    message = refused("run", path)
    assert message.startswith(f"output: {output}/bundles cannot be written (")
    assert rows("select count(*) from trials", file="kept.db") == [(0,)]
    assert summary(invoke("run", study("storage: sqlite:///kept.db\n"), "--json"))["trials"]["complete"] == 3


def test_a_check_of_what_can_be_written_leaves_no_folder_there(study: Write) -> None:
    invoke("check", study("output: deep/deeper\nstorage: sqlite:///s.db\n"))
    assert not Path("deep").exists()


@pytest.mark.parametrize(
    ("text", "why"), [("''", "must be a folder, but got ''"), ("linear.py", "linear.py is a file")]
)
def test_what_is_no_folder_is_refused(study: Write, text: str, why: str) -> None:
    assert why in refused("check", study(f"output: {text}\n"))
