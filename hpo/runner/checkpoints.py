"""What a study keeps of its networks, in `<output>/checkpoints/<study>/`: a trial's checkpoint, the best weights.

    place-N.pt   what the trial that holds slot N of the budget resumes from
    best.pt      the weights of the best trial's best epoch
    best-N.pt    those of trial N while it is being told: it may turn out to be the best

A checkpoint is of one study (as it was made, not its name alone), one lineage of trials, one data, one code. Whatever
else lies there is refused, with the reason: to train from scratch costs time, to resume from it costs the truth.
"""

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpo.errors import HpoError, InputError, Interrupted
from hpo.log import log
from hpo.processes import this_process
from hpo.runner.keeping import checkpoints_of, claim_of
from hpo.runner.prepare import Plan
from hpo.runner.turns import take_turn
from hpo.search import schema
from hpo.search.address import exists, whole_address
from hpo.search.claim import Claim
from hpo.search.search import Search
from hpo.search.view import Best, StudyView
from hpo.study.held import other_values
from hpo.training.stack import Member

BEST = "best.pt"
_FULL_BYTES = 1 << 20
_GPUS = ("mps", "mps:0", *(f"cuda:{i}" for i in range(64)))
OWN = "own"
"""In a checkpoint's `training`: the state that an objective's own `train` has reported."""


class Refused(Exception):
    """A checkpoint that is not to be resumed from, and why."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a checkpoint comes from: nothing is resumed from one of another origin."""

    study: str
    """What the study was given when it was made (`Search.making`): a name may be used again."""
    data: str | None
    code: str
    held: Mapping[str, str]
    """Digests of what the objective holds: with other values its curve would be another one. Of a study file they are
    those that the study goes by, in all of its workers: some differ by machine, or by when a module was imported."""

    @classmethod
    def of(cls, plan: Plan, search: Search) -> "Origin":
        return cls(
            study=search.making,
            data=search.attrs.get(schema.DATA),
            code=plan.source,
            held=dict(plan.held if plan.by_program else search.attrs.get(schema.HELD_BY_FILE) or {}),
        )


@dataclass(kw_only=True)
class Checkpoint:
    """All that a trial resumes from, right after an epoch's end."""

    epoch: int
    joined: int
    """The round of its stack in which it started."""
    history: list[dict[str, float]]
    best: tuple[float, int, dict[str, float]] | None
    """The value, the epoch (from 0) and the metrics that the trial would end with."""
    kept: dict[str, Tensor]
    """The weights of that epoch."""
    peak: float | None
    improved: int
    training: Mapping[str, Any]
    """`hpo.training.stack.Stack.checkpoint`; of an objective's own `train` what it has reported, under OWN."""
    rounds: list[int] = field(default_factory=list)
    """`hpo.training.stack.Member.rounds`; empty: not known, as of an earlier version."""


def folder_of(plan: Plan) -> Path:
    """Return the study's folder of weights."""
    return checkpoints_of(plan.spec)


def file_of(plan: Plan, claim: Claim) -> Path:
    """Return the file of a claimed trial's checkpoint."""
    return folder_of(plan) / f"place-{claim.slot}.pt"


