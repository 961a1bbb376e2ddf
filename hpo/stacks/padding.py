"""The frames that a study's networks are tried in, and how much larger than itself a network may be made to fit.

Widths are padded by building, for the same params, a network whose widths are rounded up: so its shapes agree with each
other whatever the objective's code does with a width (adds to it, concatenates). Which params are widths, and which
change how many layers there are, is seen on networks at the ends of the space.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from hpo.errors import is_number
from hpo.stacks.structure import Frame, PaddedModule, frame_of, tensors
from hpo.study.objective import Params
from hpo.study.space import Space
from hpo.study.spec import Categorical, FloatRange, IntRange
from hpo.training.faults import TrialError
from hpo.training.memory import Within, is_out_of_memory, most_to_look_at, networks_at_once

Padder = Callable[[nn.Module, Params], PaddedModule]
"""Puts a network, built with those params, into a frame."""
Padding = Literal["fine", "coarse"]
"""Widths are rounded up to the next power of two, or to the study's largest: one stack for all."""
_SMALLEST = 16
_FEW = 16
"""Of a space that reaches beyond memory, networks are looked at of which so many may be held at once."""


def _lower(searched: Any, value: Any) -> Any:
    """Return about half of a size, or the next smaller choice; of what is no size, the value itself."""
    if isinstance(searched, IntRange):
        step = searched.step or 1
        return searched.low + (value - searched.low) // 2 // step * step
    if isinstance(searched, Categorical) and is_number(value):
        return max((c for c in searched.choices if is_number(c) and c < value), default=value)
    return value


def as_it_is(module: nn.Module, params: Params) -> PaddedModule:
    """Put a network into a frame that turns nothing but dropout rates into tensors."""
    return Frame().fit(module)


class PaddingPlan:
    """From what stacks most to what fits all: layers and widths may differ, only widths, neither."""

    def __init__(self, space: Space, build: Callable[[Params], nn.Module], grain: Padding = "fine") -> None:
        self._space, self._build, self._grain = space, build, grain
        self._made: list[Padder] = []

    def __len__(self) -> int:
        return 3

    def __getitem__(self, level: int) -> Padder:
        if not self._made:
            self._made = self._make()
        return self._made[level]

    def _make(self) -> list[Padder]:
        try:
            return self._read_off()
        except TrialError:  # an end of the space is infeasible: nothing is known of its networks
            return [as_it_is] * len(self)

    def _read_off(self) -> list[Padder]:
        highs, n_at_once = self._largest()
        if not n_at_once:
            return [as_it_is] * len(self)
        several = [self._lowered(params, highs) for params in self._space.extremes(min(64, n_at_once))]
        highs, *others = {repr(sorted(each.items())): each for each in several}.values()
        widths, depths = self._sizes(highs)
        everything = [highs, *others]

        def fit_in(frame: Frame, to_highest: Sequence[str]) -> Padder:
            known: dict[str, Mapping[str, tuple[int, ...]]] = {}

            def fit(module: nn.Module, params: Params) -> PaddedModule:
                larger = {name: self._rounded(params[name], highs[name]) for name in widths if name in params}
                larger |= {name: highs[name] for name in to_highest if name in params}
                if all(params[name] == value for name, value in larger.items()):
                    return frame.fit(module)
                structural = {n: v for n, v in {**params, **larger}.items() if not isinstance(v, float)}
                key = repr(sorted(structural.items()))
                if key not in known:
                    try:
                        known[key] = frame.shapes_of(self._network(self._space.completed({**params, **larger})))
                    except Exception:  # user's code: a width that is rounded up may be one that it does not take
                        known[key] = {}
                return frame.fit(module, known[key])

            return fit

        layers = frame_of([self._network(params) for params in everything])
        sizes = frame_of([self._network(params) for params in everything], sizes_only=True)
        return [fit_in(layers, depths), fit_in(sizes, ()), as_it_is]

    def _network(self, params: Params) -> nn.Module:
        """Raises MemoryError where it would be too large to be looked at."""
        with Within(most_to_look_at()):
            return self._build(params)

    def _largest(self) -> tuple[Params, int]:
        """Return the largest configuration that may be looked at, and how many such; 0: there is none.

        Of a space whose highest sizes are too large it is one of lower sizes: what is larger is not padded.
        """
        params = highest = self._space.extremes(1)[0]
        while True:
            try:
                n_at_once = networks_at_once(self._network(params))
                if params == highest or n_at_once >= _FEW:
                    return params, n_at_once
            except Exception as error:
                if not is_out_of_memory(error):
                    if params == highest:
                        raise
                    return params, 0  # user's code: a size that is lowered may be one that it does not take
            lower = {d.name: _lower(d.searched, params[d.name]) for d in self._space.dimensions if d.name in params}
            lowered = self._space.completed({**params, **lower})
            if lowered == params:
                return params, 0
            params = lowered

    def _lowered(self, params: Params, highs: Params) -> dict[str, Any]:
        """Return `params` with no size above those of `highs`."""
        sizes = {d.name for d in self._space.dimensions if not isinstance(d.searched, FloatRange)}
        return self._space.completed(
            {n: min(v, highs[n]) if n in sizes and n in highs and is_number(v) else v for n, v in params.items()}
        )

    def _sizes(self, highs: Params) -> tuple[list[str], list[str]]:
        """Return the names of the params that change the layers' sizes, and of those that change how many there are."""
        shapes = {n: t.shape for n, t in tensors(self._network(highs)).items()}
        widths, depths = [], []
        for dimension in self._space.dimensions:
            if isinstance(dimension.searched, IntRange) and dimension.name in highs:
                lower = self._space.completed({**highs, dimension.name: dimension.searched.low})
                other = {n: t.shape for n, t in tensors(self._network(lower)).items()}
                if other.keys() != shapes.keys():
                    depths.append(dimension.name)
                elif other != shapes:
                    widths.append(dimension.name)
        return widths, depths

    def _rounded(self, size: Any, highest: int) -> int:
        if self._grain == "coarse" or size > highest:
            return max(size, highest)
        return min(highest, max(_SMALLEST, 1 << (size - 1).bit_length()))
