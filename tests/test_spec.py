"""study.yaml as a spec: every rule's message with its line, defaults, and whose search space it is."""

import os
import re
import socket
from pathlib import Path

import pytest

from hpo import processes
from hpo.errors import SpecError
from hpo.study import draft as drafts
from hpo.study.ranges import Categorical, FloatRange, IntRange
from hpo.study.spec import StudySpec


@pytest.fixture
def draft(tmp_path, monkeypatch):
    """Return a function that reads a text as study.yaml, `objective: x` being its first line."""
    monkeypatch.chdir(tmp_path)

    def read(text="", overrides=None, head="objective: x\n"):
        Path("study.yaml").write_text(head + text, encoding="utf-8")
        return drafts.read(Path("study.yaml"), overrides)

    return read


@pytest.fixture
def faults(draft):
    """Return a function that gives the fault messages of a text."""

    def read(*args, **kwargs):
        read_draft = draft(*args, **kwargs)
        return read_draft.document.render(read_draft.faults)

    return read


def test_the_objective_is_enough(draft):
    read = draft()
    spec = read.spec
    assert not read.faults
    assert (spec.name, spec.objective, spec.value, spec.metric, spec.timeout) == ("study", "x", "best", None, None)
    assert (spec.epochs, spec.trials, spec.seed, spec.device) == (20, 50, 42, "auto")
    assert (spec.sampler.name, spec.pruner.name) == ("tpe", "median")
    assert (spec.patience, spec.precision, spec.stack) == (None, "float32", "auto")


@pytest.mark.parametrize("name", ["n" * 128, "é" * 64])
def test_the_longest_name_leaves_room_for_what_the_files_add_to_it(draft, name, tmp_path, monkeypatch):
    """A host's name has up to 64 bytes, a process's number 7 digits."""
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 64)
    monkeypatch.setattr(os, "getpid", lambda: 4194304)
    processes._place.cache_clear()
    try:
        process = processes.this_process()
    finally:
        processes._place.cache_clear()
    assert draft(f"name: {name}\n").spec.name == name
    for file in (f"{name}.{process}.jsonl", f".{name}-12345678", f"{name}-trial-{2**63}", f".{name}-trial-{2**63}-old"):
        (tmp_path / file).touch()


PARAMS = [
    ("{type: float, low: 1, high: 0.1}", "params.p: low < high must hold, but got low=1.0 and high=0.1"),
    ("{type: int, low: 3, high: 3}", "params.p: low < high must hold, but got low=3 and high=3"),
    ("{type: float, low: -1, high: 1, log: true}", "params.p: low > 0 must hold with log: true, but got low=-1.0"),
    (
        "{type: int, low: 0, high: 3, log: true}",
        "params.p: low > 0 must hold with log: true, but got low=0; for exactly 0 or a log range write `or: 0`",
    ),
    ("{type: float, low: 0, high: 1, step: 2}", "params.p: 0 < step <= high - low must hold, but got step=2.0"),
    ("{type: int, low: 0, high: 9, step: 0}", "params.p: 0 < step <= high - low must hold, but got step=0"),
    ("{type: int, low: 0, high: 9, step: -1}", "params.p: 0 < step <= high - low must hold, but got step=-1"),
    ("{type: float, low: 0.4, high: 0.5, step: 0.11}", "params.p: 0 < step <= high - low must hold, but got step=0.11"),
    ("{type: categorical, choices: []}", "params.p.choices: must name at least one choice, but got []"),
    (
        "{type: categorical, choices: [a, b, a]}",
        "params.p.choices: must name each choice once, but got ['a', 'b', 'a']",
    ),
    ("{type: categorical, choices: [true, 1]}", "params.p.choices: must name each choice once, but got [True, 1]"),
    (
        "{type: categorical, choices: [[1]]}",
        "params.p.choices[0]: must be one value: a number, a text, true, false or null, but got [1]",
    ),
    ("{low: 1, high: 2}", "params.p: type is missing; write type: float, int or categorical"),
    (
        "{type: flaot, low: 1}",
        "params.p: type must be float, int or categorical, but got 'flaot'; did you mean \"float\"?",
    ),
    ("{type: uniform, low: 1}", "params.p: type must be float, int or categorical, but got 'uniform'"),
    ("{type: float, low: 1}", "params.p.high: is missing"),
    ("{type: float, low: 1, high: 2, setp: 1}", 'params.p.setp: unknown key; did you mean "step"?'),
    (
        "{type: float, low: 1, high: 2, zzz: 1}",
        "params.p.zzz: unknown key; known: when, type, low, high, log, step, or",
    ),
    ("{type: categorical, choices: [1], low: 2}", "params.p.low: unknown key; known: when, type, choices"),
    ("{type: float, low: small, high: 2}", "params.p.low: must be a number, but got 'small'"),
    ("{type: float, low: 1, high: .inf}", "params.p.high: must be a finite number, but got inf"),
    ("{type: float, low: 1, high: 2, or: none}", "params.p.or: must be a number, but got 'none'"),
    ("{type: int, low: 1.5, high: 2}", "params.p.low: must be an integer, but got 1.5"),
    ("{type: int, low: 1, high: 2, or: 0.5}", "params.p.or: must be an integer, but got 0.5"),
    ("{type: int, low: true, high: 2}", "params.p.low: must be an integer, but got True"),
    ("{type: int, low: 1, high: 3, log: yes}", "params.p.log: must be a boolean, but got 'yes'"),
    ("{type: int, low: 1, high: 3, when: {a: []}}", "params.p.when: must name at least one value of a, but got []"),
    ("[1, 2]", "params.p: must be one value: a number, a text, true, false or null, but got [1, 2]"),
]


