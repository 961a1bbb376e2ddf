"""Trials that are paused and resumed: by a worker, by several, after an interruption, in each storage."""

from contextlib import closing, suppress
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo.errors import Interrupted, SpecError
from hpo.runner.checkpoints import folder_of
from hpo.runner.prepare import prepare
from hpo.runner.worker import work
from hpo.search.budget import trained
from hpo.search.curves import curves_in, reported
from hpo.search.opening import open_search
from hpo.search.pruning import settle_pruner
from hpo.search.queue import Queue
from hpo.search.search import Search
from hpo.study.spec import Plugin
from hpo.study.value import value_of
from hpo.tracking.base import MemoryTracker
from tests.logged import recorded
from tests.screens import Screen
from tests.searches import Opener, StopWhen, stored
from tests.test_checkpoints import OBJECTIVE

TEXT = "objective: noisy.py\ntrials: 8\nepochs: 8\nsampler: random\ndevice: cpu\n"
HALVING = "pruner: {name: halving, first: 2, finish: 1}\n"


class Study:
    """A study in the folder, run by as many workers, one after the other, as it is asked for."""

    def __init__(self, name, text, objective=OBJECTIVE.replace("DROPOUT", "0.0"), **overrides):
        Path("noisy.py").write_text(objective)
        file = Path(f"{name}.yaml")
        file.write_text(f"{TEXT}storage: sqlite:///{name}.db\n{text}")
        self.plan = prepare(file, {key: str(value) for key, value in overrides.items()})
        self.tracker, self.screen = MemoryTracker(), Screen()

    def run(self, during=lambda number, epoch: None, stop=None):
        self.screen._during = during
        with closing(self._open()) as search, recorded() as self.said, suppress(Interrupted):
            work(self.plan, self.plan.load_data(), search, self.tracker, self.screen, stop)
        return self

    def _open(self):
        return open_search(self.plan.spec, self.plan.space, self.plan.metric, maximize=self.plan.maximize)

    @property
    def view(self):
        with closing(self._open()) as search:
            return search.view()

    def curves(self):
        """Return of each trial of the budget what it has reported, by its slot."""
        return {t.user_attrs["place"]: [v for _, v in sorted(t.intermediate_values.items())] for t in self.view.trials}

    @property
    def folder(self):
        return folder_of(self.plan)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_resumed_trial_has_the_curve_that_it_would_have_had_without_the_pause():
    whole = Study("whole", "pruner: none\nstack: 1\n").run().curves()
    done = Study("halving", f"{HALVING}stack: 1\n").run()
    curves = done.curves()
    assert {len(curve) for curve in curves.values()} >= {2, 8}
    assert {slot: whole[slot][: len(curve)] for slot, curve in curves.items()} == curves  # to the last bit
    assert done.view.best().value == max(map(max, whole.values()))
    assert done.view.effort.epochs == sum(map(len, curves.values())) < 0.6 * 64


@pytest.mark.parametrize("stack", [1, 4, pytest.param(64, marks=pytest.mark.slow)])
def test_each_trial_has_one_end_and_storage_tracker_and_screen_agree_on_it(stack):
    done = Study("s", f"{HALVING}stack: {stack}\n").run()
    view = done.view
    assert (view.counts.finished, view.counts.paused, len(view.everything)) == (8, 0, 8)
    ends = {t.number: t.state.name for t in view.trials}
    assert set(ends.values()) == {"COMPLETE", "PRUNED"}
    assert {number: state for number, (state, _) in done.tracker.ended.items()} == ends
    assert sorted((number, state) for number, state, *_ in done.screen.ended) == sorted(ends.items())
    assert done.tracker.paused == set()
    for trial in view.trials:
        steps = [step for step, _ in done.tracker.metrics[trial.number]]
        assert steps == sorted(trial.intermediate_values) == list(range(len(steps)))  # each epoch was logged once
        curves = view.curves(trial.number)
        assert curves["valid_r2"] == list(trial.intermediate_values.values())
        if trial.state == TrialState.PRUNED:
            assert trial.user_attrs["paused_at"] == len(steps)
            assert trial.value == curves["valid_r2"][-1]
    assert len(done.screen.paused) == view.effort.paused
    assert not list(done.folder.glob("place-*"))


