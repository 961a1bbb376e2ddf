"""A LightningModule as an objective: a whole study of the page's code, and what is refused before the first trial."""

import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpo.errors import Interrupted
from hpo.study.data import Data, batch_sizes
from tests import warm
from tests.cli import invoke, refused, summary
from tests.conftest import ROOT

pytest.importorskip("lightning", reason="hpo.LightningObjective needs lightning: pip install 'hpo[lightning]'")

PAGE = (ROOT / "docs" / "lightning_code.md").read_text()
CODE, STUDY = (re.search(rf"```{kind}\n(.*?)```", PAGE, re.S)[1] for kind in ("python", "yaml"))  # type: ignore[index]
QUICK = "objective: wine.py\ntrials: 1\nepochs: 2\ntracking: off\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(*changes: tuple[str, str], study: str = QUICK) -> str:
    """Write the page's code, with some of its text replaced, and a study of it; return the study's name."""
    code = CODE
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    Path("wine.py").write_text(code)
    Path("wine.yaml").write_text(study)
    return "wine.yaml"


def wine(*changes: tuple[str, str], **environ: str) -> SimpleNamespace:
    """Return what the module with the page's changed code defines."""
    write(*changes)
    namespace: dict[str, object] = {"__name__": "wine"}
    exec(compile(Path("wine.py").read_text(), "wine.py", "exec"), namespace)
    return SimpleNamespace(**namespace)


class Report:
    """A Reporter over some data, that stops after `stop` epochs."""

    def __init__(self, data: Data, epochs: int = 2, stop: int = 99, seed: int = 3) -> None:
        self.train, self.valid, self.epochs, self.seed = data.train, data.valid, epochs, seed
        self.told: list[dict[str, float]] = []
        self._stop = stop

    def __call__(self, metrics: dict[str, float]) -> bool:
        self.told.append(dict(metrics))
        return len(self.told) < self._stop


def trained(made: SimpleNamespace, report: Report | None = None, **params: object) -> nn.Module:
    objective = made.Wine()
    data = objective.data()
    objective.info = data.info
    return objective.train({**objective.defaults, **params}, report or Report(data))


ALONE = """
import sys, torch
model = torch.jit.load("mlruns/bundles/wine/model.torchscript.pt")
rows = torch.load("rows.pt")
print((model(rows["x"]).argmax(1) == rows["y"]).float().mean().item(), {"hpo", "lightning"} & set(sys.modules))
"""


@pytest.mark.parametrize("imported", ["lightning", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def test_a_whole_study_of_the_pages_code(folder: Path, imported: str) -> None:
    pytest.importorskip(imported, reason="lightning by its other name")
    output = invoke("run", write(("import lightning as", f"import {imported} as"), study=STUDY), "--json")
    result = summary(output)
    assert result["trials"]["complete"] + result["trials"]["pruned"] == 4
    assert result["trials"]["pruned"] > 0
    test = wine().Wine().data().test
    torch.save({"x": test.inputs["features"], "y": test.targets}, "rows.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": ""}
    )
    accuracy, others = done.stdout.split(maxsplit=1)
    assert float(accuracy) == pytest.approx(result["test"]["accuracy"], abs=1e-6)
    assert others.strip() == "set()"
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"mlruns", "wine.py", "wine.yaml", "rows.pt"}


def test_what_lightning_says_is_not_shown_and_its_loggers_are_left_as_they_were() -> None:
    code = "from hpo.cli.app import main; import sys; sys.argv = ['hpo', 'run', 'wine.yaml']; main()"
    write()
    done = warm.run(code)
    assert done.returncode == 0, done.stderr
    shown = (done.stdout + done.stderr).lower()
    assert "trial 0 complete" in shown
    for chatter in ("lightning", "gpu", "tpu", "num_workers", "max_epochs", "warn", "tip"):
        assert chatter not in shown, shown
    import logging

    before = logging.getLogger("lightning.pytorch").level
    trained(wine())
    assert logging.getLogger("lightning.pytorch").level == before


