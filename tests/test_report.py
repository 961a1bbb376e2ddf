"""`hpo report`: what it says of a study, in each format; studies at the edges; texts that mean harm."""

import base64
import csv
import hashlib
import io
import json
import math
import random
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from datetime import datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from plotly.graph_objects import Figure
from typer.testing import CliRunner

import hpo
from hpo.cli.app import app
from hpo.errors import InputError
from hpo.export.files import finite
from hpo.report import figures, space_figures, texts, time_figures
from hpo.report.axes import HAS_NOT, axis_of, text
from hpo.report.facts import leases_of, read
from hpo.report.page import page
from hpo.report.place import default_path
from hpo.report.searched import distributions
from hpo.search import schema
from tests.cli import invoke, refused, summary
from tests.conftest import ROOT
from tests.searches import PARAMS, HandClock, Opener

VOID = {"meta", "link", "input", "br", "img"}
EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>&\u2028{{ 7*7 }}"


@pytest.fixture
def opened(tmp_path):
    opener = Opener(tmp_path)
    yield opener
    opener.close()


def facts_of(search):
    seen, spec = search.view(), search.spec
    leases = leases_of(search.storage, spec.name)
    return read(search.study, seen.everything, leases, budget=spec.trials, epochs=spec.epochs)


def tried(search, values, epochs=3):
    """Claim a trial for each of `values`, and end it so: a number, `pruned`, `failed`, `retried`."""
    for value in values:
        claim = search.ask()
        for epoch in range(epochs if isinstance(value, float) else 1):
            search.report(claim.number, epoch, value if isinstance(value, float) else 0.25)
        if value == "pruned":
            search.prune(claim.number)
        elif value == "failed":
            search.fail(claim.number, "ValueError: no")
        elif value == "retried":
            search.give_back(claim.number, "interrupted")
        else:
            search.complete(claim.number, value)


def stdout_of(*arguments):
    """Run a command in this process; return what it wrote to stdout alone."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def data_in(html):
    """Return what a page's script reads."""
    return json.loads(re.search(r'<script type="application/json" id="report-data">(.*?)</script>', html, re.S)[1])


class Outline(HTMLParser):
    """A page's tags, which must be closed in their order, its headings, ids, links and scripts."""

    def __init__(self, html):
        super().__init__()
        self.open, self.levels, self.ids, self.links, self.labels, self.scripts = [], [], [], [], [], 0
        self.attributes = []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.attributes += attrs
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if "href" in attrs else []
        self.labels += [attrs["for"]] if "for" in attrs else []
        self.levels += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def checked(html):
    """Return a page's outline, which must be sound."""
    outline = Outline(html)
    assert html.lstrip().startswith('<!DOCTYPE html>\n<html lang="en">')
    assert outline.levels.count(1) == 1
    assert outline.levels[0] == 1
    assert all(after <= before + 1 for before, after in zip(outline.levels, outline.levels[1:], strict=False))
    assert len(outline.ids) == len(set(outline.ids))
    assert {link[1:] for link in outline.links if link.startswith("#")} <= set(outline.ids)
    assert set(outline.labels) <= set(outline.ids)
    assert outline.scripts == 3
    assert not any(name.startswith("on") for name in outline.attributes)
    for figure in data_in(html)["figures"].values():
        Figure(figure)  # plotly's own check of every key
    return outline


# What it says.


def test_facts_of_trials_of_every_state(opened):
    search = opened(trials=7)
    tried(search, [0.5, 0.9, "pruned", "failed", "retried", 0.8])  # the retry is claimed before new trials
    search.ask()
    facts = facts_of(search)
    assert [row["state"] for row in facts.rows][:4] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL"]
    retry = next(row for row in facts.rows if row["retry_of"] is not None)
    assert retry["retry_of"] == 4
    assert facts.best.value == 0.9
    assert facts.best.params["batch_size"] == 16
    assert [row["value"] for row in facts.ranked()][:2] == [0.9, 0.8]
    assert (facts.counts.complete, facts.counts.pruned, facts.counts.failed, facts.counts.running) == (3, 1, 1, 1)
    kinds = {span.number: span.kind for span in facts.work.spans}
    assert kinds[4] == "INTERRUPTED"
    assert kinds[3] == "FAIL"
    assert len(set(kinds)) == 7
    drawn = {trace["name"]: trace for trace in figures.history(facts).figure["data"]}
    assert drawn["best so far"]["y"] == [0.5, 0.9, 0.9]
    assert len({drawn[name]["marker"]["symbol"] for name in ("complete", "pruned", "failed", "running")}) == 4
    assert {bars["name"] for bars in time_figures.timeline(facts).figure["data"]} >= {"interrupted, and retried"}
    said = " ".join(texts.certainty(facts))
    assert "the best of 3 complete trials" in said
    assert "with 0.8 (gap 0.1)" in said
    assert "not known which of these gaps are only noise" in said
    checked(page(facts))


