"""hpo: hyperparameter search and experiment tracking for PyTorch, with results one can trust.

The command line is `python -m hpo` (or `hpo`). In Python:

    import hpo
    study = hpo.run("study.yaml", trials=20)
    study.best.params

Nothing heavy is loaded by `import hpo`: each name is imported when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.api import adopt, check, open_study, run
    from hpo.errors import DataError, ExportError, HpoError, InputError, Interrupted, SpecError, StorageError
    from hpo.export.loading import load_bundle
    from hpo.report.results import Study
    from hpo.study.blocks import MLP, LogitAccuracy, Standardize, tabular_splits
    from hpo.study.data import Data, DataInfo, Split
    from hpo.study.lightning import LightningObjective
    from hpo.study.objective import Objective, Reporter

__version__ = "0.2.0"
_HOMES = {
    "hpo.api": ("adopt", "check", "open_study", "run"),
    "hpo.errors": ("DataError", "ExportError", "HpoError", "InputError", "Interrupted", "SpecError", "StorageError"),
    "hpo.export.loading": ("load_bundle",),
    "hpo.report.results": ("Study",),
    "hpo.study.blocks": ("MLP", "LogitAccuracy", "Standardize", "tabular_splits"),
    "hpo.study.data": ("Data", "DataInfo", "Split"),
    "hpo.study.lightning": ("LightningObjective",),
    "hpo.study.objective": ("Objective", "Reporter"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [
    "MLP",
    "Data",
    "DataError",
    "DataInfo",
    "ExportError",
    "HpoError",
    "InputError",
    "Interrupted",
    "LightningObjective",
    "LogitAccuracy",
    "Objective",
    "Reporter",
    "SpecError",
    "Split",
    "Standardize",
    "StorageError",
    "Study",
    "adopt",
    "check",
    "load_bundle",
    "open_study",
    "run",
    "tabular_splits",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hpo' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