def test_it_is_the_training_that_a_loop_by_hand_gives() -> None:
    """Same seed, same batches, same steps: the weights are equal, whatever is measured between epochs."""
    from hpo import seeds

    made = wine(("nn.ReLU()", "nn.ReLU(), nn.Dropout(0.3)"))
    data = made.Wine().data()
    report = Report(data)
    network = trained(made, report, lr=0.02)

    torch.manual_seed(report.seed)
    byhand = made.LitWine(13, 3, 16, 0.02).net
    optimizer = torch.optim.Adam(byhand.parameters(), lr=0.02)
    order = torch.Generator().manual_seed(seeds.derive(report.seed, "order"))
    x, y = data.train.inputs["features"], data.train.targets
    for _ in range(2):
        # a DataLoader draws a seed for its workers from torch's generator
        torch.empty((), dtype=torch.int64).random_()
        for rows in torch.randperm(len(y), generator=order).split(batch_sizes(len(y), 32)):
            optimizer.zero_grad()
            loss = F.cross_entropy(byhand(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
    for name, weight in byhand.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], weight, rtol=0, atol=0)
    byhand.eval()
    right = byhand(data.valid.inputs["features"]).argmax(1) == data.valid.targets
    assert report.told[-1]["accuracy"] == pytest.approx(right.float().mean().item())


def test_measuring_leaves_each_part_in_the_mode_that_it_was_in() -> None:
    made = wine(
        ("    def training_step(self, batch, batch_idx):\n", FREEZES),
    )
    network = trained(made, Report(made.Wine().data(), epochs=3))
    assert network[1].num_batches_tracked == 0  # frozen for good, although evaluated after each epoch
    assert made.LitWine.modes == {(True, False)}


FREEZES = """    modes = set()

    def on_train_start(self):
        self.net[1].eval()

    def training_step(self, batch, batch_idx):
        self.modes.add((self.net.training, self.net[1].training))
"""


def test_it_stops_where_report_says_no_and_train_loss_is_there_unlogged() -> None:
    made = wine(
        ('self.log("train_loss", loss, on_step=False, on_epoch=True)', "self.seen.append(loss)"),
        ("    def training_step", "    seen = []\n\n    def training_step"),
    )
    report = Report(made.Wine().data(), epochs=50, stop=2)
    trained(made, report)
    assert len(report.told) == 2
    sizes = torch.tensor(batch_sizes(len(report.train), 32), dtype=torch.float32)
    losses = torch.stack([loss.detach() for loss in made.LitWine.seen]).reshape(2, -1)
    expected = (losses * sizes).sum(1) / sizes.sum()
    assert [each["train_loss"] for each in report.told] == pytest.approx(expected.tolist())


def test_what_the_module_logs_is_preferred_and_val_loss_is_the_metric_loss() -> None:
    made = wine(('self.log("train_loss", loss', 'self.log("train_loss", 7.0'), ("    def configure", VALIDATES))
    report = Report(made.Wine().data())
    network = trained(made, report).eval()
    assert [each["train_loss"] for each in report.told] == [7.0, 7.0]
    loss = F.cross_entropy(network(report.valid.inputs["features"]), report.valid.targets)
    assert report.told[-1]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert "metric loss" not in invoke("run", write(("    def configure", VALIDATES), study=QUICK + "metric: loss\n"))


VALIDATES = """    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure"""

OWN_FORWARD = (
    ('    network = "net"\n', ""),
    (
        "    def training_step",
        "    def scaled(self, x):\n        return x * self.hparams.n_hidden\n\n"
        "    def forward(self, x):\n        return self.net(self.scaled(x))\n\n    def training_step",
    ),
    ("F.cross_entropy(self.net(x), y)", "F.cross_entropy(self(x), y)"),
)


def test_without_a_network_the_modules_own_forward_is_exported() -> None:
    result = summary(invoke("run", write(*OWN_FORWARD), "--json"))
    made = wine(*OWN_FORWARD)
    network = trained(made)
    assert not isinstance(network, import_module("lightning.pytorch").LightningModule)
    x = torch.randn(5, 13)
    torch.testing.assert_close(network.eval()(x), network.net(x * 16))
    exported = torch.jit.load(Path(result["bundle"]) / "model.torchscript.pt")
    assert exported(x).shape == (5, 3)


MANUAL = """    def training_step(self, batch, batch_idx):
        x, y = batch
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        layers = self.net[0].parameters(), self.net[3].parameters()
        return [torch.optim.SGD(each, lr=self.hparams.lr) for each in layers]
"""
STEP = CODE[CODE.index("    def training_step") : CODE.index("\n\nclass Wine(")]