@pytest.mark.parametrize(("entry", "message"), PARAMS)
def test_a_param_that_is_wrong_is_named_with_its_line(faults, entry, message):
    assert faults(f"epochs: 3\nparams:\n  p: {entry}\n") == [f"study.yaml:4: {message}"]


def test_step_and_log_exclude_each_other(faults):
    [line] = faults("params:\n  p: {type: int, low: 1, high: 9, step: 2, log: true}\n")
    assert line.startswith("study.yaml:3: params.p: step and log: true exclude each other; drop one")


def test_a_step_may_be_the_whole_range(draft):
    assert not draft("params:\n  p: {type: float, low: 0.4, high: 0.5, step: 0.1}\n").faults


def test_params_are_ranges_or_fixed_values(draft):
    read = draft(
        "params:\n  lr: {type: float, low: 1e-5, high: 1, log: true, or: 0}\n"
        "  n: {type: int, low: 1, high: 3, when: {act: relu, on: [true, 1]}}\n"
        "  act: {type: categorical, choices: [relu, null, 1e-5]}\n  on: off\n"
    )
    assert not read.faults
    assert read.spec.params == {
        "lr": FloatRange(type="float", low=1e-5, high=1, log=True, **{"or": 0}),
        "n": IntRange(type="int", low=1, high=3, when={"act": ["relu"], "on": [True, 1]}),
        "act": Categorical(type="categorical", choices=("relu", None, 1e-5)),
        "on": "off",
    }


