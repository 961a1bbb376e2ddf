"""Optuna's own contract tests, over the storages and samplers as hpo uses them."""

import pickle
import warnings
from contextlib import ExitStack, contextmanager

import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.storages import GrpcStorageProxy, JournalStorage, get_storage
from optuna.storages._grpc.server import make_server
from optuna.testing.pytest_samplers import BasicSamplerTestCase
from optuna.testing.pytest_storages import StorageTestCase

from hpo.search.retrying import RetryingStorage
from hpo.search.samplers import make_sampler
from hpo.search.storage import close_storage, open_storage
from hpo.study.space import build
from hpo.study.spec import Plugin
from tests.servers import free_port


def slow(kind):
    return pytest.param(kind, marks=pytest.mark.slow)


@contextmanager
def served(folder):
    """Serve a database as `hpo serve` does, but from this process, which is quicker; give its address."""
    database, port = open_storage(f"sqlite:///{folder}/served.db"), free_port()
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        serving = make_server(get_storage(database), "127.0.0.1", port)
    serving.start()
    yield f"grpc://127.0.0.1:{port}"
    serving.stop(None).wait()
    close_storage(database)


@pytest.fixture(params=["sqlite", "journal", *(slow(kind) for kind in ("postgresql", "grpc"))], scope="module")
def opened(request, tmp_path_factory):
    """Return a storage of each kind: one for all tests, since to make it is what takes time."""
    folder = tmp_path_factory.mktemp("contracts")
    with ExitStack() as stack:
        url = f"{request.param}:///{folder}/s.db"
        if request.param == "postgresql":
            url = request.getfixturevalue("server").database()
        if request.param == "grpc":
            url = stack.enter_context(served(folder))
        storage = RetryingStorage(open_storage(url), 0.0)
        stack.callback(storage.close)
        yield storage


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
class TestStorages(StorageTestCase):
    """What a search sees: the storage as it is opened, with `RetryingStorage` around it."""

    @pytest.fixture
    def storage(self, opened, tmp_path):
        if isinstance(opened.inner, JournalStorage):  # it gives the ids of a deleted study's trials still
            opened = RetryingStorage(open_storage(f"journal:///{tmp_path}/s.log"), 0.0)
        yield opened
        for study in opened.get_all_studies():
            opened.delete_study(study._study_id)

    def test_pickle_storage(self, storage):
        """None of ours can be copied: a copy would have none of what was set up when the storage was opened."""
        with pytest.raises(TypeError, match="cannot be copied to another process: open the storage there"):
            pickle.dumps(storage)

    @pytest.mark.parametrize("param_names", [["a", "b"], ["b", "a"]])
    def test_get_all_trials_params_order(self, storage, param_names):
        """Optuna's messages over gRPC hold params in a map, which has no order; hpo asks for them by name."""
        if isinstance(storage.inner, GrpcStorageProxy):
            pytest.skip("Optuna's gRPC keeps no order of params")
        super().test_get_all_trials_params_order(storage, param_names)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
class TestSamplers(BasicSamplerTestCase):
    """Each sampler that can draw from any space, made per trial; grid and brute_force have only what they list."""

    @pytest.fixture(params=["tpe", "random", "qmc", "cmaes", "nsgaii", slow("gp")])
    def sampler(self, request):
        space, _ = build({}, ())
        keys = {"n_startup_trials": 2} if request.param in ("tpe", "gp") else {}
        return lambda: make_sampler(Plugin(name=request.param, **keys), 1, space)[0]
