"""A trial that was interrupted goes on from its checkpoint as if nothing had happened."""

from types import SimpleNamespace

import pytest
import torch

from hpo.errors import HpoError, Interrupted
from hpo.runner.checkpoints import folder_of as checkpoints
from hpo.runner.checkpoints import write
from hpo.runner.prepare import prepare
from hpo.runner.worker import work
from hpo.search.opening import open_search
from hpo.tracking.base import MemoryTracker
from tests.searches import Quiet, StopWhen

OBJECTIVE = """
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics.regression import R2Score
from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class Noisy(Objective):
    defaults = {"optimizer": "adam", "learning_rate": 0.01, "batch_size": 32, "n_hidden": 8, "dropout": DROPOUT,
                "loss": "mse"}
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-1, "log": True}}

    def data(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(200, 4, generator=generator)
        y = x.sum(1, keepdim=True).sin()
        parts = [slice(0, 120), slice(120, 160), slice(160, 200)]
        train, valid, test = (Split(inputs={"x": x[p]}, targets=y[p]) for p in parts)
        return Data(train=train, valid=valid, test=test)

    def build(self, params, info):
        return nn.Sequential(
            nn.Linear(4, params["n_hidden"], bias=False), nn.BatchNorm1d(params["n_hidden"]), nn.ReLU(),
            nn.Dropout(params["dropout"]), nn.Linear(params["n_hidden"], 1))

    def metrics(self):
        return {"r2": R2Score()}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(folder, name, text, stop_at=None, dropout=0.0):
    """Run a study, interrupted once at the end of that epoch of its first trial; return each place's reported curve."""
    (folder / "noisy.py").write_text(OBJECTIVE.replace("DROPOUT", str(dropout)))
    (folder / f"{name}.yaml").write_text(f"objective: noisy.py\ntrials: 4\nepochs: 6\npruner: none\n{text}")
    plan = prepare(folder / f"{name}.yaml")
    data = plan.load_data()
    for stop in [stop_at, None] if stop_at is not None else [None]:
        search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
        tracker, progress = MemoryTracker(), Quiet()
        try:
            stopping = lambda stop=stop, p=progress: stop is not None and p.epochs >= stop  # noqa: E731
            work(plan, data, search, tracker, progress, StopWhen(stopping, in_time=True))
        except Interrupted:
            assert stop is not None
            assert list(checkpoints(plan).glob("place-*.pt"))
        trials = search.trials()
        search.close()
    assert not list(checkpoints(plan).glob("place-*.pt"))
    assert len(trials) == 4
    curves = {t.user_attrs["place"]: (t.params, list(t.intermediate_values.values()), t.value) for t in trials}
    weights = torch.load(checkpoints(plan) / "best.pt", weights_only=True)["model_state_dict"]
    return curves, weights


SLOW_OPTIMIZERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "rmsprop", "adagrad")]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adadelta", *SLOW_OPTIMIZERS])
def test_alone_it_goes_on_bit_for_bit(folder, said, optimizer):
    text = f"stack: 1\nparams: {{optimizer: {optimizer}, schedule: cosine}}\n"
    text += "value: last\n" if optimizer == "sgd" else ""
    plain, weights = run(folder, "plain", text, dropout=0.3)
    resumed, again = run(folder, "resumed", text, stop_at=9, dropout=0.3)  # in the second trial's third epoch
    assert any("resumes after epoch 3" in text for text in said)
    assert resumed == plain
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_one_that_was_written_on_a_gpu_is_resumed_on_another_device(folder, said, monkeypatch):
    def on_a_gpu(file, content):
        with pytest.MonkeyPatch.context() as patch:
            if file.name.startswith("place-"):
                patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
            write(file, content)

    plain, _ = run(folder, "plain", "stack: 1\n")
    monkeypatch.setattr("hpo.runner.checkpoints.write", on_a_gpu)
    resumed, _ = run(folder, "resumed", "stack: 1\n", stop_at=9)
    assert any("resumes after epoch 3" in text for text in said)
    assert resumed == plain


