"""Constraints: read, refused, kept by TPE as Optuna does, and in all that says which trial is the best."""

import json
import math
from pathlib import Path

import optuna
import pytest
import torch
from optuna.trial import TrialState, create_trial

import hpo
from hpo.errors import HpoError, SpecError
from hpo.report.rows import ranked, row_of
from hpo.runner.prepare import prepare
from hpo.search.constraints import feasible_text, holds, is_feasible, nearest, violation_of
from hpo.search.halving import Halving, HalvingPruner
from hpo.search.samplers import PerTrialSampler
from hpo.search.seen import AtOneRung
from hpo.search.stop import StopRules
from hpo.search.tpe import Shared, SharedTPESampler
from hpo.study.constraints import constraints_in, parse
from hpo.study.spec import StudySpec
from tests.cli import invoke, refused, summary
from tests.mlflows import in_store
from tests.test_own import OWN
from tests.test_tpe import SPACE, drawn, same

SIZED = '''
"""Lines through 300 points by a network of one hidden layer, some of whose weights are frozen."""

import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import MeanSquaredError, R2Score

from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class Sized(Objective):
    defaults = {"learning_rate": 0.02, "batch_size": 50, "n_hidden": 8, "slow": False}
    space = {"n_hidden": {"type": "int", "low": 1, "high": 40}}

    def data(self):
        x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
        y = x.sum(1, keepdim=True)
        parts = [slice(0, 200), slice(200, 250), slice(250, 300)]
        train, valid, test = (Split(inputs={"features": x[p]}, targets=y[p]) for p in parts)
        return Data(train=train, valid=valid, test=test)

    def build(self, params, info):
        n = params["n_hidden"]
        network = nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 1), nn.Linear(1, 1))
        network[-1].requires_grad_(False)
        return network

    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets)

    def metrics(self):
        return {"r2": R2Score(), "mse": MeanSquaredError()}
'''
PARAMETERS = {n: 4 * n + n + n + 1 for n in range(1, 41)}
"""Of a network of so many hidden units: the last layer is not trained."""


@pytest.fixture
def sized(study):
    Path("sized.py").write_text(SIZED)

    def write(text, **keys):
        named = {line.partition(":")[0] for line in text.splitlines()}
        rest = {"objective": "sized.py", "trials": 8, "stack": 1}
        return study("".join(f"{key}: {rest[key]}\n" for key in rest if key not in named) + text, **keys)

    return write


def failed(*arguments):
    """Run a command that must fail with exit status 1; return its message."""
    with pytest.raises(HpoError) as caught:
        invoke(*arguments)
    assert caught.value.exit_status == 1
    return str(caught.value)


# What a study file may say.


@pytest.mark.parametrize(
    ("name", "text", "bound", "is_least"),
    [
        ("n_parameters", "<= 1e5", 100_000, False),
        ("latency", "<=2 ms", 2, False),
        ("latency_256", "  <= 0.0015s ", 1.5, False),
        ("accuracy", ">= 0.9", 0.9, True),
        ("loss", ">= -1", -1, True),
        ("loss", "<= 0", 0, False),
    ],
)
def test_a_constraint_is_read_and_written_in_one_form(name, text, bound, is_least):
    read = parse(name, text)
    assert (read.name, read.bound, read.is_least) == (name, bound, is_least)
    assert parse(name, read.text) == read


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        ('{r2: "< 5"}', "constraints: r2: must be <= or >= and a finite number, such as \">= 0.9\", but got '< 5'"),
        ('{r2: "<= abc"}', "r2: must be <= or >= and a finite number"),
        ('{r2: "<= nan"}', "r2: must be <= or >= and a finite number"),
        ('{r2: ">= inf"}', "r2: must be <= or >= and a finite number"),
        ('{r2: "=> 5"}', "r2: must be <= or >= and a finite number"),
        ('{r2: "<= 5 <= 6"}', "r2: must be <= or >= and a finite number"),
        ("{r2: 5}", "r2: must be <= or >= and a finite number"),
        ("{r2: [1]}", "r2: must be <= or >= and a finite number"),
        ('{r2: ""}', "r2: must be <= or >= and a finite number"),
        ('{r2: "<= 5ms"}', "r2: must be a number without a unit"),
        ('{latency: "<= 5"}', "latency: must have a unit, ms or s"),
        ('{n_parameters: "<= 0"}', "n_parameters: is above 0 in every trial"),
        ('{latency: "<= -2ms"}', "latency: is above 0 in every trial"),
        ("7", "constraints: must be a mapping of names to texts"),
        ("[n_parameters]", "constraints: must be a mapping of names to texts"),
        (
            '{n_parameter: "<= 5"}',
            'n_parameter: there is nothing of that name to constrain; did you mean "n_parameters"?',
        ),
        ('{xyz: "<= 5"}', "known: r2, mse, loss, n_parameters, latency, latency_256"),
    ],
)
def test_a_wrong_constraint_is_refused_with_its_line(sized, constraints, message):
    file = sized(f"constraints: {constraints}\n")
    said = refused("check", file)
    assert message in said
    assert f"{file.name}:" in said


