"""What the networks of one study have in common: the `CommonStructure` that those are padded to which a stack trains.

Members of a stack run the same code, so what makes their networks differ is turned into tensors: a dropout's rate, the
index of an activation among several, whether a layer is there at all, how much of a padded weight is used. Nothing is
declared for that: the common structure is inferred from some networks of the study that show its extremes. What it
cannot turn into tensors stays in a network's signature, and members share a stack if theirs are equal.
"""

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpo.stacks.tensor_modules import Gated, SelectOne, idle_dropout, is_control, tensor_dropout
from hpo.training.kinds import HOOKS, NOT_READ, Kinds

_SIZES = ("in_features", "out_features", "num_features", "in_channels", "out_channels")
"""Attributes of torch.nn's own modules that say what the shapes say, and that their forward does not use."""


@dataclass(frozen=True, kw_only=True)
class PaddedModule:
    """A network in the common structure. `names` are the structure's names by the network's own, of all its tensors.

    `beside` are those of its own names that its state_dict lacks: buffers that are not persistent. `shapes` are those
    of its tensors in the stack, by the structure's names; `varied` the tensors of which not all networks of the study
    have all.
    """

    module: nn.Module
    names: Mapping[str, str]
    beside: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]
    varied: frozenset[str]
    own: Mapping[str, Tensor]
    """This network's own tensors by the structure's names, in their own shapes; all others are padding. Kept here since
    `torch.func` leaves others in a module that stands at two places of the network."""
    signature: Hashable
    """Equal for networks that only the numbers in their tensors tell apart."""

    @property
    def has_choices(self) -> bool:
        """Whether a tensor decides which of its layers are used."""
        return any(isinstance(each, Gated | SelectOne) for each in self.module.modules())

    @property
    def form(self) -> Hashable:
        """What networks of one signature may differ in beside numbers: their own sizes, and the layers they use."""
        used = [int(each.used) for each in self.module.modules() if isinstance(each, Gated)]
        chosen = [int(each.chosen) for each in self.module.modules() if isinstance(each, SelectOne)]
        return tuple((name, tuple(each.shape)) for name, each in self.own.items()), tuple(used), tuple(chosen)


