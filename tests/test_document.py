"""Reading YAML: numbers and words, variables, doubled keys, overrides, and where a value stands."""

import math
import time
from pathlib import Path

import pytest

from hpo.errors import Fault, InputError
from hpo.study.document import read
from hpo.study.yaml_values import dotted


@pytest.fixture
def document(tmp_path, monkeypatch):
    """Return a function that reads a text as study.yaml in an environment of its own."""
    monkeypatch.chdir(tmp_path)

    def read_text(text, overrides=None, **environ):
        Path("study.yaml").write_text(text, encoding="utf-8")
        return read(Path("study.yaml"), overrides, environ)

    return read_text


def shown(document):
    return document.render(document.faults)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("-3", -3),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("e5", "e5"),
        ("1e", "1e"),
        ('"1e-5"', "1e-5"),
        ("2024-01-01", "2024-01-01"),
    ],
)
def test_a_scalar_is_read_as_yaml_1_2_does(document, text, value):
    read_value = document(f"x: {text}").values["x"]
    assert (type(read_value), read_value) == (type(value), value)


def test_nan_is_a_number(document):
    assert math.isnan(document("x: .nan").values["x"])


@pytest.mark.parametrize(
    ("text", "environ", "value"),
    [
        ("${N}", {"N": "7"}, 7),
        ("${N}", {"N": "1e-3"}, 1e-3),
        ("${N}", {"N": "true"}, True),
        ("${N}", {"N": "seven"}, "seven"),
        ("${N}", {"N": "[1, 2]"}, "[1, 2]"),
        ("${N:-9}", {}, 9),
        ("${N:-9}", {"N": "7"}, 7),
        ("${N:-}", {}, ""),
        ("a-${N}-${M:-z}", {"N": "7"}, "a-7-z"),
        ("$N", {"N": "7"}, "$N"),
    ],
)
def test_a_variable_comes_from_the_environment(document, text, environ, value):
    read_document = document(f"x: [{{y: '{text}'}}]", **environ)
    read_value = read_document.values["x"][0]["y"]
    assert not read_document.faults
    assert (type(read_value), read_value) == (type(value), value)


def test_a_variable_that_is_not_set_is_a_fault_with_its_line(document):
    assert shown(document("a: 1\nb:\n  - x\n  - ${HOME_OF_IT}/db\n")) == [
        "study.yaml:4: b[1]: the environment variable HOME_OF_IT is not set; set it, or write ${HOME_OF_IT:-default}"
    ]


def test_every_key_that_is_written_twice_is_a_fault(document):
    assert shown(document("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n")) == [
        "study.yaml:4: b.c: is written twice, first in line 3",
        "study.yaml:5: a: is written twice, first in line 1",
    ]


@pytest.mark.parametrize(
    ("overrides", "values"),
    [
        ({"a": "2"}, {"a": 2, "b": {"c": 1}}),
        ({"b.c": "1e-5"}, {"a": 1, "b": {"c": 1e-5}}),
        ({"b.d": "off"}, {"a": 1, "b": {"c": 1, "d": "off"}}),
        ({"new.deep.key": "[1, x]"}, {"a": 1, "b": {"c": 1}, "new": {"deep": {"key": [1, "x"]}}}),
        ({"b": "{c: 3}"}, {"a": 1, "b": {"c": 3}}),
        ({"a": ""}, {"a": None, "b": {"c": 1}}),
        ({"a": "${V}"}, {"a": 5, "b": {"c": 1}}),
        ({"a": "2", "b.c": "3"}, {"a": 2, "b": {"c": 3}}),
    ],
)
def test_set_replaces_or_adds_a_value(document, overrides, values):
    read_document = document("a: 1\nb: {c: 1}\n", overrides, V="5")
    assert read_document.values == values
    assert read_document.written == {"a": 1, "b": {"c": 1}}


def test_set_fills_a_mapping_that_the_file_leaves_empty(document):
    assert document("a:\n", {"a.b": "1"}).values == {"a": {"b": 1}}


def test_set_changes_one_use_of_an_alias_only(document):
    values = document("a: &r {low: 1}\nb: *r\n", {"a.low": "5"}).values
    assert values == {"a": {"low": 5}, "b": {"low": 1}}


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("a.b", "1", "--set a.b=1: a is no mapping, so nothing can be set in it"),
        ("c.0", "1", "--set c.0=1: c is no mapping, so nothing can be set in it"),
        ("a", "[1", "--set a=[1: the value is not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a.b", "mysql://me:pw@host", "--set a.b=mysql://me:***@host: a is no mapping, so nothing can be set in it"),
    ],
)
def test_set_refuses_what_cannot_be_set(document, key, text, message):
    with pytest.raises(InputError) as caught:
        document("a: 1\nc: [1]\n", {key: text})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "study.yaml: a study file is a mapping (`objective: breast_cancer`), but it holds nothing"),
        ("- a\n", "study.yaml: a study file is a mapping (`objective: breast_cancer`), but it holds list"),
        ("a: 1\nb: [1\n", "study.yaml:3: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: !shell ls\n", "study.yaml:1: not YAML: could not determine a constructor for the tag '!shell'"),
        ("a: &x {b: *x}\n", "study.yaml: not YAML: a.b holds itself"),
    ],
)
def test_a_text_that_is_no_study_is_refused(document, text, message):
    with pytest.raises(InputError) as caught:
        document(text)
    assert str(caught.value) == message


def bomb(levels, line="{name}: &{name} [*{before}, *{before}, *{before}, *{before}]\n"):
    """Return a text of a few lines whose aliases stand for 4 to the power of `levels` values."""
    lines = [line.format(name=f"x{n}", before=f"x{n - 1}") for n in range(1, levels)]
    return "".join(["x0: &x0 {k: 1}\n", *lines])