def test_no_constraint_at_all_is_the_default(sized):
    assert prepare(sized("constraints: {}\n")).spec.constraints == {}


def test_a_function_is_said_what_to_do(study):
    Path("f.py").write_text("def f(trial):\n    return trial.suggest_float('x', 0, 1)\n")
    said = refused("check", study('objective: f.py:f\nconstraints: {x: "<= 5"}\n'))
    assert "constraints: a function sets its own: trial.set_constraint" in said


@pytest.mark.parametrize(
    "pruner", [pytest.param("median", marks=pytest.mark.slow), "{name: halving, first: 1, finish: 1}"]
)
def test_an_objective_that_trains_itself_is_held_to_the_network_that_it_returns(study, pruner):
    own = OWN.replace("def train(self, params, report):", "def train(self, params, report, resume=None):")
    own = own.replace("network = nn.Linear(4, 2)", "network = nn.Linear(4, 2); network.bias.requires_grad_(False)")
    Path("own.py").write_text(own)
    bounds = 'constraints: {n_parameters: "<= 8", latency: "<= 1s"}\n'
    file = study(f"objective: own.py\nepochs: 4\ntrials: 6\npruner: {pruner}\n{bounds}")
    invoke("run", file)
    table = hpo.open_study(file).trials
    complete = table[table["state"] == "COMPLETE"]
    assert (complete["constrained_n_parameters"] == 8).all()
    assert complete["feasible"].all()
    assert (complete["constrained_latency"] > 0).all()
    assert complete["epochs"].tolist() == [4] * len(complete) != []
    tight = study(f"objective: own.py\n{bounds.replace('8', '7')}", name="tight.yaml")
    assert "trial 0: n_parameters 8 (must be <= 7, broken by 1)" in failed("run", tight)
    Path("own.py").write_text(own.replace("return network", "return None"))
    said = refused("run", study(f"objective: own.py\n{bounds}", name="none.yaml"))
    assert "train must return its network, since the study measures n_parameters, latency of it" in said


def test_a_metric_that_an_objectives_own_train_does_not_report_stops_the_study(study):
    Path("own.py").write_text(OWN.replace('micro")}', 'micro"), "f1": MulticlassAccuracy(2)}'))
    with pytest.raises(HpoError, match=r"reported accuracy, train_rows, but the study needs f1 of each trial, too"):
        invoke("run", study('objective: own.py\nconstraints: {f1: ">= 0.1"}\n'))


# What is stored, and what follows from it.


def trial(number, value=None, state=TrialState.COMPLETE, constraints=None, **attrs):
    made = create_trial(state=state, value=value, constraints=constraints, user_attrs=attrs)
    made.number = number
    return made


