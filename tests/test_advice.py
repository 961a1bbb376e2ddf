"""What is said of an objective that can be trained, but hardly as it was meant."""

import pytest

from hpo.runner.advice import file_advice, start_advice
from hpo.runner.preflight import preflight
from hpo.runner.prepare import prepare
from tests.cli import invoke
from tests.searches import Told

OBJECTIVE = """
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import BinaryAccuracy
import hpo

ENDS = {
    "plain": lambda: [],
    "softmax": lambda: [nn.Softmax(dim=-1)],
    "softmax_reshaped": lambda: [nn.Softmax(dim=-1), nn.Unflatten(1, (3, 1)), nn.Flatten()],
    "log_softmax": lambda: [nn.LogSoftmax(dim=-1)],
    "sigmoid": lambda: [nn.Sigmoid()],
    "sigmoid_squeezed": lambda: [nn.Sigmoid(), nn.Flatten(0)],
}


class Odd(hpo.Objective):
    defaults = {"end": "plain", "with": "cross_entropy", "head": "none", "loss": "cross_entropy"}
    space = {"learning_rate": {"type": "float", "low": 1e-3, "high": 1e-2}}

    def data(self):
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        part = hpo.Split(inputs={"x": x}, targets=self.targets())
        return hpo.Data(train=part, valid=part, test=part)

    def targets(self):
        return torch.arange(60) % 3

    def build(self, params, info):
        n_out = 1 if params["with"] == "bce" else 3
        return nn.Sequential(nn.Linear(4, n_out), *ENDS[params["end"]]())

    def metrics(self):
        return {"m": Mean()}

    def head(self):
        return self.the_head


class Mean(MeanMetric):
    higher_is_better = False

    def update(self, outputs, targets):
        super().update(outputs)


class Ce(Odd):
    the_head = nn.Identity()

    def loss(self, outputs, targets, params):
        return nn.CrossEntropyLoss()(outputs, targets)


class Named(Odd):
    the_head = nn.Identity()


class WithHead(Ce):
    the_head = nn.Softmax(dim=-1)


class Bce(Odd):
    the_head = nn.Identity()
    defaults = Odd.defaults | {"with": "bce"}

    def targets(self):
        return (torch.arange(60) % 2).float()

    def loss(self, outputs, targets, params):
        return F.binary_cross_entropy_with_logits(outputs.reshape(-1), targets)


class Halved(Odd):
    the_head = nn.Identity()

    def targets(self):
        return (torch.arange(60) % 2).float()[:, None]

    def build(self, params, info):
        ends = {"plain": [], "sigmoid": [nn.Sigmoid()]}[params["end"]]
        network = nn.Sequential(nn.Linear(4, 1), *ends)
        network[0].weight.data *= 10.0
        return network

    def loss(self, outputs, targets, params):
        return F.mse_loss(outputs, targets) if params["end"] == "sigmoid" else F.softplus(-outputs * targets).mean()

    def metrics(self):
        return {"share": BinaryAccuracy()}


class Nll(Odd):
    the_head = nn.Identity()

    def loss(self, outputs, targets, params):
        return F.nll_loss(outputs, targets)
"""
SOFTMAX = "its network ends in a softmax, but its loss, cross_entropy, takes logits and applies one itself: "
SIGMOID = "its network ends in a sigmoid, but its loss, binary_cross_entropy_with_logits, takes logits and applies one "
LOGITS = "takes logits, and it has no `head`, so that the exported model gives logits; for probabilities have `head` "


@pytest.fixture
def planned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd.py").write_text(OBJECTIVE)

    def plan(name, end="plain"):
        (tmp_path / "study.yaml").write_text(
            f"objective: odd.py:{name}\ntracking: off\ntrials: 1\nepochs: 1\nparams: {{end: {end}}}\n"
        )
        return prepare(tmp_path / "study.yaml")

    return plan


@pytest.mark.parametrize(
    ("name", "end", "said"),
    [
        ("Ce", "softmax", SOFTMAX),
        ("Ce", "softmax_reshaped", SOFTMAX),
        ("Named", "softmax", SOFTMAX),
        ("WithHead", "softmax", SOFTMAX),
        ("Ce", "plain", f"cross_entropy, {LOGITS}return nn.Softmax(dim=-1)"),
        ("Named", "plain", f"cross_entropy, {LOGITS}return nn.Softmax(dim=-1)"),
        ("WithHead", "plain", None),
        ("Nll", "log_softmax", None),
        (
            "Halved",
            "plain",
            "its network gives numbers beyond 0 and 1, and it has no `head`; TorchMetrics (share) takes ",
        ),
        ("Halved", "sigmoid", None),
        ("Bce", "sigmoid", SIGMOID),
        ("Bce", "sigmoid_squeezed", SIGMOID),
        ("Bce", "plain", f"binary_cross_entropy_with_logits, {LOGITS}return nn.Sigmoid()"),
    ],
)
def test_what_is_hardly_meant_is_said_with_what_to_do(planned, name, end, said):
    plan = planned(name, end)
    _, warnings = preflight(plan, plan.load_data())
    assert len(warnings) == (said is not None)
    if said:
        assert warnings[0].startswith(f"objective odd.py:{name}: its ")
        assert said in warnings[0]


