"""Studies of several metrics: what is refused, the Pareto front wherever it is shown, pruning on one of them."""

import contextlib
import itertools
import json
import math
import random
import sqlite3
import time
from pathlib import Path

import optuna
import pytest
from optuna.study._multi_objective import _get_pareto_front_trials_by_trials
from optuna.trial import TrialState, create_trial

import hpo
from hpo.errors import StorageError
from hpo.report.texts import heading
from hpo.runner.prepare import prepare
from hpo.search.front import WorstIfPruned, alone, front_of, leading
from hpo.search.pareto import front_lines
from hpo.search.samplers import make_sampler
from hpo.search.stop import StopRules
from hpo.study.goals import front
from hpo.study.space import build
from hpo.study.spec import Plugin, StudySpec
from tests.cli import invoke, refused, summary
from tests.databases import MLFLOW, OPTUNA, rows
from tests.searches import Opener
from tests.test_constraints import PARAMETERS, sized  # noqa: F401 (a fixture)
from tests.test_own import OWN

SEVERAL = "metric: [r2, n_parameters]\n"
FUNCTION = """
import optuna


def two(trial):
    x, y = (trial.suggest_float(name, 0, 2) for name in "xy")
    for step in range(4):
        trial.report(x + step, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return x * x + y, (x - 2) ** 2 + y


def one(trial):
    return trial.suggest_float("x", 0, 2)
"""


def dominates(a, b, maximize):
    signed = [(-x, -y) if more else (x, y) for x, y, more in zip(a, b, maximize, strict=True)]
    return all(x <= y for x, y in signed) and any(x < y for x, y in signed)


@pytest.fixture
def opened(tmp_path):
    opener = Opener(tmp_path)
    yield opener
    opener.close()


# What a study file may say.


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("metric: [r2, r2]", "metric: must name each metric once; r2 stands there twice"),
        ("metric: []", "metric: must be a name, or a list of names such as [accuracy, n_parameters], but got []"),
        ("metric: [r2, 3]", "metric: must be a name, or a list of names such as [accuracy, n_parameters]"),
        ("metric: {r2: 1}", "metric: must be a name, or a list of names such as [accuracy, n_parameters]"),
        ("metric: [r2, xyz]", "metric: the objective has no metric 'xyz'; known: n_parameters, latency"),
        (
            "metric: [n_parameters, latency]",
            "metric: one must be measured each epoch, r2 or mse or loss",
        ),
        (
            "metric: n_parameters",
            "metric: n_parameters alone says nothing of what was learned: name",
        ),
        (f"{SEVERAL}prune_on: n_parameters", "prune_on: must be measured each epoch, but n_parameters is known once"),
        (f"{SEVERAL}prune_on: mse", "prune_on: must be one of `metric`, r2, n_parameters, but got 'mse'"),
        ("prune_on: r2", "prune_on: is for studies of several metrics: trials are pruned on r2; remove it"),
        (f"{SEVERAL}pruner: median", "pruner: median ends trials by one metric, and the study has several: name it"),
        (f"{SEVERAL}pruner: halving", "pruner: halving ends trials by one metric, and the study has several: name it"),
        (f"{SEVERAL}sampler: cmaes", "sampler: cmaes searches for one metric: choose another sampler for several"),
        (
            f"{SEVERAL}direction: maximize",
            "direction: must be a list with one for each of r2, n_parameters",
        ),
        (f"{SEVERAL}direction: [maximize, maximize]", "direction: of n_parameters less is better; remove `direction`"),
        (
            f"{SEVERAL}direction: [maximize, up]",
            "direction: must be minimize or maximize, or of several metrics a list",
        ),
        ("direction: [maximize, minimize]", "direction: must be one, but got maximize, minimize"),
        (
            f"{SEVERAL}stop: {{terminator: emmr}}",
            "stop.terminator: Optuna's terminators know one metric",
        ),
    ],
)
def test_what_several_metrics_cannot_be_is_refused_with_its_line(sized, keys, message):  # noqa: F811
    file = sized(keys + "\n")
    said = refused("check", file)
    assert message in said
    assert f"{file.name}:" in said