def test_a_trial_is_feasible_as_optuna_says():
    assert is_feasible(trial(0, 1.0)) is None
    assert is_feasible(trial(0, 1.0, constraints={"a": 0.0, "b": -1.0})) is True
    assert is_feasible(trial(0, 1.0, constraints={"a": 1e-300, "b": -1.0})) is False
    assert is_feasible(trial(0, state=TrialState.PRUNED, constraints={"a": -1.0})) is None
    assert violation_of(trial(0, 1.0, constraints={"a": 2.0, "b": 3.0, "c": -9.0})) == 5
    old = create_trial(value=1.0, system_attrs={"constraints": [0.5, -1]})
    assert is_feasible(old) is False


def test_the_best_is_the_best_that_holds_to_all():
    trials = [trial(0, 3.0, constraints={"a": 0.1}), trial(1, 2.0, constraints={"a": 0.0}), trial(2, 1.0)]
    assert [each.number for each in ranked(trials, maximize=True)] == [1, 2]
    assert [each.number for each in ranked(trials, maximize=False)] == [2, 1]
    assert row_of(trials[0])["violation"] == 0.1
    assert "feasible" not in row_of(trials[2])


def test_the_nearest_is_named_with_what_it_breaks():
    constraints = constraints_in({"n_parameters": "<= 100"})
    trials = [
        trial(0, state=TrialState.PRUNED, constraints={"n_parameters": 0.01}, constrained={"n_parameters": 101.0}),
        trial(1, 1.0, constraints={"n_parameters": 1.5}, constrained={"n_parameters": 250.0}),
        trial(2, 1.0, constraints={"n_parameters": 4.0}, constrained={"n_parameters": 500.0}),
    ]
    assert nearest(trials).number == 1
    assert feasible_text(trials, constraints) == (
        "0 of 2 complete trials hold to n_parameters <= 100; 1 more were not trained, since they break one; "
        "the nearest is trial 1: n_parameters 250 (must be <= 100, broken by 150)"
    )
    assert feasible_text([trial(0, 1.0)], {}) == ""


def test_adopted_trials_are_those_that_are_known_to_hold_or_not(sized):
    file = sized('trials: 3\nconstraints: {mse: ">= 1"}\n')
    invoke("run", file)
    other = sized('trials: 1\nsampler: gp\nconstraints: {mse: ">= 2"}\n', name="other.yaml")
    invoke("adopt", other, "--from", "sqlite:///mlruns/optuna.db", "--study", "study")
    adopted = hpo.open_study(other).to_optuna().get_trials()
    values = hpo.open_study(file).trials["constrained_mse"]
    assert [each.constraints["mse"] for each in adopted] == pytest.approx([(2 - value) / 2 for value in values])
    third = sized('constraints: {n_parameters: "<= 9"}\n', name="third.yaml")
    invoke("adopt", third, "--from", "sqlite:///mlruns/optuna.db", "--study", "study")
    assert hpo.open_study(third).to_optuna().get_trials() == []


def test_rules_that_stop_a_search_count_feasible_trials_only():
    spec = StudySpec(name="s", objective="o", trials=9, stop={"target": 1.0, "no_gain": 3})
    broken = [trial(i, 5.0 + i, constraints={"a": 1.0}) for i in range(4)]
    assert StopRules(spec, maximize=True).ask(broken) is None
    found = StopRules(spec, maximize=True).ask([trial(9, 1.5, constraints={"a": -1.0}), *broken[:1]])
    assert found.why == "trial 9 has reached the target 1, with 1.5"
    ended = [trial(0, 0.5, constraints={"a": 0.0}), *(trial(1 + i, 5.0, constraints={"a": 1.0}) for i in range(3))]
    assert "none of the last 3 finished trials was better than trial 0" in StopRules(spec, maximize=True).ask(ended).why


# TPE.


def constrained_history(n):
    """Return n finished trials, of which some break a constraint, some pruned ones were never trained."""
    import numpy as np

    rng = np.random.RandomState(1)
    trials = []
    for _ in range(n):
        params = {name: of.to_external_repr(drawn(of, rng)) for name, of in SPACE.items()}
        over = params["n"] / 100 - 1
        pruned = over > 0.5
        trials.append(
            create_trial(
                state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
                value=None if pruned else (params["y"] - 1) ** 2,
                params=params,
                distributions=SPACE,
                constraints={"n": over, "m": -1.0},
            )
        )
    return trials


