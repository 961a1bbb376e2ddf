"""The slots of a stack: which member has which, and where its tensors are among the stacked ones.

A network smaller than the shapes it is padded to fills a *region* of each stacked tensor, beginning at its first
corner; the rest is padding: zeros, that stay zeros since their gradients are masked.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hpo.stacks.state import StackState, hyperparameters
from hpo.stacks.structure import PaddedModule
from hpo.training.stack import Kept, Member

Region = tuple[slice, ...]


class Slots:
    """Up to `capacity` members, and the state that holds their tensors, one row a slot."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._device = device
        self._taken: list[Member | None] = [None] * capacity
        self._regions: dict[Member, dict[str, tuple[str, Region]]] = {}
        self._beside: dict[Member, frozenset[str]] = {}
        self._live: Tensor | None = None
        self._improved: set[int] = set()
        self._kept: dict[str, Tensor] = {}
        self.state = StackState.without_networks(capacity, device)

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return len(self._taken)

    @property
    def members(self) -> Sequence[Member]:
        """The members, in the order of their slots."""
        return [member for member in self._taken if member is not None]

    @property
    def free(self) -> int:
        """How many slots are empty."""
        return self._taken.count(None)

    def live(self) -> Tensor:
        """Return the slots that have a member, (n,). Kept until they change: a copy to a GPU waits for it."""
        if self._live is None:
            slots = [slot for slot, member in enumerate(self._taken) if member is not None]
            self._live = torch.tensor(slots, dtype=torch.long, device=self._device)
        return self._live

    def take(self, member: Member) -> int:
        """Give `member` the first empty slot, and return which."""
        slot = self._taken.index(None)
        self._taken[slot], self._live = member, None
        return slot

    def release(self, member: Member) -> None:
        """Make a member's slot an empty one."""
        slot = self._taken.index(member)
        self._taken[slot], self._live = None, None
        self._improved.discard(slot)
        self._regions.pop(member, None)
        self._beside.pop(member, None)

    def keep(self, member: Member) -> Kept:
        """See `hpo.training.stack.Stack.keep`. What all members keep of one epoch is copied at once (`settle`)."""
        self._improved.add(self._taken.index(member))

        def kept() -> dict[str, Tensor]:
            self.settle()
            return self.own(member, self._kept, self._beside[member])

        return kept

    def settle(self) -> None:
        """Copy what is to be kept: to be called before the state changes."""
        if not self._improved:
            return
        improved = [slot in self._improved for slot in range(self.capacity)]
        self._improved.clear()
        mask = torch.tensor(improved).to(self._device, non_blocking=True)
        for name, now in {**self.state.weights, **self.state.buffers}.items():
            before = self._kept.get(name)
            fits = before is not None and before.shape == now.shape
            column = mask.view(-1, *[1] * (now.ndim - 1))
            self._kept[name] = torch.where(column, now, before) if fits else now.clone()  # type: ignore[arg-type]

    def resize(self, capacity: int) -> None:
        """Change the number of slots to `capacity`, at least as many as there are members, who move together."""
        self.settle()
        kept, members = self.live(), self.members
        assert len(members) <= capacity

        def moved(tensor: Tensor) -> Tensor:
            new = tensor.new_zeros((capacity, *tensor.shape[1:]))
            new[: len(members)] = tensor[kept]
            return new

        self.state = tree_map(moved, self.state)
        self._kept = {name: moved(tensor) for name, tensor in self._kept.items()}
        self._taken, self._live = [*members, *[None] * (capacity - len(members))], None

    def fill(self, networks: Mapping[int, tuple[Member, PaddedModule]]) -> None:
        """Put members with their networks into slots, at the beginning of their training.

        Of each tensor all members' rows are put together where the networks are, and copied at once.
        """
        state = self.state
        own = [padded.own for _, padded in networks.values()]
        for (member, padded), tensors in zip(networks.values(), own, strict=True):
            regions = {name: tuple(slice(0, size) for size in tensor.shape) for name, tensor in tensors.items()}
            self._regions[member] = {key: (name, regions[name]) for key, name in padded.names.items()}
            self._beside[member] = padded.beside
        slots = torch.tensor(list(networks), device=self._device)
        with torch.no_grad():
            for name, rows in (*state.weights.items(), *state.buffers.items()):
                new, mask = _rows_of([tensors.get(name) for tensors in own], rows, name in state.masks)
                rows.index_copy_(0, slots, new.to(self._device))
                if mask is not None:
                    state.masks[name].index_copy_(0, slots, mask.to(self._device))
            for states in state.optimizer.values():
                for rows in states.values():
                    rows.index_fill_(0, slots, 0)
            state.t.index_fill_(0, slots, 0)
            hyper = [hyperparameters(member.params) for member, _ in networks.values()]
            for name, rows in state.hyper.items():
                rows.index_copy_(0, slots, rows.new_tensor([each[name] for each in hyper]))
            for name, rows in state.loss_hyper.items():
                rows.index_copy_(0, slots, rows.new_tensor([member.params[name] for member, _ in networks.values()]))

    def tensors(self, member: Member) -> dict[str, Tensor]:
        """Return copies of a member's weights and buffers, by its network's own names."""
        return self.own(member, {**self.state.weights, **self.state.buffers})

    def state_dict(self, member: Member) -> dict[str, Tensor]:
        """Return those of `tensors` that the network's state_dict has: buffers that are not persistent are left out."""
        return self.own(member, {**self.state.weights, **self.state.buffers}, self._beside[member])

    def own(
        self, member: Member, stacked: Mapping[str, Tensor], left_out: frozenset[str] = frozenset()
    ) -> dict[str, Tensor]:
        """Return copies of a member's part of stacked tensors, by its network's own names."""
        slot, regions = self._taken.index(member), self._regions[member]
        own = {key: place for key, place in regions.items() if key not in left_out}
        return {key: stacked[name][slot][region].clone() for key, (name, region) in own.items() if name in stacked}

    def checkpoint(self, member: Member) -> dict[str, Any]:
        """Return what `restore` takes: see `hpo.training.stack.Stack.checkpoint`."""
        slot = self._taken.index(member)
        t = self.state.t[slot]
        step = {} if str(member.params["optimizer"]).lower() == "sgd" else {"step": t.float().cpu().clone()}
        optimizer = {  # as torch.optim keeps it
            own: step | {key: rows[slot][region].cpu().clone() for key, rows in self.state.optimizer[name].items()}
            for own, (name, region) in self._regions[member].items()
            if name in self.state.optimizer
        }
        model = {name: tensor.cpu() for name, tensor in self.tensors(member).items()}
        return {"model": model, "optimizer": optimizer, "steps": int(t)}

    def restore(self, slot: int, member: Member, resume: Mapping[str, Any]) -> None:
        """Have the member in `slot` resume from a checkpoint."""
        state = self.state
        with torch.no_grad():
            for own, (name, region) in self._regions[member].items():
                if own not in resume["model"]:  # not persistent: stacks of earlier versions did not keep it
                    continue
                rows = state.weights if name in state.weights else state.buffers
                rows[name][slot][region] = resume["model"][own].to(self._device)
                kept = resume["optimizer"].get(own, {})
                for key, states in state.optimizer.get(name, {}).items():
                    if kept.get(key) is not None:  # torch's SGD has no buffer before its first step
                        states[slot][region] = kept[key].to(self._device)
            state.t[slot] = resume["steps"]


def _rows_of(own: Sequence[Tensor | None], rows: Tensor, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Return networks' tensors as rows (n, ...), each in its region, zeros elsewhere; and, if it is `masked`, the mask.

    A mask is 1 in the region. None: a network has no such tensor.
    """
    there = [each for each in own if each is not None]
    if len(there) == len(own) and all(each.shape == rows.shape[1:] for each in there):
        new = torch.stack(there).to(rows.dtype)
        return new, torch.ones_like(new) if masked else None
    new = torch.zeros((len(own), *rows.shape[1:]), dtype=rows.dtype, device=there[0].device if there else rows.device)
    mask = torch.zeros_like(new) if masked else None
    for row, each in enumerate(own):
        if each is not None:
            region = tuple(slice(0, size) for size in each.shape)
            new[row][region] = each
            if mask is not None:
                mask[row][region] = 1
    return new, mask