def test_a_pause_is_a_stretch_of_its_own(opened):
    clock = HandClock()
    search = opened(pruner="halving", epochs=4, clock=clock.clock)
    claim = search.ask()
    search.report(claim.number, 0, 0.3)
    clock.move(5)
    search.pause(claim.number)
    facts = facts_of(search)
    (span,) = facts.work.spans
    assert span.kind == "PAUSED"
    assert span.end - span.start == pytest.approx(5, abs=2)  # it was claimed by the machine's own clock
    assert facts.rows[0]["state"] == "PAUSED"
    assert facts.counts.paused == 1
    assert "paused" in {trace["name"] for trace in figures.history(facts).figure["data"]}
    checked(page(facts))


def test_the_test_result_and_how_often_the_test_set_was_read(opened):
    search = opened()
    tried(search, [0.5])
    assert texts.tests_text(facts_of(search)) == "The test set was not read."
    search.remember(schema.RESULT, {"number": 0, "test": {"accuracy": 0.4}, "bundle": None, "parity": None})
    search.remember(schema.TEST_EVALUATIONS, [{}, {}])
    said = texts.tests_text(facts_of(search))
    assert said.startswith("accuracy 0.4: trial 0's params, trained from scratch on train + validation.")
    assert said.endswith("was read 2 times; the more often, the less it says.")
    tried(search, [0.7])
    assert "which is not the best trial now" in texts.tests_text(facts_of(search))


def test_a_param_that_is_null_is_another_in_csv_than_one_that_was_not_asked_for(opened):
    clip = {"type": "categorical", "choices": [None, 1.0]}
    search = opened(params=PARAMS | {"clip": clip}, trials=12)
    tried(search, [random.Random(i).random() for i in range(12)])
    facts = facts_of(search)
    del facts.rows[0]["params_clip"]
    rows = list(csv.DictReader(io.StringIO(texts.as_csv(facts))))
    assert rows[0]["params_clip"] == ""
    assert {row["params_clip"] for row in rows[1:]} == {"null", "1.0"}


def test_params_with_a_branch_stand_under_their_own_name(opened):
    decay = {"type": "float", "low": 1e-6, "high": 1e-1, "log": True, "or": 0}
    search = opened(params=PARAMS | {"weight_decay": decay}, trials=30)
    tried(search, [random.Random(i).random() for i in range(30)])
    facts = facts_of(search)
    assert "weight_decay" in facts.importances
    assert not [name for name in facts.importances if ":or" in name]
    assert sum(facts.importances.values()) == pytest.approx(1)
    drawing = next(each for each in space_figures.slices(facts) if each.title == "weight_decay")
    assert drawing.figure["layout"]["xaxis"]["ticktext"][0] == "0"
    html = page(facts)
    assert ":or" not in html.partition("<script>")[0]
    checked(html)


def test_places_on_an_axis():
    log = axis_of("x", {"low": 1e-4, "high": 1e-1, "log": True, "otherwise": 0}, [1e-2, 0, HAS_NOT])
    assert log.place(1e-2) == pytest.approx(-2)
    assert log.place(HAS_NOT) < log.place(0) < log.place(1e-4)
    assert log.ticks()[1] == ["none", "0", "0.0001", "0.001", "0.01", "0.1"]
    choices = axis_of("x", {"choices": ["a", "b", True]}, ["b"])
    assert [choices.place(each) for each in ("a", "b", True)] == [0, 1, 2]
    odd = axis_of("x", {"choices": [True, 1, "1", None]}, [None, HAS_NOT])
    assert [odd.place(each) for each in (HAS_NOT, True, 1, "1", None)] == [-1, 0, 1, 2, 3]
    assert odd.ticks() == ([-1, 0, 1, 2, 3], ["none", "True", "1", "'1'", "None"])
    long = axis_of("x", {"choices": ["y" * 100 + "1", "y" * 100 + "2"]}, [])
    assert len(set(map(long.place, long.choices))) == 1 or long.ticks()[0] == [0, 1]
    fixed = axis_of("x", {"low": 3, "high": 3, "log": False}, [3])
    assert math.isfinite(fixed.place(3))
    assert text("<b>&\n" + "z" * 99) == "&lt;b&gt;&amp; " + "z" * 34 + "…"


