"""What hpo says: no secret is in it, a program's own handlers decide what is shown, and a reason is given once."""

import logging

import pytest

from hpo.log import Once, log, shown_by

SECRET = "postgresql://bob:s3cret@h/d"


def test_no_secret_is_in_a_record_however_it_is_given(said: list[str]) -> None:
    log.info(f"of {SECRET}, 100 %")
    log.warning("%s: %d trials", SECRET, 3)
    log.error(ConnectionError(f"{SECRET} refused"))
    assert said == [
        "of postgresql://bob:***@h/d, 100 %",
        "postgresql://bob:***@h/d: 3 trials",
        "postgresql://bob:***@h/d refused",
    ]


def test_a_reason_is_said_once_by_each(said: list[str], caplog: pytest.LogCaptureFixture) -> None:
    once = Once()
    for trial in range(3):
        once.info(f"trial {trial}", "as fast")
        once.warning(f"trial {trial}", "error: odd")
    Once().info("trial 3", "as fast")
    assert said == ["trial 0: as fast", "trial 0: error: odd", "trial 3: as fast"]


class Shown(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.levels: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.levels.append(record.levelno)


def say() -> None:
    log.debug("a")
    log.info("b")
    log.warning("c")


def test_a_handler_shows_all_from_information_on_and_nothing_afterwards() -> None:
    before, handler = (log.level, log.propagate, list(log.handlers)), Shown()
    with shown_by(handler):
        say()
    say()
    assert handler.levels == [logging.INFO, logging.WARNING]
    assert (log.level, log.propagate, log.handlers) == before


@pytest.mark.parametrize("whose", ["hpo", ""])
def test_where_the_program_has_a_handler_that_alone_decides(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, ours, logger = Shown(), Shown(), logging.getLogger(whose or None)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's
    monkeypatch.setattr(logger, "handlers", [own])
    with shown_by(ours, unless_handled=True):
        say()
    assert (own.levels, ours.levels) == ([logging.WARNING], [])
    monkeypatch.setattr(logger, "handlers", [])
    with shown_by(ours, unless_handled=True):
        say()
    assert (own.levels, ours.levels) == ([logging.WARNING], [logging.INFO, logging.WARNING])