def test_a_list_of_one_is_that_one(sized):  # noqa: F811
    plan = prepare(sized("metric: [mse]\ndirection: [minimize]\n"))
    assert (plan.spec.metric, plan.metric, plan.maximize, plan.others) == ("mse", "mse", False, {})


def test_a_metric_that_is_measured_each_epoch_leads(sized):  # noqa: F811
    plan = prepare(sized("metric: [n_parameters, mse, r2]\n"))
    assert (plan.metric, plan.maximize, plan.others) == ("mse", False, {"n_parameters": False, "r2": True})
    assert plan.spec.pruner.name == "none"
    plan = prepare(sized("metric: [n_parameters, mse, r2]\nprune_on: r2\n"))
    assert (plan.metric, plan.maximize, plan.others) == ("r2", True, {"n_parameters": False, "mse": False})
    assert plan.spec.pruner.name == "median"


# The front.


@pytest.mark.parametrize("maximize", [*itertools.product([False, True], repeat=2), (True, False, True)])
def test_the_front_is_optunas(maximize):
    numbers = random.Random(1)
    points = [tuple(float(numbers.randint(0, 12)) for _ in maximize) for _ in range(80)]
    on = front(points, maximize)
    assert on == [i for i, a in enumerate(points) if not any(dominates(b, a, maximize) for b in points)]
    trials = [create_trial(values=list(point)) for point in points]
    for number, trial in enumerate(trials):
        trial.number = number
    directions = [optuna.study.StudyDirection.MAXIMIZE if m else optuna.study.StudyDirection.MINIMIZE for m in maximize]
    expected = _get_pareto_front_trials_by_trials(trials, directions)
    assert {t.number for t in front_of(trials, maximize)} == {t.number for t in expected} == set(on)


def test_a_front_of_thousands_of_trials_takes_no_minutes():
    started = time.monotonic()
    assert front([(float(i), -float(i)) for i in range(4000)], (True, True)) == list(range(4000))
    assert front([(-0.0, 0.0), (0.0, -0.0), (math.inf, 1.0)], (True, False)) == [0, 1, 2]
    assert front([], (True, True)) == []
    assert time.monotonic() - started < 10  # compared one by one it took more than a minute


def test_a_single_metric_has_no_front():
    assert front_of([create_trial(value=1.0)], [True]) == []
    assert leading(create_trial(value=1.0)) == 1.0
    assert leading(create_trial(values=[2.0, 1.0])) == 2.0
    assert leading(create_trial(state=TrialState.FAIL)) is None


@pytest.fixture
def ran(sized):  # noqa: F811
    """Return the path of a finished study of r2 and n_parameters."""
    path = sized(SEVERAL + "trials: 10\nepochs: 3\n")
    invoke("run", path)
    return path


def test_the_front_is_the_same_wherever_it_is_shown(ran):
    said = summary(invoke("status", ran, "--json"))
    study = hpo.open_study(ran)
    table = study.trials
    assert table["values_n_parameters"].tolist() == [PARAMETERS[n] for n in table["params_n_hidden"]]
    points = list(zip(table["value"], table["values_n_parameters"], strict=True))
    expected = {i for i, a in enumerate(points) if not any(dominates(b, a, (True, False)) for b in points)}
    assert said["metrics"]["directions"] == {"r2": "maximize", "n_parameters": "minimize"}
    shown = said["metrics"]["front"]
    assert {each["number"] for each in shown} == {best.number for best in study.front} == expected
    assert {trial.number for trial in study.to_optuna().best_trials} == expected
    assert [each["values"]["r2"] for each in shown] == sorted((points[i][0] for i in expected), reverse=True)
    assert said["best"]["number"] == shown[0]["number"] == study.best.number
    assert study.best.others == {"n_parameters": points[study.best.number][1]}
    invoke("report", ran, "--format", "json", "--out", "r.json")
    facts = json.loads(Path("r.json").read_text())
    assert facts["front"] == [each["number"] for each in shown]
    invoke("report", ran, "--format", "md", "--out", "r.md")
    assert (
        f"{len(expected)} of 10 complete trials: no other is better in r2 (more is better)" in Path("r.md").read_text()
    )
    assert r": maximize r2, minimize n\_parameters. 10 of 10" in Path("r.md").read_text()
    assert r"| trial | r2 | n\_parameters | n\_hidden |" in Path("r.md").read_text().partition("## Best ")[2]
    invoke("report", ran, "--out", "r.html")
    page = Path("r.html").read_text()
    assert 'id="front-table"' in page
    assert '<a href="#front">Pareto front</a>' in page
    about = json.loads((study.bundle / "bundle.json").read_text())
    assert about["other_metrics"] == dict(study.best.others)