@pytest.mark.parametrize("n_before", [5, 40, 200])
def test_tpe_draws_as_optunas_with_constraints(n_before):
    drawn_by = []
    shared = Shared()
    for make in (lambda seed: SharedTPESampler(shared, seed=seed), lambda seed: optuna.samplers.TPESampler(seed=seed)):
        sampler = PerTrialSampler(make, shared)
        study = optuna.create_study(sampler=sampler)
        study.add_trials(constrained_history(n_before))
        params = []
        ids = [study._storage.create_new_trial(study._study_id) for _ in range(20)]
        with sampler.together():
            for trial_id in ids:
                study._thread_local.cached_all_trials = None
                each = optuna.trial.Trial(study, trial_id)
                for name, of in SPACE.items():
                    each._suggest(name, of)
                params.append(each.params)
        drawn_by.append(params)
    same(*drawn_by)


def test_under_halving_samplers_see_only_trials_whose_constraints_are_known():
    def paused(number, score, constraints):
        made = create_trial(state=TrialState.WAITING, intermediate_values={0: score, 1: score}, constraints=constraints)
        made.number = number
        return made

    known = [paused(i, float(i), {"a": i - 5.0}) for i in range(11)]
    unknown = paused(11, 0.0, {})
    untrained = trial(12, state=TrialState.PRUNED, constraints={"a": 9.0})
    see = AtOneRung(Halving(HalvingPruner(16), 1, maximize=False), 16, ["a"], maximize=False)
    seen = see([*known, unknown, untrained])
    assert [each.number for each in seen] == [*range(11), 12]
    assert [holds(each) for each in seen] == [i <= 5 for i in range(11)] + [False]
    assert seen[-1].state == TrialState.PRUNED


# Whole studies.


def test_a_run_says_feasible_of_no_trial_of_which_it_is_not_known(sized, request, tmp_path):
    mlflow = in_store("sqlite", request, tmp_path)
    keys = f'name: {mlflow.study}\ntracking: {mlflow.uri}\nstack: 1\nconstraints: {{n_parameters: "<= 100"}}\n'
    keys += "epochs: 3\npruner: {name: threshold, lower: 1.1}\nstart_with: [{n_hidden: 4}, {n_hidden: 40}]\n"
    failed("run", sized(keys))
    runs = mlflow.runs()
    table = hpo.open_study(mlflow.study, storage="sqlite:///mlruns/optuna.db").trials
    assert set(table["state"]) == {"PRUNED"}
    for number, broken in enumerate(table["feasible"].eq(False)):
        assert runs[str(number)].data.metrics.get("feasible") == (0.0 if broken else None)
    assert table["feasible"].eq(False).any()
    assert table["feasible"].isna().any()


def test_a_network_that_is_too_large_is_not_trained_and_its_trial_counts(sized):
    file = sized('constraints: {n_parameters: "<= 100"}\n')
    said = summary(invoke("run", file, "--json"))
    table = hpo.open_study(file).trials
    pruned = table[table["state"] == "PRUNED"]
    assert 0 < len(pruned) < len(table) == 8
    assert (pruned["epochs"] == 0).all()
    assert (table["constrained_n_parameters"] == [PARAMETERS[n] for n in table["params_n_hidden"]]).all()
    assert (table["feasible"] == (table["constrained_n_parameters"] <= 100)).all()
    assert table["violation"].tolist() == pytest.approx(
        [max(0, n - 100) / 100 for n in table["constrained_n_parameters"]]
    )
    assert said["constraints"]["feasible"] == table.index[table["feasible"]].tolist()
    assert said["best"]["number"] in said["constraints"]["feasible"]
    trials = {each.number: each for each in hpo.open_study(file).to_optuna().trials}
    assert all(trials[number].constraints["n_parameters"] > 0 for number in pruned.index)
    assert "infeasible: n_parameters" in pruned["error"].iloc[0]


