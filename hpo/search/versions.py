"""Optuna's look at the version of a database's tables, without Alembic where they are as this Optuna makes them.

Importing Alembic and reading its scripts takes a third of the time in which a database is opened, in every process.
It is left to make the tables of a new database, and to say what is wrong with those of another version.
"""

import re
from functools import cache
from importlib.resources import files

from optuna.storages._rdb import storage as optunas
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

_REVISION = re.compile(r'^(down_)?revision = "([^"]+)"', re.MULTILINE)


class _Versions(optunas._VersionManager):
    def _init_alembic(self) -> None:
        if self._stored() is None:
            super()._init_alembic()

    def get_current_version(self) -> str:
        return self._stored() or super().get_current_version()

    def get_head_version(self) -> str:
        return newest() or super().get_head_version()

    def _stored(self) -> str | None:
        """Return the version that the database says its tables have; None: it says none yet."""
        try:
            with self.engine.connect() as connection:
                found = connection.execute(text("SELECT version_num FROM alembic_version")).scalars().all()
        except DBAPIError:  # there is no such table, or what Alembic will say
            return None
        return str(found[0]) if len(found) == 1 else None


@cache
def newest() -> str | None:
    """Return the version of the tables that this Optuna makes, from the scripts it comes with; None: not clear there.

    As `alembic.script.ScriptDirectory.get_current_head`: the one version from which no other is made.
    """
    try:
        scripts = [
            each.read_text()
            for each in (files(optunas.__package__) / "alembic/versions").iterdir()
            if each.name.endswith(".py")
        ]
    except OSError:
        return None
    found = [match for script in scripts for match in _REVISION.findall(script)]
    every, before = ({name for down, name in found if bool(down) is is_down} for is_down in (False, True))
    last = every - before
    return last.pop() if len(last) == 1 else None


def without_alembic() -> None:
    """Have Optuna's storages of databases look at versions in this way."""
    optunas._VersionManager = _Versions  # type: ignore[misc]  # a class of the same kind