@pytest.mark.parametrize(
    "optimizer", ["adam", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sgd", "rmsprop"))]
)
def test_in_a_stack_it_goes_on_as_it_was(folder, said, optimizer):
    text = f"stack: 4\nsampler: random\nparams: {{optimizer: {optimizer}, momentum: 0.9, "
    text += "learning_rate: {type: float, low: 1e-3, high: 3e-2}, n_hidden: {type: int, low: 4, high: 9}}\n"
    text = text.replace("momentum: 0.9, ", "") if optimizer == "adam" else text
    plain, _ = run(folder, "plain", text)
    resumed, _ = run(folder, "resumed", text, stop_at=12)  # the third epoch of all four
    assert sum("resumes after epoch 3" in text for text in said) == 4
    for place, (params, values, value) in plain.items():
        assert resumed[place][0] == params
        assert resumed[place][1] == pytest.approx(values, abs=1e-5)
        assert resumed[place][2] == pytest.approx(value, abs=1e-5)


def test_what_a_stack_kept_one_alone_takes_up_and_the_other_way_round(folder, said):
    text = "sampler: random\nparams: {optimizer: adam, learning_rate: {type: float, low: 1e-3, high: 3e-2}}\n"
    plain, _ = run(folder, "plain", f"stack: 1\n{text}")
    for before, after in (("4", "1"), ("1", "4")):
        name = f"from{before}"
        resumed = interrupted_then(folder, said, name, text, before, after)
        assert [len(values) for _, values, _ in resumed.values()] == [6] * 4
        if after == "1":  # in a stack its order is the others' from then on
            assert resumed[0][1] == pytest.approx(plain[0][1], abs=1e-4)


def interrupted_then(folder, said, name, text, before, after):
    (folder / "noisy.py").write_text(OBJECTIVE.replace("DROPOUT", "0.0"))
    path = folder / f"{name}.yaml"
    for stack, stop in ((before, 2 * int(before)), (after, None)):
        path.write_text(f"objective: noisy.py\ntrials: 4\nepochs: 6\npruner: none\nstack: {stack}\n{text}")
        plan = prepare(path)
        search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
        progress = Quiet()
        said.clear()
        try:
            stopping = lambda stop=stop, p=progress: stop is not None and p.epochs >= stop  # noqa: E731
            work(plan, plan.load_data(), search, MemoryTracker(), progress, StopWhen(stopping, in_time=True))
        except Interrupted:
            pass
        trials = search.trials()
        search.close()
    assert any("resumes after epoch 2" in text for text in said)
    return {t.user_attrs["place"]: (t.params, list(t.intermediate_values.values()), t.value) for t in trials}


def test_one_that_is_damaged_costs_the_epochs_only(folder, said):
    text = "stack: 1\n"
    plain, _ = run(folder, "plain", text)
    (folder / "resumed.yaml").write_text(f"objective: noisy.py\ntrials: 4\nepochs: 6\npruner: none\n{text}")
    plan = prepare(folder / "resumed.yaml")
    for damage in (False, True):
        search, progress = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize), Quiet()
        if damage:
            (file,) = checkpoints(plan).glob("place-*.pt")
            file.write_bytes(file.read_bytes()[:500])
        stopping = lambda p=progress, damage=damage: not damage and p.epochs >= 2  # noqa: E731
        try:
            work(plan, plan.load_data(), search, MemoryTracker(), progress, StopWhen(stopping, in_time=True))
        except Interrupted:
            assert not damage
        trials = search.trials()
        search.close()
    assert any("cannot be read" in text and "starts from scratch" in text for text in said)
    resumed = {t.user_attrs["place"]: (t.params, list(t.intermediate_values.values()), t.value) for t in trials}
    assert resumed == plain


def test_they_are_made_no_oftener_than_asked_for(folder, monkeypatch):
    from hpo.runner import checkpoints as trials

    written = []
    monkeypatch.setattr(trials, "write", lambda file, content: written.append(file.name))
    for seconds, expected in (("1h", 0), ("0.000001s", 4 * 5)):  # none after the last epoch
        written.clear()
        (folder / "noisy.py").write_text(OBJECTIVE.replace("DROPOUT", "0.0"))
        path = folder / f"every{expected}.yaml"
        path.write_text(
            f"objective: noisy.py\ntrials: 4\nepochs: 6\npruner: none\nstack: 1\ncheckpoint_every: {seconds}\n"
        )
        plan = prepare(path)
        search = open_search(plan.spec, plan.space, plan.metric, maximize=plan.maximize)
        work(plan, plan.load_data(), search, MemoryTracker(), Quiet())
        search.close()
        assert len([name for name in written if name.startswith("place-")]) == expected


def test_a_full_disk_is_called_so(tmp_path, monkeypatch):
    def fails(content, file):
        file.write_bytes(b"a part")
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos")

    monkeypatch.setattr(torch, "save", fails)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda folder: SimpleNamespace(free=0 if list(tmp_path.iterdir()) else 10**9)
    )
    with pytest.raises(HpoError, match=r"place-0.pt cannot be written \(no space is left on the device\)"):
        write(tmp_path / "place-0.pt", {})
    assert not list(tmp_path.iterdir())
