"""The test split kept out of reach until the search is over."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hpo.errors import InputError
from hpo.study.data import Data, Split
from hpo.study.objective import Objective


class SealedData(Data):
    """Data in the search: `test` raises InputError, all else is as it was. Made by `sealed`."""

    @property
    def test(self) -> Split:
        raise InputError(
            "the test split is read once, after the search: the objective must not use data().test in build, loss, "
            "metrics, preprocess, head or train; train and valid are there"
        )

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "valid": self.valid}


def sealed(data: Data) -> Data:
    """Return `data` without its test split."""
    kept = object.__new__(SealedData)
    kept.__dict__.update({name: value for name, value in vars(data).items() if name != "test"})
    return kept


class _Sealed:
    """An objective's `data`, without the test split; it can be pickled where that can."""

    def __init__(self, plain: Callable[[], Any]) -> None:
        self._plain = plain

    def __call__(self) -> Any:
        data = self._plain()
        return sealed(data) if isinstance(data, Data) else data


@contextmanager
def sealing(objective: object) -> Iterator[None]:
    """Within this, what the objective's own methods get of `self.data()` has no test split; a function has no data."""
    if not isinstance(objective, Objective):
        yield
        return
    before = vars(objective).get("data")
    objective.data = _Sealed(objective.data)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del objective.data
        if before is not None:
            objective.data = before  # type: ignore[method-assign]