def test_it_resumes_whatever_the_order_of_the_metrics_that_do_not_lead(sized):  # noqa: F811
    text = "metric: [r2, n_parameters, mse]\nepochs: 2\ntrials: {}\n"
    invoke("run", sized(text.format(3)))
    invoke("run", path := sized(text.format(6).replace("n_parameters, mse", "mse, n_parameters")))
    table = hpo.open_study(path).trials
    assert table["values_n_parameters"].tolist() == [PARAMETERS[n] for n in table["params_n_hidden"]]
    assert "metric.mse is absent here, minimize there" in refused("run", sized("metric: [r2, n_parameters]\n"))
    assert "metric is 'mse' here, 'r2' there" in refused("run", sized("metric: [mse, n_parameters, r2]\n"))


def test_of_trials_equal_in_the_metric_that_leads_the_others_decide(opened):
    search = opened(others={"n_parameters": False})
    assert search.others == {"n_parameters": False}
    for size in (30.0, 10.0, 20.0):
        claim = search.ask()
        search.complete(claim.number, 0.5, {"n_parameters": size})
    seen = search.view()
    assert seen.best().number == 1
    assert [best.number for best in seen.front] == [1]


@pytest.mark.parametrize(
    ("sampler", "stack"),
    [
        ("gp", 1),
        ("tpe", 4),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("tpe", "nsgaii", "random", "qmc")),
    ],
)
def test_samplers_and_stacks(sized, sampler, stack):  # noqa: F811
    keys = ", n_startup_trials: 4" if sampler in ("tpe", "gp") else ""
    path = sized(
        f"{SEVERAL}sampler: {{name: {sampler}{keys}}}\nstack: {stack}\nepochs: 2\ntrials: 9\n"
        'constraints: {n_parameters: "<= 160"}\n'
    )
    invoke("run", path)
    said = summary(invoke("status", path, "--json"))
    assert said["trials"]["complete"] + said["trials"]["pruned"] == 9
    front = said["metrics"]["front"]
    assert front
    assert all(each["values"]["n_parameters"] <= 160 for each in front)


# Pruning.


@pytest.mark.parametrize(
    "pruner",
    [
        "{name: median, n_startup_trials: 3, n_warmup_steps: 1}",
        "halving",
        pytest.param("hyperband", marks=pytest.mark.slow),
    ],
)
def test_trials_are_pruned_on_the_metric_that_is_named(sized, pruner):  # noqa: F811
    path = sized(f"{SEVERAL}prune_on: r2\npruner: {pruner}\nepochs: 6\ntrials: 16\nstack: 1\n")
    invoke("run", path)
    table = hpo.open_study(path).trials
    assert set(table["state"]) == {"COMPLETE", "PRUNED"}
    assert table.loc[table["state"] == "PRUNED", "values_n_parameters"].isna().all()
    assert table.loc[table["state"] == "COMPLETE", "values_n_parameters"].notna().all()


def test_the_pruner_decides_as_optunas_does_for_that_metric_alone():
    both = optuna.create_study(directions=["maximize", "minimize"], pruner=optuna.pruners.MedianPruner(2, 0))
    first = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(2, 0))
    numbers = random.Random(3)
    decided = []
    for _ in range(30):
        curve = [numbers.random() for _ in range(3)]
        reports = dict(enumerate(curve))
        trials = [study.ask() for study in (both, first)]
        for study, trial in zip((both, first), trials, strict=True):
            for step, value in reports.items():
                study._storage.set_trial_intermediate_value(trial._trial_id, step, value)
        frozen = [study._storage.get_trial(t._trial_id) for study, t in zip((both, first), trials, strict=True)]
        decisions = [both.pruner.prune(alone(both), frozen[0]), first.pruner.prune(first, frozen[1])]
        assert decisions[0] == decisions[1]
        decided.append(decisions[0])
        both.tell(trials[0], [max(curve), 1.0])
        first.tell(trials[1], max(curve))
    assert 0 < sum(decided) < 30
    assert len(both.directions) == 2