SEARCHED = "{label_smoothing: {type: float, low: 0.0, high: 0.5}}"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "metric: loss\nparams: {loss: {type: categorical, choices: [cross_entropy, nll]}}",
            "metric: loss: objective odd.py:Smooth computes it by loss, ",
        ),
        ("metric: loss\nparams: SEARCHED", "it by label_smoothing, which "),
        ("metric: loss\nparams: {label_smoothing: 0.1, weight_decay: {type: float, low: 0.0, high: 0.5}}", None),
        ("metric: m\nparams: SEARCHED", None),
        (
            "metric: m\nconstraints: {loss: '<= 1'}\nparams: SEARCHED",
            "constraints: loss: objective odd.py:Smooth computes it by label_smoothing, which the study searches: "
            "losses of trials that differ there do not compare, and the smallest may be of the worse network; take "
            "another metric (m), or fix label_smoothing",
        ),
        ("metric: [m, loss]\nparams: SEARCHED", "metric: loss: objective "),
    ],
)
def test_a_loss_that_the_searched_params_change_compares_no_trials(tmp_path, planned, more, said):
    (tmp_path / "odd.py").write_text(
        f"{OBJECTIVE}\n\nclass Smooth(hpo.Objective):\n    data, targets, build = Odd.data, Odd.targets, Odd.build\n"
        "    metrics, head = Odd.metrics, lambda self: nn.Softmax(dim=-1)\n"
        "    defaults = {'end': 'plain', 'with': 'cross_entropy', 'loss': 'cross_entropy', 'label_smoothing': 0.0}\n"
        "    space = Odd.space\n"
    )
    name = tmp_path / "study.yaml"
    name.write_text(
        f"objective: odd.py:Smooth\ntracking: off\ntrials: 1\nepochs: 1\n{more.replace('SEARCHED', SEARCHED)}\n"
    )
    plan = prepare(name)
    _, warnings = preflight(plan, plan.load_data())
    assert len(warnings) == (said is not None)
    if said:
        assert said in warnings[0]


def test_check_and_the_first_run_say_it_once(planned, said):
    planned("Ce", "softmax")
    for command, times in ((["check"], 1), (["run"], 2), (["run", "--trials", "2"], 2)):
        invoke(*command, "study.yaml")
        assert " ".join(said).count(SOFTMAX) == times


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("nn.BatchNorm1d(3)", None),
        ("nn.Sequential(nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1), nn.Flatten())", None),
        (
            "nn.Sequential(nn.Unflatten(1, (1, 3)), nn.BatchNorm1d(1, track_running_stats=False), nn.Flatten())",
            "in evaluation mode predictions of a row depend on which rows are given with it: of a row alone they ",
        ),
        (
            "nn.BatchNorm1d(3, track_running_stats=False)",
            "in evaluation mode its network takes no row alone, which its export and predictions need (Expected more ",
        ),
        ("nn.Softmax(dim=0)", "in evaluation mode predictions of a row depend on which rows "),
    ],
)
def test_predictions_that_depend_on_the_rows_given_with_them_are_said_before_the_first_trial(
    tmp_path, planned, end, said
):
    own = f"""
class Own(WithHead):
    def build(self, params, info):
        return nn.Sequential(nn.Linear(4, 3), {end})
"""
    (tmp_path / "odd.py").write_text(OBJECTIVE + own)
    plan = planned("Own")
    _, warnings = preflight(plan, plan.load_data())
    assert [line for line in warnings if "evaluation mode" in line] == [
        line for line in warnings if said and line.startswith(f"objective odd.py:Own: {said}")
    ]
    assert len([line for line in warnings if "evaluation mode" in line]) == (said is not None)


KEEPING = (
    OBJECTIVE
    + """

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        outputs = self.layer(x)
        self.kept = outputs.square().mean()
        return outputs


class Keeping(WithHead):
    counts = []
    at_build, at_loss = staticmethod(lambda self: None), staticmethod(lambda self: None)

    def build(self, params, info):
        self.net = Net()
        self.at_build(self)
        return self.net

    def loss(self, outputs, targets, params):
        self.at_loss(self)
        return super().loss(outputs, targets, params) + 0.01 * self.net.kept

"""
)


