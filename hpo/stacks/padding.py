"""How the networks of a study are padded to share stacks: to which structure, and how much larger than they are.

Widths are padded by building, for the same params, a network whose widths are rounded up: so its shapes agree with each
other whatever the objective's code does with a width (adds to it, concatenates). Which params are widths, and which
change how many layers there are, is seen on networks at the ends of the space.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from hpo.errors import is_number
from hpo.stacks.cost import power_of_two
from hpo.stacks.structure import CommonStructure, PaddedModule, common_structure, tensors
from hpo.study.objective import Params
from hpo.study.space import Space
from hpo.study.spec import Categorical, FloatRange, IntRange
from hpo.training.faults import TrialError
from hpo.training.memory import Within, is_out_of_memory, most_to_look_at, networks_at_once

Padder = Callable[[nn.Module, Params], PaddedModule]
"""Pads a network that was built with those params."""
Padding = Literal["fine", "coarse"]
"""Widths are rounded up to the next power of two, or to the study's largest: one stack for all."""
_SMALLEST = 16
_FEW = 16
"""Of a space that reaches beyond memory, networks are inspected of which so many may be held at once."""


def _lower(searched: Any, value: Any) -> Any:
    """Return about half of a size, or the next smaller choice; of what is no size, the value itself."""
    if isinstance(searched, IntRange):
        step = searched.step or 1
        return searched.low + (value - searched.low) // 2 // step * step
    if isinstance(searched, Categorical) and is_number(value):
        return max((c for c in searched.choices if is_number(c) and c < value), default=value)
    return value


def unpadded(module: nn.Module, params: Params) -> PaddedModule:
    """Pad nothing: only dropout rates are turned into tensors."""
    return CommonStructure().pad(module)


class PaddingPlan:
    """The padders of a study, loosest first: layers and widths may differ, only widths, neither."""

    def __init__(self, space: Space, build: Callable[[Params], nn.Module], padding: Padding = "fine") -> None:
        self._space, self._build, self._padding = space, build, padding
        self._padders: list[Padder] = []

    def __iter__(self) -> Iterator[Padder]:
        if not self._padders:
            self._padders = self._made()
        return iter(self._padders)

    @property
    def loosest(self) -> Padder:
        """The one with which most members share a stack."""
        return next(iter(self))

    def _made(self) -> list[Padder]:
        try:
            return self._inferred()
        except TrialError:  # an end of the space is infeasible: nothing is known of its networks
            return [unpadded]

    def _inferred(self) -> list[Padder]:
        highs, n_at_once = self._largest()
        if not n_at_once:
            return [unpadded]
        several = [self._lowered(params, highs) for params in self._space.extremes(min(64, n_at_once))]
        highs, *others = {repr(sorted(each.items())): each for each in several}.values()
        widths, depths = self._sizes(highs)
        everything = [highs, *others]
        try:
            layers = common_structure([self._network(params) for params in everything])
        except TrialError:
            raise
        except Exception as error:  # user's code: a layer that cannot be copied cannot be left out of a network
            if is_out_of_memory(error):
                raise
            layers = CommonStructure()
        sizes = common_structure([self._network(params) for params in everything], sizes_only=True)
        return [
            self._padder(layers, highs, widths, to_highest=depths),
            self._padder(sizes, highs, widths),
            unpadded,
        ]

    def _padder(
        self, structure: CommonStructure, highs: Params, widths: Sequence[str], to_highest: Sequence[str] = ()
    ) -> Padder:
        """Return what pads to `structure`: `widths` are rounded up, the params `to_highest` are those of `highs`."""
        known: dict[str, Mapping[str, tuple[int, ...]]] = {}

        def pad(module: nn.Module, params: Params) -> PaddedModule:
            larger = {name: self._rounded(params[name], highs[name]) for name in widths if name in params}
            larger |= {name: highs[name] for name in to_highest if name in params}
            if all(params[name] == value for name, value in larger.items()):
                return structure.pad(module)
            structural = {n: v for n, v in {**params, **larger}.items() if not isinstance(v, float)}
            key = repr(sorted(structural.items()))
            if key not in known:
                try:
                    known[key] = structure.shapes_of(self._network(self._space.completed({**params, **larger})))
                except Exception:  # user's code: a width that is rounded up may be one that it does not take
                    known[key] = {}
            return structure.pad(module, known[key])

        return pad

    def _network(self, params: Params) -> nn.Module:
        """Raises MemoryError where it would be too large to be inspected."""
        with Within(most_to_look_at()):
            return self._build(params)

    def _largest(self) -> tuple[Params, int]:
        """Return the largest configuration that may be inspected, and how many such; 0: there is none.

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
            {
                n: min(v, highs[n]) if n in sizes and is_number(v) and is_number(highs.get(n)) else v
                for n, v in params.items()
            }
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

    def _rounded(self, size: int, highest: int) -> int:
        if self._padding == "coarse" or size > highest:
            return max(size, highest)
        return min(highest, max(_SMALLEST, power_of_two(size)))
