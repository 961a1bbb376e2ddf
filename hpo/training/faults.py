"""Which errors are one trial's own: they end that trial, and the study continues.

Out of memory, and what study.yaml's `catch` names, fail the trial; `optuna.TrialPruned`, raised where a network is
built or its loss computed, says that the configuration is infeasible: the trial is pruned. Every other error is a bug,
and stops the study with its traceback.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from hpo.errors import HpoError, said
from hpo.training.memory import is_out_of_memory

ALIKE = 3
"""If so many trials have ended, all with the same caught error at the same place, it is a bug: the study stops."""


@dataclass(frozen=True, kw_only=True)
class TrialFault:
    """How an error ends its trial: `state` is FAIL or PRUNED, `text` is said and stored."""

    state: str
    text: str
    caught: bool = False
    """Whether it is one of those that `catch` names."""


class TrialError(Exception):
    """An error of a user's code that ends one trial, its `fault`; raised from that error."""

    def __init__(self, fault: TrialFault) -> None:
        super().__init__(fault.text)
        self.fault = fault


def fault_of(error: BaseException, catch: Sequence[str], where: str) -> TrialFault | None:
    """Return how `error` ends the trial that it is of; None: it is no trial's own. `where` is said of a caught one."""
    if _is_pruned(error):
        return TrialFault(state="PRUNED", text=f"infeasible: {said(error) or 'optuna.TrialPruned'}")
    if is_out_of_memory(error):
        return TrialFault(state="FAIL", text=f"out of memory: {said(error) or type(error).__name__}")
    if isinstance(error, HpoError) or not isinstance(error, Exception):
        return None
    names = {name for cls in type(error).__mro__[:-2] for name in names_of(cls)}
    is_caught = not names.isdisjoint(catch) or any(each in type(error).__mro__ for each in map(exception_at, catch))
    return TrialFault(state="FAIL", text=where, caught=True) if is_caught else None


def names_of(cls: type) -> tuple[str, str]:
    """Return the names by which `catch` may have an exception."""
    return cls.__name__, f"{cls.__module__}.{cls.__qualname__}"


def exception_at(path: str) -> type[Exception] | None:
    """Return the exception that a dotted name leads to, as `torch.linalg.LinAlgError`, which calls itself otherwise."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def ended_the_process(where: str) -> HpoError:
    """Return what is said of code of an objective that calls sys.exit `where`: it would end all trials so."""
    return HpoError(f"the objective's code ends the process (sys.exit, {where}); raise an error")


def _is_pruned(error: BaseException) -> bool:
    return any(cls.__name__ == "TrialPruned" and cls.__module__.startswith("optuna.") for cls in type(error).__mro__)


def all_alike(reasons: Sequence[str | None]) -> bool:
    """Whether these reasons, of all the trials that have ended (None: one did not fail), are one error at one place."""
    return len(reasons) >= ALIKE and None not in reasons and len({_key(str(reason)) for reason in reasons}) == 1


def _key(reason: str) -> tuple[str, str]:
    """Return an error's type and place in `ValueError: its message (file.py:12)`: messages hold params."""
    place = re.search(r"\(([^()]*:\d+)\)$", reason)
    return reason.partition(":")[0], place[1] if place else ""