@dataclass(frozen=True)
class _Optional:
    """Of a sequence of `modules`, those from `first` to `last` may be left out."""

    modules: tuple[tuple[str, nn.Module], ...]
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class CommonStructure:
    """See the module's docstring. `CommonStructure()` turns nothing but dropout into tensors."""

    optional: Mapping[str, _Optional] = field(default_factory=dict)
    choices: Mapping[str, tuple[nn.Module, ...]] = field(default_factory=dict)
    varied: frozenset[str] = frozenset()
    """The tensors whose sizes are not the same in all networks of the study, and those of layers that some lack."""
    drops: bool = True
    """Whether a network of the study has dropout of another rate than 0."""

    def pad(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None) -> PaddedModule:
        """Return `module`, which is changed, in this structure, to be stacked with those `shapes` or else its own.

        `shapes` are those of a network at least as large, see `shapes_of`.
        """
        module = tensor_dropout(module)
        first_names = {id(tensor): name for name, tensor in tensors(module).items()}  # a tied weight has several
        kept = {key: first_names[id(tensor)] for key, tensor in module.state_dict(keep_vars=True).items()}
        beside = {name: name for name, _ in module.named_buffers() if name not in kept}
        own = {key: name for key, name in {**kept, **beside}.items() if not is_control(module, name)}
        module, renamed = self._put(module)
        if not self.drops:
            idle_dropout(module)  # of layers that this network lacks, too
        every = tensors(module)
        names = {key: _renamed(name, renamed) for key, name in own.items()}
        present = {_renamed(name, renamed) for name in first_names.values()}
        left_out = frozenset(name for name in every if name not in present and not is_control(module, name))
        shapes = {name: (shapes or {}).get(name, tuple(tensor.shape)) for name, tensor in every.items()}
        frozen = tuple(n for n, w in module.named_parameters() if not w.requires_grad)
        kinds = Kinds()
        parts = tuple((n, *_kind(m, kinds)) for n, m in module.named_modules())
        layout = tuple((n, shapes[n], t.dtype) for n, t in every.items())
        return PaddedModule(
            module=module,
            names=names,
            beside=frozenset(beside) & names.keys(),
            shapes=shapes,
            varied=self.varied,
            own={name: tensor for name, tensor in every.items() if name not in left_out},
            signature=(layout, frozen, parts),
        )

    def shapes_of(self, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors of `module`, which is changed, in this structure."""
        module, _ = self._put(tensor_dropout(module))
        return {name: tuple(tensor.shape) for name, tensor in tensors(module).items()}

    def _put(self, module: nn.Module) -> tuple[nn.Module, list[tuple[str, str]]]:
        """Return `module` with this structure's layers and choices, and (old, new) prefixes of names."""
        renamed: list[tuple[str, str]] = []
        for path, optional in self.optional.items():
            module, more = _gate(module, path, optional)
            renamed += more
        for path, options in self.choices.items():
            module = _choose(module, path, options)
        return module, renamed


def common_structure(modules: Sequence[nn.Module], sizes_only: bool = False) -> CommonStructure:
    """Return the structure that some networks of a study have in common; they are changed.

    `sizes_only`: only the sizes of layers may differ, not which there are.
    """
    drops = any(each.p for module in modules for each in module.modules() if type(each) is nn.Dropout)
    modules = [tensor_dropout(module) for module in modules]
    if sizes_only:
        return CommonStructure(varied=_varied(modules), drops=drops)
    optional: dict[str, _Optional] = {}
    for path in _sequences(modules):
        lists = [list(module.get_submodule(path).named_children()) for module in modules]
        found = _optional(lists)
        if found is not None and not any(path == p or path.startswith(f"{p}.") or p == "" for p in optional):
            optional[path] = found
    gated = []
    for module in modules:
        for path, each in optional.items():
            module, _ = _gate(module, path, each)
        gated.append(module)
    choices: dict[str, dict[Hashable, nn.Module]] = {}
    for module in gated:
        for path, leaf in module.named_modules():
            if not list(leaf.children()) and not tensors(leaf) and path:
                choices.setdefault(path, {})[_layer_and_settings(leaf)] = leaf
    return CommonStructure(
        optional=optional,
        choices={path: tuple(each.values()) for path, each in choices.items() if len(each) > 1},
        varied=_varied(gated) | _may_lack(gated[0], optional),
        drops=drops,
    )


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def own_state(module: nn.Module) -> Hashable:
    """Return what a network holds outside of tensors, torch's own modules aside: running it must not change that."""
    kinds = Kinds()
    return tuple(
        (name, *_kind(each, kinds))
        for name, each in module.named_modules()
        if not type(each).__module__.startswith("torch.")
    )


def _sequences(modules: Sequence[nn.Module]) -> list[str]:
    """Return the paths at which every module has an nn.Sequential."""
    paths = [{p for p, m in module.named_modules() if type(m) is nn.Sequential} for module in modules]
    return [path for path, m in modules[0].named_modules() if all(path in each for each in paths)]


Children = Sequence[tuple[str, nn.Module]]


def _optional(lists: Sequence[Children]) -> _Optional | None:
    """Return which modules of the longest of these sequences the shorter ones lack, if it is one run of them.

    Of the ways to lay a shorter sequence on the longest, that is the right one in which all their tensors have the same
    shapes: networks of the same widths, but another depth, are among those that the structure is inferred from.
    """
    longest = max(lists, key=len)
    shortest = min(map(len, lists))
    if shortest == len(longest):
        return None
    for short in (each for each in lists if len(each) == shortest):
        for tail in (*range(1, shortest + 1), 0):
            head = shortest - tail
            last = len(longest) - tail
            laid = [*zip(short[:head], longest[:head], strict=True), *zip(short[head:], longest[last:], strict=True)]
            if all(_alike(a, b) for (_, a), (_, b) in laid):
                return _Optional(tuple((name, deepcopy(module)) for name, module in longest), head, last)
    return None


def _alike(a: nn.Module, b: nn.Module) -> bool:
    shapes_a, shapes_b = ([t.shape for t in tensors(each).values()] for each in (a, b))
    return _layer_type(a) == _layer_type(b) and shapes_a == shapes_b


def _layer_type(module: nn.Module) -> Hashable:
    """Return a layer's type, whatever its sizes; None for all that have no weights (see `SelectOne`)."""
    return _kind(module, Kinds())[0] if tensors(module) else None


def _layer_and_settings(module: nn.Module) -> Hashable:
    return _kind(module, Kinds())


def _kind(module: nn.Module, kinds: Kinds) -> tuple[Hashable, Hashable]:
    """Return what a module's class is and its `_attributes`. These first: a class made for it may close over it."""
    attributes = _attributes(module, kinds)
    return kinds.of(type(module)), attributes


def _gate(module: nn.Module, path: str, optional: _Optional) -> tuple[nn.Module, list[tuple[str, str]]]:
    """Return `module` with the sequence at `path` filled up to the structure's, and (old, new) prefixes of names."""
    try:
        sequence = module.get_submodule(path)
    except AttributeError:
        return module, []
    own = list(sequence.named_children())
    n, tail = len(optional.modules), len(optional.modules) - optional.last
    used = len(own) - optional.first - tail
    if type(sequence) is not nn.Sequential or not 0 <= used <= optional.last - optional.first:
        return module, []
    indices = [*range(optional.first + used), *range(optional.last, n)]
    expected = [optional.modules[index][1] for index in indices]
    if any(_layer_type(child) != _layer_type(other) for (_, child), other in zip(own, expected, strict=True)):
        return module, []
    begin = f"{path}." if path else ""
    present: dict[str, nn.Module] = {}
    renamed = []
    for (name, child), index in zip(own, indices, strict=True):
        common_name = optional.modules[index][0]
        present[common_name] = child
        renamed.append((f"{begin}{name}.", f"{begin}{common_name}."))
    left_out = {name: deepcopy(each) for name, each in optional.modules if name not in present}
    with torch.no_grad():
        for each in left_out.values():
            for tensor in tensors(each).values():
                tensor.zero_()
    device = next((t.device for t in tensors(module).values()), None)
    both = {name: present[name] if name in present else left_out[name] for name, _ in optional.modules}
    gated = Gated(both, optional.first, optional.last, used).to(device)
    return _replaced(module, path, gated.train(module.training)), renamed


def _choose(module: nn.Module, path: str, options: Sequence[nn.Module]) -> nn.Module:
    """Return `module` with the one at `path` replaced by a SelectOne; unchanged where it is not an option."""
    try:
        child = module.get_submodule(path)
    except AttributeError:
        return module
    for index, option in enumerate(options):
        if _layer_and_settings(child) == _layer_and_settings(option):
            device = next((t.device for t in tensors(module).values()), None)
            return _replaced(module, path, SelectOne(options, index).to(device).train(module.training))
    return module


def _replaced(module: nn.Module, path: str, by: nn.Module) -> nn.Module:
    if not path:
        return by
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, by)
    return module


