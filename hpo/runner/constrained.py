"""What is measured of a trial beside the metric that leads: what the study constrains, and its other metrics.

How many parameters a network has is known before it is trained, so one with too many is not: its trial is PRUNED, and
samplers are given by how much it breaks the constraint. A latency is measured when a trial ends or is paused.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from hpo.export.describing import latency
from hpo.runner.prepare import Plan
from hpo.search.constraints import attrs_of
from hpo.study.constraints import LATENCY, N_PARAMETERS, OF_ANY_TRIAL, constraints_in
from hpo.study.data import Split
from hpo.study.objective import Params
from hpo.training.faults import TrialError, TrialFault
from hpo.training.memory import Within, is_out_of_memory
from hpo.training.stack import Member, Task


class Limits:
    """The constraints of a study, and the values of its trials that they name."""

    def __init__(self, plan: Plan, task: Task | None = None) -> None:
        """`task` is what the engine's loop trains; None: trials are trained in another way."""
        self._constraints = constraints_in(plan.spec.constraints)
        self._names = plan.measured
        """What is measured."""
        self._task, self._device = task, plan.device
        self._of_function = plan.function is not None
        """Whether a trial's values are what a plain function has returned: they are logged nowhere else."""
        self.wants_network = task is None and any(name in OF_ANY_TRIAL for name in self._names)
        """Whether a trial that trains itself is judged only once it has given its network (`values_of_network`)."""
        self.rows: Callable[[int], Split] | None = None
        """Gives the first so many rows as networks take them, on the device; set by who has the data."""
        self.must_end: Callable[[Member, float, float], bool] = lambda member, value, started: False
        """Whether a trial is complete with the epochs it has, for the study's time (`hpo.runner.deadline`)."""

    def values_at_claim(self, params: Params) -> dict[str, float]:
        """Return what is known of a trial of these `params` before it is trained.

        Nothing where its network cannot be built: that ends its trial where it is trained.
        """
        if self._task is None or N_PARAMETERS not in self._names:
            return {}
        try:
            return {N_PARAMETERS: self._n_trainable(self._network(params))}
        except TrialError:
            return {}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return {}

    def values_of_network(self, network: nn.Module) -> dict[str, float]:
        """Return what is known of a trial by the network that an objective's own training has given."""
        counted = {N_PARAMETERS: self._n_trainable(network)} if N_PARAMETERS in self._names else {}
        return counted | self._latency(lambda: network)

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
        named = {name: metrics.get(f"valid_{name}", math.nan) for name in self._names}
        known = {name: value for name, value in named.items() if math.isfinite(value)}
        return known | (self._latency(lambda: self._network(params)) if timed and self._task is not None else {})

    def unknown(self, values: Mapping[str, float]) -> str | None:
        """Return the first name of which no value is known; None: all are."""
        return next((name for name in self._names if name not in values), None)

    def broken(self, values: Mapping[str, float]) -> str | None:
        """Return which constraints a trial with these values breaks, and by how much; None: none."""
        held = [(each, values[name]) for name, each in self._constraints.items() if name in values]
        said = [each.said(value) for each, value in held if each.excess(value) > 0]
        return f"infeasible: {', '.join(said)}" if said else None

    def attrs(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Return what is stored of a trial with these values."""
        return attrs_of(self._constraints, values)

    def logged(self, values: Mapping[str, float], is_complete: bool) -> dict[str, float]:
        """Return what is logged of a trial with these values beside its metrics.

        That it holds to its constraints is known only of one that is complete (`hpo.search.constraints.is_feasible`).
        """
        if self._of_function:
            return dict(values)
        times = {f"{name}_ms": value for name, value in values.items() if name in LATENCY}
        holds = self.broken(values) is None
        known = bool(self._constraints) and (is_complete or not holds)
        return times | ({"feasible": float(holds)} if known else {})

    def _network(self, params: Params) -> nn.Module:
        assert self._task is not None
        with torch.random.fork_rng(devices=[]), Within():
            return self._task.network(params)

    @staticmethod
    def _n_trainable(network: nn.Module) -> float:
        return float(sum(weight.numel() for weight in network.parameters() if weight.requires_grad))

    def _latency(self, build: Callable[[], nn.Module]) -> dict[str, float]:
        """Return the milliseconds that a network takes, eager, on the study's device, by `latency` and the like.

        Nothing where the device has no memory for it, or none is wanted.
        """
        sizes = {name: LATENCY[name] for name in self._names if name in LATENCY}
        if not sizes:
            return {}
        assert self.rows is not None
        try:
            network = build().to(self._device).eval()
            with torch.random.fork_rng(devices=[]), nullcontext() if self._task is None else self._task.autocast():
                times = latency(network, self.rows(max(sizes.values())), tuple(sizes.values()), self._device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return {}
        return {name: times[str(size)] for name, size in sizes.items()}