def test_to_samplers_a_pruned_trial_is_the_worst():
    complete = [create_trial(values=[0.9, 100.0]), create_trial(values=[0.5, 20.0])]
    pruned = create_trial(state=TrialState.PRUNED, intermediate_values={0: 0.95})
    infeasible = create_trial(
        state=TrialState.PRUNED, system_attrs={"constraints:n_parameters": 1.0}, intermediate_values={}
    )
    seen = WorstIfPruned((True, False))([*complete, pruned, infeasible])
    assert seen[:2] == complete
    assert (seen[2].state, seen[2].values) == (TrialState.COMPLETE, [0.5, 100.0])
    assert seen[3] is infeasible
    assert pruned.state == TrialState.PRUNED
    assert WorstIfPruned((True, False))([pruned]) == []


def test_tpe_draws_where_most_trials_are_pruned():
    space, _ = build({"x": {"type": "float", "low": 0.0, "high": 1.0}}, [])
    sampler, faults = make_sampler(Plugin(name="tpe", n_startup_trials=5), 0, space, (True, False))
    assert not faults
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    for i in range(40):
        trial = study.ask()
        x = trial.suggest_float("x", 0, 1)
        if x < 0.5 and i > 3:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [x, (x - 0.7) ** 2])
    drawn = [trial.params["x"] for trial in study.trials[20:]]
    assert sum(x >= 0.5 for x in drawn) > 14  # it has learned where trials are pruned


# The end of a search.


def test_no_gain_is_of_the_front():
    spec = StudySpec(name="s", objective="o", metric=("r2", "n_parameters"), trials=100, stop={"no_gain": 3}, params={})
    rules = StopRules(spec, maximize=True, others=(False,))

    def ended(*points):
        trials = [create_trial(values=list(point)) for point in points]
        for number, trial in enumerate(trials):
            trial.number = number
        return trials

    assert rules.ask(ended((0.5, 10.0), (0.4, 20.0), (0.3, 30.0))) is None
    found = rules.ask(ended((0.5, 10.0), (0.4, 20.0), (0.3, 30.0), (0.5, 10.0)))
    assert found is not None
    assert found.why == "none of the last 3 finished trials added to the Pareto front"
    assert rules.ask(ended((0.5, 10.0), (0.4, 20.0), (0.3, 5.0), (0.5, 10.0))) is None
    assert rules.ask(ended((0.5, 10.0), (0.6, 20.0), (0.1, 50.0), (0.2, 60.0))) is None


# Others' code.


def test_a_function_returns_a_number_for_each(study):
    Path("f.py").write_text(FUNCTION)
    path = study("objective: f.py:two\nmetric: [a, b]\ntrials: 12\n")
    invoke("run", path)
    table = hpo.open_study(path).trials
    x, y = table["params_x"], table["params_y"]
    assert table["value"].tolist() == pytest.approx((x * x + y).tolist())
    assert table["values_b"].tolist() == pytest.approx(((x - 2) ** 2 + y).tolist())
    assert set(table["state"]) == {"COMPLETE"}
    path = study(
        "objective: f.py:two\nmetric: [a, b]\nprune_on: b\ndirection: [minimize, maximize]\ntrials: 25\nname: p\n"
    )
    invoke("run", path)
    found = hpo.open_study(path)
    assert (found.metric, found.maximize, found.others) == ("b", True, {"a": False})
    assert "PRUNED" in set(found.trials["state"])
    assert "must return 2 numbers, a, b, but returned" in refused(
        "run", study("objective: f.py:one\nmetric: [a, b]\ntrials: 2\nname: q\n")
    )
    assert "must return one number, a trial's value (of several metrics: name them" in refused(
        "run", study("objective: f.py:two\ntrials: 2\nname: r\n")
    )


def test_mlflow_has_what_a_function_returns(study):
    Path("f.py").write_text("def f(trial):\n    x = trial.suggest_float('x', 0, 1)\n    return x, 1 - x\n")
    invoke("run", path := study(f"objective: f.py:f\nmetric: [a, b]\ntrials: 3\ntracking: sqlite:///{MLFLOW}\n"))
    table = hpo.open_study(path).trials
    for name, column in (("a", "value"), ("b", "values_b")):
        logged = rows("SELECT value FROM metrics WHERE key = ?", name, file=MLFLOW)
        assert sorted(value for (value,) in logged) == sorted(table[column])


