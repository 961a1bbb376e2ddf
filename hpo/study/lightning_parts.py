"""What is taken out of Lightning's classes: a module's network without Lightning in it, a datamodule's rows."""

from typing import Any

from torch import nn

from hpo.errors import DataError, InputError
from hpo.study.data import Split

_PACKAGES = ("lightning.pytorch.", "pytorch_lightning.")


def base_of(cls: Any, where: str) -> type[nn.Module]:
    """Return the LightningModule that `cls` is a child of. Raises InputError where it is not one's class."""
    if isinstance(cls, nn.Module):
        name = type(cls).__name__
        raise InputError(
            f"{where}: module must be the class {name}, but is an instance of it; each trial makes its own: "
            f"write module = {name}, and its arguments as `defaults`"
        )
    for each in cls.__mro__ if isinstance(cls, type) else ():
        if each.__name__ == "LightningModule" and each.__module__.startswith(_PACKAGES):
            return each
    came = "None" if cls is None else f"the class {cls.__name__}" if isinstance(cls, type) else f"{cls!r:.60}"
    raise InputError(f"{where}: module must be the class of a LightningModule, but is {came}")


def require_no_transfer_hooks(cls: type, where: str) -> None:
    """Raise InputError where a module or datamodule changes batches on their way to `training_step`.

    What is measured and exported takes the rows as they are.
    """
    own = [each for each in cls.__mro__ if not each.__module__.startswith(_PACKAGES)]
    for name in ("on_before_batch_transfer", "on_after_batch_transfer"):
        if any(name in vars(each) for each in own):
            raise InputError(
                f"{where}: {cls.__name__}.{name} changes the batches, but the network is measured and exported on rows "
                "as the data has them; put that into the dataset, into the objective's `preprocess`, or (augmentation) "
                "into training_step"
            )


def plain(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """Return `module` itself, or, if it is a LightningModule (`base`), a network with its forward and its weights.

    That has the layers, the tensors, the plain attributes and the methods of the user's own classes, and nothing of
    Lightning's: a forward that needs a Trainer cannot be exported, and says so.
    """
    if not isinstance(module, base):
        return module
    cls = type(module)
    forward = getattr(cls.forward, "__code__", None)
    if forward is not None and "__class__" in forward.co_freevars:  # which super() reads
        raise InputError(
            f"forward of {cls.__name__} uses super(), which is not in an exported network; put the network into an "
            'attribute of its own, and name that (network = "net")'
        )
    own = [each for each in reversed(cls.__mro__) if each not in base.__mro__]
    members = {name: value for each in own for name, value in vars(each).items() if not name.startswith("__")}

    def lacking(self: nn.Module, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if not hasattr(base, name):
                raise
            raise AttributeError(
                f"forward of {cls.__name__} uses self.{name}, which is Lightning's and not in an exported network; put "
                'the network into an attribute of its own, and name that (network = "net")'
            ) from None

    made: nn.Module = type(
        cls.__name__, (nn.Module,), {**members, "__module__": cls.__module__, "__getattr__": lacking}
    )()
    lightnings = vars(base())
    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers", "_modules") or name not in lightnings:
            made.__dict__[name] = value
    made.__dict__["hparams"] = module.hparams
    made.training = module.training
    return made


def split_of(datamodule: Any, kind: str) -> Split:
    """Return the rows of a datamodule's `kind` (train, val, test) of dataloader, each once and in order."""
    name = type(datamodule).__name__
    try:
        loader = getattr(datamodule, f"{kind}_dataloader")()
    except Exception as error:
        if type(error).__name__ != "MisconfigurationException":
            raise
        loader = None
    dataset = getattr(loader, "dataset", None)
    if dataset is None:
        came = "none" if loader is None else f"a {type(loader).__name__}"
        raise DataError(
            f"{name}.{kind}_dataloader must return one DataLoader, but there is {came}; a study trains on train, "
            "chooses on val and tests once on test"
        )
    return Split.from_dataset(loader)
