"""Whether members give in a stack what they give alone: looked at on a few rows, before they are trained there."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hpo.stacks.alone import NotStackable, is_other, unlike
from hpo.stacks.candidate import Candidate
from hpo.stacks.moved import outputs_when_moved
from hpo.stacks.recording import line
from hpo.stacks.slots import Slots
from hpo.stacks.trying import Trying
from hpo.stacks.vmap_step import VmapStep
from hpo.study.data import Split
from hpo.training.memory import is_out_of_memory
from hpo.training.stack import Task

_DRAWS = "it draws random numbers in training, of which padding may make something else"
_OTHER_STEP = "its gradients in a stack are not those alone"
_OTHER_LOSS = "its loss in evaluation in a stack is not the one alone"


class Admission:
    """Compares those that are in a stack's `slots` with what they are alone."""

    def __init__(self, task: Task, example: Split, slots: Slots) -> None:
        """`example`: a few rows as they are trained on."""
        self._task, self._example, self._slots = task, example, slots
        self._moved: set[Hashable] = set()
        self._stepped: set[Hashable] = set()

    def wrong(self, step: VmapStep, several: Mapping[int, Candidate]) -> dict[int, str]:
        """Return by slot why what a member does there is not what its network does, for those of which that is so.

        The slots hold other networks then.
        """
        self._slots.fill({slot: (each.member, each.probe) for slot, each in several.items()})
        wrong = self._wrong(
            step,
            {slot: each.outputs for slot, each in several.items()},
            {slot: each.loss for slot, each in several.items() if each.loss is not None},
        )
        several = {slot: each for slot, each in several.items() if slot not in wrong}
        new = {each.padded.form: slot for slot, each in several.items() if each.padded.form not in self._moved}
        wrong |= self._wrong_step(step, several) | self._wrong_when_moved(step, several, new)
        self._moved |= {form for form, slot in new.items() if slot not in wrong}
        return wrong

    def _wrong(
        self, step: VmapStep, alone: Mapping[int, Any], losses: Mapping[int, Tensor] | None = None
    ) -> dict[int, str]:
        """Return by slot why in the stack its outputs are not those of its own network, `alone`, or its loss of them in
        an evaluation is not that of `losses`."""
        if not alone:
            return {}
        try:
            stacked = step.forward(self._slots.state, [x.clone() for x in self._example.inputs.values()])
            of = {slot: tree_map(lambda x, slot=slot: x[slot], stacked) for slot in alone}
            found = {slot: unlike(of[slot], outputs, step.rounding) for slot, outputs in alone.items()}
            if losses:  # last: a loss may change the outputs that it is given
                got = step.losses_when_evaluated(stacked, self._example.targets.clone(), self._slots.state)
                other = {slot for slot, loss in losses.items() if is_other(got[slot], loss, step.rounding)}
                found |= {slot: _OTHER_LOSS for slot in other if found[slot] is None}
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return dict.fromkeys(alone, not_batched(error))
        return {slot: reason for slot, reason in found.items() if reason is not None}

    def _wrong_step(self, step: VmapStep, several: Mapping[int, Candidate]) -> dict[int, str]:
        """Return by slot why its first step in a stack is not its own.

        Of each form with the same numbers for its loss one is looked at, where none was before.
        """
        wrong = {slot: _DRAWS for slot, each in several.items() if each.alone.is_random and each.is_padded}
        alike = {slot: (each.padded.form, self._numbers(each)) for slot, each in several.items()}
        new = {key: slot for slot, key in alike.items() if not several[slot].alone.is_random}
        new = {key: slot for key, slot in new.items() if key not in self._stepped}
        if not new:
            return wrong
        inputs, targets = [x.clone() for x in self._example.inputs.values()], self._example.targets
        state = self._slots.state
        state = state._replace(weights=tree_map(torch.clone, state.weights))  # a forward may write into them
        try:
            with torch.no_grad(), Trying():
                gradients, buffers, _ = step.gradients(state, inputs, targets)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return dict.fromkeys(several, not_batched(error))
        for key, first in new.items():
            member, alone = several[first].member, several[first].alone
            if alone.is_like(self._slots.own(member, {**gradients, **buffers}), step.rounding):
                self._stepped.add(key)
            else:
                wrong |= {slot: _OTHER_STEP for slot, each in alike.items() if each == key}
        return wrong

    def _numbers(self, candidate: Candidate) -> Hashable:
        """Return the numbers that a member's loss is given as tensors: by one number it may do what it does not by
        another, as one that looks it up in a table does."""
        return tuple(candidate.member.params[name] for name in self._slots.state.loss_hyper)

    def _wrong_when_moved(
        self, step: VmapStep, several: Mapping[int, Candidate], new: Mapping[Hashable, int]
    ) -> dict[int, str]:
        """Return by slot why its outputs are not its own with other weights; of each `new` form one is looked at."""
        some = {slot: several[slot] for slot in new.values() if several[slot].is_padded}
        found: dict[Hashable, str] = {}
        for alone in outputs_when_moved(self._task, some, self._example) if some else ():
            self._slots.fill({slot: (several[slot].member, several[slot].probe) for slot in some})
            found |= {several[slot].padded.form: why for slot, why in self._wrong(step, alone).items()}
        return {slot: found[each.padded.form] for slot, each in several.items() if each.padded.form in found}


def not_batched(error: Exception) -> str:
    """Return why a network or loss is not stacked that torch.func does not take."""
    if isinstance(error, NotStackable):
        return str(error)
    return f"torch.func cannot batch it ({line(error)})"