def test_the_best_feasible_trial_is_the_best_everywhere(sized):
    file = sized('epochs: 6\nconstraints: {mse: ">= 1"}\n')  # the good ones are forbidden
    done = summary(invoke("run", file, "--json"))
    study = hpo.open_study(file)
    table = study.trials
    allowed = table[table["constrained_mse"] >= 1]
    assert 0 < len(allowed) < len(table)
    best = int(allowed["value"].idxmax())
    assert table["value"].max() > table["value"][best]
    assert done["best"]["number"] == best == study.best.number
    assert summary(invoke("status", file, "--json"))["best"]["number"] == best
    about = json.loads((Path(done["bundle"]) / "bundle.json").read_text())
    assert about["trial"] == best
    weights = torch.load("mlruns/checkpoints/study/best.pt", weights_only=True)
    assert weights["trial"] == best
    assert study.to_optuna().best_trial.number == best
    report = json.loads(Path(invoke_report(file)).read_text())
    assert report["best"]["number"] == best == report["ranking"][0]
    assert len(report["ranking"]) == len(allowed)
    seen = summary(invoke("status", file, "--json"))["constraints"]
    assert sorted([*seen["feasible"], *seen["infeasible"]]) == table.index.tolist()
    forbidden = int(table["value"].idxmax())
    with_warning = invoke("export", file, "--trial", forbidden, "--out", "one")
    assert f"trial {forbidden} is exported though it breaks a constraint: mse" in with_warning


def invoke_report(file):
    invoke("report", file, "--format", "json", "--out", "report.json", "--no-baselines")
    return "report.json"


def test_where_no_trial_holds_the_run_says_by_how_much_and_exports_nothing(sized):
    file = sized('trials: 4\nconstraints: {r2: ">= 2"}\n')
    said = failed("run", file)
    assert "has no feasible trial, so there is nothing to export: 0 of 4 complete trials hold to r2 >= 2" in said
    assert "(must be >= 2, broken by " in said
    assert not Path("mlruns/bundles/study").exists()
    assert not Path("mlruns/checkpoints/study/best.pt").exists()
    assert failed("run", file) == said  # what is over stays so
    assert "no feasible trial yet" in invoke("status", file)
    assert "has no feasible trial" in refused("export", file)
    assert hpo.open_study(file).best is None
    assert "no feasible one yet" in repr(hpo.open_study(file))
    invoke("report", file, "--format", "html", "--out", "r.html", "--no-baselines")
    assert "No trial holds to the constraints yet" in Path("r.html").read_text()


def test_a_space_without_any_network_that_is_small_enough_is_over_at_once(sized):
    said = failed("run", sized('trials: 30\nconstraints: {n_parameters: "<= 5"}\n'))
    assert "30 more were not trained, since they break one; the nearest is trial" in said


def test_latency_is_measured_of_one_row_and_of_many(sized):
    file = sized('trials: 3\nconstraints: {latency: "<= 1s", latency_256: ">= 0.00001ms"}\n')
    assert summary(invoke("run", file, "--json"))["constraints"]["feasible"] == [0, 1, 2]
    table = hpo.open_study(file).trials
    assert (table["constrained_latency"] > 0).all()
    assert (table["constrained_latency_256"] > 0).all()
    slow = sized('trials: 3\nconstraints: {latency: "<= 0.000001ms"}\n', name="slow.yaml")
    assert "the nearest is trial" in failed("run", slow)