def test_choices_that_are_equal_but_not_the_same_are_two():
    choices = CategoricalDistribution((True, 1, "1", None))
    trial = create_trial(params={"x": 1}, distributions={"x": choices}, value=0.0)
    assert list(map(repr, distributions([trial])["x"]["choices"])) == ["True", "1", "'1'", "None"]


def test_far_worse_values_are_counted_of_all_trials_and_not_of_those_drawn(opened):
    search = opened(trials=3)
    tried(search, [0.3, 0.2, 0.1])
    facts = facts_of(search)
    points = [replace(facts.points[0], number=n, value=-1e6 if n % 10 == 0 else n / 1e4) for n in range(10_000)]
    assert "1,000 far worse ones" in figures.history(replace(facts, points=points)).note


# Formats.


def test_the_command_writes_each_format(study):
    path = study(
        """
        metric: r2
        trials: 4
        params:
          learning_rate: {type: float, low: 1e-3, high: 1e-1, log: true}
        """
    )
    invoke("run", path)
    out = stdout_of("report", path).rstrip()
    assert out == "mlruns/reports/study/report.html"
    html = (path.parent / out).read_text()
    checked(html)
    best = hpo.open_study(path).best
    assert f'id="best-value">{best.value:.6g}<' in html
    assert "measured once more on the 50 validation rows" in html
    assert "linear regression" in html
    whole = json.loads(stdout_of("report", path, "--format", "json"))
    assert whole["best"]["number"] == best.number
    assert whole["judged"]["measured"]["r2"] == pytest.approx(best.value, abs=1e-6)
    assert len(whole["judged"]["residuals"]["targets"]) == 50
    assert whole["judged"]["baselines"]["rows"][1]["value"] == pytest.approx(1.0, abs=1e-4)
    rows = list(csv.DictReader(io.StringIO(stdout_of("report", path, "--format", "csv"))))
    table = hpo.open_study(path).trials.reset_index()
    assert list(rows[0]) == list(table.columns)
    assert [float(row["value"]) for row in rows] == list(table["value"])
    short = stdout_of("report", path, "--format", "md")
    assert f"r2 **{best.value:.6g}**, trial {best.number}" in short
    assert stdout_of("report", path, "--out", "a/b.md") == "a/b.md\n"
    assert (path.parent / "a" / "b.md").read_text() == short
    assert stdout_of("report", path, "--format", "md", "--out", "-") == short
    assert "the report a cannot be written (it is a folder); give another place by --out" in refused(
        "report", path, "--out", "a"
    )
    assert not list(path.parent.rglob("*.part"))


def test_without_the_objective_or_a_study(study):
    path = study()
    assert "run it first: hpo run" in refused("report", path)
    invoke("run", path)
    assert "they were not asked for" in stdout_of("report", path, "--no-baselines", "--out", "-")
    (path.parent / "mlruns" / "checkpoints" / "study" / "best.pt").unlink()
    assert "there are no weights of the best trial" in stdout_of("report", path, "--out", "-")
    (path.parent / "linear.py").write_text("raise RuntimeError('</script>')\n")
    html = stdout_of("report", path, "--out", "-")
    assert "there are no residuals and baselines: " in html
    checked(html)
    (path.parent / "linear.py").unlink()
    assert "r2" in stdout_of("report", path, "--format", "md")