@pytest.mark.parametrize(
    ("at_build", "at_loss", "changes"),
    [
        ("None", "None", None),
        ("vars(self).update(n=0)", "vars(self).update(n=self.n + 1)", None),
        ("None", "vars(self).setdefault('weights', torch.ones(3))", None),
        ("vars(self).update(n=vars(self).get('n', 0) + 1)", "None", "self.n"),
        ("None", "vars(self).update(n=vars(self).get('n', 0) + 1)", "self.n"),
        ("None", "vars(self).setdefault('seen', []).append(0)", "self.seen"),
        ("None", "vars(self).setdefault('dice', torch.Generator().manual_seed(1)).seed()", "self.dice"),
        ("None", "self.counts.append(0)", "Keeping.counts"),
    ],
)
def test_what_a_trial_leaves_in_the_objective_for_the_next_is_said(tmp_path, planned, at_build, at_loss, changes):
    """And a loss may read what the forward of the network built last has kept."""
    methods = {"at_build": at_build, "at_loss": at_loss}.items()
    lines = [f"    {name} = staticmethod(lambda self: {what})\n" for name, what in methods]
    (tmp_path / "odd.py").write_text(KEEPING + "".join(lines))
    plan = planned("Keeping")
    _, warnings = preflight(plan, plan.load_data())
    said = f"objective odd.py:Keeping: its build or loss changes {changes}, which the next trial finds as the last one "
    assert [line[: len(said)] for line in warnings] == ([said] if changes else [])


@pytest.mark.parametrize(
    "held", ["nn.Linear(3, 3)", "nn.Parameter(torch.ones(3))", "nn.Linear(3, 3).requires_grad_(False)"]
)
def test_weights_that_only_the_objective_holds_are_not_trained_which_is_said(tmp_path, planned, held):
    own = f"""
class Own(WithHead):
    def __init__(self, options=None):
        super().__init__(options)
        self.own = {held}

    def loss(self, outputs, targets, params):
        outputs = self.own(outputs) if isinstance(self.own, nn.Module) else self.own * outputs
        return super().loss(outputs, targets, params)
"""
    (tmp_path / "odd.py").write_text(OBJECTIVE + own)
    plan = planned("Own")
    _, warnings = preflight(plan, plan.load_data())
    said = [line for line in warnings if line.startswith("objective odd.py:Own: no optimizer trains self.own")]
    assert len(said) == ("False" not in held)


def test_what_an_entry_of_start_with_names_in_vain_is_said(study, said):
    text = """
        pruner: none
        params:
          optimizer: {type: categorical, choices: [adam, sgd, rmsprop]}
          momentum: {type: float, low: 0.1, high: 0.9, when: {optimizer: [sgd, rmsprop]}}
          learning_rate: {type: float, low: 1.0e-3, high: 1.0e-1}
        start_with:
          - {optimizer: sgd, momentum: 0.5}
          - {momentum: 0.5}  # whether it is asked for is yet to be drawn
          - {optimizer: adam, momentum: 0.5}
    """
    line = (
        "start_with[2].momentum: is without effect, since momentum is asked for only when optimizer is sgd or rmsprop, "
        "and this entry has optimizer=adam"
    )
    path = study(text)
    assert file_advice(prepare(path)) == [line]
    invoke("run", path)
    assert [each for each in said if "without effect" in each] == [line]


def test_a_new_entry_of_start_with_that_no_trial_is_left_for_is_said(study):
    told = Told()
    rates = "start_with: [{learning_rate: 0.02}]\n"

    def said(text):
        plan, _, search = told(study(f"pruner: none\n{text}"), None)
        return start_advice(plan, search.view())

    try:
        _, _, search = told(study(f"pruner: none\ntrials: 3\n{rates}"), None)
        search.complete(search.ask().number, 0.5)
        more = rates.replace("[", "[{learning_rate: 0.03}, {learning_rate: 0.04}, ")
        assert said(f"trials: 3\n{more}") == []  # two trials are queued that nobody has started
        told(study(f"pruner: none\ntrials: 2\n{rates}"), lambda claim: (0.5, 0))
        assert said(f"trials: 2\n{rates}") == []
        assert said(f"trials: 3\n{more}") == [
            "of the 3 trials none is left to try start_with[1], which no trial has had; raise `trials` to 4"
        ]
    finally:
        told.close()


def test_a_name_in_catch_that_no_exception_has_is_said(study, said):
    path = study("catch: [ValueError, numpy.linalg.LinAlgError, NoSuch, torch.linalg.LinAlgError, json.NoSuch]\n")
    lines = [
        "catch: no exception NoSuch is there before the first trial; it catches what has that name only",
        "catch: no exception json.NoSuch is there before the first trial; it catches what has that name only",
    ]
    assert file_advice(prepare(path)) == lines
    invoke("check", path)
    assert [each for each in said if each.startswith("catch: ")] == lines
