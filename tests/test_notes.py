"""The note of a study, as optuna-dashboard reads it."""

import pytest

from hpo.search.notes import write_note
from tests.searches import Opener


@pytest.fixture
def opened(tmp_path):
    opener = Opener(tmp_path)
    yield opener
    opener.close()


def read(search):
    from optuna_dashboard import get_note

    return get_note(search.study)


def test_what_is_written_is_what_the_dashboard_shows(opened):
    search = opened(trials=1)
    for text in ("short", "long " * 1000, "short again"):
        write_note(search, text)
        assert read(search) == text
    version = search.storage.get_study_system_attrs(search.study._study_id)["dashboard:note_ver"]
    write_note(search, "short again")
    attrs = search.storage.get_study_system_attrs(search.study._study_id)
    assert attrs["dashboard:note_ver"] == version == 3


def test_what_a_person_wrote_stays(opened):
    from optuna_dashboard import save_note

    search = opened(trials=1)
    write_note(search, "ours")
    save_note(search.study, "theirs")
    write_note(search, "ours again")
    assert read(search) == "theirs"