VALUE = "must be best, last or mean_of_K (K at least 2, such as mean_of_3)"
KEYS = [
    ("trials: 0", "trials: must be greater than or equal to 1, but got 0"),
    ("epochs: 1.5", "epochs: must be an integer, but got 1.5"),
    ("epochs: many", "epochs: must be an integer, but got 'many'"),
    ("patience: 0", "patience: must be greater than or equal to 1, but got 0"),
    ("patience: 1.5", "patience: must be an integer, but got 1.5"),
    ("precision: fp16", "precision: must be 'float32', 'tf32' or 'bf16', but got 'fp16'"),
    ("precision: 16", "precision: must be 'float32', 'tf32' or 'bf16', but got 16"),
    ("seed: -1", "seed: must be greater than or equal to 0, but got -1"),
    ("value: worst", f"value: {VALUE}, but got 'worst'"),
    ("value: mean_of_1", f"value: {VALUE}, but got 'mean_of_1'"),
    ("value: mean_of_2.5", f"value: {VALUE}, but got 'mean_of_2.5'"),
    ("value: mean_of_03", f"value: {VALUE}, but got 'mean_of_03'"),
    ("value: mean_of_K", f"value: {VALUE}, but got 'mean_of_K'"),
    ("value: 3", f"value: {VALUE}, but got 3"),
    ("value:", f"value: {VALUE}, but got None"),
    ("value: mean_of_21", "value: must be a mean over at most 20 epochs, the number of `epochs`, but got 'mean_of_21'"),
    ("stop: true", "stop: must be false or a mapping of no_gain, target, terminator, but got True"),
    ("stop: 30", "stop: must be false or a mapping of no_gain, target, terminator, but got 30"),
    ("stop: {}", "stop: must name at least one of no_gain, target, terminator, but got none of them"),
    ("stop: {terminator: false}", "stop: must name at least one of no_gain, target, terminator, but got none of them"),
    ("stop: {no_gian: 3}", 'stop.no_gian: unknown key; did you mean "no_gain"?'),
    ("stop: {zzz: 3}", "stop.zzz: unknown key; known: no_gain, target, terminator"),
    ("stop: {no_gain: 0}", "stop.no_gain: must be greater than or equal to 1, but got 0"),
    ("stop: {no_gain: 2.5}", "stop.no_gain: must be an integer, but got 2.5"),
    ("stop: {no_gain: true}", "stop.no_gain: must be an integer, but got True"),
    ("stop: {target: .nan}", "stop.target: must be a finite number, but got nan"),
    ("stop: {target: high}", "stop.target: must be a number, but got 'high'"),
    (
        "stop: {terminator: emr}",
        "stop.terminator: must be true or one of regret_bound, emmr, best_value_stagnation, but got 'emr'; "
        'did you mean "emmr"?',
    ),
    ("confirm: {sede: 3}", 'confirm.sede: unknown key; did you mean "seeds"?'),
    ("metric: 4", "metric: must be a name, or a list of names such as [accuracy, n_parameters], but got 4"),
    ("params: 3", "params: must be a mapping of names, but got 3"),
    ("trails: 3", 'trails: unknown key; did you mean "trials"?'),
    (
        "start_with: [{lr: [1]}]",
        "start_with[0].lr: must be one value: a number, a text, true, false or null, but got [1]",
    ),
    (
        "sampler: tpee",
        "sampler: must be one of tpe, gp, nsgaii, cmaes, qmc, random, grid, brute_force, but got 'tpee'; "
        'did you mean "tpe"?',
    ),
    (
        "pruner: {name: best}",
        "pruner: must be one of median, halving, percentile, successive_halving, hyperband, patient, "
        "threshold, wilcoxon, none, but got 'best'",
    ),
    ("sampler: {seed: 3}", "sampler.name: is missing"),
    ("timeout: soon", "timeout: must be a length of time such as 90s, 45m, 2h, 1h30m or 1d, but got 'soon'"),
    ("timeout: 2h later", "timeout: must be a length of time such as 90s, 45m, 2h, 1h30m or 1d, but got '2h later'"),
    ("timeout: -1h", "timeout: must be a length of time such as 90s, 45m, 2h, 1h30m or 1d, but got '-1h'"),
    ("timeout: 0", "timeout: must be greater than 0, but got 0"),
    ("timeout: .inf", "timeout: must be a finite number, but got inf"),
    ("name: a/b", "name: must be letters, digits, `_`, `-`, `.` (it names a folder), but got 'a/b'"),
    ("name: ..", "name: must be letters, digits, `_`, `-`, `.` (it names a folder), but got '..'"),
    (
        f"name: {'n' * 129}",
        f"name: must be at most 128 bytes long, since it names files, but got 129 bytes: '{'n' * 57}...'",
    ),
    (
        f"name: {'é' * 65}",
        f"name: must be at most 128 bytes long, since it names files, but got 130 bytes: '{'é' * 57}...'",
    ),
    (
        f"name: {'/' * 999}",
        "name: must be letters, digits, `_`, `-`, `.` (it names a folder), but got '" + "/" * 57 + "...'",
    ),
    ("name: ''", "name: must be letters, digits, `_`, `-`, `.` (it names a folder), but got ''"),
    ("name: [a]", "name: must be a string, but got ['a']"),
    ("storage: [mysql://me:pw@host/db]", "storage: must be a string, but got ['mysql://me:pw@host/db']"),
]


@pytest.mark.parametrize(("text", "message"), KEYS)
def test_a_key_that_is_wrong_is_named_with_its_line(faults, text, message):
    assert faults(f"\n{text}\n") == [f"study.yaml:3: {message}"]


def test_a_spec_error_shows_no_password(faults):
    error = SpecError(faults("storage: [mysql://me:pw@host/db]\n"))
    assert str(error) == "study.yaml:2: storage: must be a string, but got ['mysql://me:***@host/db']"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2h", 7200),
        ("90s", 90),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1.5h", 5400),
        ("1d", 86400),
        ("45", 45),
        ("0.5", 0.5),
        ("null", None),
    ],
)
def test_a_timeout_is_a_length_of_time_or_seconds(draft, text, seconds):
    assert draft(f"timeout: {text}\n").spec.timeout == seconds


@pytest.mark.parametrize(("text", "name"), [("my-study_1.2", "my-study_1.2"), ("7", "7"), ("größe", "größe")])
def test_a_name_that_can_be_a_folder_is_taken(draft, text, name):
    assert draft(f"name: {text}\n").spec.name == name


