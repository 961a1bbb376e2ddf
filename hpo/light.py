"""Libraries without what they import for a few functions only: TorchMetrics, scikit-learn, torch's export.

`import torchmetrics` imports torchvision, SciPy's signal processing and Matplotlib: four fifths of its time, before the
first trial of every process. scikit-learn imports `scipy.stats`, torch's export NetworkX, and SciPy asks NumPy for all
of its names, `numpy.f2py` among them. Here they are stand-ins while one of these is imported (`lightly`); the first use
of one imports the real module. Whoever else asks for one meanwhile, in another thread, gets the real one.
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

from hpo.garbage import uncollected

_PLOT = "torchmetrics.utilities.plot"
"""What imports Matplotlib."""
_LATER = {
    "torchmetrics": (
        "scipy.signal",
        "torchvision",
        "torchvision.models",
        "torchvision.ops",
        "torchvision.transforms",
        _PLOT,
        "numpy.f2py",
    ),
    "sklearn": ("scipy.stats", "numpy.f2py"),
    "torch": ("networkx",),
}
"""By the library that imports them, what it hardly uses."""
_PATCHES_SIGNALS = "srmrpy"
"""Where this is installed, TorchMetrics gives SciPy's signal processing back a name that it needs."""
_IMPORTS_A_PART = "_find_and_load_unlocked"
"""The function of `importlib` that asks a package for its `__path__`; `from package import name` asks too, for less."""
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
        """Whether the library is being imported that imports this module."""

    def __getattr__(self, name: str) -> Any:
        if name == "__path__" and sys._getframe(1).f_code.co_name == _IMPORTS_A_PART:
            return self._real().__path__
        if name == "__all__":  # from module import *
            return getattr(self._real(), name)
        if name.startswith("__"):
            raise AttributeError(name)
        if self._imports and sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] in _LATER:
            return _Later(self, name)
        return self.real(name)

    def __dir__(self) -> list[str]:
        return dir(self._real())

    def real(self, name: str) -> Any:
        """Return what the real module has under that name; of a package's parts, too."""
        module = self._real()
        with suppress(AttributeError):
            return getattr(module, name)
        return importlib.import_module(f"{self.__name__}.{name}")

    def _real(self) -> ModuleType:
        with _lock:
            _take_away()
            return importlib.import_module(self.__name__)

    def end(self) -> None:
        self._imports = False


class _OfTheCompiler:
    """In the place of a function that torch keeps from its compiler: the function, until that compiler is imported."""

    NAME = "__dynamo_disable"
    """Where torch keeps the function as its compiler has made it, with which it replaces this."""

    def __init__(self, kept: Any) -> None:
        self._kept, self._function = kept, kept.__wrapped__
        vars(self._function).setdefault(self.NAME, self)

    def __call__(self, *args: Any, **keys: Any) -> Any:
        if "torch._dynamo" not in sys.modules:  # so that nothing can be compiling
            return self._function(*args, **keys)
        if vars(self._function).get(self.NAME) is self:
            del vars(self._function)[self.NAME]
        return self._kept(*args, **keys)


def without_compiler(cls: type, *names: str) -> None:
    """Have methods of torch that are kept from its compiler not import it for that: it takes one to two seconds."""
    for name in names:
        if hasattr(vars(cls).get(name), "__wrapped__"):
            _OfTheCompiler(vars(cls)[name])


def _take_away() -> None:
    """Have the next import of each find the real module."""
    for name in (name for names in _LATER.values() for name in names):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
        package, _, part = name.rpartition(".")
        if isinstance(vars(sys.modules.get(package, sys)).get(part), _StandIn):
            delattr(sys.modules[package], part)


@contextmanager
def lightly(library: str) -> Iterator[None]:
    """Import within this: what that library hardly uses has a stand-in, if it is installed and not imported yet."""
    names = [name for name in _LATER[library] if name not in sys.modules and _is_installed(name.partition(".")[0])]
    if find_spec(_PATCHES_SIGNALS) is not None:
        names = [name for name in names if name != "scipy.signal"]
    made = [_StandIn(name) for name in names]
    sys.modules.update({module.__name__: module for module in made})
    for module in made:
        package, _, part = module.__name__.rpartition(".")
        if package in sys.modules:  # as an import does: NumPy's own `f2py` imports it until it is there
            setattr(sys.modules[package], part, module)
    try:
        with uncollected():
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
        with lightly("torchmetrics"):
            import torchmetrics

            plot = sys.modules.get(_PLOT)
        if isinstance(plot, _StandIn):
            torchmetrics.utilities.plot = plot
    except Exception:  # another version's, which uses more of them: then as it is
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
            del sys.modules[name]


_import()

from torchmetrics import Metric  # noqa: E402
from torchmetrics.classification import BinaryAccuracy  # noqa: E402

__all__ = ["BinaryAccuracy", "Metric", "lightly", "without_compiler"]