def test_manual_optimization_with_several_optimizers_is_trained() -> None:
    manual = (STEP, MANUAL), ("self.save_hyper", "self.automatic_optimization = False\n        self.save_hyper")
    assert summary(invoke("run", write(*manual), "--json"))["trials"]["complete"] == 1
    made = wine(*manual)
    torch.manual_seed(3)
    before = made.LitWine(13, 3).net
    after = trained(made, lr=0.1)
    for layer in (0, 3):
        assert not torch.equal(before[layer].weight, after[layer].weight)


SCALED = "return self.net(self.scaled(x))"
EACH = "[torch.optim.SGD([p], lr=0.1) for p in self.parameters()]"
GIVES_EPOCHS = "    def trainer(self, params):\n        return {'max_epochs': 3}\n\n    def data(self)"
CHECKED: dict[str, list[tuple[str, str]]] = {
    'network = "nett", but LitWine has no such attribute; did you mean "net"': [
        ('network = "net"', 'network = "nett"')
    ],
    'network = "hparams" must name a network .* is a AttributeDict': [('network = "net"', 'network = "hparams"')],
    'has no forward of its own; .*network = "net"; its networks: net$': [('    network = "net"\n', "")],
    "uses self.log, which is": [*OWN_FORWARD, (SCALED, "self.log('a', 1.0); return self.net(x)")],
    'forward of LitWine uses self.trainer, which is Lightning\'s .*network = "net"': [
        *OWN_FORWARD,
        (SCALED, "return self.net(x) + self.trainer.current_epoch"),
    ],
    r"LitWine.net \(Odd\) cannot be exported: .*its forward must take tensors": [
        ("self.net = nn.Sequential(", "self.net = Odd(")
    ],
    "__init__ demands 'n_heads', which is no param": [("n_classes, n_hidden=16", "n_classes, n_heads, n_hidden=16")],
    "nothing reads the param 'dropuot': .*takes n_features": [('"n_hidden": 16, ', '"n_hidden": 16, "dropuot": 0.1, ')],
    "training_step returned None, so nothing would be learned": [("        return loss\n", "")],
    "configure_optimizers returns no optimizer of": [("return torch.optim.Adam", "torch.optim.Adam")],
    "multiple optimizers is only supported with manual optimization": [
        ("torch.optim.Adam(self.parameters(), lr=self.hparams.lr)", EACH)
    ],
    "must be the class LitWine, but is an instance": [("module = LitWine", "module = LitWine(13, 3)")],
    "must be the class of a LightningModule, but is the class Linear": [("module = LitWine", "module = nn.Linear")],
    "must be the class of a LightningModule, but is None": [("    module = LitWine\n", "")],
    "`defaults` name no batch_size": [(', "batch_size": 32', "")],
    "trainer must not give max_epochs": [("    def data(self)", GIVES_EPOCHS)],
    "a first epoch of a few rows with .* failed: .*classes": [("MulticlassAccuracy(3", "MulticlassAccuracy(2")],
}
ODD = '''
class Odd(nn.Sequential):
    """Its outputs leave torch on their way."""

    def forward(self, x):
        y = super().forward(x)
        return y + torch.from_numpy(x.detach().numpy().mean(1, keepdims=True))


class LitWine('''


@pytest.mark.parametrize("text", CHECKED)
def test_what_cannot_be_trained_or_exported_is_refused_before_the_first_trial(text: str) -> None:
    changes = CHECKED[text]
    if "Odd(" in changes[0][1]:
        changes = [("\nclass LitWine(", ODD), *changes]
    study = write(*changes)
    told = refused("check", study)
    assert re.search(text, told, re.S), told
    assert re.search(text, refused("run", study), re.S)
    assert "0 of 1 trials done" in invoke("status", study)


