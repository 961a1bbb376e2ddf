"""What comes out of a storage runs no code that its user did not name, and keeps nobody's passwords."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from hpo import errors
from hpo.errors import conceal, masked, said
from hpo.study.document import read
from hpo.study.spec import StudySpec, parse_param
from hpo.study.trust import code_references
from tests.cli import invoke, refused
from tests.databases import rows

STORAGE = "sqlite:///mlruns/optuna.db"
OBJECTIVE = """
import os
from pathlib import Path

Path("imported").touch()


def value(trial):
    trial.set_user_attr("x", 1)
    if os.environ.get("FAILS"):
        raise RuntimeError("no route to " + os.environ["SECRET"] + " or postgresql://me:opensesame@host/db")
    return trial.suggest_float("a", 0, 1)
"""
OPTIONS = """
from dataclasses import dataclass

import torch
from torch import nn
from torchmetrics import MeanSquaredError

from hpo.study.data import Data, Split
from hpo.study.objective import Objective


@dataclass(frozen=True)
class Options:
    dsn: str = ""
    pin: int = 0
    host: str = ""


class Lines(Objective):
    Options = Options
    defaults = {"loss": "mse", "learning_rate": 0.1}
    space = {"learning_rate": {"type": "float", "low": 0.01, "high": 0.1}}

    def data(self):
        if "broken" in self.options.host:
            raise ValueError(f"cannot connect to {self.options.dsn} with {self.options.pin}")
        x = torch.linspace(-1, 1, 60)[:, None]
        parts = [Split(inputs={"x": x[i::3]}, targets=2 * x[i::3]) for i in range(3)]
        return Data(train=parts[0], valid=parts[1], test=parts[2])

    def build(self, params, info):
        return nn.Linear(1, 1)

    def metrics(self):
        return {"mse": MeanSquaredError()}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "_CONCEALED", {})
    Path("own.py").write_text(OBJECTIVE)
    Path("lines.py").write_text(OPTIONS)
    Path("study.yaml").write_text("objective: own.py:value\ntrials: 1\ntracking: off\n")


def started():
    """Have a study in the storage that was started by `hpo run`; nothing of it is imported here any more."""
    invoke("run", "study.yaml")
    Path("imported").unlink()


def poisoned(**values):
    """Change the study file that the storage keeps, as whoever can write the storage can."""
    with closing(sqlite3.connect("mlruns/optuna.db")) as database, database:
        where = "where key = 'hpo:study_file'"
        (text,) = database.execute(f"select value_json from study_user_attributes {where}").fetchone()
        text = json.dumps(json.dumps(json.loads(json.loads(text)) | values))
        database.execute(f"update study_user_attributes set value_json = ? {where}", (text,))


def everything_in(folder):
    """Return all that is written below a folder, as one text."""
    files = [file for file in Path(folder).rglob("*") if file.is_file()]
    return "\n".join(file.read_bytes().decode("latin-1") for file in files)


@pytest.mark.parametrize(
    "values",
    [{}, {"objective": "evil.py:value"}, {"objective": "os"}, {"params": {"loss": "evil.py:loss"}}],
)
def test_code_that_the_storage_names_is_not_even_imported(values):
    started()
    Path("evil.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    poisoned(**values)
    named = ["--objective", "own.py:value"] if values else []
    message = refused("worker", "--study", "study", "--storage", STORAGE, *named)
    assert "the storage names code to run" in message
    assert "--trust-storage" in message
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    "how", [["--objective", "own.py:value"], ["--trust-storage"], ["--set", "objective=own.py:value"]]
)
def test_a_worker_runs_the_code_that_its_user_names_or_trusts(how):
    started()
    invoke("worker", "--study", "study", "--storage", STORAGE, *how)
    assert Path("imported").exists()


def test_losses_by_path_are_code_too():
    loss = {"type": "categorical", "choices": ["mse", "a.py:f", "b:g"]}
    spec = StudySpec(name="s", objective="o", params={"loss": parse_param(loss)})
    assert [code for _, code in code_references(spec)] == ["o", "a.py:f", "b:g"]
    spec = StudySpec(name="s", objective="o", params={"loss": "mse"})
    assert [code for _, code in code_references(spec)] == ["o"]


