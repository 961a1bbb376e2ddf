"""The commands end to end, and every kind of bad input: one clear message, exit status 2, nothing lost."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from hpo.errors import HpoError
from hpo.runner.opening import open_existing
from hpo.runner.prepare import prepare
from hpo.search import schema
from hpo.study import catalog
from tests.cli import invoke, refused, summary
from tests.conftest import FRESH, ROOT, run_hpo, start_hpo
from tests.databases import MLFLOW, rows

Write = Callable[..., Path]


def test_run_then_run_again_then_more_trials(study: Write) -> None:
    path = study()
    first = summary(invoke("run", path, "--json"))
    keys = {"study", "storage", "trials", "epochs", "best", "confirmed", "test", "bundle"}
    keys |= {"test_of_seeds", "test_evaluations", "stopped", "baselines"}
    assert set(first) == keys
    assert first["trials"] == {"complete": 3, "pruned": 0, "failed": 0, "running": 0, "paused": 0, "waiting": 0}
    assert set(first["best"]) == {"number", "value", "params"}
    assert set(first["test"]) == {"loss", "r2"}
    assert Path(first["bundle"], "model.torchscript.pt").is_file()

    again = invoke("run", path, "--json")
    assert "study: all 3 trials are done" in again
    assert summary(again) == first

    more = summary(invoke("run", path, "--json", "--trials", 5))
    assert more["trials"]["complete"] == 5


def test_timeout_ends_the_study_and_says_so(study: Write) -> None:
    path = study("timeout: 2\ntrials: 300\nstack: 1")
    output = invoke("run", path, "--json")
    assert "the study's time (2 s) is over: no new trial is started; raise `timeout` to train more" in output
    assert 0 < summary(output)["trials"]["complete"] < 300
    assert summary(output)["bundle"] is not None
    done = summary(output)["trials"]
    assert summary(invoke("run", path, "--json"))["trials"] == done  # and what is over stays over
    assert "about 0.0 s left" in invoke("status", path)
    assert summary(invoke("run", path, "--json", "--set", "timeout=4"))["trials"]["complete"] > done["complete"]


def test_an_exit_status_for_each_end(study: Write) -> None:
    path = study()
    assert run_hpo("run", path, "--trials", 0).returncode == 2
    assert run_hpo("run", path, "--nonsense").returncode == 2
    failing = run_hpo("run", path, "--set", "params.kind=nan", "--set", "name=nan", "--json")
    assert failing.returncode == 1
    assert (
        "hpo: study 'nan' has no complete trial to choose from: 0 pruned, 3 failed, 0 not started; "
        "the last one failed: train_loss became nan in epoch 1"
    ) in failing.stderr
    assert "Traceback" not in failing.stderr


def test_check_shows_space_model_and_data_and_leaves_no_study(study: Write) -> None:
    output = invoke("check", study())
    for text in (
        "0.001 .. 0.1, log",
        "5 parameters",
        "(the network) │ Linear │ 5",
        "(200, 4) float32",
        "nothing is wrong",
    ):
        assert text in output
    assert rows("select count(*) from studies") == [(0,)]


def test_status_of_a_finished_and_of_no_study(study: Write) -> None:
    path = study()
    assert "has no study named 'study'; run it first: hpo run" in refused("status", path)
    assert not Path("mlruns").exists()
    invoke("run", path)
    output = invoke("status", path, "--json")
    assert "study: 3 of 3 trials done (3 complete, 0 pruned, 0 failed), 0 running, 0 waiting" in output
    assert "best r2" in output
    assert "time used" in output
    assert summary(output)["trials"]["complete"] == 3


def test_status_needs_neither_torch_nor_the_objective(study: Write) -> None:
    """Nor sound sampler keys, nor the space that the file has now: it says what the storage knows."""
    path = study()
    Path("sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = run_hpo("status", path, PYTHONPATH=".")
    assert (done.returncode, "run it first: hpo run" in done.stderr) == (2, True), done.stderr
    invoke("run", path)
    before = invoke("status", path, "--json")
    Path("linear.py").unlink()
    done = run_hpo("status", path, "--json", PYTHONPATH=".")
    assert done.returncode == 0, done.stderr
    assert done.stdout == before
    done = run_hpo("status", path, "--set", "params.learning_rate=0.5", "--trials", 5, PYTHONPATH=".")
    assert "3 of 5 trials done (3 complete, 0 pruned, 0 failed), 0 running, 2 waiting" in done.stdout
    done = run_hpo("status", path, "--set", "trials=none", PYTHONPATH=".")
    assert (done.returncode, "trials: must be" in done.stderr) == (2, True), done.stderr


def test_status_of_a_grid_knows_how_many_trials_there_can_be(study: Write) -> None:
    path = study("trials: 9\nsampler: grid\nparams:\n  learning_rate: {type: categorical, choices: [0.1, 0.2]}")
    invoke("run", path)
    assert "study: 2 of 2 trials done" in invoke("status", path)


def test_a_run_says_something_before_torch_is_imported(study: Write) -> None:
    path = study()
    Path("sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = run_hpo("run", path, PYTHONPATH=".")
    assert done.stdout == f"study: {path}, 3 trials; importing PyTorch\n"
    assert run_hpo("run", "nothing.yaml", PYTHONPATH=".").returncode == 2


def test_export_any_trial_and_refuse_what_is_none(study: Write) -> None:
    path = study()
    invoke("run", path)
    invoke("export", path, "--trial", 1, "--out", "one")
    assert json.loads(Path("one/bundle.json").read_text())["trial"] == 1
    assert (
        refused("export", path, "--trial", 9)
        == "--trial 9: is not a complete trial of study 'study'; complete are: 0, 1, 2"
    )
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years of work")
    message = "--out mine: is to be replaced by the bundle, but holds thesis.txt; give another folder"
    assert refused("export", path, "--out", "mine") == message
    assert Path("mine/thesis.txt").read_text() == "years of work"
    assert refused("export", path, "--out", "mine/thesis.txt") == "--out mine/thesis.txt: is a file; give a folder"


def test_objectives_lists_one_line_each() -> None:
    lines = invoke("objectives").splitlines()
    assert [line.split()[0] for line in lines] == list(catalog.names())
    assert {"breast_cancer", "iris", "tabular"} <= set(catalog.names())


def test_determinism_on_request_and_only_then(study: Write) -> None:
    path = study("deterministic: true\nname: strict")
    seen = "        Path('seen').write_text(str(torch.are_deterministic_algorithms_enabled()))\n"
    code = Path("linear.py").read_text().replace("import time\n", "import time\nfrom pathlib import Path\n", 1)
    Path("linear.py").write_text(code.replace("def data(self):\n", f"def data(self):\n{seen}", 1))
    invoke("run", path)
    assert Path("seen").read_text() == "True"
    assert not torch.are_deterministic_algorithms_enabled(), "a run leaves torch as it was"
    assert "deterministic is False here, True there" in refused("run", study("name: strict"))
    invoke("run", study())
    assert Path("seen").read_text() == "False"


def test_three_lines_are_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("three.yaml").write_text("objective: breast_cancer\ntrials: 2\nepochs: 2\n")
    assert summary(invoke("run", "three.yaml", "--json", "--tracking", "off"))["trials"]["complete"] == 2


def test_a_current_folder_that_was_deleted_is_said(study: Write, tmp_path: Path) -> None:
    command = f"mkdir gone; cd gone; rmdir ../gone; {sys.executable} -m hpo run {study()}"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "hpo: the current folder has been deleted; cd to one that is there\n")


ABSENT = "import sys\nsys.modules['mlflow'] = None\n"
REFUSED = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlflow":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("missing", [ABSENT, pytest.param(REFUSED, marks=pytest.mark.slow)])
def test_tracking_off_needs_no_mlflow(study: Write, missing: str) -> None:
    Path("sitecustomize.py").write_text(missing)
    path = f".{os.pathsep}{ROOT}"
    done = run_hpo("run", study("trials: 1\nepochs: 1\nbaseline: false"), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    done = run_hpo("run", study(), "--set", "name=x", "--tracking", "sqlite:///m.db", PYTHONPATH=path)
    assert done.returncode == 2
    assert "MLflow is not installed" in done.stderr
    assert "pip install mlflow, or set tracking: off" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trials: 0", "study.yaml:4: trials: must be greater than or equal to 1, but got 0"),
        ("trails: 3", 'trails: unknown key; did you mean "trials"?'),
        (
            "params: {learning_rate: {type: float, low: 1, high: 0.1}}",
            "low < high must hold, but got low=1.0 and high=0.1",
        ),
        (
            "params: {learning_rate: {type: float, low: 0, high: 1, log: true}}",
            "low > 0 must hold with log: true, but got low=0.0",
        ),
        (
            "params: {kind: {type: categorical, choices: []}}",
            "params.kind.choices: must name at least one choice, but got []",
        ),
        (
            "params: {learning_rate: {type: float, low: 1, high: 2, when: {kid: good}}}",
            "params.learning_rate.when.kid: there is no parameter 'kid'; did you mean \"kind\"?",
        ),
        (
            "params: {learning_rate: {type: float, low: 1, high: 2, when: {kind: bad}}}",
            "params.learning_rate.when.kind: kind cannot be 'bad'; it is fixed to 'good'",
        ),
        ("metric: r3", "metric: the objective has no metric 'r3'; known: r2, loss"),
        ("device: cuda:9", "device: there is no device 'cuda:9' here; available: auto"),
        ("objective: nothing", "objective: there is no objective and no module 'nothing'; known: breast_cancer"),
        ("objective: gone.py", "objective: no such file: "),
        (
            "sampler: {name: tpe, n_startup: 3}",
            'sampler.n_startup: unknown key of Optuna\'s TPESampler; did you mean "n_startup_trials"?',
        ),
        ("tracking: ./mlruns", "tracking: './mlruns' must be off, a server (http://host:5000) or a database"),
        ("storage: nonsense", "storage nonsense: is not a database address; write sqlite:///path/to/file.db"),
        (
            "storage: sqlite:////no/where/x.db",
            "cannot be opened: there is no folder /no/where; make it, or give another",
        ),
        ("storage: 'sqlite://'", "names no file, so nothing would be kept"),
        (
            "start_with: [{learning_rate: 5}]",
            "start_with[0].learning_rate: 5 is outside of the space: 0.001 .. 0.1, log",
        ),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_bad_input_has_one_clear_message(study: Write, command: str, text: str, message: str) -> None:
    assert message in refused(command, study(text))


def test_all_faults_of_a_file_come_at_once_each_with_its_line(study: Write) -> None:
    path = study("metric: r3\nparams:\n  learning_rate: {type: float, low: 2, high: 1}\n  kid: 3\ndevice: tpu\n")
    lines = refused("run", path).splitlines()
    assert [line.split(": ")[0].rsplit(":")[-1] for line in lines] == ["5", "7", "8", "9"]


def test_no_such_file_and_no_yaml(study: Write) -> None:
    assert refused("run", "gone.yaml").startswith("gone.yaml: no such file")
    Path("bad.yaml").write_text("a: [1\nb: 2\n")
    assert refused("run", "bad.yaml").startswith("bad.yaml:2: not YAML:")
    Path("text.yaml").write_text("hello")
    assert "a study file is a mapping" in refused("run", "text.yaml")


def test_an_objectives_own_import_error_is_shown(study: Write) -> None:
    path = study("objective: broken.py")
    Path("broken.py").write_text("import math\nimport not_installed_here\n")
    message = refused("run", path)
    assert "broken.py cannot be imported: ModuleNotFoundError: No module named 'not_installed_here'" in message
    assert "broken.py:2)" in message


def test_a_storage_that_is_no_database_or_another_programs_is_left_as_it_was(study: Write) -> None:
    Path("letter.db").write_text("Dear Sir")
    assert "is it a database at all?" in refused("run", study(), "--storage", "sqlite:///letter.db")
    assert Path("letter.db").read_text() == "Dear Sir"
    with closing(sqlite3.connect("shop.db")) as db, db:
        db.execute("create table customers (name text)")
    message = refused("run", study(), "--storage", "sqlite:///shop.db")
    assert "is another program's database (it has tables customers, but none of Optuna's)" in message
    with closing(sqlite3.connect("shop.db")) as db, db:
        assert db.execute("select name from sqlite_master").fetchall() == [("customers",)]


def test_a_study_of_that_name_that_is_another_says_what_differs(study: Write) -> None:
    invoke("run", study())
    message = refused("run", study("epochs: 3"), "--set", "params.learning_rate=0.1")
    assert "has another study named 'study':" in message
    assert "  epochs is 3 here, 2 there" in message
    assert "  params.learning_rate is 0.1 here, {'type': 'float'" in message
    assert "or give this one another `name`" in message
    assert "metric is 'loss' here, 'r2' there" in refused("check", study("metric: loss"))


def test_data_with_nan_and_data_that_changed(study: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEAR_DATA", "nan")
    for command in ("run", "check"):
        assert "in its train split, features holds NaN or infinity in 1 of 200 rows (the first: row 7)" in refused(
            command, study()
        )
    monkeypatch.delenv("LINEAR_DATA")
    invoke("run", study())
    monkeypatch.setenv("LINEAR_DATA", "other")
    assert "is not what study 'study' began with" in refused("run", study("trials: 4"))


@pytest.mark.parametrize("version", ["this", "an earlier one"])
def test_a_bundle_is_made_again_where_columns_are_called_otherwise(
    study: Write, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    path = study("start_with: [{learning_rate: 0.1}]\n")  # the best one
    objective = Path("linear.py")
    names = "test=test, feature_names=tuple(os.environ['NAMES']))"
    objective.write_text(objective.read_text().replace("test=test)", names))
    monkeypatch.setenv("NAMES", "abcd")
    invoke("run", path)
    if version != "this":
        with closing(open_existing(prepare(path), path)) as search:
            kept = {key: value for key, value in search.attrs[schema.RESULT].items() if key != "names"}
            search.remember(schema.RESULT, kept)
    about = Path("mlruns/bundles/study/bundle.json")
    made = json.loads(about.read_text())
    invoke("run", path)
    assert json.loads(about.read_text()) == made, "nothing is called otherwise"
    monkeypatch.setenv("NAMES", "bacd")
    said = invoke("run", path, "--trials", 4)
    assert "called otherwise than before" in said
    assert "damaged" not in said
    again = json.loads(about.read_text())
    assert again["feature_names"] == ["b", "a", "c", "d"]
    assert again["trial"] == made["trial"], "no new trial is the reason"
    assert invoke("status", path)
    said = invoke("run", path, "--trials", 5)
    assert "called otherwise" not in said


ABOUT = """
    def preprocess(self, split):
        self.mean = float(split.inputs["features"].mean())
        return super().preprocess(split)

    def about(self):
        return {"mean": self.mean}
