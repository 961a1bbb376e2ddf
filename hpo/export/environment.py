"""What a result was made with: versions, commit, device, user. It is stored with a study and in its bundle."""

import getpass
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("hpo", "torch", "torchvision", "torchmetrics", "optuna", "scikit-learn", "mlflow")


def versions() -> dict[str, str | None]:
    """Return the versions of Python and of the packages that a result depends on; None: it is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Return the commit of the folder we run in, with `-dirty` where it has changes; None where there is no git."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def user() -> str:
    """Return who runs this; `unknown` where the machine does not say."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"