def test_the_trainer_takes_more_arguments_and_params_that_they_read() -> None:
    more = "    def trainer(self, params):\n        return {'gradient_clip_val': params['clip'], 'callbacks': []}\n\n"
    made = wine(
        ("    def data(self)", more + "    def data(self)"), ("Adam", "SGD"), ('"lr": 0.01', '"lr": 1.0, "clip": 0.0')
    )
    torch.manual_seed(3)
    before = made.LitWine(13, 3).net[0].weight
    moved = {clip: (trained(made, clip=clip)[0].weight - before).norm().item() for clip in (1e-4, 1e9)}
    assert moved[1e-4] < 1e-2 < moved[1e9]
    hpo = import_module("hpo")
    hpo.check(made.Wine, tracking="off")


DATAMODULE = """
class WineData(L.LightningDataModule):
    def setup(self, stage):
        wine = load_wine()
        x, y = torch.from_numpy(wine.data), torch.from_numpy(wine.target)
        rows = torch.utils.data.TensorDataset(((x - x.mean(0)) / x.std(0)), y)
        self.parts = torch.utils.data.random_split(rows, [100, 38, 40], torch.Generator().manual_seed(0))

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.parts[0], batch_size=7, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.parts[1], batch_size=7)

    def test_dataloader(self):
        return torch.utils.data.DataLoader(self.parts[2], batch_size=7)


class Wine("""
OF_DATAMODULE = (
    ("\nclass Wine(", DATAMODULE),
    (CODE[CODE.index("    def data(self)") : CODE.index("    def metrics")], "    datamodule = WineData\n\n"),
)


def test_a_datamodules_rows_are_read_whole_in_order_and_trained_on() -> None:
    data = wine(*OF_DATAMODULE).Wine().data()
    assert [len(split) for split in data.splits.values()] == [100, 38, 40]
    assert data.train.inputs["features"].dtype == torch.float32
    assert data.class_names == ("0", "1", "2")
    assert data.fingerprint() == wine(*OF_DATAMODULE).Wine().data().fingerprint()
    assert summary(invoke("run", write(*OF_DATAMODULE), "--json"))["trials"]["complete"] == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("datamodule = WineData", "datamodule = WineData()"), "datamodule` as the class of .* but it is a WineData"),
        (("    datamodule = WineData\n\n", ""), "needs a method `data`, or `datamodule`.* there is none"),
        (
            ("def test_dataloader", "def other"),
            "WineData.test_dataloader must return one DataLoader, but there is none",
        ),
        (
            ("return torch.utils.data.DataLoader(self.parts[1], batch_size=7)", "return []"),
            "val_dataloader.* is a list",
        ),
    ],
)
def test_a_datamodule_that_cannot_be_read_is_refused(change: tuple[str, str], text: str) -> None:
    assert re.search(text, refused("check", write(*OF_DATAMODULE, change)))


def test_a_forward_that_asks_super_is_refused_before_the_first_trial() -> None:
    asks = ("return self.net(self.scaled(x))", "return self.net(x) if x.ndim else super().forward(x)")
    assert "forward of LitWine uses super()" in refused("check", write(*OWN_FORWARD, asks))


def test_a_datamodules_loader_chooses_and_collates_its_rows() -> None:
    sampled = (
        "shuffle=True, drop_last=True",
        "sampler=torch.utils.data.SubsetRandomSampler([5, 3, 9]), collate_fn=times",
    )
    times = (
        "\nclass WineData",
        "\ndef times(rows):\n    x, y = torch.utils.data.default_collate(rows)\n"
        "    return 100 * x, y\n\n\nclass WineData",
    )
    whole = wine(*OF_DATAMODULE).Wine().data().train
    data = wine(*OF_DATAMODULE, times, sampled).Wine().data()
    rows = torch.tensor([5, 3, 9])
    assert torch.allclose(data.train.inputs["features"], 100 * whole.inputs["features"][rows])
    assert torch.equal(data.train.targets, whole.targets[rows])


@pytest.mark.parametrize("cls", ["class WineData(L.LightningDataModule):", "class LitWine(L.LightningModule):"])
def test_batches_that_are_changed_on_their_way_are_refused(cls: str) -> None:
    hook = "\n    def on_after_batch_transfer(self, batch, index):\n        return batch\n"
    said = refused("check", write(*OF_DATAMODULE, (cls, cls + hook)))
    assert "on_after_batch_transfer changes the batches" in said


