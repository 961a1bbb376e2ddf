"""A study as `hpo ui` shows it in optuna-dashboard: own names, own order, and the files that it has left."""

import json
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from hpo.report.shown import ShownStorage, StudyFiles

BRANCH = CategoricalDistribution((0, "range"))
DECAY = FloatDistribution(1e-4, 1e-1, log=True)
LAYERS = IntDistribution(2, 8, log=True)


def trial(value, decay=None, layers=None, **attrs):
    params, distributions = {"decay:or": 0}, {"decay:or": BRANCH}
    if decay is not None:
        params, distributions = {"decay:or": "range", "decay": decay}, {"decay:or": BRANCH, "decay": DECAY}
    if layers is not None:
        distributions |= {"layers:or": CategoricalDistribution((16, "range"))}
        params |= {"layers:or": 16} if layers == 16 else {"layers:or": "range", "layers": layers}
        distributions |= {} if layers == 16 else {"layers": LAYERS}
    return create_trial(value=value, params=params, distributions=distributions, user_attrs=attrs)


@pytest.fixture
def study():
    study = optuna.create_study(study_name="s", direction="maximize")
    better = {"metrics": {"valid_loss": 0.1}}
    study.add_trials([trial(0.5, layers=3), trial(0.9, 1e-3, layers=16), trial(0.9, 1e-2, layers=2, **better)])
    return study


def test_params_have_their_own_names_and_ranges_with_the_other_value(study):
    shown = ShownStorage(study._storage, study._study_id, StudyFiles([]))
    trials = shown.get_all_trials(study._study_id)
    assert [t.params for t in trials] == [
        {"decay": 0, "layers": 3},
        {"decay": 1e-3, "layers": 16},
        {"decay": 1e-2, "layers": 2},
    ]
    expected = {"decay": FloatDistribution(0, 1e-1), "layers": IntDistribution(2, 16, log=True)}
    assert all(t.distributions == expected for t in trials)
    assert "decay:or" in study.trials[0].params, "the storage's own trials are as they were"
    assert shown.get_all_trials(study._study_id, states=(TrialState.FAIL,)) == []
    assert shown.get_trial(trials[0]._trial_id).params == {"decay": 0, "layers": 3}


def test_a_study_in_which_no_trial_took_the_range(study):
    other = optuna.create_study()
    other.add_trial(trial(1.0))
    shown = ShownStorage(other._storage, other._study_id, StudyFiles([]))
    (only,) = shown.get_all_trials(other._study_id)
    assert (only.params, only.distributions) == ({"decay": 0}, {"decay": CategoricalDistribution((0,))})


def test_the_best_trial_is_the_one_that_status_names(study):
    shown = ShownStorage(study._storage, study._study_id, StudyFiles([]))
    assert study.best_trial.number == 1
    assert shown.get_best_trial(study._study_id).number == 2, "the same value at a lower loss"
    with pytest.raises(ValueError, match="No trials"):
        shown.get_best_trial(optuna.create_study(storage=study._storage, study_name="empty")._study_id)


def ask(app, path):
    """Return the status and the body that a WSGI application answers with."""
    environ, answered = {"PATH_INFO": path}, []
    setup_testing_defaults(environ)
    answer = app(environ, lambda status, headers, error=None: answered.append(status))
    body = b"".join(answer)
    getattr(answer, "close", lambda: None)()  # as a server does
    return answered[0], body


def test_the_dashboard_answers_with_names_order_and_files(study, tmp_path):
    from optuna_dashboard import wsgi

    (tmp_path / "bundle.json").write_text('{"a": 1}')
    files = StudyFiles([tmp_path / "bundle.json", tmp_path / "model.onnx"])
    app = wsgi(ShownStorage(study._storage, study._study_id, files), artifact_store=files)
    status, body = ask(app, f"/api/studies/{study._study_id}")
    assert status == "200 OK"
    shown = json.loads(body)
    assert ":or" not in body.decode()
    assert {p["name"] for p in shown["trials"][0]["params"]} == {"decay", "layers"}
    assert {p["name"] for p in shown["union_search_space"]} == {"decay", "layers"}
    assert [best["number"] for best in shown["best_trials"]] == [2]
    (artifact,) = shown["artifacts"]
    assert (artifact["filename"], artifact["mimetype"]) == ("bundle.json", "application/json")
    address = f"/artifacts/{study._study_id}/{artifact['artifact_id']}"
    assert ask(app, address) == ("200 OK", b'{"a": 1}')
    status, body = ask(app, f"/api/studies/{study._study_id}/param_importances")
    assert {each["name"] for each in json.loads(body)["param_importances"][0]} == {"decay", "layers"}
    assert "artifacts:" not in str(study._storage.get_study_system_attrs(study._study_id)), "nothing is stored"


def test_files_are_only_read(tmp_path):
    file = tmp_path / "MODEL.md"
    file.write_text("text")
    files = StudyFiles([file])
    (described,) = files.described().values()
    name = json.loads(described)["artifact_id"]
    with pytest.raises(PermissionError, match="takes none"):
        files.write(name, None)
    files.remove(name)
    with files.open_reader(name) as read:
        assert read.read() == b"text"
    file.unlink()
    assert files.described() == {}
    with pytest.raises(ArtifactNotFound):
        files.open_reader(name)
    with pytest.raises(ArtifactNotFound):
        files.open_reader("../../etc/passwd")
