"""An objective's own training tried before anything runs: a few rows for one epoch, and the export of what it gives.

The engine trains nothing of such a study itself, so without this a network that cannot be exported would be known only
after the last trial.
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpo.errors import HpoError, InputError
from hpo.export.bundle import export
from hpo.export.model import Model
from hpo.runner.custom import TrialReporter
from hpo.runner.firststep import missing_param, module_from, settings_stay, try_forward, try_measuring
from hpo.runner.prepare import Plan, guarded
from hpo.study.data import Data, Split
from hpo.study.loading import origin
from hpo.study.objective import Objective, Params
from hpo.training.memory import Within

_SEED = 1


class Preview:
    """Tries an objective's `preview` with a few rows, `raw` and as `preprocess` makes `batch` of them."""

    def __init__(self, plan: Plan, data: Data, preprocess: nn.Module, raw: Split, batch: Split) -> None:
        assert isinstance(plan.objective, Objective)
        self._objective: Objective = plan.objective
        self._plan, self._data, self._preprocess, self._raw, self._batch = plan, data, preprocess, raw, batch
        self._exported: set[tuple[str, ...]] = set()

    def __call__(self, params: Params, is_first: bool) -> tuple[nn.Module | None, Any]:
        """Return the network of `params` and its outputs; None where the objective gives none. Raises InputError."""
        plan, batch = self._plan, self._batch
        network = self._trained(params)
        if network is None:
            return None, None
        network = network.cpu().eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of so few rows metrics say much; the trials themselves will say it
            outputs = try_forward(plan, network, batch)
            if is_first:
                try_measuring(plan, self._data, outputs, batch, [])
            kinds = tuple(type(part).__qualname__ for part in network.modules())
            if kinds not in self._exported:  # the same layers of another width are exported alike
                self._export(network, params)
                self._exported.add(kinds)
        return network, outputs

    def _trained(self, params: Params) -> nn.Module | None:
        plan, batch = self._plan, self._batch
        report = TrialReporter(plan, batch, batch, 1, _SEED, self._told)
        shown = ", ".join(f"{name}={value}" for name, value in plan.space.searched(params).items())
        what = f"a first epoch of a few rows with {shown or 'its fixed params'}"
        torch.manual_seed(_SEED)
        try:
            with settings_stay(plan, "train"), Within(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                network = guarded(plan, what, lambda: self._objective.preview(params, report))
        except InputError as error:
            raise InputError(f"{error}{missing_param(error, params)}") from error.__cause__
        return None if network is None else module_from(plan, "preview", lambda: network)

    @staticmethod
    def _told(metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> bool:
        return False

    def _export(self, network: nn.Module, params: Params) -> None:
        """Export the network into a temporary folder, as it will be at the study's end. Raises InputError."""
        plan = self._plan
        head = module_from(plan, "head", self._objective.head)
        model = Model(
            preprocess=self._preprocess, network=network, head=head, params=params, info=self._data.info, about={}
        )
        try:
            with tempfile.TemporaryDirectory() as folder:
                export(model, self._raw, Path(folder) / "bundle")
        except Exception as error:  # whatever TorchScript, the user's forward or the comparison raise
            why = str(error) if isinstance(error, HpoError) else origin(error)
            raise InputError(
                f"objective {plan.spec.objective}: {self._objective.returns} ({type(network).__name__}) cannot be "
                f"exported: {why}; its forward must take tensors and give a tensor by torch's own functions, the same "
                "for the same rows, so that torch.jit can script or trace it"
            ) from error
