"""A study folder that was moved or copied: the absolute places of artifacts in MLflow's database are set.

MLflow's own API changes none of them. Left as they are, a copy would write into the original's artifacts, and the model
of a folder that was moved could not be loaded.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from hpo.log import log

_PLACES = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}
"""The columns of MLflow's tables that name a place of files; a version of MLflow may lack some."""


def set_places(database: Path) -> None:
    """Have the artifacts of each experiment in `database` lie beside it, if hpo had put them beside another one.

    A place that somebody else has chosen stays, as does one that is the same folder by another path.
    """
    if database.stat().st_size == 0:  # somebody has opened one; MLflow makes its tables
        return
    home = database.parent.resolve()
    with closing(sqlite3.connect(database, timeout=30)) as connection:
        found = connection.execute("SELECT name, artifact_location FROM experiments").fetchall()
        moved = {uri: old for name, uri in found if (old := _old_home(name, uri, home, database.name)) is not None}
        if not moved:
            return
        with connection:
            for uri in moved:
                study = Path(_path_of(uri) or "").name
                _replace(connection, uri, (home / "artifacts" / study).as_uri())
    for old in sorted(set(moved.values())):
        log.info(
            f"tracking: the database {database} was made in {old}, and its folder has been moved or copied since; "
            f"artifacts are read from and written to {home / 'artifacts'} now, and those in {old} stay as they are"
        )


def _old_home(study: str, uri: str | None, home: Path, database: str) -> Path | None:
    """Return the folder of the database beside which hpo had put a study's artifacts, if it is another one now."""
    place = _path_of(uri)
    if place is None or place.parts[-2:] != ("artifacts", study):
        return None
    old = place.parent.parent
    if old == home or (old.exists() and old.samefile(home)):
        return None
    has_come_along = (home / "artifacts" / study).is_dir()
    return old if has_come_along or (old / database).is_file() or not old.is_dir() else None


def _path_of(uri: str | None) -> Path | None:
    parts = urlsplit(uri or "")
    return Path(url2pathname(parts.path)) if parts.scheme == "file" and not parts.netloc else None


def _replace(connection: sqlite3.Connection, old: str, new: str) -> None:
    """Have what lies at `old`, or under it, lie at `new`."""
    for table, column in _PLACES.items():
        if any(row[1] == column for row in connection.execute(f"PRAGMA table_info({table})")):
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                (new, len(old) + 1, len(old) + 1, f"{old}/"),
            )
