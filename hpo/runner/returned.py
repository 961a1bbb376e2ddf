"""A network that an objective's own training has returned, tried: its forward, metrics and head, and its export.

The engine trains nothing of such a study itself, so without this a network that cannot be tested or exported would be
known only after the last trial.
"""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import HpoError, InputError, said
from hpo.export.apart import apart, note
from hpo.export.bundle import export
from hpo.export.model import Model
from hpo.log import silenced
from hpo.runner.firststep import came, module_from, try_forward, try_measuring
from hpo.runner.prepare import Plan, guarded
from hpo.study.data import Data, Split, prediction
from hpo.study.loading import origin
from hpo.study.losses import Link
from hpo.study.objective import Objective, Params
from hpo.study.probabilities import link_of

_FEW = 8
_EXTRA_STATE = "_extra_state"
"""What torch calls in a state_dict what get_extra_state gives."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FewRows:
    """A few rows of the data as they are, `raw`, and as `preprocess` makes them, `batch`; all on the CPU."""

    raw: Split
    batch: Split
    preprocess: nn.Module


def try_network(plan: Plan, data: Data, rows: FewRows, network: nn.Module, *, measures: bool) -> Any:
    """Return the outputs of `network`, which is on the CPU in evaluation mode; with `measures` try metrics and head.

    Raises InputError.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of so few rows metrics say much; the trials themselves will say it
        outputs = try_forward(plan, network, rows.batch)
        if measures:
            try_measuring(plan, data, outputs, rows.batch, [])
    return outputs


def link_in(plan: Plan, rows: FewRows, network: nn.Module, params: Params) -> Link:
    """Return what makes probabilities of `network`'s predictions, if the loss takes them as logits."""
    if plan.trains_itself:
        return ""
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    with torch.no_grad():
        outputs = network.eval()(*(x.to(device) for x in rows.batch.inputs.values()))
    return link_of(plan.objective, outputs, rows.batch.targets.to(device), params)


def try_export(plan: Plan, data: Data, rows: FewRows, network: nn.Module, params: Params) -> None:
    """Export `network` into a temporary folder, as it will be at the study's end. Raises InputError."""
    assert isinstance(plan.objective, Objective)
    require_tensors(plan, network)
    what = "its network" if plan.objective.train is None else plan.objective.returns
    head = module_from(plan, "head", plan.objective.head)
    model = Model(preprocess=rows.preprocess, network=network, head=head, params=params, info=data.info, about={})
    try:
        with tempfile.TemporaryDirectory() as folder, silenced("hpo"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export(model, rows.raw, Path(folder) / "bundle")
    except Exception as error:  # whatever TorchScript, the user's forward or the comparison raise
        why = str(error) if isinstance(error, HpoError) else origin(error)
        raise InputError(
            f"objective {plan.spec.objective}: {what} ({type(network).__name__}) cannot be "
            f"exported: {why}; its forward must take tensors and give a tensor by torch's own functions, the same "
            "for the same rows, so that torch.jit can script or trace it"
        ) from error


def require_tensors(plan: Plan, network: nn.Module) -> None:
    """Raise InputError for a network with something in its state_dict that is no tensor, as get_extra_state may give.

    Checkpoints, the best epoch's weights and bundles hold tensors: without the rest they would be of another network.
    """
    state = guarded(plan, "state_dict", network.state_dict)
    name = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if name is None:
        return
    path, _, entry = name.rpartition(".")
    holder = f"{path} ({type(network.get_submodule(path)).__name__})" if path else type(network).__name__
    what = f"get_extra_state of {holder}" if entry == _EXTRA_STATE else f"the entry {name} of its state_dict"
    raise InputError(
        f"objective {plan.spec.objective}: all that a network keeps must be tensors, which checkpoints and bundles are "
        f"made of, but {what} gives {came(state[name])}; keep numbers in buffers (register_buffer), and have no "
        "get_extra_state"
    )


def apart_advice(plan: Plan, rows: FewRows, network: nn.Module) -> list[str]:
    """Return what to say of a network whose predictions, in evaluation mode, of a row depend on the rows with it."""
    assert isinstance(plan.objective, Objective)
    head, targets = module_from(plan, "head", plan.objective.head), rows.raw.targets

    def predictions(*inputs: Tensor) -> Tensor:
        given = Split(inputs=dict(zip(rows.raw.inputs, inputs, strict=True)), targets=targets[: len(inputs[0])])
        predicted: Tensor = head(prediction(network(*given.through(rows.preprocess).inputs.values())))
        return predicted

    was, where = network.training, f"objective {plan.spec.objective}: in evaluation mode"
    network.eval()
    try:
        found = apart(predictions, list(rows.raw.inputs.values()))
    except Exception as error:  # whatever the user's forward raises
        why = said(error) or type(error).__name__
        return [f"{where} its network takes no row alone, which its export and predictions need ({why})"]
    finally:
        network.train(was)
    what = "let forward take no mean, rank or norm over the rows, and BatchNorm keep running statistics"
    return [f"{where} {note(found)}; {what}"] if found else []


def few_rows(plan: Plan, data: Data, preprocess: nn.Module) -> FewRows:
    """Return the first rows of the training data. Raises InputError."""
    raw = Split(inputs={n: x[:_FEW] for n, x in data.train.inputs.items()}, targets=data.train.targets[:_FEW])
    return FewRows(raw=raw, batch=guarded(plan, "preprocess", lambda: raw.through(preprocess)), preprocess=preprocess)
