"""A trial is trained once more and compared with what was recorded of it; a difference names what has changed."""

import json
import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

import hpo
from hpo.runner.replay import FIRST, LATER, Replay
from hpo.search.codes import code_of, codes_text, with_code
from tests.cli import invoke, refused, summary
from tests.conftest import run_hpo
from tests.test_checkpoints import OBJECTIVE

SPACE = "params:\n  learning_rate: {type: float, low: 0.01, high: 0.2, log: true}\n  batch_size: 16\n"


def replayed(**curves: tuple[list[float], list[float]]) -> Replay:
    return Replay(
        number=0,
        recorded={name: before for name, (before, _) in curves.items()},
        replayed={name: now for name, (_, now) in curves.items()},
        changed=[],
    )


class TestComparison:
    @pytest.mark.parametrize(
        ("before", "now", "first_other"),
        [
            ([1.0, 2.0], [1.0, 2.0], None),
            ([1.0, math.nan], [1.0, math.nan], None),
            ([1.0, 2.0], [1.0 + 3 * FIRST, 2.0], 1),
            ([1.0, 2.0], [1.0 + FIRST, 2.0 + LATER], None),
            ([1.0, 2.0, 3.0], [1.0, 2.0 + 4 * LATER, 3.0], 2),
            ([1.0, 2.0], [1.0, math.nan], 2),
            ([1.0, math.inf], [1.0, 2.0], 2),
            ([1e6, 1e6], [1e6 + 10, 1e6 + 1e3], None),  # of the largest number
        ],
    )
    def test_where_curves_part(self, before: list[float], now: list[float], first_other: int | None) -> None:
        done = replayed(loss=(before, now), other=([0.0] * len(now), [0.0] * len(now)))
        assert done.first_other == first_other
        assert done.agrees == (first_other is None)

    def test_nothing_to_compare_is_no_agreement(self) -> None:
        assert not replayed().agrees
        assert not replayed(loss=([], [])).agrees


@pytest.mark.parametrize("stack", [1, 4])
def test_every_trial_of_a_study_is_played_back(study: Callable[..., Path], stack: int) -> None:
    path = study(
        f"baseline: false\ntrials: 6\nepochs: 4\nstack: {stack}\npruner: {{name: median, n_startup_trials: 2}}\n{SPACE}"
    )
    invoke("run", path)
    for number in range(6):
        out = invoke("replay", path, "--trial", number, "--json")
        done = summary(out)
        assert done["trial"] == number
        assert done["changed"] == []
        assert done["max_difference"] <= (0 if stack == 1 else LATER)
        assert "identical, to the last bit" in out or stack > 1


NOISY = """stack: 4
pruner: {name: halving, first: 2, finish: 1}
params:
  n_hidden: {type: int, low: 4, high: 12}
  dropout: {type: categorical, choices: [0.0, 0.3]}
  learning_rate: 0.01
"""


@pytest.mark.slow
def test_trials_with_dropout_that_were_paused_in_stacks_are_played_back(study: Callable[..., Path]) -> None:
    Path("noisy.py").write_text(OBJECTIVE.replace("DROPOUT", "0.3"))
    path = study(f"objective: noisy.py\nbaseline: false\ntrials: 8\nepochs: 4\n{NOISY}")
    invoke("run", path)
    resumed = summary(invoke("status", path, "--json"))["epochs"]["resumed"]
    assert resumed > 0
    ends = {(t.state, t.params["dropout"]): t.number for t in hpo.open_study(path).to_optuna().get_trials()}
    assert len(ends) == 4, "of those that were resumed and of the others, with dropout and without"
    for number in ends.values():
        done = summary(invoke("replay", path, "--trial", number, "--json"))
        assert done["max_difference"] <= LATER


def test_other_code_is_named_and_the_trial_is_another_one(study: Callable[..., Path]) -> None:
    path = study(f"trials: 2\nepochs: 3\nstack: 1\npruner: none\n{SPACE}")
    invoke("run", path)
    code = Path("linear.py")
    before = code.read_text()
    assert "mse_loss(" in before
    code.write_text(before.replace("mse_loss(", "l1_loss(", 1))
    done = run_hpo("replay", path, "--trial", 1)
    assert done.returncode == 1
    assert "trial 1 is another one from epoch 1 on: the objective's code: fingerprint" in done.stderr
    code.write_text(before + "\n# a remark\n")
    done = run_hpo("replay", path, "--trial", 1)
    assert done.returncode == 0, done.stderr
    assert "changed since: the objective's code" in done.stdout


def test_the_code_of_each_trial_is_known_after_a_resume_with_another_one(study: Callable[..., Path]) -> None:
    path, code = study(f"trials: 2\nepochs: 3\nstack: 1\npruner: none\n{SPACE}"), Path("linear.py")
    assert "codes of the objective" not in invoke("run", path) + invoke("status", path)
    code.write_text(code.read_text().replace("mse_loss(", "l1_loss(", 1))
    resumed = run_hpo("run", path, "--trials", 3)
    assert "the objective's code has changed since the study began" in resumed.stdout
    whose = json.loads(Path("mlruns/bundles/study/bundle.json").read_text())["trial"]
    assert ("was exported by another code of the objective" in resumed.stdout) == (whose < 2), resumed.stdout
    done = run_hpo("replay", path, "--trial", 1)
    assert done.returncode == 1
    assert "the objective's code: fingerprint" in done.stderr
    assert run_hpo("replay", path, "--trial", 2).returncode == 0
    said = "trials of 2 codes of the objective, which may not be comparable: 2 of "
    assert said in " ".join(run_hpo("status", path).stdout.split())
    assert said in invoke("report", path, "--format", "md", "--no-baselines")


def test_where_an_earlier_version_stored_one_code_it_is_that_of_all_trials() -> None:
    trial = FrozenTrial(0, TrialState.COMPLETE, 0.5, datetime(2026, 1, 1), datetime(2026, 1, 1), {}, {}, {}, {}, {}, 0)
    assert code_of({"hpo:code": "a"}, trial) == "a"
    assert code_of({}, trial) is None
    later = with_code({"hpo:code": "a"}, "b")
    assert [each["code"] for each in later] == ["a", "b"]
    assert code_of({"hpo:codes": later, "hpo:code": "b"}, trial) == "a"
    assert with_code({"hpo:code": "a"}, "b", same=["a"]) == [{"since": 0.0, "code": "b"}]
    assert codes_text({"hpo:codes": ["no code", {"since": 1}], "hpo:code": "a"}, [trial]) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trial", 9), "--trial 9: study 'study' has no such trial; its trials are 0 to 1"),
        (("--trial", 0, "--epochs", 9), "--epochs 9: must be 1 to 2, as many as trial 0 has reported"),
        (("--trial", 0, "--epochs", 0), "--epochs 0: must be 1 to 2"),
    ],
)
def test_what_cannot_be_played_back(study: Callable[..., Path], arguments: tuple[object, ...], message: str) -> None:
    path = study(f"trials: 2\nepochs: 2\nstack: 1\npruner: none\n{SPACE}")
    invoke("run", path)
    assert message in refused("replay", path, *arguments)


def test_fewer_epochs(study: Callable[..., Path]) -> None:
    path = study(f"trials: 1\nepochs: 5\nstack: 1\npruner: none\n{SPACE}")
    invoke("run", path)
    assert summary(invoke("replay", path, "--trial", 0, "--epochs", 2, "--json"))["epochs"] == 2