"""


def test_an_objective_may_know_what_its_bundle_says_only_once_it_has_made_its_preprocessing(study: Write) -> None:
    path = study()
    objective = Path("linear.py")
    objective.write_text(objective.read_text() + ABOUT)
    invoke("run", path)
    assert "mean" in json.loads(Path("mlruns/bundles/study/bundle.json").read_text())["about_the_data"]


def test_a_password_is_never_shown_or_stored(study: Write) -> None:
    path = study("storage: postgresql+nodriver://bob:s3cret@localhost/x\nsampler: {name: tp}")
    done = run_hpo("run", path)
    assert done.returncode == 2
    assert "s3cret" not in done.stdout + done.stderr
    path = study("tracking: http://bob:s3cret@127.0.0.1:9/")
    done = run_hpo("run", path, "--json")
    assert done.returncode == 0, done.stderr
    assert "tracking: http://bob:***@127.0.0.1:9/ does not work" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr
    found = subprocess.run(["grep", "-rl", "s3cret", "mlruns"], capture_output=True, text=True, check=False).stdout
    assert found == ""


def test_unknown_objective_data_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setattr("urllib.request.urlopen", _offline)
    Path("c.yaml").write_text("objective: california_housing\n")
    message = refused("check", "c.yaml")
    assert (
        f"california_housing: not in {tmp_path}/data/sklearn/cal_housing_py3.pkz, and it could not be downloaded"
        in message
    )
    assert "point HPO_DATA_HOME at the folder that holds sklearn/" in message


def _offline(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_a_corrupted_data_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_DATA_HOME", str(tmp_path))
    raw = tmp_path / "torchvision/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{part}-ubyte").write_bytes(b"\x00\x00\x08\x03 not images")
    Path("f.yaml").write_text("objective: fashion_mnist\n")
    message = refused("run", "f.yaml")
    assert f"FashionMNIST: {raw} cannot be read" in message
    assert "a file in it is corrupted or incomplete; delete it to have it downloaded again" in message


def test_what_could_not_be_sent_is_sent_by_a_run_of_the_finished_study(study: Write) -> None:
    path = study("tracking: sqlite:///mlruns/mlflow.db")
    done = run_hpo("run", path, "--tracking", "http://127.0.0.1:9/")
    assert done.returncode == 0, done.stderr
    assert list(Path("mlruns/unsent").iterdir())
    assert "all 3 trials are done" in run_hpo("run", path).stdout
    assert not list(Path("mlruns/unsent").iterdir())
    runs = rows("select name, status from runs order by name", file=MLFLOW)
    assert [(name.removesuffix(" (best)"), status) for name, status in runs] == [
        ("study", "FINISHED"),
        *[(f"trial {i}", "FINISHED") for i in range(3)],
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("return Data(train=train, valid=valid, test=test)", "return 5"),
            "data must return hpo.study.data.Data, but got 5",
        ),
        (("x = torch.randn", "raise OSError('gone')\n        x = torch.randn"), "data failed: OSError: gone ("),
        (('return {"r2": R2Score()}', 'return {"r2": max}'), "must be TorchMetrics objects, but r2 is <built-in"),
        (
            ("return nn.Linear(info.n_features, 1)", "return None"),
            "build must return a torch.nn.Module, but returned None",
        ),
        (
            ("return loss\n", "return loss.expand(3)\n"),
            "loss must return one number (a tensor of no dimensions), but got",
        ),
    ],
)
def test_an_objective_that_breaks_the_contract_is_told_so_before_anything_runs(
    study: Write, change: tuple[str, str], message: str
) -> None:
    path = study("objective: odd.py")
    text = Path("linear.py").read_text()
    assert change[0] in text
    Path("odd.py").write_text(text.replace(*change))
    for command in ("check", "run"):
        assert message in refused(command, path)


@pytest.mark.slow
def test_a_pipe_that_closes_early_gives_no_traceback(study: Write) -> None:
    """The reader takes the first line and goes: the study trains on, and says so once."""
    with start_hpo("run", study("trials: 5"), **FRESH) as process:  # it says that it imports PyTorch
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().endswith("5 trials; importing PyTorch\n")
        process.stdout.close()
        lost = "hpo: the output cannot be written (Broken pipe); the command continues without it, and `hpo status`"
        assert process.stderr.read() == f"{lost} shows the study\n"
        assert process.wait(timeout=200) == 0


def test_a_manager_that_stops_it_while_it_imports_is_told_so(study: Write) -> None:
    with start_hpo("run", study(), **FRESH) as process:
        assert process.stdout is not None
        assert process.stdout.readline().endswith("importing PyTorch\n")
        process.terminate()
        assert process.wait(timeout=200) == 130


@pytest.mark.parametrize("arguments", [["objectives"], ["--help"]])
def test_a_pipe_that_nobody_reads_gives_no_traceback(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hpo", *arguments]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_folder_of_output_that_is_a_file_costs_no_trial(study: Write) -> None:
    Path("mlruns").mkdir()
    for name in ("checkpoints", "bundles"):
        Path("mlruns", name).write_text("in the way")
        with pytest.raises(HpoError, match=f"mlruns/{name}.* cannot be (made|written).*no trial is lost"):
            invoke("run", study())
        Path("mlruns", name).unlink()
    assert summary(invoke("run", study(), "--json"))["trials"]["complete"] == 3


def test_a_head_that_is_none_and_an_objective_that_exits_are_found_before_anything_runs(study: Write) -> None:
    text = Path("linear.py").read_text()
    Path("odd.py").write_text(text + "\n    def head(self):\n        return None\n")
    assert "head must return a torch.nn.Module, but returned None" in refused("run", study("objective: odd.py"))
    Path("gone.py").write_text("import sys\nsys.exit(3)\n")
    assert "gone.py cannot be imported: SystemExit: 3" in refused("run", study("objective: gone.py"))


def test_a_corrupted_database_is_said_in_one_line(study: Write) -> None:
    path = study()
    invoke("run", path)
    database = Path("mlruns/optuna.db")
    content = bytearray(database.read_bytes())
    content[4096:40960] = b"\x7f" * (40960 - 4096)
    database.write_bytes(content)
    done = run_hpo("status", path)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert "malformed" in done.stderr
