"""The Python API: frozen, lazy, each name with an example that runs, and the ways in which a study can be named."""

import doctest
import functools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
import torch
import torchmetrics

import hpo
from hpo.errors import InputError, SpecError
from tests import warm
from tests.conftest import LINEAR, ROOT

PUBLIC = [
    "MLP",
    "Data",
    "DataError",
    "DataInfo",
    "ExportError",
    "HpoError",
    "InputError",
    "Interrupted",
    "LightningObjective",
    "LogitAccuracy",
    "Objective",
    "Reporter",
    "SpecError",
    "Split",
    "Standardize",
    "StorageError",
    "Study",
    "adopt",
    "check",
    "load_bundle",
    "open_study",
    "run",
    "tabular_splits",
]
ON_PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
QUICK = {"trials": 2, "epochs": 2, "tracking": "off", "quiet": True}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def linear(folder: Path) -> Path:
    (folder / "linear.py").write_text(LINEAR)
    return folder / "linear.py"


def run_python(code: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a program in a fresh process in the current folder."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ON_PATH | environ)


def test_the_public_names_are_frozen_and_each_has_a_docstring() -> None:
    assert hpo.__all__ == PUBLIC
    assert set(PUBLIC) <= set(dir(hpo))
    for name in PUBLIC:
        assert getattr(hpo, name).__doc__.strip(), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hpo.nothing  # type: ignore[attr-defined]


def test_importing_hpo_loads_nothing_heavy_and_takes_no_time() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import hpo; took = time.perf_counter() - start\n"
        "print(took, sorted({'torch', 'mlflow', 'optuna', 'pandas', 'sklearn', 'pydantic'} & set(sys.modules)))"
    )
    runs = [run_python(code).stdout.split(maxsplit=1) for _ in range(3)]
    assert {heavy.strip() for _, heavy in runs} == {"[]"}
    assert min(float(took) for took, _ in runs) < 0.1


EXAMPLES = [name for name in PUBLIC if name == "HpoError" or (not name.endswith("Error") and name != "Interrupted")]
GLOBALS = {"hpo": hpo, "torch": torch, "torchmetrics": torchmetrics, "np": np}


@pytest.mark.parametrize("name", [*EXAMPLES, "Split.from_dataset", "Study.report", "Study.plot_curves"])
def test_the_example_in_the_docstring_runs(name: str) -> None:
    finder = doctest.DocTestFinder(recurse=False)
    what = attrgetter(name)(hpo)
    (found,) = finder.find(what, name, globs=dict(GLOBALS))
    assert found.examples, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(found)
    assert runner.failures == 0


class TestWaysToNameAStudy:
    def test_a_path_with_overrides(self, linear: Path, folder: Path) -> None:
        (folder / "s.yaml").write_text("objective: linear.py\ntrials: 3\nepochs: 5\n")
        study = hpo.run("s.yaml", **QUICK, params={"batch_size": 25})
        assert study.name == "s"
        assert study.best.params["batch_size"] == 25
        assert study.counts.complete == 2
        assert hpo.open_study("s.yaml").best == study.best == hpo.open_study(folder / "s.yaml").best

    def test_a_mapping(self, linear: Path) -> None:
        study = hpo.run({"objective": "linear.py", "params": {"kind": "good"}}, **QUICK, params={"batch_size": 25})
        assert study.name == "linear"
        assert study.best.params["batch_size"] == 25
        assert study.bundle is not None
        assert set(study.test) == {"loss", "r2"}
        model = hpo.load_bundle(study.bundle)
        assert model(torch.zeros(3, 4)).shape == (3, 1)

    def test_a_class_an_instance_and_a_function(self) -> None:
        namespace: dict[str, object] = {"__name__": "__main__"}  # as a notebook's cell
        exec(LINEAR, namespace)
        cls = namespace["Linear"]
        one = hpo.run(cls, name="one", **QUICK)
        two = hpo.run(cls(), name="two", **QUICK)
        assert one.best.value == two.best.value
        assert list(one.trials["params_learning_rate"]) == list(two.trials["params_learning_rate"])
        square = lambda trial: trial.suggest_float("x", 0, 1) ** 2  # noqa: E731 (a cell may well have one)
        plain = hpo.run(square, trials=3, tracking="off", quiet=True)
        assert plain.name == "function"
        assert plain.counts.complete == 3
        assert set(plain.best.params) == {"x"}

    def test_workers_need_a_class_that_they_can_import(self) -> None:
        namespace: dict[str, object] = {"__name__": "__main__"}
        exec(LINEAR, namespace)
        with pytest.raises(InputError, match="Linear was defined in a notebook"):
            hpo.run(namespace["Linear"], workers=2, **QUICK)
        with pytest.raises(InputError, match="Study is a partial, not a function or class that a file defines by a"):
            hpo.run(functools.partial(hpo.Study), workers=2)

    def test_what_is_resumed(self, linear: Path) -> None:
        hpo.run({"objective": "linear.py"}, **QUICK)
        more = hpo.run({"objective": "linear.py"}, **(QUICK | {"trials": 4}))
        assert more.counts.complete == 4

    @pytest.mark.parametrize("sampler", ["grid", {"name": "grid"}])
    def test_a_grid_waits_for_no_more_than_it_has(self, linear: Path, sampler: object) -> None:
        params = {"learning_rate": {"type": "categorical", "choices": [0.05, 0.1]}}
        values = {"objective": "linear.py", "sampler": sampler, "params": params, "baseline": False}
        counts = hpo.run(values, **(QUICK | {"trials": 7})).counts
        assert (counts.complete, counts.waiting) == (2, 0)


