"""Optuna's own contract tests, over the storages and samplers as hpo uses them."""

import pytest
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_storages import StorageTestCase

from hpo.outage import Patient
from hpo.samplers import make_sampler
from hpo.space import build
from hpo.spec import Plugin
from hpo.storage import open_storage
from tests.servers import grpc_server


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
class TestStorages(StorageTestCase):
    """What a search sees: the storage as it is opened, with `Patient` around it."""

    @pytest.fixture(params=["sqlite", "journal", "postgresql", "grpc"])
    def storage(self, request, tmp_path):
        url = f"{request.param}:///{tmp_path}/s.db"
        if request.param == "postgresql":
            url = request.getfixturevalue("server").database()
        if request.param == "grpc":
            url = request.getfixturevalue("served")
        storage = Patient(open_storage(url), 0.0)
        yield storage
        storage.close()

    @pytest.fixture
    def served(self, tmp_path):
        with grpc_server(f"sqlite:///{tmp_path}/s.db") as address:
            yield address


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
class TestSamplers(BasicSamplerTestCase):
    """Each sampler that can draw from any space, made per trial."""

    @pytest.fixture(params=["tpe", "random", "qmc", "gp"])
    def sampler(self, request):
        space, _ = build({}, ())
        keys = {"n_startup_trials": 2} if request.param in ("tpe", "gp") else {}
        return lambda: make_sampler(Plugin(name=request.param, **keys), 1, space)[0]