def test_the_loss_of_gathered_gradients_is_that_of_the_batches() -> None:
    found = []
    for n in (1, 2):
        gathers = f"\n    def trainer(self, params):\n        return {{'accumulate_grad_batches': {n}}}\n"
        made = wine(
            ("    def metrics", f"{gathers}\n    def metrics"),
            ('self.log("train_loss", loss', 'self.log("other", loss'),
        )
        report = Report(made.Wine().data(), epochs=1)
        trained(made, report, lr=1e-12)
        found.append(report.told[0]["train_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_an_epoch_is_measured_after_the_modules_own_end_of_it() -> None:
    ends = """    def on_train_epoch_end(self):
        self.log("train_loss", float(self.current_epoch))
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.zero_()

    def configure"""
    made = wine(('self.log("train_loss", loss', 'self.log("other", loss'), ("    def configure", ends))
    report = Report(made.Wine().data())
    trained(made, report)
    assert [each["train_loss"] for each in report.told] == [0.0, 1.0]
    share = (report.valid.targets == 0).float().mean().item()  # the class of which outputs of 0 are
    assert report.told[-1]["accuracy"] == pytest.approx(share, abs=1e-6)


def test_weights_that_change_after_the_last_epoch_are_refused() -> None:
    ends = """    def on_train_end(self):
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.zero_()

    def configure"""
    said = refused("run", write(("    def configure", ends)))
    assert "once the Trainer has ended" in said


@pytest.mark.parametrize("argument", ["check_val_every_n_epoch", "limit_val_batches"])
def test_what_decides_when_lightning_validates_is_the_studys(argument: str) -> None:
    gives = f"    def trainer(self, params):\n        return {{'{argument}': 2}}\n\n    def metrics"
    assert f"trainer must not give {argument}" in refused("check", write(("    def metrics", gives)))


def test_a_precision_that_would_be_ignored_is_refused() -> None:
    assert "precision: is of hpo's own loop" in refused("check", write(study=QUICK + "precision: bf16\n"))


def signalling(number: str) -> tuple[str, str]:
    first = "        x, y = batch\n"
    sends = f"            import os, signal\n            os.kill(os.getpid(), signal.{number})\n"
    return first, f"{first}        if len(y) == 32 and batch_idx == 0:\n{sends}"


def test_sigterm_finishes_the_epoch_and_gives_the_trial_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    study = write(signalling("SIGTERM"))
    with pytest.raises(Interrupted):
        invoke("run", study)
    assert signal.getsignal(signal.SIGTERM) is before
    assert summary(invoke("run", write(), "--json"))["trials"]["complete"] == 1


def test_ctrl_c_without_a_study_stays_ctrl_c() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            trained(wine(signalling("SIGINT")))
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_scheduler_around_the_worker_is_none_of_lightnings_business(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"NTASKS": "4", "PROCID": "2", "LOCALID": "2", "JOB_ID": "7", "JOB_NAME": "x"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert trained(wine()) is not None


BATCH = """    def batch(self, inputs, targets):
        return {"x": inputs["features"], "y": targets}

    def data(self)"""


def test_another_batch_for_the_training_step() -> None:
    made = wine(("x, y = batch", "x, y = batch['x'], batch['y']"), ("    def data(self)", BATCH))
    assert trained(made) is not None


TWO = """objective: wine.py
trials: 2
epochs: 2
tracking: off
params: {lr: {type: categorical, choices: [0.01, 0.02]}}
sampler: grid
"""
LOSS = "loss * (float('nan') if self.hparams.lr == 0.02 and len(y) == 32 else 1)"
TOO_LARGE = """        super().__init__()
        import optuna
        if lr == 0.02:
            raise optuna.TrialPruned("too large")
"""


def test_a_trial_that_diverges_fails_alone() -> None:
    unlogged = ('        self.log("train_loss", loss, on_step=False, on_epoch=True)\n', "")
    study = write(("return loss", f"return {LOSS}"), unlogged, study=TWO)
    result = summary(invoke("run", study, "--json"))
    assert (result["trials"]["complete"], result["trials"]["failed"]) == (1, 1)


def test_a_configuration_that_is_infeasible_is_pruned() -> None:
    output = invoke("run", write(("        super().__init__()\n", TOO_LARGE), study=TWO), "--json")
    assert (summary(output)["trials"]["complete"], summary(output)["trials"]["pruned"]) == (1, 1)