@pytest.mark.parametrize(
    "imported",
    [pytest.param(False, id="its own", marks=pytest.mark.slow), pytest.param(True, id="imported from beside it")],
)
def test_a_class_of_a_script_is_trained_by_two_workers(folder: Path, imported: bool) -> None:
    script = folder / "scripts" / "script.py"
    script.parent.mkdir()
    (script.parent / "beside.py").write_text(LINEAR)
    script.write_text(
        ("from beside import Linear" if imported else LINEAR)
        + '\nif __name__ == "__main__":\n    import hpo\n'
        + '    study = hpo.run(Linear, workers=2, trials=4, epochs=2, tracking="off")\n'
        + "    print(study, study.trials.worker.nunique())\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ON_PATH,
    )
    assert "Study('linear': 4 of 4 trials finished" in done.stdout, done.stderr + done.stdout


def test_a_script_without_a_guard_does_not_start_itself_again(folder: Path) -> None:
    (folder / "script.py").write_text(
        LINEAR + '\nimport hpo\nhpo.run(Linear, workers=2, trials=4, epochs=2, tracking="off")\n'
    )
    done = warm.run("import runpy; runpy.run_path('script.py', run_name='__main__')")
    assert done.returncode == 1
    assert 'put the call under `if __name__ == "__main__":`' in done.stderr


class TestResults:
    def test_trials_are_a_table_and_curves_are_by_epoch(self, linear: Path) -> None:
        study = hpo.run({"objective": "linear.py"}, **QUICK)
        table = study.trials
        assert isinstance(table, pd.DataFrame)
        assert list(table.index) == [0, 1]
        assert table.loc[study.best.number, "value"] == study.best.value == table["value"].max()
        assert set(table["epochs"]) == {2}
        curves = study.curves(0)
        assert list(curves.index) == [1, 2]
        assert curves["valid_r2"].iloc[-1] == table.loc[0, "value"] or study.trials.loc[0, "best_epoch"] == 1
        with pytest.raises(InputError, match="has no trial 7; its trials are 0 to 1"):
            study.curves(7)
        assert [trial.number for trial in study.to_optuna().trials] == [0, 1]

    def test_what_is_not_there_is_said(self, linear: Path) -> None:
        with pytest.raises(InputError, match="there is no storage sqlite:///no"):
            hpo.open_study("linear", storage="sqlite:///no.db")
        hpo.run({"objective": "linear.py"}, **QUICK)
        with pytest.raises(InputError, match="has no study 'liner'; did you mean \"linear\""):
            hpo.open_study("liner")
        with pytest.raises(InputError, match="no bundle is there"):
            hpo.load_bundle("mlruns/bundles/other")
        Path("model.torchscript.pt").write_text("no")
        with pytest.raises(InputError, match="is no bundle, there is no bundle"):
            hpo.load_bundle(".")
        with pytest.raises(InputError, match="cannot be read as a TorchScript model"):
            hpo.load_bundle("model.torchscript.pt")


@pytest.mark.parametrize(
    ("study", "overrides", "text"),
    [
        (5, {}, "must be a path, a mapping, an hpo.Objective or a function of a trial, but got 5"),
        (dict, {}, "the class dict is not an hpo.Objective"),
        ("none.yaml", {}, "none.yaml: no such file"),
        ("iris", {}, r'write hpo.run\(\{"objective": "iris"\}\)'),
        ({}, {}, "objective"),
        ({"objective": "iris", 3: 4}, {}, "keys must be texts, but one is 3"),
        ({"objective": "iris"}, {"trials": 0}, "trials"),
        ({"objective": "iris"}, {"trails": 3}, 'unknown key; did you mean "trials"'),
        ({"objective": "iris"}, {"params": {"n_hiden": 3}}, "n_hiden"),
        ({"objective": "iris"}, {"params": {"n_hidden": torch.nn.ReLU}}, "no study file can hold a type"),
        ({"objective": "iris"}, {"workers": 0}, "workers: must be a number of at least 1"),
        ({"objective": "iris"}, {"workers": True}, "workers: must be a number of at least 1"),
        ({"objective": "__main__:Wine"}, {}, "defined in a notebook, which no other process can import"),
    ],
)
def test_bad_input_is_named(study: object, overrides: dict[str, object], text: str) -> None:
    with pytest.raises(InputError, match=text):
        hpo.run(study, quiet=True, **overrides)  # type: ignore[arg-type]