@pytest.mark.parametrize(
    "values",
    [
        {"objective": "evil.py${COLON}value"},
        {"objective": "own.py:value", "params": {"loss": "evil.py${COLON}loss"}},
        {"name": "${HF_TOKEN}"},
        {"metric": "${HF_TOKEN}"},
        {"tracking": "http://127.0.0.1:9/${HF_TOKEN}"},
        {"tracking": "http://127.0.0.1:9/"},
        {"tracking": "sqlite:////elsewhere/m.db"},
        {"output": "${HF_TOKEN}"},
        {"output": "/elsewhere"},
        {"output": "inside/../../elsewhere"},
    ],
    ids=str,
)
def test_variables_and_addresses_are_not_the_storages_to_choose(monkeypatch, values):
    monkeypatch.setenv("COLON", ":")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    started()
    Path("evil.py").write_text("from pathlib import Path\nPath('imported').touch()\n")
    poisoned(**values)
    worker = ["worker", "--study", "study", "--storage", STORAGE, "--objective", "own.py:value"]
    if "name" not in values:
        assert "hf_abcdefgh" not in refused(*worker)
        assert not Path("imported").exists()
    else:  # the name is the user's
        invoke(*worker)
    assert "hf_abcdefgh" not in everything_in("mlruns")


@pytest.mark.parametrize(
    "secret", ["pa\\ss\"w'0rd-Xyz", "pässwörd-42", "first-line\nsecond-line", "x" * 290 + "tail-of-it"]
)
def test_a_secret_is_masked_in_every_form_and_before_anything_is_cut(monkeypatch, secret):
    conceal(secret, "${S}")
    for error in (ValueError(f"refused {secret}"), ValueError(f"refused {secret!r}"), ValueError(json.dumps([secret]))):
        text = said(error)
        assert "${S}" in text
        for part in ("w'0rd", "0rd-Xyz", "rd-42", "first-line", "second-line", "xxxx"):
            assert part not in text


def test_a_name_that_is_a_path_writes_nothing_outside(tmp_path):
    started()
    with closing(sqlite3.connect("mlruns/optuna.db")) as database, database:
        database.execute("update studies set study_name = '../../x'")
    message = refused("worker", "--study", "../../x", "--storage", STORAGE, "--objective", "own.py:value")
    assert "name: must be letters" in message
    assert not list(tmp_path.parent.glob("x*"))


SECRETS = "objective: lines.py\ntrials: 1\nepochs: 1\noptions: {dsn: '${SECRET}', pin: '${PIN}', host: h}\n"


def test_what_came_from_a_variable_is_stored_nowhere(monkeypatch):
    monkeypatch.setenv("SECRET", "postgresql-key-7f3a")
    monkeypatch.setenv("PIN", "73451")
    Path("study.yaml").write_text(SECRETS + "tracking: sqlite:///mlruns/mlflow.db\n")
    out = invoke("run", "study.yaml") + everything_in("mlruns")
    assert "postgresql-key-7f3a" not in out
    assert "73451" not in json.dumps(json.loads(Path("mlruns/bundles/study/bundle.json").read_text()))
    assert json.loads(Path("mlruns/bundles/study/bundle.json").read_text())["options"]["dsn"].startswith("${SECRET} #")
    assert "all 1 trials are done" in invoke("run", "study.yaml")
    monkeypatch.setenv("SECRET", "postgresql-key-0000")
    message = refused("run", "study.yaml")
    assert "options.dsn is another value than there" in message
    assert "postgresql-key" not in message


def test_a_worker_without_a_file_takes_secrets_from_its_own_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "postgresql-key-7f3a")
    monkeypatch.setenv("PIN", "73451")
    Path("study.yaml").write_text(SECRETS + "tracking: ${TRACKING:-off}\n")
    invoke("run", "study.yaml")
    worker = ["worker", "--study", "study", "--storage", STORAGE, "--objective", "lines.py", "--tracking", "off"]
    invoke(*worker)
    monkeypatch.delenv("SECRET")
    assert "the environment variable SECRET is not set" in refused(*worker)