def test_texts_need_no_torch(study):
    path = study()
    invoke("run", path)
    code = (
        "import sys; from hpo.cli.app import app\n"
        f"for form in ('md', 'csv'): app(['report', {str(path)!r}, '--format', form], standalone_mode=False)\n"
        "heavy = {'torch', 'mlflow', 'pandas', 'plotly', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_api_gives_pages_and_curves(study):
    path = study()
    invoke("run", path)
    found = hpo.open_study(path)
    assert found.report() == path.parent.joinpath("mlruns/reports/study/report.html").relative_to(path.parent)
    assert "this report is of the storage alone" in found.report(path.parent / "x.html").read_text()
    figure = found.plot_curves()
    assert figure.layout.yaxis.title.text == "valid_r2"
    bold = {trace.name for trace in figure.data if trace.line.width == 3}
    assert bold == {"trial 0", "trial 1", "trial 2"}
    assert found.plot_curves("train_loss").data
    with pytest.raises(InputError, match='has reported valid_r3; did you mean "valid_r2"'):
        found.plot_curves("valid_r3")


def test_a_function_that_counts_steps_of_its_own_has_its_curves_by_them(study):
    def function(trial):
        x = trial.suggest_float("x", 0, 1)
        for step in (100, 300, 200):
            trial.report(x + step, step)
        with pytest.warns(UserWarning, match="already reported"):
            trial.report(7.0, 300)
        return x

    found = hpo.run(function, name="own", metric="loss", trials=2)
    x = found.to_optuna().trials[1].params["x"]
    curves = found.curves(1)
    assert (curves.index.name, list(curves.index)) == ("step", [100, 200, 300])
    assert list(curves["loss"] - x) == pytest.approx([100, 200, 300])
    figure = found.plot_curves()
    assert figure.layout.xaxis.title.text == "step"
    assert {tuple(trace.x) for trace in figure.data} == {(100, 200, 300, None)}
    assert all("step %{x}" in trace.hovertemplate for trace in figure.data)


# Edges.


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ([], {}),
        (["failed", "failed"], {}),
        ([0.5], {}),
        ([0.5, 0.5, 0.5, 0.5, 0.5], {}),
        ([0.1, -1e300, float("inf"), 0.2, 0.3], {}),
        ([0.5, 0.6], {"params": {"batch_size": 16}}),
        ([0.5, 0.6, 0.7, "pruned"], {"params": {"kind": {"type": "categorical", "choices": [True, "a", 1.5, "b"]}}}),
    ],
    ids=["empty", "failed only", "one", "equal", "far and infinite", "all fixed", "choices"],
)
def test_studies_at_the_edges(opened, values, keys):
    search = opened(**keys)
    tried(search, values)
    facts = facts_of(search)
    html = page(facts)
    checked(html)
    assert json.loads(texts.as_json(facts, None))["counts"]["failed"] == values.count("failed")
    assert "NaN" not in texts.as_json(facts, None)
    assert "Infinity" not in texts.as_json(facts, None)
    assert texts.as_markdown(facts).count("\n## Best\n") == 1
    assert ("No trial is complete yet" in html) == (facts.best is None)
    json.loads(json.dumps(data_in(html)), parse_constant=lambda name: pytest.fail(name))


def test_far_worse_values_do_not_squeeze_the_others(opened):
    search = opened(maximize=False, trials=9)
    tried(search, [0.5, 0.4, 0.45, 0.3, 0.35, 1e9, 0.32])
    drawing = figures.history(facts_of(search))
    assert drawing.figure["layout"]["yaxis"]["range"][1] < 1
    assert "1 far worse ones are beyond the axis" in drawing.note


