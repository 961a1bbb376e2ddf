"""`benchmarks/documented.py`: the verdict is by the range over the seeds, and each seed is a training of its own."""

import math
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import documented
    import reproduction

    monkeypatch.setattr(documented, "ROWS", dict(documented.ROWS))
    return documented, reproduction


@pytest.fixture
def figure(benchmarks):
    def make(documented, ours, better=1, **more):
        return benchmarks[1].Figure(name="figure", documented=documented, ours=ours, better=better, **more)

    return make


@pytest.mark.parametrize(
    ("documented", "ours", "better", "verdict", "place"),
    [
        ("0.75", [0.70, 0.74, 0.76], 1, "yes", "1 of 3 as good"),
        ("0.75", [0.76, 0.78, 0.80], 1, "yes", "all 3 are better"),
        ("0.75", [0.70, 0.72, 0.74], 1, "worse", "all 3 are worse"),
        ("0.75", [0.70, 0.72, 0.746], 1, "yes", "1 of 3 as good"),  # 0.75 may have been 0.745
        ("0.750", [0.70, 0.72, 0.746], 1, "worse", "all 3 are worse"),
        ("0.408", [0.28, 0.30, 0.54], -1, "yes", "2 of 3 as good"),
        ("0.408", [0.28, 0.30, 0.39], -1, "yes", "all 3 are better"),
        ("0.408", [0.42, 0.43, 0.54], -1, "worse", "all 3 are worse"),
        ("0.408", [0.28, 0.30, math.nan], -1, "worse", "1 of 3 are NaN"),
        ("0.408", [math.nan, 0.28, 0.30], -1, "worse", "1 of 3 are NaN"),
        ("0.408", [math.inf, 0.28, 0.30], -1, "yes", "2 of 3 as good"),
        ("0.408", [math.nan], -1, "worse", "1 of 1 are NaN"),
        ("16.16", [16.158], 0, "yes", "the same in 1 of 1"),
        ("16.16", [16.158, 16.17], 0, "worse", "the same in 1 of 2"),
        ("4e-3", [0.0036], 1, "yes", "1 of 1 as good"),
    ],
)
def test_a_figure_is_worse_only_where_all_of_ours_are(figure, documented, ours, better, verdict, place):
    made = figure(documented, ours, better)
    assert (made.verdict, made.place) == (verdict, place)


def test_an_exact_figure_is_not_rounded(figure):
    assert figure("0", [0.4], better=0).verdict == "yes"
    assert figure("0", [1e-9], better=0, exact=True).verdict == "worse"
    assert figure("0.93", [0.929], exact=True).verdict == "worse"


@pytest.mark.parametrize(("learned", "verdict"), [((True, True, False), "yes"), ((True, False), "worse"), ((), "")])
def test_a_model_that_only_trains_is_judged_by_how_many_seeds_learn(figure, learned, verdict):
    assert figure(None, [0.5] * 3, learned=learned).verdict == verdict


def test_a_seed_that_ends_in_nan_is_worse_also_where_nothing_is_documented(figure):
    made = figure(None, [0.5, math.nan], learned=(True, True))
    assert made.cells() == ["figure", "trains", "0.5", "0.5 to 0.5", "2", "1 of 2 are NaN", "worse"]


@pytest.mark.parametrize(("late", "status"), [(0.80, 0), (0.70, 1)])
def test_what_ten_seeds_leave_worse_is_settled_by_forty_and_by_the_exit_status(
    benchmarks, monkeypatch, capsys, late, status
):
    documented, reproduction = benchmarks
    asked = []

    def row(seeds):
        asked.append(seeds)
        yield reproduction.Figure(name="R2", documented="0.754", ours=[late if seed > 20 else 0.7 for seed in seeds])

    documented.ROWS[3] = ("made up", row)
    monkeypatch.setattr(sys, "argv", ["documented.py", "--only", "3", "--seed", "1"])
    with pytest.raises(SystemExit) as end:
        documented.main()
    assert end.value.code == status
    assert asked == [tuple(range(1, 11)), tuple(range(1, 41))]
    assert (
        "| 40 | " + ("20 of 40 as good | yes" if status == 0 else "all 40 are worse | worse") in capsys.readouterr().out
    )


def test_a_seed_is_an_initialisation_and_an_order(benchmarks):
    _, reproduction = benchmarks
    objective = reproduction.objective_of("synthetic_binary")
    one, other, again = reproduction.fits(objective, 2, (1, 2, 1))
    assert one.losses == again.losses != other.losses
    params = one.network.state_dict(), again.network.state_dict()
    assert all(params[0][name].equal(params[1][name]) for name in params[0])


@pytest.mark.slow
def test_a_row_from_the_command_line():
    command = [sys.executable, "benchmarks/documented.py", "--only", "1", "2", "10", "--seeds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    by_name = {row[2]: row for row in cells}
    assert by_name["xor: errors"][3:9] == ["0", "0", "", "1", "the same in 1 of 1", "yes"]
    assert by_name["accuracy, test"][7:9] == ["the same in 1 of 1", "yes"]
    learned = by_name["accuracy, validation, epoch 100"]
    assert (learned[6], learned[7], learned[8]) == ("2", "2 of 2 learn", "yes")
    assert float(learned[4]) > 0.9
