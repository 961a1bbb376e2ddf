"""TorchMetrics without what it imports for a few metrics only: torchvision, and SciPy's signal processing.

`import torchmetrics` imports both, and torchvision imports torch's compiler: four fifths of its time, before the first
trial of every process. Here they are stand-ins while TorchMetrics is imported; the first use of one imports the real
module. Whoever else asks for one meanwhile, in another thread, gets the real one.
"""

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_LATER = ("scipy.signal", "torchvision", "torchvision.models", "torchvision.ops", "torchvision.transforms")
_PATCHES_SIGNALS = "srmrpy"
"""Where this is installed, TorchMetrics gives SciPy's signal processing back a name that it needs."""
_lock = threading.RLock()


class _Later:
    """A name of a module that is not imported yet: called, or asked for a name of its own, it is the real one."""

    def __init__(self, module: "_StandIn", name: str) -> None:
        self._module, self._name = module, name

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return self._module.real(self._name)(*args, **keys)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._module.real(self._name), name)


class _StandIn(ModuleType):
    """A module that is imported when something of it is used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self._imports = True
        """Whether TorchMetrics is being imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._imports and sys._getframe(1).f_globals.get("__name__", "").startswith("torchmetrics"):
            return _Later(self, name)
        return self.real(name)

    def real(self, name: str) -> Any:
        """Return what the real module has under that name; of a package's parts, too."""
        with _lock:
            _take_away()
            module = importlib.import_module(self.__name__)
        with suppress(AttributeError):
            return getattr(module, name)
        return importlib.import_module(f"{self.__name__}.{name}")

    def end(self) -> None:
        self._imports = False


def _take_away() -> None:
    """Have the next import of each find the real module."""
    for name in _LATER:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Within this, what is not imported yet has a stand-in, if it is installed."""
    names = [name for name in _LATER if name not in sys.modules and _is_installed(name.partition(".")[0])]
    if find_spec(_PATCHES_SIGNALS) is not None:
        names = [name for name in names if name != "scipy.signal"]
    made = [_StandIn(name) for name in names]
    sys.modules.update({module.__name__: module for module in made})
    try:
        yield
    finally:
        with _lock:
            _take_away()
        for module in made:
            module.end()


def _is_installed(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None


def _import() -> None:
    if "torchmetrics" in sys.modules:
        return
    try:
        with _stand_ins():
            import torchmetrics  # noqa: F401
    except Exception:  # another version's, which uses more of them: then as it is
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
            del sys.modules[name]


_import()

from torchmetrics import Metric  # noqa: E402
from torchmetrics.classification import BinaryAccuracy  # noqa: E402

__all__ = ["BinaryAccuracy", "Metric"]
