"""The studies that come with the objectives: each is without a fault, says how long it takes, and none is forgotten."""

import re
from pathlib import Path

import pytest

from hpo.runner.prepare import prepare
from hpo.study import catalog

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_each_study_has_no_faults(path, monkeypatch):
    monkeypatch.setenv("HPO_DATA_HOME", "/data")  # some name it
    prepare(path)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_each_study_says_on_its_first_lines_how_long_it_takes(path):
    comment = re.match(r"(#.*\n)+", path.read_text())[0].replace("\n# ", " ")
    assert re.search(r"(second|minute|hour)s?( and a half)? on one CPU core|on a CPU it takes|on one CPU core", comment)


def test_every_objective_has_a_study():
    studied = {re.search(r"^objective: (\S+)", path.read_text(), re.MULTILINE)[1] for path in STUDIES}
    assert set(catalog.names()) <= studied
