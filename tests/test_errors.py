"""Messages: no password in any of them, exit statuses as documented, and a hint at the nearest name."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpo.errors import (
    DataError,
    ExportError,
    HpoError,
    InputError,
    Interrupted,
    SpecError,
    StorageError,
    did_you_mean,
    masked,
)

ERRORS = [(HpoError, 1), (InputError, 2), (DataError, 2), (StorageError, 2), (ExportError, 1), (Interrupted, 130)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pw@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg2://me:p@ss/w:rd@host:5432/db", "postgresql+psycopg2://me:***@host:5432/db"),
        ("redis://:pw@host", "redis://:***@host"),
        ("cannot open 'https://me:pw@host/api'!", "cannot open 'https://me:***@host/api'!"),
        ("http://a:1@b and http://c:2@d", "http://a:***@b and http://c:***@d"),
        ("postgresql://host/db?password=pw&x=1", "postgresql://host/db?password=***&x=1"),
        ("http://host/?x=1&Token=pw", "http://host/?x=1&Token=***"),
    ],
)
def test_a_password_is_masked(text, shown):
    assert masked(text) == shown


@pytest.mark.parametrize("text", ["sqlite:///mlruns/optuna.db", "grpc://host:13000", "study.yaml:3: lr: a@b", ""])
def test_a_text_without_a_password_stays_as_it_is(text):
    assert masked(text) == text


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
@settings(max_examples=50, deadline=None)
def test_no_password_survives_whatever_its_characters(password):
    assert masked(f"mysql://me:{password}@host/db is down") == "mysql://me:***@host/db is down"


@pytest.mark.parametrize(("error", "status"), ERRORS)
def test_an_error_masks_its_message_and_knows_its_exit_status(error, status):
    raised = error("no access to mysql://me:pw@host")
    assert str(raised) == "no access to mysql://me:***@host"
    assert raised.exit_status == status
    assert isinstance(raised, HpoError)


def test_a_spec_error_is_all_of_its_lines_masked():
    error = SpecError(["a.yaml:1: x: is missing", "a.yaml:2: storage: got mysql://me:pw@host"])
    assert error.lines == ("a.yaml:1: x: is missing", "a.yaml:2: storage: got mysql://me:***@host")
    assert str(error) == "\n".join(error.lines)
    assert error.exit_status == 2


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("trails", ["epochs", "trials"], '; did you mean "trials"?'),
        ("zzz", ["epochs", "trials"], "; known: epochs, trials"),
        ("zzz", [], "; known: none"),
        (7, iter(["epochs"]), "; known: epochs"),
    ],
)
def test_the_hint_is_the_nearest_name_or_all_of_them(name, known, hint):
    assert did_you_mean(name, known) == hint


@pytest.mark.parametrize("text", ["a" * 100_000, "a://b:" * 20_000, "a" * 300 + "://" * 30_000, "x&password=" * 20_000])
def test_a_long_message_is_masked_within_a_moment(text):
    begun = time.perf_counter()
    masked(text)
    assert time.perf_counter() - begun < 5
