"""The commands that are shown after a run: each is one that the command line takes, and finds the same study."""

import shlex

import pytest
import typer.main

from hpo.cli.app import app
from tests.cli import invoke, refused

GROUP = typer.main.get_command(app)


def shown(out: str) -> list[list[str]]:
    """Return the words of each command that is shown after a run."""
    lines = out.partition("\nnext:\n")[2].splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("  hpo ")]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--set", "name=a study", "--set", 'tracking="off"', "--set", "output=out put"],
        ["--storage", "sqlite:///other.db", "--tracking", "off", "--set", "name=other"],
    ],
)
def test_every_command_that_is_shown_is_one_that_is_taken(study, arguments):
    path = study()
    steps = shown(invoke("run", path, *arguments))
    assert [words[1] for words in steps] == ["report", "ui", "predict", "run"]
    for words in steps:
        GROUP.commands[words[1]].make_context(words[1], list(words[2:]))  # raises where it is not taken
    assert "MLflow: left out" in invoke(*steps[1][1:], "--no-dashboard")


def test_the_command_that_searches_on_has_the_same_study(study):
    path = study()
    more = ["--set", "epochs=1", "--set", "seed=3", "--set", "params.batch_size=7", "--trials", "2"]
    command = shown(invoke("run", path, *more))[-1]
    assert command[1:3] == ["run", str(path)]
    assert command[-2:] == ["--trials", "4"]
    assert command.count("--trials") == 1
    assert "4 complete" in invoke(*command[1:])


def test_a_password_is_left_out_and_that_is_said(study, monkeypatch):
    monkeypatch.setattr("hpo.cli.commands.next_steps", lambda *given: ["hpo ui s.yaml --set storage=x://a:secret@b/c"])
    out = invoke("run", study())
    assert "hpo ui s.yaml --set storage=x://a:***@b/c\n" in out
    assert "*** stands for a password" in out


def test_a_studys_name_has_no_file_to_lay_values_over(study):
    invoke("run", study())
    assert "--set output=x: overrides a value of a study file, but 'study' is a study's name; give" in refused(
        "ui", "study", "--set", "output=x"
    )
