"""What a trial is held to beside its metric: the values that the study constrains, measured.

How many parameters a network has is known before it is trained, so one with too many is not: its trial is PRUNED, and
samplers are given by how much it breaks the constraint. A latency is measured when a trial ends or is paused.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from hpo.export.describing import latency
from hpo.runner.prepare import Plan
from hpo.search.constraints import attrs_of
from hpo.study.constraints import LATENCY, N_PARAMETERS, constraints_in
from hpo.study.data import Split
from hpo.study.objective import Params
from hpo.training.faults import TrialError, TrialFault
from hpo.training.memory import Within, is_out_of_memory
from hpo.training.stack import Task


class Limits:
    """The constraints of a study, and the values of its trials that they name."""

    def __init__(self, plan: Plan, task: Task | None = None) -> None:
        """`task` is what the engine's loop trains; None: trials are trained in another way."""
        self._constraints = constraints_in(plan.spec.constraints)
        self._task = task
        self.rows: Callable[[int], Split] | None = None
        """Gives the first so many rows as networks take them, on the device; set by who has the data."""

    def values_at_claim(self, params: Params) -> dict[str, float]:
        """Return what is known of a trial of these `params` before it is trained.

        Nothing where its network cannot be built: that ends its trial where it is trained.
        """
        if N_PARAMETERS not in self._constraints:
            return {}
        try:
            return {N_PARAMETERS: self._n_trainable(self._network(params))}
        except TrialError:
            return {}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return {}

    def network(self, params: Params) -> nn.Module:
        """Return a network of `params`, on the CPU. Raises TrialError where it would not be trained."""
        network = self._network(params)
        if N_PARAMETERS in self._constraints:
            broken = self.broken({N_PARAMETERS: self._n_trainable(network)})
            if broken is not None:
                raise TrialError(TrialFault(state="PRUNED", text=broken))
        return network

    def values(self, params: Params, metrics: Mapping[str, float], timed: bool = True) -> dict[str, float]:
        """Return the values that a trial has by the `metrics` of an epoch, and, unless not `timed`, its latency."""
        named = {name: metrics.get(f"valid_{name}", math.nan) for name in self._constraints}
        sizes = {name: LATENCY[name] for name in self._constraints if name in LATENCY} if timed else {}
        times = self._latency(params, tuple(sizes.values())) if sizes else {}
        named |= {name: times.get(str(size), math.nan) for name, size in sizes.items()}
        return {name: value for name, value in named.items() if math.isfinite(value)}

    def unknown(self, values: Mapping[str, float]) -> str | None:
        """Return the first name of which no value is known; None: all are."""
        return next((name for name in self._constraints if name not in values), None)

    def broken(self, values: Mapping[str, float]) -> str | None:
        """Return which constraints a trial with these values breaks, and by how much; None: none."""
        said = [self._constraints[name].said(value) for name, value in values.items() if self._excess(name, value) > 0]
        return f"infeasible: {', '.join(said)}" if said else None

    def attrs(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Return what is stored of a trial with these values."""
        return attrs_of(self._constraints, values)

    def logged(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return what is logged of a trial with these values beside its metrics; nothing where none is constrained."""
        if not self._constraints:
            return {}
        times = {f"{name}_ms": value for name, value in values.items() if name in LATENCY}
        return times | {"feasible": float(self.broken(values) is None)}

    def _excess(self, name: str, value: float) -> float:
        return self._constraints[name].excess(value)

    def _network(self, params: Params) -> nn.Module:
        assert self._task is not None
        with torch.random.fork_rng(devices=[]), Within():
            return self._task.network(params)

    @staticmethod
    def _n_trainable(network: nn.Module) -> float:
        return float(sum(weight.numel() for weight in network.parameters() if weight.requires_grad))

    def _latency(self, params: Params, sizes: tuple[int, ...]) -> dict[str, float]:
        """Return the milliseconds that a network of `params` takes for so many rows, eager, on the study's device.

        Nothing where that has no memory for it.
        """
        assert self._task is not None
        assert self.rows is not None
        try:
            network = self._network(params).to(self._task.device).eval()
            with torch.random.fork_rng(devices=[]), self._task.autocast():
                return latency(network, self.rows(max(sizes)), sizes, self._task.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return {}
