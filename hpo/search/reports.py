"""Trials' values that were reported while the storage was away, kept to be sent as soon as it is back."""

from collections import deque
from collections.abc import Callable, Iterable

from hpo.search.away import may_pass

Report = tuple[int, int, float]
"""A trial's id, the step, the value."""


class ReportBuffer:
    """Reports in the order in which they came."""

    def __init__(self) -> None:
        self._reports: deque[Report] = deque()

    def extend(self, reports: Iterable[Report]) -> None:
        """Keep reports."""
        self._reports.extend(reports)

    def flush(self, send: Callable[[Report], None], refused: Callable[[Report, Exception], None]) -> None:
        """Send all; `refused` is called with each that the storage will never take: it would hold up the others.

        Such a report is dropped, whatever `refused` raises. Raises what `send` does where it may pass: that report
        and those after it are kept.
        """
        while self._reports:
            report = self._reports[0]
            try:
                send(report)
            except Exception as error:
                if may_pass(error):
                    raise
                self._reports.popleft()
                refused(report, error)
            else:
                self._reports.popleft()
