"""Addresses of storages: what kind one names, and whether there is anything yet."""

from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from hpo.errors import StorageError, masked
from hpo.sqlite_files import misread

_OPTIONS = ("cached_statements", "check_same_thread", "detect_types")
"""What SQLAlchemy gives to SQLite as an SQLite address has it; how long is waited for a lock is hpo's own affair."""


def kind_of(url: str) -> str:
    """Return `grpc`, `journal`, or the name of a database. Raises StorageError."""
    scheme = url.partition(":")[0]
    return scheme if scheme in ("grpc", "journal") else parsed_url(url).get_backend_name()


def journal_path(url: str) -> Path:
    """Return the path of `journal:///relative` or `journal:////absolute`."""
    scheme, _, path = url.partition(":///")
    if scheme != "journal" or not path:
        raise StorageError(f"storage {url}: names no file; write journal:///mlruns/journal.log")
    return Path(path)


def parsed_url(url: str) -> URL:
    """Return `url` taken apart. Raises StorageError where it is not the address of a database that we can use."""
    if wrong := misread(url, _OPTIONS):
        raise StorageError(f"storage {url}: {wrong}")
    try:
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError, ValueError) as error:
        hint = "write sqlite:///path/to/file.db, postgresql://..., journal:///path, grpc://host:port"
        raise StorageError(f"storage {url}: is not a database address; {hint}") from error
    except ImportError as error:
        raise StorageError(f"storage {url}: its driver is not installed ({error}); pip install it") from error
    if parsed.get_backend_name() == "sqlite" and (not parsed.database or parsed.database == ":memory:"):
        raise StorageError(f"storage {url}: names no file, so nothing would be kept; write sqlite:///mlruns/optuna.db")
    return parsed


def as_text(parsed: URL) -> str:
    """Return an address with its password, to connect with."""
    return parsed.render_as_string(hide_password=False)


def whole_address(url: str) -> str:
    """Return an address as it is from everywhere on this machine, without a password."""
    kind = kind_of(url)
    if kind == "journal":
        return f"journal:///{journal_path(url).absolute()}"
    if kind == "grpc":
        return masked(url)
    parsed = parsed_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database is None:
        return masked(url)
    return f"sqlite:///{Path(parsed.database).absolute()}"


def exists(url: str) -> bool:
    """Whether there is a database at `url` to look into, so that looking does not make one."""
    kind = kind_of(url)
    if kind == "journal":
        return journal_path(url).is_file()
    if kind == "grpc":
        return True
    parsed = parsed_url(url)
    return parsed.get_backend_name() != "sqlite" or (parsed.database is not None and Path(parsed.database).is_file())