def test_an_own_training_must_give_what_is_measured(study):
    Path("own.py").write_text(OWN)
    invoke("run", path := study("objective: own.py\nmetric: [accuracy, n_parameters]\ntrials: 4\n"))
    assert hpo.open_study(path).trials["values_n_parameters"].nunique() == 1
    Path("own.py").write_text(OWN.replace("return network", "return None"))
    said = refused("run", study("objective: own.py\nmetric: [accuracy, n_parameters]\ntrials: 4\nname: n\n"))
    assert "train must return its network, since the study measures n_parameters of it" in said


def test_a_trial_is_replayed_and_another_one_of_the_front_exported(ran):
    front = summary(invoke("status", ran, "--json"))["metrics"]["front"]
    assert summary(invoke("replay", ran, "--trial", front[-1]["number"], "--json"))["max_difference"] == 0
    invoke("export", ran, "--trial", front[-1]["number"], "--out", "other")
    about = json.loads(Path("other/bundle.json").read_text())
    assert about["other_metrics"]["n_parameters"] == front[-1]["values"]["n_parameters"]


def test_it_adopts_no_trials(ran):
    old = optuna.create_study(storage="sqlite:///old.db", study_name="old", direction="maximize")
    old.add_trial(create_trial(value=1.0))
    said = refused("adopt", ran, "--from", "sqlite:///old.db", "--study", "old")
    assert "has 2 metrics: it cannot adopt trials" in said


# What others have written, and odd numbers.


@pytest.mark.parametrize(
    ("statement", "values"),
    [
        ("DELETE FROM trial_values WHERE objective = 1", "the values [1.0]"),
        ("DELETE FROM trial_values", "the values []"),
        ("UPDATE trial_values SET value = 'much' WHERE objective = 1", "the values [1.0, 'much']"),
        ("INSERT INTO trial_values (trial_id, objective, value, value_type) VALUES (1, 2, 7, 'FINITE')", "7.0]"),
    ],
)
def test_values_that_hpo_did_not_write_are_said(study, statement, values):
    Path("f.py").write_text("def f(trial):\n    return 1, trial.suggest_float('x', 0, 1)\n")
    invoke("run", path := study("objective: f.py:f\nmetric: [a, b]\ntrials: 1\n"))
    with contextlib.closing(sqlite3.connect(OPTUNA)) as database, database:
        database.execute(statement)
    for command in ("status", "report", "run"):
        said = refused(command, path)
        assert values in said
        assert "and the study has 2 metrics; hpo did not write that: repair or delete the trial" in said
    with pytest.raises(StorageError, match="and the study has 2 metrics"):
        _ = hpo.open_study(path).front


def test_an_infinite_value_of_others_is_shown(opened):
    search = opened(others={"n_parameters": False})
    for value in (0.5, -math.inf):
        claim = search.ask()
        search.complete(claim.number, 0.5, {"n_parameters": value})
    assert front_lines(search.view())[1:] == ["  trial 1: accuracy 0.5, n_parameters -inf"]


@pytest.mark.parametrize("returned", ["'12'", "{1.0, 2.0}", "{1: 1, 2: 2}", "(1, 10**400)", "(1, 'x')", "None"])
def test_what_is_no_number_for_each_is_refused(study, returned):
    Path("f.py").write_text(f"def f(trial):\n    return {returned}\n")
    said = refused("run", study("objective: f.py:f\nmetric: [a, b]\ntrials: 1\n"))
    assert "must return 2 numbers, a, b, but returned" in said


def test_an_own_training_must_report_the_other_metrics(study):
    Path("own.py").write_text(OWN)
    said = refused("run", study("objective: own.py\nmetric: [accuracy, loss]\ntrials: 1\n"))
    assert "but the study needs loss of each trial, too" in said


def test_headings_of_columns_that_are_named_as_others():
    assert [heading(name) for name in ("params_values_x", "values_params_x", "constrained_x", "best_epoch")] == [
        "values_x",
        "params_x",
        "x",
        "best epoch",
    ]