def _renamed(name: str, renamed: Sequence[tuple[str, str]]) -> str:
    for old, new in renamed:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _varied(modules: Sequence[nn.Module]) -> frozenset[str]:
    shapes: dict[str, set[torch.Size]] = {}
    for module in modules:
        for name, tensor in tensors(module).items():
            shapes.setdefault(name, set()).add(tensor.shape)
    return frozenset(name for name, each in shapes.items() if len(each) > 1)


def _may_lack(module: nn.Module, optional: Mapping[str, _Optional]) -> frozenset[str]:
    """Return the names of the tensors of layers that some networks lack."""
    lacking = {path: each.modules[each.first : each.last] for path, each in optional.items()}
    begin = tuple(f"{path}.{name}.".lstrip(".") for path, some in lacking.items() for name, _ in some)
    return frozenset(name for name in tensors(module) if name.startswith(begin))


def _runs_torchs_code(cls: type) -> bool:
    """Whether a class is one of torch.nn, or derived from one without any code but its __init__."""
    own = [each for each in cls.__mro__ if each is not object and not each.__module__.startswith("torch.nn")]
    return all(vars(each).keys() <= {"__module__", "__qualname__", *NOT_READ} for each in own)


def _attributes(module: nn.Module, kinds: Kinds) -> Hashable:
    """Return a module's own attributes that are no tensors: what its forward may branch on or compute with.

    Of torch's own modules, not what they derive from others (`_flat_weights`), nor sizes, which their shapes have.
    """
    left_out: frozenset[str] = frozenset()
    if _runs_torchs_code(type(module)):
        left_out = frozenset(key for key in vars(module) if key in _SIZES or key.startswith("_")) - HOOKS
    return kinds.attributes(module, left_out)
