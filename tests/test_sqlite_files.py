"""Which file an SQLite address names: what SQLAlchemy would read in it is refused, with what to write for the same."""

import pytest
from sqlalchemy import make_url

from hpo.search.address import parsed_url
from hpo.sqlite_files import misread
from tests.cli import invoke, refused

TAKEN = ["sqlite:///a b#c.db", "sqlite:////tmp/100%.db", "sqlite:///a%zz.db", "postgresql://u:a%41@h/d?sslmode=require"]
REFUSED = {
    "sqlite:///a%41?b#c.db": "has ?b#c.db, and what follows a ? is no part of the file's name, but options, of which "
    "b#c.db is not taken",
    "sqlite:///a.db?": "has ?, and what follows",
    "sqlite:///a.db?timeout=30": "of which timeout is not taken",
    "sqlite:///m%41#c.db": "has %41 in its path, which stands for another character; write that: sqlite:///mA#c.db",
    "sqlite+pysqlite:///a%20b%20c.db": "write that: sqlite+pysqlite:///a b c.db",
    "sqlite:///a%2541.db": "has %25 in its path, which stands for another character; give the file another name",
    "sqlite:///a%3Fb.db": "give the file another name",
}


@pytest.mark.parametrize("address", TAKEN)
def test_what_names_a_file_as_it_looks_is_taken(address):
    assert misread(address) == ""


@pytest.mark.parametrize("key", ["storage", "tracking"])
@pytest.mark.parametrize("address", REFUSED)
def test_what_would_name_another_file_is_refused_alike_for_storage_and_tracking(study, tmp_path, key, address):
    path = study()
    before = set(tmp_path.iterdir())
    for command in ("run", "check"):
        said = " ".join(refused(command, path, "--set", f"{key}={address}").split())
        assert f"{key} {address}: " in said
        assert REFUSED[address] in said
    assert set(tmp_path.iterdir()) == before


def test_the_file_that_is_to_be_written_is_the_one_that_the_address_has_named_so_far(study):
    for address in (address for address, said in REFUSED.items() if "write that" in said):
        other = misread(address).rpartition("write that: ")[2]
        assert parsed_url(other).database == make_url(address).database


def test_an_option_that_sqlite_is_given_is_taken(study):
    invoke("run", study(), "--storage", "sqlite:///some.db?cached_statements=64")
    assert "complete" in invoke("status", study(), "--storage", "sqlite:///some.db")