def test_a_files_name_that_is_no_studys_says_where_the_name_comes_from(tmp_path):
    file = tmp_path / "st#1 🎉.yaml"
    file.write_text("objective: x\n")
    read = drafts.read(file)
    (line,) = read.document.render(read.faults)
    assert line.endswith(
        ":1: name: must be letters, digits, `_`, `-`, `.` (it names a folder), but got 'st#1 🎉'; this is the file's "
        "name, since it has no `name`: write `name: ...` into it, or rename the file"
    )
    file.write_text("objective: x\nname: ok\n")
    assert not drafts.read(file).faults
    assert "rename the file" not in str(drafts.read(file, {"name": "a/b"}).faults)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_patience_and_precision_are_taken(draft, precision):
    spec = draft(f"patience: 3\nprecision: {precision}\n").spec
    assert (spec.patience, spec.precision) == (3, precision)
    assert draft("patience: null\n").spec.patience is None


@pytest.mark.parametrize("text", ["off", "false", "null"])
def test_tracking_can_be_off(draft, text):
    assert draft(f"tracking: {text}\n").spec.tracking == "off"


def test_plugins_keep_their_keys(draft):
    spec = draft("sampler: {name: gp, n_startup_trials: 3}\npruner: null\n").spec
    assert (spec.sampler.name, spec.sampler.keys, spec.pruner.name) == ("gp", {"n_startup_trials": 3}, "none")


def test_all_faults_come_at_once_each_with_its_line(faults, monkeypatch):
    monkeypatch.delenv("UNSET", raising=False)
    assert faults(
        "trials: 0\nepochs: ${UNSET}\nparams:\n  lr:\n    type: float\n    low: 2\n    high: 1\n  n:\n"
        "    type: int\n    low: a\n    high: 3\nsede: 1\ntrials: 2\n",
        {"value": "worst"},
    ) == [
        f"--set value: value: {VALUE}, but got 'worst'",
        "study.yaml:3: epochs: the environment variable UNSET is not set; set it, or write ${UNSET:-default}",
        "study.yaml:5: params.lr: low < high must hold, but got low=2.0 and high=1.0",
        "study.yaml:11: params.n.low: must be an integer, but got 'a'",
        'study.yaml:13: sede: unknown key; did you mean "seed"?',
        "study.yaml:14: trials: is written twice, first in line 2",
    ]


def test_what_is_at_fault_is_left_out_of_the_spec(draft):
    spec = draft("trials: 0\nparams: {lr: {type: float}, n: 3}\n").spec
    assert (spec.trials, spec.params) == (50, {"n": 3})


def test_without_an_objective_there_is_no_spec(draft, faults):
    assert faults("objectiv: x\n", head="") == [
        "study.yaml:1: objective: is missing",
        'study.yaml:1: objectiv: unknown key; did you mean "objective"?',
    ]
    assert draft("objectiv: x\n", head="").spec is None


def test_a_fault_in_an_override_is_not_the_files(faults):
    text = "params:\n  lr: {type: float, low: 1, high: 2}\n"
    assert faults(text, {"params.lr": "{type: float, low: x, high: 2}"}) == [
        "--set params.lr: params.lr.low: must be a number, but got 'x'"
    ]
    assert faults(text, {"trials": "0"}) == ["--set trials: trials: must be greater than or equal to 1, but got 0"]


def test_more_starts_than_trials_is_a_fault(faults):
    assert faults("trials: 1\nstart_with: [{a: 1}, {a: 2}]\n") == [
        "study.yaml:3: start_with: names 2 configurations, but trials is 1; raise trials"
    ]


RANGE = "{type: int, low: 1, high: 2}"


@pytest.mark.parametrize(
    ("text", "overrides", "own"),
    [
        ("", {}, False),
        ("params: {a: 1}\n", {}, False),
        (f"params: {{a: {RANGE}}}\n", {}, True),
        (f"params: {{a: {RANGE}}}\n", {"params.a": "3"}, True),
        ("params: {a: 1}\n", {"params.a": RANGE}, True),
        ("", {"params.a": "3"}, False),
    ],
)
def test_the_space_is_the_files_own_once_the_file_or_an_override_names_a_range(draft, text, overrides, own):
    assert draft(text, overrides).own_space is own


@pytest.mark.parametrize("key", StudySpec.model_fields)
def test_each_key_says_its_values_its_default_and_an_example_that_holds(draft, key: str) -> None:
    """The documentation is made from these."""
    field = StudySpec.model_fields[key]
    text = " ".join((field.description or "").split())
    found = re.fullmatch(r"(.+?) Values: (.+?) Default: (.+) Example: `(.+)`", text)
    assert found, f"{key}: {text}"
    example = draft(f"{found[4]}\n", head="" if key == "objective" else "objective: o\n")
    assert [each for each in example.faults if "PASSWORD" not in each.message] == []
    assert getattr(example.spec, key) != field.default
    said = re.match(r"`([^`]+)`", found[3])
    if said and key not in ("options", "params"):
        default = draft(f"{key}: {said[1]}\n")
        assert default.faults == []
        assert getattr(default.spec, key) == field.default