@pytest.mark.parametrize(
    "pruner", [pytest.param("median", marks=pytest.mark.slow), "{name: halving, first: 2, finish: 1}"]
)
def test_stacks_and_halving_hold_to_them(sized, pruner):
    file = sized(
        f"stack: 4\nepochs: 6\ntrials: 16\npruner: {pruner}\n"
        'constraints: {n_parameters: "<= 150", mse: ">= 0.5", latency: "<= 1s"}\n'
    )
    invoke("run", file)
    study = hpo.open_study(file)
    table = study.trials
    complete = table[table["state"] == "COMPLETE"]
    for number in complete.index:  # the value's epoch is the constraint's
        epoch = int(complete["best_epoch"][number]) - 1
        assert complete["constrained_mse"][number] == study.curves(number)["valid_mse"].iloc[epoch]
    assert study.best is None or study.best.metrics["valid_mse"] >= 0.5
    assert (table[table["constrained_n_parameters"] > 150]["epochs"] == 0).all()


SLOW_SAMPLERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("nsgaii", "cmaes")]


@pytest.mark.parametrize("sampler", ["gp", "random", "{name: nsgaii, population_size: 3}", *SLOW_SAMPLERS])
def test_other_samplers_take_constrained_studies(sized, sampler):
    file = sized(f'trials: 14\nepochs: 1\nsampler: {sampler}\nconstraints: {{n_parameters: "<= 200", mse: ">= 0.1"}}\n')
    said = invoke("run", file)
    ignores = sampler in ("cmaes", "random")
    assert (f"the sampler {sampler} does not look at constraints; tpe, gp, nsgaii do" in said) == ignores
    assert "Constraints have been set" not in said
    assert len(hpo.open_study(file).trials) == 14


def test_a_metric_that_is_no_number_at_the_values_epoch_fails_the_trial(sized):
    text = Path("sized.py").read_text()
    Path("sized.py").write_text(
        text.replace('"mse": MeanSquaredError()', '"mse": Never()')
        + "\n\nclass Never(MeanSquaredError):\n    def compute(self):\n        return super().compute() * torch.nan\n"
    )
    said = failed("run", sized('trials: 2\nconstraints: {mse: "<= 1"}\n'))
    assert "mse is not known in epoch 2, and the study needs it of each trial" in said


def test_a_functions_own_constraints_decide_what_is_best(study):
    Path("f.py").write_text(
        "def f(trial):\n    x = trial.suggest_float('x', 0, 1)\n"
        "    trial.set_constraint('small', x - 0.5)\n    return x\n"
    )
    file = study("objective: f.py:f\ndirection: maximize\ntrials: 12\n")
    best = summary(invoke("run", file, "--json"))["best"]
    table = hpo.open_study(file).trials
    assert best["value"] == table["value"][table["value"] <= 0.5].max() < table["value"].max()
    assert "broken by" not in invoke("status", file)


def test_constraints_are_part_of_the_study_and_one_without_stores_nothing_of_them(sized):
    file = sized("trials: 2\n")
    invoke("run", file)
    optunas = hpo.open_study(file).to_optuna()
    assert "constraints" not in optunas.user_attrs["hpo:identity"]
    assert not any("constrain" in key for each in optunas.trials for key in {**each.user_attrs, **each.system_attrs})
    assert not {"feasible", "violation"} & set(hpo.open_study(file).trials.columns)
    said = refused("run", sized('trials: 2\nconstraints: {n_parameters: "<= 100"}\n'))
    assert "constraints.n_parameters is <= 100 here, absent there" in said


def test_what_others_wrote_as_a_constraint_is_refused(sized):
    file = sized('trials: 2\nconstraints: {n_parameters: "<= 300"}\n')
    invoke("run", file)
    import sqlite3

    with sqlite3.connect("mlruns/optuna.db") as database:
        database.execute(
            "UPDATE trial_system_attributes SET value_json = '\"much\"' WHERE key = 'constraints:n_parameters'"
        )
    assert "its constraints:n_parameters is 'much', not a number; hpo did not write that" in refused("status", file)


def test_the_spec_of_a_study_in_python_takes_them(sized):
    sized("")
    with pytest.raises(SpecError, match="r2: must be <= or >="):
        hpo.run({"objective": "sized.py", "constraints": {"r2": math.nan}}, tracking="off", quiet=True)