def test_a_trial_is_said_to_have_taken_what_it_was_trained_for():
    """Also one that a run before has trained and paused, and that is pruned by this one."""
    done = Study("s", f"{HALVING}stack: 1\n")
    done.run(stop=StopWhen(lambda: len(done.screen.paused) > 5, in_time=True))
    done.screen = Screen()
    done.run()
    seconds = {trial.number: trained(trial) for trial in done.view.trials}
    pruned = [number for number, state, *_ in done.screen.ended if state == "PRUNED"]
    assert len(pruned) > 2
    for number, *_ in done.screen.ended:
        assert done.screen.seconds[number] == pytest.approx(seconds[number], abs=0.3)
        assert done.screen.seconds[number] > 0
    assert {number for number, params in done.screen.started if params} >= set(pruned)


def test_time_is_counted_while_trials_are_trained_only():
    done = Study("s", f"{HALVING}stack: 1\n").run()
    with closing(done._open()) as search:
        used = search.seconds_used()
    spans = [t.datetime_complete.timestamp() - t.datetime_start.timestamp() for t in done.view.trials]
    assert 0 < used < sum(spans)  # most were paused until the study's end


@pytest.mark.parametrize(
    "at",
    [
        pytest.param((0, 1), id="first", marks=pytest.mark.slow),
        pytest.param((3, 2), id="at a rung"),
        pytest.param((2, 3), id="resumed"),
        pytest.param((0, 6), id="late", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_study_comes_to_the_same_end(at):
    undisturbed = Study("one", f"{HALVING}stack: 1\n").run().curves()
    study, seen = Study("two", f"{HALVING}stack: 1\n"), []
    stop = StopWhen(lambda: bool(seen), in_time=True)
    study.run(lambda number, epoch: seen.append(1) if epoch == at[1] and number >= at[0] else None, stop)
    assert seen
    assert study.view.counts.unfinished
    again = study.run()
    assert again.curves() == undisturbed
    assert (again.view.counts.finished, again.view.counts.unfinished) == (8, 0)


def test_a_study_is_resumed_by_another_process_from_the_checkpoints_on_disk():
    undisturbed = Study("one", f"{HALVING}stack: 1\n").run().curves()
    study = Study("two", f"{HALVING}stack: 1\n")
    started = []
    study.run(lambda number, epoch: started.append(number), StopWhen(lambda: len(set(started)) > 6, in_time=True))
    assert study.view.counts.paused >= 6
    assert len(list(study.folder.glob("place-*"))) >= 6
    assert Study("two", f"{HALVING}stack: 1\n").run().curves() == undisturbed


def test_one_whose_checkpoint_is_gone_is_trained_from_scratch_and_that_is_said_and_counted():
    undisturbed = Study("one", f"{HALVING}stack: 1\n").run().curves()
    study, started = Study("two", f"{HALVING}stack: 1\n"), []
    study.run(lambda number, epoch: started.append(number), StopWhen(lambda: len(set(started)) > 6, in_time=True))
    for file in study.folder.glob("place-*"):
        file.unlink()
    again = study.run()
    assert again.curves() == undisturbed  # the same curves: they follow from params and seed
    assert again.view.effort.restarted > 0
    assert f"{again.view.effort.restarted} resumed from scratch" in again.view.effort.text()
    assert any("starts from scratch" in line for line in again.said)
    for trial in again.view.trials:
        steps = [step for step, _ in again.tracker.metrics[trial.number]]
        assert sorted(set(steps)) == list(range(len(trial.intermediate_values)))


KEEPING = OBJECTIVE.replace("DROPOUT", "0.0").replace(
    "class Noisy(Objective):",
    """
from collections import deque

class Warming(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.steps, self.seen, self.last = 0, [], deque(maxlen=20)
        self.register_buffer("n", torch.zeros(()), persistent=False)
        self.held, self.drawing = [nn.BatchNorm1d(4, affine=False)], torch.Generator().manual_seed(1)
        self.mean = torch.zeros(1)

    def forward(self, x):
        if self.training and "HOW" == "a buffer":
            self.n += 1
        if self.training and "HOW" == "a count":
            self.steps += 1
        if self.training and "HOW" == "a list":
            self.seen.append({"n": x.mean().detach()})
        if self.training and "HOW" == "a deque":
            self.last.append(0)
        if self.training and "HOW" == "a module in a list":
            self.held[0](x)
        if self.training and "HOW" == "a generator":
            x = x + 0.01 * torch.rand(1, generator=self.drawing)
        if self.training and "HOW" == "numbers behind torch's back":
            self.mean.data += 1
        n = self.n + self.steps + len(self.seen) + len(self.last) + self.held[0].num_batches_tracked + self.mean
        return super().forward(x) * (1 if "HOW" == "the objective" else min(1.0, n / 20))


class Noisy(Objective):
    def loss(self, outputs, targets, params):
        self.n = getattr(self, "n", 0) + torch.is_grad_enabled() * ("HOW" == "the objective")
        return F.mse_loss(outputs, targets) + min(1.0, self.n / 20) * outputs.square().mean()
""",
)
KEEPING = KEEPING.replace("        return nn.Sequential(", "        self.n = 0\n        return Warming(")


KEPT = ("a buffer", "a count", "a list", "the objective", "numbers behind torch's back")


@pytest.mark.parametrize(
    "how",
    [
        *("numbers behind torch's back", "a generator"),
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("a count", "a deque", "a buffer", "a list")),
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("the objective", "a module in a list")),
    ],
)
def test_what_training_changes_outside_of_weights_is_there_when_it_is_resumed(how):
    """Else it is trained from scratch, which is said: its curve is that without a pause either way."""
    objective = KEEPING.replace("HOW", how)
    whole = Study("whole", "pruner: none\nstack: 1\n", objective).run().curves()
    study, started = Study("halving", f"{HALVING}stack: 1\n", objective), []
    study.run(lambda number, epoch: started.append(number), StopWhen(lambda: len(set(started)) > 6, in_time=True))
    done = study.run()  # from the disk; those of its own pauses from memory
    curves = done.curves()
    assert 8 in {len(curve) for curve in curves.values()}
    assert {slot: whole[slot][: len(curve)] for slot, curve in curves.items()} == curves
    said = [line for line in done.said if "had changed in training, and is nothing that a checkpoint can hold" in line]
    assert (done.view.effort.restarted > 0) == bool(said) == (how not in KEPT)


def test_one_that_is_damaged_is_refused_with_the_reason():
    study, started = Study("two", f"{HALVING}stack: 1\n"), []
    study.run(lambda number, epoch: started.append(number), StopWhen(lambda: len(set(started)) > 6, in_time=True))
    for file in study.folder.glob("place-*"):
        file.write_bytes(b"no checkpoint")
    again = study.run()
    assert any("is not resumed from: it cannot be read" in line for line in again.said)
    assert again.view.counts.finished == 8


def test_one_whose_worker_dies_just_before_it_is_told_to_be_paused_is_paused_then(monkeypatch):
    """Its checkpoint is there, and it has not been chosen to be trained on."""
    undisturbed = Study("one", f"{HALVING}stack: 1\n").run().curves()
    real, died = Search.pause, []

    def dies(self, number):
        if len(died) < 3:
            died.append(number)
            raise Interrupted("killed")
        real(self, number)

    monkeypatch.setattr(Search, "pause", dies)
    study = Study("two", f"{HALVING}stack: 1\n")
    for _ in range(5):
        study.run()
    assert len(died) == 3
    assert study.view.counts.unfinished == 0
    assert study.curves() == undisturbed


def test_without_memory_for_them_paused_trials_are_read_from_disk():
    undisturbed = Study("one", f"{HALVING}stack: 1\n").run().curves()
    text = "pruner: {name: halving, first: 2, finish: 1, memory: 0}\nstack: 1\n"
    assert Study("two", text).run().curves() == undisturbed


def test_another_pruner_takes_up_what_is_paused():
    study, started = Study("s", f"{HALVING}stack: 1\n"), []
    study.run(lambda number, epoch: started.append(number), StopWhen(lambda: len(set(started)) > 6, in_time=True))
    assert study.view.counts.paused
    again = Study("s", "pruner: none\nstack: 1\n").run()
    assert [len(curve) for curve in again.curves().values()] == [8] * 8


def test_a_lower_budget_withdraws_no_paused_trial():
    study, started = Study("s", f"{HALVING}stack: 1\n"), []
    study.run(lambda number, epoch: started.append(number), StopWhen(lambda: len(set(started)) > 6, in_time=True))
    paused = study.view.paused
    again = Study("s", f"{HALVING}stack: 1\n", trials=3).run()
    assert len(paused) == 6
    states = {t.number: t.state.name for t in again.view.trials}
    assert {states[number] for number in paused} == {"COMPLETE", "PRUNED"}
    assert again.view.counts.unfinished == 0


class TestDefault:
    def test_stacks_are_pruned_by_halving_and_that_is_said_once(self):
        done = Study("s", "stack: 4\n").run()
        assert [line for line in done.said if line.startswith("pruner: halving, since 4 trials")] != []
        assert done.view.counts.pruned > 0
        assert not any("pruner:" in line for line in done.run().said)

    def test_one_at_a_time_by_the_median(self):
        done = Study("s", "stack: 1\n").run()
        assert [len(curve) for curve in done.curves().values()] == [8] * 8  # of 8 trials it prunes none
        assert not any("pruner:" in line for line in done.said)

    def test_what_the_file_names_stands(self):
        done = Study("s", "stack: 4\npruner: none\n").run()
        assert [len(curve) for curve in done.curves().values()] == [8] * 8

    def test_what_was_begun_before_stays_as_it_was(self, tmp_path):
        opener = Opener(tmp_path)
        first = opener(epochs=8)
        first.complete(first.ask().number, 0.5)
        later = opener(epochs=8)
        later.spec.model_fields_set.discard("pruner")
        assert not settle_pruner(later, 4, stacked=True)
        assert later.halving is None
        opener.close()

    def test_all_workers_have_the_first_ones_choice(self, tmp_path):
        opener = Opener(tmp_path)
        searches = [opener(epochs=8) for _ in range(2)]
        for search in searches:
            search.spec.model_fields_set.discard("pruner")
        assert settle_pruner(searches[0], 4, stacked=True)
        assert not settle_pruner(searches[1], 1, stacked=False)
        assert searches[1].halving.rungs == searches[0].halving.rungs == (2, 4)
        opener.close()


class TestSearch:
    def open(self, opener, url=None):
        more = {} if url is None else {"storage": url}
        pruner = Plugin(name="halving", first=2)
        searches = [opener(pruner=pruner, epochs=8, trials=4, **more) for _ in range(2)]
        for search in searches:
            settle_pruner(search, 1, stacked=False)
        return searches

    def train(self, search, claim, value):
        """Train a claimed trial to its next rung, or its end."""
        for epoch in range(claim.n_reported, 8):
            with search.together():
                assert search.report(claim.number, epoch, value)
                if epoch == 7:
                    return search.complete(claim.number, value)
                if epoch + 1 == search.halving.next_pause(claim.paused_at):
                    return search.pause(claim.number)
        return None

    def at_the_first_rung(self, opener):
        """Return two workers of a study of which one has trained all trials to their first rung."""
        one, other = self.open(opener)
        for claim in [one.ask() for _ in range(4)]:
            self.train(one, claim, 0.1 * (claim.slot + 1))
        return one, other

    @pytest.mark.parametrize("kind", ["sqlite", "journal"])
    def test_what_a_peer_pauses_between_the_look_and_the_claim_is_resumed(self, tmp_path, kind, monkeypatch):
        """A new one to its first rung, say: it is not started from scratch, as it was when it was looked at."""
        opener = Opener(tmp_path)
        one, other = self.open(opener, url={"sqlite": None, "journal": f"journal:///{tmp_path}/s.log"}[kind])
        real, trained = Queue._chosen, []

        def chosen(queue, halving, n):
            found = real(queue, halving, n)
            if queue is one._queue and not trained:
                trained.append(claim := other.ask())
                self.train(other, claim, 0.3)
            return found

        monkeypatch.setattr(Queue, "_chosen", chosen)
        claim = one.ask()
        assert (claim.number, claim.n_reported, claim.is_resumed) == (trained[0].number, 2, True)
        opener.close()

    @pytest.mark.parametrize("kind", ["sqlite", "journal", "postgresql"])
    def test_two_workers_in_each_storage(self, tmp_path, kind, request):
        opener = Opener(tmp_path)
        url = {"sqlite": None, "journal": f"journal:///{tmp_path}/s.log"}.get(kind)
        if kind == "postgresql":
            url = request.getfixturevalue("server").database()
        one, other = self.open(opener, url=url)
        rounds = 0
        while True:
            claims = [(search, claim) for search in (one, other) if (claim := search.ask()) is not None]
            if not claims:
                break
            for search, claim in claims:
                self.train(search, claim, 0.1 * (claim.slot + 1))
            rounds += 1
        assert rounds > 3
        view = one.view()
        assert (view.counts.finished, len(view.everything)) == (4, 4)
        assert view.best().value == pytest.approx(0.4)
        ended = {lost.number for search in (one, other) for lost in search.drain_lost()}
        assert ended == {t.number for t in view.trials if t.state == TrialState.PRUNED}
        opener.close()

    def test_a_peer_sees_that_a_trial_was_resumed_and_paused_again(self, tmp_path):
        opener = Opener(tmp_path)
        one, other = self.at_the_first_rung(opener)
        assert set(other.view().paused.values()) == {2}
        self.train(one, one.ask(), 0.9)
        assert sorted(other.view().paused.values()) == [2, 2, 2, 4]
        opener.close()

    def test_of_two_that_claim_the_same_paused_trial_one_gets_it(self, tmp_path):
        opener = Opener(tmp_path)
        one, other = self.at_the_first_rung(opener)
        claims = [one.ask_up_to(4), other.ask_up_to(4)]
        assert [len(each) for each in claims] == [2, 0]
        assert all(claim.is_resumed and claim.n_reported == 2 for claim in claims[0])
        opener.close()

    def test_one_whose_worker_dies_after_it_was_resumed_is_retried_past_its_rung(self, tmp_path):
        opener = Opener(tmp_path)
        one, other = self.at_the_first_rung(opener)
        resumed = one.ask()
        one.give_back(resumed.number, "interrupted")
        again = other.ask()
        assert (again.is_retry, again.slot, again.paused_at) == (True, resumed.slot, 2)
        assert dict(again.params) == dict(resumed.params)
        assert stored(other, resumed.number).state == TrialState.FAIL
        opener.close()


OWN = """
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import R2Score
from hpo import Data, Objective, Split


class Own(Objective):
    defaults = {"learning_rate": 0.1}
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 0.5, "log": True}}

    def data(self):
        x = torch.linspace(-1, 1, 60).unsqueeze(1)
        splits = [Split(inputs={"x": x[i::3]}, targets=2 * x[i::3]) for i in range(3)]
        return Data(train=splits[0], valid=splits[1], test=splits[2])

    def metrics(self):
        return {"r2": R2Score()}

    def train(self, params, report, resume):
        network = nn.Linear(1, 1)
        start = 0
        if resume is not None:
            network.load_state_dict(resume["network"])
            start = resume["epochs"]
        optimizer = torch.optim.SGD(network.parameters(), params["learning_rate"])
        for epoch in range(start, report.epochs):
            optimizer.zero_grad()
            F.mse_loss(network(report.train.inputs["x"]), report.train.targets).backward()
            optimizer.step()
            loss = F.mse_loss(network(report.valid.inputs["x"]), report.valid.targets).item()
            if not report({"r2": 1 - loss}, {"network": network.state_dict(), "epochs": epoch + 1}):
                break
        return network
"""

FUNCTION = "def own(trial):\n    return 1.0\n"


class TestOwnTraining:
    def test_it_is_resumed_from_the_state_that_it_reported(self):
        whole = Study("whole", "pruner: none\n", OWN).run().curves()
        done = Study("halving", HALVING, OWN).run()
        curves = done.curves()
        assert {slot: whole[slot][: len(curve)] for slot, curve in curves.items()} == curves
        assert {len(curve) for curve in curves.values()} >= {2, 8}
        assert (done.view.counts.finished, done.view.effort.restarted) == (8, 0)

    @pytest.mark.parametrize("value", ["best", "last", "mean_of_3"])
    @pytest.mark.parametrize("memory", [0, 256], ids=["from its file", "from memory"])
    def test_a_resumed_trials_value_is_of_all_its_epochs(self, value, memory):
        done = Study(
            "whole", f"{HALVING}value: {value}\n".replace("halving,", f"halving, memory: {memory},"), OWN
        ).run()
        complete = [trial for trial in done.view.trials if trial.state == TrialState.COMPLETE]
        curves = {trial.number: reported(trial) for trial in complete}
        assert {trial.number: trial.value for trial in complete} == {
            number: value_of(curve, value, maximize=True)[0] for number, curve in curves.items()
        }
        assert [curves_in(trial, "")["valid_r2"] for trial in complete] == [*curves.values()]
        assert (bool(complete), done.view.effort.restarted) == (True, 0)

    def test_one_that_reports_no_state_is_trained_from_scratch(self):
        silent = OWN.replace(', {"network": network.state_dict(), "epochs": epoch + 1})', ")")
        done = Study("silent", HALVING, silent).run()
        assert done.view.counts.finished == 8
        assert done.view.effort.restarted > 0

    def test_a_state_that_is_none_is_refused(self):
        wrong = OWN.replace('{"network": network.state_dict(), "epochs": epoch + 1})', "[1])")
        with pytest.raises(Exception, match=r"must report its state as a mapping, but reported \[1\]"):
            Study("wrong", HALVING, wrong).run()

    @pytest.mark.parametrize(
        ("own", "text", "said"),
        [
            (OWN.replace("report, resume)", "report)"), HALVING, "give it a parameter `resume`"),
            (
                "def own(trial):\n    return 1.0\n",
                HALVING + "objective: own.py:own\n",
                "a function's trials cannot be paused",
            ),
            (OWN, HALVING + "sampler: cmaes\n", "cmaes learns from trials in the order in which they end"),
        ],
    )
    def test_what_cannot_be_paused_is_refused_with_the_reason(self, own, text, said):
        Path("own.py").write_text(own)
        file = Path("refused.yaml")
        of = "" if "objective" in text else "objective: own.py\n"
        file.write_text(f"trials: 4\nepochs: 8\n{text}{of}")
        with pytest.raises(SpecError) as error:
            prepare(file)
        assert said in str(error.value)
        assert "refused.yaml:3: pruner: halving pauses trials, and " in str(error.value)
