"""An objective's own training tried before anything runs: a few rows for one epoch, and the export of what it gives."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hpo.errors import InputError
from hpo.runner.advice import head_advice
from hpo.runner.custom import TrialReporter
from hpo.runner.firststep import missing_param, module_from, settings_stay
from hpo.runner.prepare import Plan, guarded
from hpo.runner.returned import FewRows, apart_advice, try_export, try_network
from hpo.study.data import Data
from hpo.study.objective import Objective, Params
from hpo.training.memory import Within

_SEED = 1


class Preview:
    """Tries an objective's `preview` with a few rows."""

    def __init__(self, plan: Plan, data: Data, rows: FewRows) -> None:
        assert isinstance(plan.objective, Objective)
        self._objective: Objective = plan.objective
        self._plan, self._data, self._rows = plan, data, rows
        self.warnings: list[str] = []
        self._exported: set[tuple[str, ...]] = set()

    def __call__(self, params: Params, is_first: bool) -> nn.Module | None:
        """Return the network of `params`; None where the objective gives none. Raises InputError."""
        network = self._trained(params)
        if network is None:
            return None
        network = network.cpu().eval()
        outputs = try_network(self._plan, self._data, self._rows, network, measures=is_first)
        if is_first:
            self.warnings += head_advice(self._plan, outputs)
            self.warnings += apart_advice(self._plan, self._rows, network)
        kinds = tuple(type(part).__qualname__ for part in network.modules())
        if kinds not in self._exported:  # the same layers of another width are exported alike
            try_export(self._plan, self._data, self._rows, network, params)
            self._exported.add(kinds)
        return network

    def _trained(self, params: Params) -> nn.Module | None:
        plan, batch = self._plan, self._rows.batch
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