MERGES = "{name}: &{name} {{<<: [*{before}, *{before}, *{before}, *{before}]}}\n"
TOO_LARGE = {
    "aliases": (bomb(20), "holds more than 20,000 values, aliases counted as often as they are used; leave some out"),
    "merge keys": (bomb(20, MERGES), "holds more than 20,000 values, aliases counted as often as they are used"),
    "many values": ("x: [" + "1, " * 40_000 + "1]\n", "holds more than 20,000 values"),
    "deep": ("x: " + "[" * 60 + "]" * 60, "mappings and lists are nested more than 50 deep; put them into fewer"),
    "far too deep": ("x: " + "[" * 100_000, "mappings and lists are nested more than 50 deep; put them into fewer"),
    "a large file": ("x: 1\n" + "# nothing\n" * 200_000, "is larger than 1 MB; give the study file, which is YAML"),
}


@pytest.mark.parametrize(("text", "message"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_is_too_large_is_refused_at_once(document, text, message):
    begun = time.process_time()
    with pytest.raises(InputError, match=f"^study.yaml: {message}"):
        document(text)
    assert time.process_time() - begun < 5  # it takes a second; what a bomb expands to would take hours


def test_aliases_and_merges_of_a_usual_size_are_read(document):
    text = "a: &a {low: 1, high: 2}\nb: {<<: *a, high: 3}\nc: [*a, *a]\n"
    assert document(text).values["b"] == {"low": 1, "high": 3}
    assert document(bomb(6)).values["x1"] == [{"k": 1}] * 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("9" * 5000, "not YAML: 99999999999999999999... of 5,000 digits is no whole number of at most 64 bits"),
        ("0x" + "f" * 5000, "not YAML: 0xffffffffffffffffff... of 5,002 digits is no whole number of at most 64 bits"),
        ("9223372036854775808", "not YAML: 9223372036854775808 is no whole number of at most 64 bits"),
        ("0x_", "not YAML: 0x_ is no whole number of at most 64 bits"),
        ("!!int many", "not YAML: many is no whole number of at most 64 bits"),
        ("!!float many", "not YAML: could not convert string to float: 'many'"),
        ("!!bool maybe", "not YAML: 'maybe'"),
        ("!!timestamp then", "not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:timestamp'"),
        ("!!set {a, b}", "not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:set'"),
        ("!!binary aGVsbG8=", "not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:binary'"),
        ("&a [*a]", "holds itself"),
        ("[" * 60 + "]" * 60, "mappings and lists are nested more than 50 deep; put them into fewer"),
        ("[" * 5000, "mappings and lists are nested more than 50 deep; put them into fewer"),
        ("a\0b", "not YAML: unacceptable character #x0000: special characters are not allowed"),
    ],
)
def test_a_value_that_is_none_is_refused_in_the_file_and_in_set_and_is_text_in_a_variable(document, value, message):
    for text, overrides in ((f"x: {value}\n", {}), ("x: 1\n", {"x": value})):
        with pytest.raises(InputError) as caught:
            document(text, overrides)
        assert message in str(caught.value)
        assert len(str(caught.value)) < 250
    assert document("x: ${V}\n", V=value).values["x"] == value


def test_set_refuses_a_path_that_is_too_deep(document):
    with pytest.raises(InputError, match=r"^--set a\.a\..*\.\.\.: mappings and lists are nested more than 50 deep"):
        document("b: 1\n", {".".join("a" * 2000): "1"})


def test_the_largest_whole_numbers_are_read(document):
    assert document("x: [9223372036854775807, -9223372036854775808]\n").values["x"] == [2**63 - 1, -(2**63)]


def test_a_device_that_never_ends_is_refused():
    with pytest.raises(InputError, match=r"^/dev/zero: is larger than 1 MB"):
        read(Path("/dev/zero"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(InputError, match=r"nothing\.yaml: no such file; a study file is YAML, see `hpo run --help`"):
        read(tmp_path / "nothing.yaml")
    with pytest.raises(InputError, match="is a folder; give the study file in it"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"latin\.yaml: cannot be read: 'utf-8' codec"):
        read(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("path", "where"),
    [
        (("a",), "study.yaml:2"),
        (("b", "c"), "study.yaml:4"),
        (("b", "c", 1), "study.yaml:6"),
        (("b", "missing"), "study.yaml:3"),
        ((), "study.yaml:2"),
        (("b", "d"), "--set b.d"),
        (("b", "d", "e"), "--set b.d"),
        (("f", "g"), "--set f"),
    ],
)
def test_a_value_is_known_by_its_line_or_its_override(document, path, where):
    text = "# a comment\na: 1\nb:\n  c:\n    - 1\n    - 2\n  d: 1\nf:\n  g: 1\n"
    assert document(text, {"b.d": "{e: 1}", "f": "{g: 2}"}).where(path) == where


def test_faults_come_in_the_order_of_the_file_and_each_once(document):
    faults = [Fault(path=path, message="is odd") for path in [("c",), ("a", "x"), ("b",), (), ("c",)]]
    assert document("a: {x: 1}\nb: 1\nc: 1\n").render(faults) == [
        "study.yaml:1: is odd",
        "study.yaml:1: a.x: is odd",
        "study.yaml:2: b: is odd",
        "study.yaml:3: c: is odd",
    ]


def test_a_path_is_written_with_dots_and_brackets():
    assert dotted(("start_with", 0, "lr")) == "start_with[0].lr"