def save(plan: Plan, origin: Origin, claim: Claim, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, whole or not at all. Raises HpoError."""
    content = {name: getattr(checkpoint, name) for name in Checkpoint.__dataclass_fields__}
    write(file_of(plan, claim), content | {"origin": _mark(origin, claim)})


def load(plan: Plan, origin: Origin, claim: Claim) -> Checkpoint | None:
    """Return what the trial that `claim` succeeds has left; None where there is nothing. Raises Refused."""
    try:
        moved = {name: str(plan.device) for name in _GPUS}  # which may be another one than that it was trained on
        content = torch.load(file_of(plan, claim), weights_only=True, map_location=moved)
    except FileNotFoundError:
        return None
    except Exception as error:  # torch.load raises a dozen kinds for a file that is damaged
        raise Refused(f"it cannot be read ({type(error).__name__})") from error
    try:
        mark, wanted = content.pop("origin", None), _mark(origin, claim)
        held = mark.pop("held", {}) if isinstance(mark, dict) else {}
        if names := other_values(wanted.pop("held"), held):
            raise Refused(f"it was trained with another value of the objective's {', '.join(names)}")
        if mark != wanted:
            raise Refused(_difference(mark, wanted))
        checkpoint = Checkpoint(**content)
        _require_sound(plan, checkpoint)
        _require_fitting(plan, claim, checkpoint.training)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"it holds something else ({type(error).__name__}: {error})") from error
    return checkpoint


def orders_of(plan: Plan, claim: Claim, member: Member) -> dict[str, Any]:
    """Return what is stored of the orders in which a trial has seen the rows, for `hpo replay`.

    Of one that was resumed something else may be stored, from before its pause.
    """
    follow = [(member.joined + epoch) % plan.spec.epochs for epoch in range(len(member.rounds))]
    rounds = list(member.rounds) if len(member.rounds) == member.epoch and member.rounds != follow else []
    known = {schema.JOINED: member.joined, schema.ROUNDS: rounds}
    return known if claim.is_resumed else {key: value for key, value in known.items() if value}


def drop(plan: Plan, claim: Claim) -> None:
    """Remove the checkpoint of a trial that has ended."""
    with suppress(OSError):
        file_of(plan, claim).unlink()


def _mark(origin: Origin, claim: Claim) -> dict[str, Any]:
    return asdict(origin) | {"lineage": claim.lineage, "seed": claim.seed, "params": dict(claim.params)}


def _difference(mark: Any, wanted: Mapping[str, Any]) -> str:
    """Return in what a checkpoint's origin differs from the one that is wanted."""
    names = {"study": "study", "lineage": "trial", "data": "data", "code": "code of the objective"}
    differs = [what for key, what in names.items() if isinstance(mark, Mapping) and mark.get(key) != wanted[key]]
    return f"it is of another {differs[0]}" if differs else "it is of other params or of another version"


def _require_sound(plan: Plan, checkpoint: Checkpoint) -> None:
    """Raise ValueError, TypeError or KeyError unless a checkpoint is one of an epoch of this study."""
    epoch, history = checkpoint.epoch, checkpoint.history
    if not (type(epoch) is int and 0 < epoch < plan.spec.epochs and len(history) == epoch):
        raise ValueError(f"it is of epoch {epoch!r} of {plan.spec.epochs}")
    for metrics in history:
        if not math.isfinite(metrics[plan.metric_key]):
            raise ValueError(f"{plan.metric_key} is {metrics[plan.metric_key]}")
    if type(checkpoint.joined) is not int or type(checkpoint.improved) is not int:
        raise ValueError("a count is no whole number")
    if not (isinstance(checkpoint.rounds, list) and all(type(each) is int for each in checkpoint.rounds)):
        raise ValueError("its rounds are no whole numbers")
    if checkpoint.best is not None:
        value, at, metrics = checkpoint.best
        if not (math.isfinite(value) and 0 <= at < epoch and isinstance(metrics, Mapping)):
            raise ValueError(f"its best epoch is {at!r}")


def _require_fitting(plan: Plan, claim: Claim, training: Mapping[str, Any]) -> None:
    """Raise Refused where the network that is built now has not the tensors that were kept: code has changed."""
    if plan.trains_itself and OWN in training:
        return
    with torch.random.fork_rng(devices=[]):
        try:
            network = plan.objective.build(dict(claim.params), plan.objective.info)
        except Exception:  # the same is raised, and said, where the trial is trained
            raise Refused("its network cannot be built") from None
    kept = {name: (tuple(x.shape), x.dtype) for name, x in training["model"].items()}
    tensors = {**dict(network.named_buffers()), **network.state_dict()}
    built = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
    if kept != built:
        name = next(n for n in (*kept, *built) if kept.get(n) != built.get(n))
        raise Refused(f"its {name} is {_shown(kept.get(name))}, that of the network now is {_shown(built.get(name))}")
    weights = dict(network.named_parameters())
    for name, state in training["optimizer"].items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != weights[name].shape:
                raise Refused(f"the optimizer's {key} of {name} has the shape {tuple(value.shape)}")
    if type(training["steps"]) is not int:
        raise Refused("its number of steps is no whole number")
    if lost := training.get("lost"):
        raise Refused(f"{lost[0]} had changed in training, and is nothing that a checkpoint can hold")


def _shown(kind: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "missing" if kind is None else f"{kind[0]} {str(kind[1]).removeprefix('torch.')}"


def remove_old(plan: Plan) -> None:
    """Remove the checkpoints that are left once all trials are done: of trials that others took over, cut short."""
    for file in folder_of(plan).glob("place-*"):
        file.unlink(missing_ok=True)


# The weights of the best trial.


def keep_candidate(
    plan: Plan, origin: Origin, number: int, params: Mapping[str, Any], value: float, epoch: int, state: Any
) -> None:
    """Write the weights of a trial that is about to be told, so that a kill right after loses nothing. Raises HpoError.

    `settle_weights` makes them the best, or removes them.
    """
    content = {
        "model_state_dict": {name: x.cpu() for name, x in state.items()},
        "model_hyperparameters": dict(params),
        "trial": number,
        "value": value,
        "epoch": epoch,
        "study": origin.study,
    }
    write(_candidate(plan, number), content)


def _candidate(plan: Plan, number: int) -> Path:
    return folder_of(plan) / f"best-{number}.pt"


def settle_weights(plan: Plan, search: Search) -> StudyView:
    """See that `best.pt` holds the best trial's weights, or none: those of another trial are removed, and it is logged.

    What this machine's workers are still telling stays, and so does all where the study is interrupted while another
    process does this: the next run does it. Return the study as it was seen. Raises HpoError where the folder cannot be
    written.
    """
    folder = folder_of(plan)
    if not folder.is_dir():
        return search.view()
    try:
        with take_turn(folder, f"puts the best weights into {folder}", search.storage.interrupt):
            candidates = {file: _trial_in(file, search.making) for file in folder.glob("best-*.pt")}
            seen = search.view()  # after the candidates: a trial whose weights are there is running, or told
            running = {trial.number for trial in seen.running}
            _settle(folder, search.making, candidates, seen.best())
            for each, number in candidates.items():
                if number not in running:
                    each.unlink(missing_ok=True)
    except OSError as error:
        raise HpoError(f"{folder} cannot be written ({error.strerror}); no trial is lost") from error
    except Interrupted:  # the candidates are still there
        return search.view()
    return seen


def _settle(folder: Path, making: str, candidates: Mapping[Path, int | None], best: Best | None) -> None:
    file, held = folder / BEST, _trial_in(folder / BEST, making)
    if best is not None and held != best.number:
        ours = next((each for each, number in candidates.items() if number == best.number), None)
        if ours is not None:
            ours.replace(file)
            return
    if file.exists() and (best is None or held != best.number):
        what = "another study's" if held is None else f"trial {held}'s"
        now = "there is no complete trial" if best is None else f"the best is trial {best.number}, whose are not here"
        log.warning(f"{file} held {what} weights, but {now}: it was removed; `hpo export` trains the best trial again")
        file.unlink()


def _trial_in(file: Path, making: str) -> int | None:
    """Return whose weights a file holds, as far as they are of this study; None: of none, or damaged."""
    try:
        content = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        number = content["trial"]
        return number if type(number) is int and content.get("study", making) == making else None
    except Exception:  # torch.load raises a dozen kinds for a file that is damaged
        return None


def claim_folder(plan: Plan, search: Search) -> None:
    """Note that the study's folders of `output` are this study's, and say so where they were another's of its name.

    Raises InputError where there are checkpoints that a study in another storage is to be resumed from; HpoError where
    the note cannot be written.
    """
    file = claim_of(plan.spec)
    ours = {"making": search.making, "storage": whole_address(plan.spec.storage)}
    held: Any = None
    with suppress(OSError, ValueError):
        held = json.loads(file.read_text())
    if held == ours:
        return
    other = held.get("storage") if isinstance(held, dict) and held.get("making") != ours["making"] else None
    if isinstance(other, str) and other != ours["storage"] and exists(other):
        theirs = f"{plan.spec.output} has the {{}} of another study named {plan.spec.name!r}, in {other}"
        if any(folder_of(plan).glob("place-*")):
            raise InputError(
                f"{theirs.format('checkpoints')}, which is to be resumed from them, and this one's would take their "
                f"place; give this one another `name`, or another `output` (if that study is no more: rm {file})"
            )
        log.warning(
            f"{theirs.format('bundle')}: this one's takes its place; another `name`, or another `output`, keeps both"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(ours))
    except OSError as error:
        raise HpoError(f"{file} cannot be written ({error.strerror}); no trial is lost") from error


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, whole or not at all. Raises HpoError."""
    unfinished = file.with_name(f"{file.name}.{this_process()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(content), unfinished)
        unfinished.replace(file)
    except (OSError, RuntimeError) as error:  # torch.save: a full disk is a RuntimeError
        why = _why(error, file.parent)  # before what was written is removed
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise HpoError(f"{file} cannot be written ({why}); no trial is lost") from error


def _why(error: Exception, folder: Path) -> str:
    """Return why nothing can be written there: of a full disk torch says something else."""
    with suppress(OSError):
        if shutil.disk_usage(folder).free < _FULL_BYTES:
            return "no space is left on the device"
    return str(error).splitlines()[0]