def _adds(constant: float) -> Callable[[optuna.Trial], float]:
    calls, seen = 0, []

    def objective(trial: optuna.Trial) -> float:
        nonlocal calls
        calls += 1
        seen.append(trial.number)
        return constant + trial.suggest_float("x", 0, 1)

    return objective


def _base(trial: optuna.Trial, constant: float) -> float:
    return constant + trial.suggest_float("x", 0, 1)


@pytest.mark.parametrize(
    ("one", "other", "what"),
    [
        (lambda: _adds(0), lambda: _adds(100), "its value of constant"),
        (
            lambda: functools.partial(_base, constant=0),
            lambda: functools.partial(_base, constant=9),
            "value of constant",
        ),
        (lambda: functools.partial(_base, constant=0), lambda: functools.partial(_base, constant=0.5), "of constant"),
        (lambda: lambda t: t.suggest_float("x", 0, 1), lambda: lambda t: 9 + t.suggest_float("x", 0, 1), "its code"),
        (lambda: lambda t: t.suggest_float("x", 0, 1), lambda: lambda t: t.suggest_float("y", 0, 1), "its code"),
    ],
)
def test_another_function_of_the_same_name_is_not_given_the_results_of_the_first(one, other, what) -> None:
    done = hpo.run(one(), **QUICK)
    function = one()
    more = hpo.run(function, **QUICK | {"trials": 3})  # the same by what it does, though another object
    assert hpo.run(function, **QUICK | {"trials": 4}).counts.finished == 4  # what it has counted meanwhile is no change
    assert more.best.value <= done.best.value
    with pytest.raises(InputError, match=f"{what}.* differs, and no name tells the two apart"):
        hpo.run(other(), **QUICK)
    assert hpo.run(other(), **QUICK, name="another").best.value != done.best.value
    assert hpo.run(other(), **QUICK, fresh=True).counts.finished == 2


def test_an_instance_has_its_own_options() -> None:
    from hpo.objectives.synthetic_binary import SyntheticBinary

    made = SyntheticBinary(SyntheticBinary.Options(data="moons"))
    study = hpo.run(made, **QUICK)
    assert study.counts.complete == 2
    with pytest.raises(InputError, match="an instance of SyntheticBinary has its own"):
        hpo.run(made, options={"data": "circles"}, **QUICK)


def test_progress_is_logged_and_printed_only_where_nothing_else_shows_it(linear: Path, capsys, caplog) -> None:
    with caplog.at_level(logging.INFO, "hpo"):
        hpo.run({"objective": "linear.py"}, **(QUICK | {"quiet": False}))
    assert any("trial 0 complete" in message for message in caplog.messages)
    code = (
        "import hpo, json; hpo.run({'objective': 'linear.py'}, trials=1, epochs=1, tracking='off', name='n'); "
        "print('end')"
    )
    done = warm.run(code)
    assert "trial 0 complete" in done.stdout, done.stderr
    assert json.dumps("end")[1:-1] in done.stdout


def test_torch_is_left_as_it_was(linear: Path) -> None:
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    hpo.run({"objective": "linear.py", "deterministic": True}, **QUICK)
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


def test_check_finds_what_is_wrong_and_runs_nothing(linear: Path) -> None:
    hpo.check({"objective": "linear.py", "tracking": "off"})
    with pytest.raises(SpecError, match="trails"):
        hpo.check({"objective": "linear.py"}, trails=3)
    assert not Path("mlruns/bundles").exists()


def test_threads_run_their_studies_one_after_the_other(tmp_path, monkeypatch):
    """torch's generators, by which trials are seeded, are the process's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linear.py").write_text(LINEAR)
    done = {}

    def run(name):
        given = {"trials": 3, "epochs": 2, "stack": 1, "tracking": "off", "baseline": False}
        done[name] = hpo.run({"objective": "linear.py"}, name=name, quiet=True, **given).trials

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run("alone")
    assert list(done["one"]["value"]) == list(done["other"]["value"]) == list(done["alone"]["value"])
