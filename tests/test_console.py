"""What a person sees: the numbers, the lines in a pipe, the bars on a terminal."""

import io
import re

import pytest
from rich.console import Console

from hpo.cli.console import table
from hpo.cli.live import LiveProgress, sparkline
from hpo.cli.screen import ConsoleHandler
from hpo.log import log, shown_by
from hpo.runner import progress as view
from hpo.runner.progress import PlainProgress, ProgressState, Refresh, shown
from hpo.search.budget import Counts
from hpo.search.clock import duration
from hpo.search.view import Best


def counts(complete=0, pruned=0, failed=0, running=0, waiting=0):
    return Counts(complete=complete, pruned=pruned, failed=failed, running=running, waiting=waiting)


def best(number=7, value=0.989):
    return Best(number=number, value=value, params={"lr": 0.1}, epoch=2, seed=0, metrics={})


def drawn(progress, width, **options):
    """Return what a live view shows at that width, line by line."""
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=True, no_color=True, **options).print(progress)
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()]


class Clock:
    """Stands in for the module `time`: it passes when it is told to."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(view, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.9, "9.9 s"),
        (12.3, "12 s"),
        (99, "99 s"),
        (100, "2 min"),
        (179, "3 min"),
        (3569, "59 min"),
        (3600, "1 h 0 min"),
        (4800, "1 h 20 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_params_are_shown_in_few_digits():
    assert shown({"learning_rate": 0.0123456, "n_hidden": 24, "optimizer": "adam", "bias": True}) == (
        "learning_rate=0.01235 n_hidden=24 optimizer=adam bias=True"
    )


class TestBoard:
    def test_the_time_left_follows_the_pace_of_this_run_alone(self, clock):
        board = ProgressState(counts(complete=10), None, 20, "accuracy")
        clock.now += 30
        assert board.seconds_left() is None
        assert board.left_text() == ""
        board.counts = counts(complete=11, pruned=1, failed=1)
        assert board.seconds_left() == pytest.approx(10 * 7)
        assert board.left_text() == "about 70 s left"

    def test_nothing_is_left_at_the_end(self, clock):
        board = ProgressState(counts(), None, 2, "accuracy")
        clock.now += 10
        board.counts = counts(complete=2)
        assert board.left_text() == ""

    def test_a_trial_that_ended_is_counted_without_looking(self):
        board = ProgressState(counts(running=4, waiting=1), None, 5, "accuracy")
        for state in ("COMPLETE", "PRUNED", "FAIL", "COMPLETE", "INTERRUPTED"):
            board.add(state)
        assert board.counts == counts(complete=2, pruned=1, failed=1, running=4, waiting=1)

    def test_the_best_so_far(self):
        assert ProgressState(counts(), None, 5, "accuracy").best_text() == "no trial yet"
        assert ProgressState(counts(), best(), 5, "accuracy").best_text() == "best accuracy 0.9890 (trial 7)"


class TestPlain:
    @pytest.fixture
    def plain(self, clock):
        """Return a progress whose `refresh` takes what `plain.next` says, as the storage would, and notes its calls."""
        board = ProgressState(counts(), None, 4, "accuracy")

        def refresh(state, value):
            made.told = (state, value)
            board.counts, board.best = made.next

        made = PlainProgress(board, refresh, epoch_seconds=15.0)
        return made

    def test_a_line_a_trial(self, plain, said, clock):
        plain.trial_started(0, {"learning_rate": 0.01})
        clock.now += 12
        plain.next = (counts(complete=1), best(0, 0.5))
        plain.trial_ended(0, "COMPLETE", 0.5, None)
        assert said == [
            "[1/4] trial 0 complete: accuracy 0.5000; learning_rate=0.01; 12 s; "
            "best accuracy 0.5000 (trial 0); about 36 s left"
        ]

    @pytest.mark.parametrize(
        ("state", "value", "reason", "text"),
        [
            ("FAIL", None, "train_loss became nan in epoch 1", "failed: train_loss became nan in epoch 1"),
            ("PRUNED", 0.25, None, "pruned: accuracy 0.2500"),
            ("INTERRUPTED", None, "interrupted", "interrupted: interrupted"),
        ],
    )
    def test_what_became_of_it(self, plain, said, state, value, reason, text):
        plain.trial_started(3, {"a": 1})
        plain.next = (counts(), None)
        plain.trial_ended(3, state, value, reason)
        assert plain.told == (state, value)
        assert said == [f"[0/4] trial 3 {text}; a=1; 0.0 s; no trial yet"]

    @pytest.mark.parametrize("resumed", [True, False])
    def test_a_pause_is_no_training(self, plain, said, clock, resumed):
        plain.next = (counts(), None)
        plain.trial_started(0, {"a": 1})
        clock.now += 5
        plain.trial_paused(0, 1)
        clock.now += 600
        if resumed:
            plain.trial_started(0, {"a": 1})
            clock.now += 3
        plain.trial_ended(0, "PRUNED", 0.5, None)
        assert said == [f"[0/4] trial 0 pruned: accuracy 0.5000; a=1; {8 if resumed else 5}.0 s; no trial yet"]

    def test_a_long_trial_is_heard_of_now_and_then(self, plain, said, clock):
        plain.trial_started(0, {})
        for epoch in range(1, 8):
            clock.now += 5
            plain.epoch_ended(0, epoch, 7, {"train_loss": 0.5, "valid_accuracy": epoch / 10})
        assert said == [
            "trial 0: epoch 3/7, accuracy 0.3000, train loss 0.5000",
            "trial 0: epoch 6/7, accuracy 0.6000, train loss 0.5000",
        ]

    def test_an_epoch_without_the_metric_shows_its_loss(self, plain, said, clock):
        plain.trial_started(0, {})
        clock.now += 15
        plain.epoch_ended(0, 1, 7, {"train_loss": float("nan")})
        assert said == ["trial 0: epoch 1/7, train loss nan"]


def test_the_live_view_ends_with_the_counts_the_best_and_every_reason():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=150, no_color=True)
    board = ProgressState(counts(), None, 2, "accuracy")

    def refresh(state, value):
        board.counts, board.best = counts(complete=1, failed=1), best(0, 0.5)

    with shown_by(ConsoleHandler(console)), LiveProgress(board, refresh, console) as progress:
        for number in (0, 1):
            progress.trial_started(number, {"lr": 0.1})
            progress.epoch_ended(number, 1, 3, {"train_loss": 0.25, "valid_accuracy": 0.5})
        progress.trial_ended(0, "COMPLETE", 0.5, None)
        progress.trial_ended(1, "FAIL", None, "became [nan]")
        log.info("a note with [brackets] :bug: of postgresql://bob:s3cret@h/d")
        progress.trial_started(2, {"lr": 0.1})
    text = out.getvalue()
    assert "trial 1 failed: became [nan]" in text
    cleared = "\x1b[2K"
    assert f"{cleared}a note with [brackets] :bug: of postgresql://bob:***@h/d\n" in text, "where the bars were"
    last = text.rpartition("trials ━")[2]
    assert "2/2" in last
    assert "best accuracy 0.5000 (trial 0)" in last
    assert "trial 2" not in last, "what was running when the view ends is cleared away"


class TestLive:
    @pytest.fixture
    def live(self, clock):
        """Return a view of a study of 20 trials that has been shown for a minute: 3 have ended, 10 are in training."""
        board = ProgressState(counts(), None, 20, "accuracy")
        made = LiveProgress(board, lambda state, value: None, Console(file=io.StringIO(), width=80))
        for number in range(10):
            made.trial_started(number, {"learning_rate": 0.01, "n_hidden": 24, "optimizer": "adam"})
            made.epoch_ended(number, 3, 12, {"train_loss": 0.25, "valid_accuracy": 0.5, "valid_loss": 0.3})
        board.counts, board.best = counts(complete=2, pruned=1), best()
        board.best_params, board.curve, board.workers = {"lr": 0.1}, [0.1, 0.5, 0.9], {"a-1", "b-2"}
        clock.now += 60
        return made

    @pytest.mark.parametrize("width", [40, 80, 120])
    def test_it_is_as_wide_as_the_terminal_and_says_the_same(self, live, width):
        lines = drawn(live, width)
        assert max(map(len, lines)) <= width
        text = "\n".join(lines)
        for part in ("3/20", "2 complete, 1 pruned, 0 failed", "best accuracy 0.9890", "3/12", "0.5000"):
            assert part in text
        assert ("optimizer=adam" in text) == (width == 120)

    def test_it_says_pace_time_left_workers_and_the_best_trials_curve(self, live):
        lines = drawn(live, 120)
        assert lines[0].endswith("3/20 60 s, about 6 min left")
        assert lines[1] == "2 complete, 1 pruned, 0 failed, 10 in training by 2 workers; 180 trials an hour"
        assert lines[2:4] == ["best accuracy 0.9890 (trial 7) ▁▄█", "  lr=0.1"]
        assert lines[4].split() == ["trial", "epoch", "accuracy", "train", "loss", "params"]
        assert len(lines[5:-1]) == 8
        assert lines[-1] == "  and 2 more in training"

    def test_what_is_no_longer_trained_is_no_longer_shown(self, live):
        for number in range(9):
            live.trial_ended(number, "COMPLETE", 0.5, None)
        live.trial_paused(9, 3)
        live.trial_ended(9, "PRUNED", 0.5, None)  # while it was paused
        assert not any("3/12" in line for line in drawn(live, 80))

    def test_a_line_a_trial_goes_to_the_log_and_not_to_the_screen(self, live, caplog):
        out = io.StringIO()
        console = Console(file=out, width=200)
        with shown_by(ConsoleHandler(console)), shown_by(caplog.handler):
            live.trial_ended(3, "COMPLETE", 0.5, None)
            log.info("a note")
        assert out.getvalue() == "a note\n"
        assert caplog.messages[0].startswith("[3/20] trial 3 complete: accuracy 0.5000; learning_rate=0.01 n_hidden=24")

    def test_a_secret_in_a_choice_is_not_shown(self, live):
        live.trial_started(0, {"data": "postgresql://bob:s3cret@h/d"})
        assert not any("s3cret" in line for line in drawn(live, 120))


@pytest.mark.parametrize(("alone", "texts"), [(True, ["1/8", "2/8", "2/8", "3/8"]), (False, ["3/8"] * 4)])
def test_of_many_that_end_together_each_is_counted_when_it_is_said(alone, texts):
    """The storage has all of their ends before the first one is said; others' trials are not said here."""

    class Ended:
        counts, running = Counts(complete=3, pruned=0, failed=0, running=1, waiting=4), ()

        def best(self):
            return None

        def view(self):
            return self

    board = ProgressState(Counts(complete=0, pruned=0, failed=0, running=4, waiting=4), None, 8, "loss")
    refresh, said = Refresh(board, Ended(), alone), []
    for state in ("COMPLETE", "FAIL", "INTERRUPTED", "PRUNED"):
        refresh(state, None)
        said.append(board.done_text())
    assert said == texts


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([1.0], ""),
        ([2.0, 2.0], "▁▁"),
        ([0.0, 0.5, 1.0], "▁▄█"),
        ([float("nan"), 1.0, float("inf"), 0.0], "█▁"),
        (list(range(1000)), "▁▁▁▁▂▂▂▃▃▃▄▄▄▄▅▅▅▆▆▆▇▇▇█"),
    ],
)
def test_a_curve_as_a_line_of_bars(values, line):
    assert sparkline(values) == line
    assert len(sparkline(list(range(500)), width=10)) == 10


def test_a_table_shows_cells_as_they_are():
    out = io.StringIO()
    Console(file=out, width=80).print(table("study", ["name", "value"], [["a[b]", "[red]1"]]))
    assert [line.split() for line in out.getvalue().splitlines() if "a[b]" in line] == [["a[b]", "│", "[red]1"]]