def test_a_password_that_is_written_out_must_be_given_again():
    text = SECRETS.replace("'${SECRET}'", "'postgresql://me:opensesame@host/db'").replace("'${PIN}'", "1")
    Path("study.yaml").write_text(text + "tracking: sqlite:///mlruns/mlflow.db\n")
    invoke("run", "study.yaml")
    assert "opensesame" not in everything_in("mlruns")
    worker = ["worker", "--study", "study", "--storage", STORAGE, "--objective", "lines.py"]
    message = refused(*worker)
    assert "options.dsn is 'postgresql://me:***@host/db': a password is not kept in the storage" in message
    invoke(*worker, "--set", "options.dsn=postgresql://me:opensesame@host/db")
    poisoned(tracking="https://me:***@tracking/")
    given = [*worker, "--set", "options.dsn=postgresql://me:opensesame@host/db"]
    assert "the storage names the tracking address 'https://me:***@tracking/'; repeat it with" in refused(*given)
    assert "give the whole with --tracking" in refused(*given, "--trust-storage")
    invoke(*given, "--tracking", "off")


def test_an_exceptions_passwords_reach_neither_storage_nor_terminal(monkeypatch):
    monkeypatch.setenv("SECRET", "postgresql-key-7f3a")
    monkeypatch.setenv("FAILS", "1")
    Path("study.yaml").write_text(
        "objective: own.py:value\ntrials: 1\ntracking: sqlite:///mlruns/${SECRET}.db\nstorage: sqlite:///mlruns/o.db\n"
    )
    with pytest.raises(RuntimeError):
        invoke("run", "study.yaml")
    stored = everything_in("mlruns")
    assert "opensesame" not in stored
    assert "no route to postgresql-key-7f3a" not in stored
    assert "no route to ${SECRET}" in stored


def test_an_error_of_the_data_shows_no_secret(monkeypatch):
    monkeypatch.setenv("SECRET", "postgresql-key-7f3a")
    monkeypatch.setenv("PIN", "73451")
    Path("study.yaml").write_text(SECRETS.replace("host: h", "host: broken") + "tracking: off\n")
    message = refused("run", "study.yaml")
    assert "cannot connect to ${SECRET} with ${PIN}" in message


def test_a_study_of_an_older_version_opens_and_its_secret_is_taken_out(monkeypatch):
    monkeypatch.setenv("SECRET", "postgresql-key-7f3a")
    monkeypatch.setenv("PIN", "73451")
    Path("study.yaml").write_text(SECRETS + "tracking: off\n")
    invoke("run", "study.yaml")
    with closing(sqlite3.connect("mlruns/optuna.db")) as database, database:
        where = "where key = 'hpo:identity'"
        (text,) = database.execute(f"select value_json from study_user_attributes {where}").fetchone()
        clear = {"options": {"dsn": "postgresql-key-7f3a", "pin": 73451, "host": "h"}}
        database.execute(
            f"update study_user_attributes set value_json = ? {where}", (json.dumps(json.loads(text) | clear),)
        )
    invoke("run", "study.yaml", "--trials", 2)
    ((text,),) = rows(f"select value_json from study_user_attributes {where}")
    assert "${SECRET} #" in text
    assert "postgresql-key-7f3a" not in text


def test_numbers_that_are_no_options_stay_numbers(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("objective: o\nepochs: ${N}\noptions: {n: '${N}', m: 'a-${N}'}\n")
    document = read(path, environ={"N": "1234"})
    kept = json.loads(document.as_json(without=()))
    assert (kept["epochs"], kept["options"]) == (1234, {"n": "${N}", "m": "a-${N}"})
    shown = document.options()
    assert shown["n"].startswith("${N} #")
    assert shown == document.options()
    assert shown != read(path, environ={"N": "1235"}).options()


def test_short_values_are_hidden_as_words_only():
    conceal("fast", "${MODE}")
    conceal("p@ss/w rd", "${P}")
    conceal("no", "${N}")
    assert masked("fast and breakfast, no") == "${MODE} and breakfast, no"
    assert masked("x?k=p%40ss%2Fw%20rd, p@ss/w rd") == "x?k=${P}, ${P}"
