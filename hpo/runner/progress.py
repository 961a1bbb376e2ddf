"""What a person is shown of a study that runs: the contract that `hpo.cli.console` keeps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any


class Progress(ABC):
    """What a person is shown of a study that runs (`hpo.cli.console`)."""

    @abstractmethod
    def trial_started(self, number: int, params: Mapping[str, Any]) -> None:
        """A trial was claimed; `params` are those that were searched."""

    @abstractmethod
    def epoch_ended(self, number: int, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        """A trial has `epoch` of its `epochs` behind it."""

    @abstractmethod
    def trial_ended(self, number: int, state: str, value: float | None, reason: str | None) -> None:
        """A trial is COMPLETE, PRUNED, FAIL, or INTERRUPTED."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Something is to be said once."""