def test_a_plain_function_and_adopted_history(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def old(trial):
        x = trial.suggest_float("x", -1, 1)
        return x**2 + (trial.suggest_int("only sometimes", 1, 3) if x > 0 else 0)

    earlier = optuna.create_study(study_name="earlier")
    earlier.optimize(old, n_trials=5)
    hpo.adopt(old, earlier, tracking="off", quiet=True)
    study = hpo.run(old, trials=8, tracking="off", quiet=True)
    html = study.report().read_text()
    checked(html)
    assert len(data_in(html)["table"]["rows"]) == 8
    assert "curves-plot" not in html.partition("<script>")[0]
    with pytest.raises(InputError, match="has reported value; known: none"):
        study.plot_curves()


def test_ten_thousand_trials_are_thinned_in_seconds():
    study, trials = of_many(10_000)
    start = time.perf_counter()
    facts = read(study, trials, {}, budget=10_000, epochs=20)
    html = page(facts)
    assert time.perf_counter() - start < 60  # about 4 s on an idle machine
    data = data_in(html)
    assert len(data["table"]["rows"]) == 10_000
    for key, figure in data["figures"].items():
        assert sum(len(trace.get("x", ())) for trace in figure["data"]) < 6000, key
        assert "".join(data["notes"][key]) or key == "importance"
    assert len(html) < 9e6
    assert "2,0" in data["notes"]["history"]
    assert " of 10,000 trials are drawn." in data["notes"]["history"]
    assert "200 of 10,000 trials are drawn." in data["notes"]["curves-0"]
    best = min(trial.value for trial in trials if trial.state == TrialState.COMPLETE)
    assert data["figures"]["history"]["data"][-1]["y"][-1] == best


def of_many(n):
    """Return a study and that many trials of it, three in ten of them pruned."""
    draw, start = random.Random(0), datetime.now() - timedelta(days=1)
    of = {
        "rate": FloatDistribution(1e-4, 1e-1, log=True),
        "n": IntDistribution(8, 64),
        "kind": CategoricalDistribution(["a", "b"]),
    }
    trials = []
    for slot in range(n):
        params = {"rate": 10 ** draw.uniform(-4, -1), "n": draw.randint(8, 64), "kind": draw.choice("ab")}
        curve = [draw.random() + 1 / (epoch + 1) for epoch in range(20)]
        pruned = draw.random() < 0.3
        trial = create_trial(
            state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
            value=curve[-1],
            params=params,
            distributions=of,
            intermediate_values=dict(enumerate(curve)),
            user_attrs={schema.SLOT: slot, schema.CURVES: {"valid_loss": curve}},
        )
        trial.number, trial.datetime_start = slot, start + timedelta(seconds=slot)
        trial.datetime_complete = trial.datetime_start + timedelta(seconds=5)
        trials.append(trial)
    study = optuna.create_study(study_name="many")
    study.set_user_attr(schema.IDENTITY, {"metric": "loss", "objective": "o", "params": {"rate": {}}})
    return study, trials


# Texts that mean harm, and secrets.


def test_of_equals_the_report_and_python_name_the_trial_that_the_study_does(study):
    path = study("trials: 3\nepochs: 1\nstack: 1\npruner: none\n")
    invoke("run", path)
    storage = optuna.storages.RDBStorage("sqlite:///mlruns/optuna.db")
    for trial_id, loss in ((1, 0.3), (2, 0.1), (3, 0.2)):
        with storage.engine.begin() as connection:  # as three trials of one value would have been written
            connection.exec_driver_sql(f"update trial_values set value = 0.5 where trial_id = {trial_id}")
            attr = f"'{{\"valid_loss\": {loss}}}' where trial_id = {trial_id} and key = 'metrics'"
            connection.exec_driver_sql(f"update trial_user_attributes set value_json = {attr}")
    storage.engine.dispose()
    assert summary(invoke("status", path, "--json"))["best"]["number"] == 1
    assert hpo.open_study(path).best.number == 1
    invoke("report", path, "--out", "report.json", "--no-baselines")
    report = json.loads(Path("report.json").read_text())
    assert (report["best"]["number"], report["ranking"]) == (1, [1, 2, 0])


def test_no_text_breaks_out_of_the_page_or_its_data():
    study = optuna.create_study(study_name=EVIL)
    attrs = {
        schema.IDENTITY: {"metric": EVIL, "objective": EVIL, "params": {EVIL: {}, f"fixed{EVIL}": EVIL}},
        schema.STUDY_FILE: json.dumps({"objective": EVIL, EVIL: EVIL}),
        schema.RESULT: {"number": 0, "test": {EVIL: 0.5}, "bundle": EVIL},
        schema.STACK_PATHS: [EVIL],
        schema.STACK: {"choice": {"why": EVIL}},
        schema.DATA: EVIL,
    }
    for key, value in attrs.items():
        study.set_user_attr(key, value)
    of = {EVIL: CategoricalDistribution([EVIL, EVIL * 50, "\ud800"]), "x": FloatDistribution(0, 1)}
    trials = []
    for number in range(12):
        trial = create_trial(
            value=number / 7,
            params={EVIL: [EVIL, EVIL * 50, "\ud800"][number % 3], "x": number / 12},
            distributions=of,
            intermediate_values={0: 0.1},
            user_attrs={schema.ERROR: EVIL, schema.CURVES: {EVIL: [0.1], f"valid_{EVIL}": [0.1]}},
            system_attrs={schema.LEASE: {"worker": EVIL}},
        )
        trial.number, trial.datetime_start, trial.datetime_complete = number, datetime.now(), datetime.now()
        trials.append(trial)
    judged = {
        "n_valid": 3,
        "notes": [EVIL],
        "measured": {EVIL: 0.5},
        "confusion": {"classes": [EVIL, "b"], "counts": [[1, 0], [0, 2]]},
        "baselines": {"rows": [{"name": EVIL, "value": 0.5, "seconds": 1.0}]},
    }
    facts = read(study, trials, {}, budget=12)
    html = page(facts, judged)
    checked(html)  # three scripts, no handler of events, whatever the texts say
    assert "<img" not in html.partition("<script>")[0]
    assert "7*7" in html
    assert "alert(1)</script>" not in html
    data = data_in(html)
    assert data["table"]["rows"][0][data["table"]["columns"].index("error")] == EVIL  # the table's cells are texts
    drawn = json.dumps({key: figure for key, figure in data["figures"].items() if key != "parallel"})
    assert "<script" not in drawn  # plotly would take small HTML in a text
    assert "<img" not in drawn
    assert "&lt;script&gt;alert(1)" in drawn
    rows = list(csv.DictReader(io.StringIO(texts.as_csv(facts))))
    assert rows[0]["error"] == EVIL
    assert json.loads(texts.as_json(facts, judged))["name"] == EVIL
    assert "<script>" not in texts.as_markdown(facts)
    page(facts, judged).encode("utf-8", "replace")
    assert default_path("out", "../../" + EVIL).parents[1].as_posix() == "out/reports"


def test_secrets_are_masked(opened):
    secret = "postgresql://me:hunter2@host/db"
    search = opened(params=PARAMS | {"url": secret}, trials=2)
    claim = search.ask()
    search.storage.set_trial_user_attr(search.study.get_trials()[claim.number]._trial_id, schema.ERROR, secret)
    search.complete(claim.number, 0.5)
    search.remember(schema.STUDY_FILE, json.dumps({"storage": secret}))
    facts = facts_of(search)
    for whole in (page(facts), texts.as_json(facts, None), texts.as_csv(facts), texts.as_markdown(facts)):
        assert "hunter2" not in whole
        assert "me:" in whole


def test_what_others_wrote_into_the_storage_is_left_out(opened):
    search = opened()
    tried(search, [0.5, 0.6])
    for key in (schema.RESULT, schema.TEST_EVALUATIONS, schema.STACK_PATHS, schema.STACK, schema.STUDY_FILE):
        search.remember(key, 7)
    trial = search.study.get_trials()[0]
    study = optuna.create_study(study_name="s")
    study.set_user_attr(schema.IDENTITY, {"params": {"n_hidden": {}}})
    trial.set_user_attr(schema.CURVES, ["no"])
    assert read(study, [trial], {}, budget=1).curves
    checked(page(facts_of(search)))


def test_the_page_lets_no_other_script_run_and_asks_for_nothing(opened):
    search = opened()
    tried(search, [0.5])
    html = page(facts_of(search))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', html)[1]
    assert policy.startswith("default-src &#39;none&#39;; script-src &#39;sha256-")
    assert "script-src 'unsafe-inline'" not in policy.replace("&#39;", "'")
    for script in re.findall(r"<script>(.*?)</script>", html, re.S):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy.replace("&#43;", "+")
    assert "showSendToCloud: false" in html


def test_the_merged_timeline_keeps_the_time_that_was_used():
    study, trials = of_many(3000)
    drawing = time_figures.timeline(read(study, trials, {}, budget=3000))
    (bars,) = drawing.figure["data"]
    assert len(bars["x"]) <= time_figures.MOST_SPANS
    assert max(base + length for base, length in zip(bars["base"], bars["x"], strict=True)) == pytest.approx(3004)
    assert "There are too many to tell them apart" in drawing.note
    assert finite(drawing.figure) == drawing.figure


def test_the_template_is_in_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hpo"]
    files = {file.name for pattern in data for file in (ROOT / "hpo").glob(pattern)}
    assert {"page.html", "page.css", "page.js"} <= files
