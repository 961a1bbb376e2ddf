"""A bundle's model in MLflow: logged with the study's run, registered under the study's name, the best one `champion`.

The file is the bundle's own `model.pt2`, which was compared with the model that was measured; MLflow's `pytorch` flavor
loads it. So nothing is exported a second time, and the process that sends needs no torch.
"""

import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpo.log import log
from hpo.tracking.experiment import alone
from hpo.tracking.values import plain

FILE = "model.pt2"
CHAMPION = "champion"
_MARK = "hpo.model"
"""The tag of the study's run that says which model was logged last."""
_TENSORS = {"float16", "float32", "float64", "int8", "uint8", "int16", "int32", "int64", "bool"}
_COLUMNS = {"float64": "double", "int32": "integer", "int64": "long"}
"""MLflow's types of named columns; those of a float32 input have no type, since MLflow refuses what it must round."""


def log_model(client: Any, uri: str, run: str, name: str, item: Mapping[str, Any]) -> None:
    """Log and register the model of the bundle in `item["folder"]`, unless that was done already.

    It becomes the champion where there is none, or where it is better than that one on the same test rows.
    """
    folder = Path(item["folder"])
    if not (folder / FILE).is_file():
        return
    file = (folder / "bundle.json").read_bytes()  # it has the checksum of every other file
    facts = _facts(item) | {_MARK: hashlib.sha256(file).hexdigest()}
    with alone(uri):  # processes that end a study together all tell its model
        its_run = client.get_run(run)
        if its_run.data.tags.get(_MARK) == facts[_MARK]:
            return
        with _everywhere(uri):
            model_id = _logged(client, its_run.info, facts) or _log(client, its_run.info, json.loads(file), facts, item)
            _register(client, name, run, model_id, facts)
        client.set_tag(run, _MARK, facts[_MARK])


@contextmanager
def _everywhere(uri: str) -> Iterator[None]:
    """Have what of MLflow's own code asks for the one address of its process use this one."""
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _logged(client: Any, run: Any, facts: Mapping[str, str]) -> str | None:
    """Return the id of the model that was logged by an earlier attempt, whose rest has failed, if there is one."""
    of_run = f"source_run_id = '{run.run_id}' and tags.`{_MARK}` = '{facts[_MARK]}'"
    found = client.search_logged_models([run.experiment_id], of_run)
    return next((str(each.model_id) for each in found if str(each.status) == "READY"), None)


def _log(client: Any, run: Any, about: Mapping[str, Any], facts: Mapping[str, str], item: Mapping[str, Any]) -> str:
    """Log the model that `about` describes with its file and its test metrics, and return its id."""
    logged = client.create_logged_model(
        run.experiment_id, name=f"trial-{item['of']}", source_run_id=run.run_id, tags=facts, params=_params(about)
    )
    with tempfile.TemporaryDirectory() as made:
        _write(Path(made), Path(item["folder"]), about, logged.model_id, run.run_id, item["torch"])
        client.log_model_artifacts(logged.model_id, made)
    _log_outputs(client, run.run_id, logged.model_id, item)
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _facts(item: Mapping[str, Any]) -> dict[str, str]:
    """Return what must be known of a model to compare it with another one."""
    return {
        "hpo.trial": str(item["of"]),
        "hpo.metric": item["metric"],
        "hpo.direction": item["direction"],
        "hpo.test": repr(item["test"].get(item["metric"])),
        "hpo.data": item["data"],
    }


def _params(about: Mapping[str, Any]) -> dict[str, str]:
    return {key: plain(str(value), 500) for key, value in about["params"].items()}


def _write(made: Path, folder: Path, about: Mapping[str, Any], model_id: str, run: str, torch: str) -> None:
    """Write a model's folder as MLflow's `pytorch` flavor reads it, and, of one input, any Python function's."""
    import mlflow
    from mlflow import pyfunc
    from mlflow.models import Model

    (made / "data").mkdir()
    shutil.copyfile(folder / FILE, made / "data" / FILE)
    model = Model(model_uuid=model_id, run_id=run, signature=_signature(about), metadata={"hpo.bundle": about["study"]})
    model.model_id = model_id
    model.add_flavor("pytorch", model_data="data", pytorch_version=torch, code=None)
    if _answers_as_function(about):
        python = {"virtualenv": "python_env.yaml"}
        pyfunc.add_to_model(
            model, loader_module="mlflow.pytorch", data="data", python_env=python, model_config={"device": None}
        )
    model.save(made / "MLmodel")
    (made / "python_env.yaml").write_text(
        f"python: {platform.python_version()}\nbuild_dependencies:\n- pip\ndependencies:\n- -r requirements.txt\n"
    )
    needs = f"mlflow=={mlflow.__version__}\ntorch=={torch.partition('+')[0]}\n"
    (made / "requirements.txt").write_text(needs)


def _answers_as_function(about: Mapping[str, Any]) -> bool:
    """Whether what MLflow hands to the model, one table as float32 or one array as it is, is what the model takes."""
    only = about["inputs"][0]
    return len(about["inputs"]) == 1 and (only["dtype"] == "float32" or not _has_columns(about, only))


def _has_columns(about: Mapping[str, Any], only: Mapping[str, Any]) -> bool:
    """Whether the one input is a table whose columns have names."""
    return bool(only["dtype"] in {"float32", *_COLUMNS} and only["shape"][1:] == [len(about["feature_names"])])


def _signature(about: Mapping[str, Any]) -> Any:
    """Return MLflow's signature of a bundle's inputs: columns by name where they have names, else tensors; or None."""
    import numpy as np
    from mlflow.models.signature import ModelSignature
    from mlflow.types.schema import AnyType, ColSpec, Schema, TensorSpec

    inputs, output = about["inputs"], about["output"]
    if any(each["dtype"] not in _TENSORS for each in [*inputs, output]):
        return None

    def tensor(each: Mapping[str, Any], name: str | None = None) -> Any:
        shape = tuple(-1 if size is None else size for size in each["shape"])
        return TensorSpec(np.dtype(each["dtype"]), shape, name)

    if len(inputs) == 1 and _has_columns(about, inputs[0]):
        kind = _COLUMNS.get(inputs[0]["dtype"]) or AnyType()  # type: ignore[no-untyped-call]
        columns = Schema([ColSpec(kind, name) for name in about["feature_names"]])
        return ModelSignature(columns, Schema([tensor(output)]))
    several = len(inputs) > 1
    tensors = Schema([tensor(each, each["name"] if several else None) for each in inputs])
    return ModelSignature(tensors, Schema([tensor(output)]))


def _log_outputs(client: Any, run: str, model_id: str, item: Mapping[str, Any]) -> None:
    """Show the model with the study's run, and the run's test metrics, as they are there, with the model."""
    from mlflow.entities import LoggedModelOutput, Metric

    client.log_outputs(run, [LoggedModelOutput(model_id, step=0)])
    metrics = []
    for name in item["test"]:
        told = max(client.get_metric_history(run, f"test_{name}"), key=lambda each: each.timestamp, default=None)
        if told is not None:
            metrics.append(Metric(told.key, told.value, told.timestamp, told.step, model_id=model_id, run_id=run))
    client.log_batch(run, metrics=metrics)


def _register(client: Any, name: str, run: str, model_id: str, facts: Mapping[str, str]) -> None:
    """Make the model a version of the registered model of that name, and its champion if it is to be that."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    version = _the_version(client, name, run, model_id, facts)
    try:
        champion = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND"):
            raise
        champion = None
    if champion is not None and int(champion.version) == int(version.version):  # by a peer, or an earlier attempt
        return
    why_not = None if champion is None else _why_not(champion.tags, facts)
    if why_not is None:
        client.set_registered_model_alias(name, CHAMPION, version.version)
    else:
        log.info(
            f"version {version.version} of {name!r} is registered in MLflow, and version {champion.version} stays its "
            f"champion: {why_not}"
        )


def _the_version(client: Any, name: str, run: str, model_id: str, facts: Mapping[str, str]) -> Any:
    """Return the one version of a bundle's model, made if there is none.

    On a server nothing keeps a peer from making one meanwhile; then the first is kept, which is the same to all.
    """

    def first() -> Any:
        found = [each for each in client.search_model_versions(f"run_id = '{run}'") if each.name == name]
        same = [each for each in found if each.tags.get(_MARK) == facts[_MARK]]
        return min(same, key=lambda each: int(each.version), default=None)

    if (there := first()) is not None:
        return there
    made = client.create_model_version(name, f"models:/{model_id}", run, tags=dict(facts), model_id=model_id)
    kept = first() or made
    if int(kept.version) < int(made.version):
        client.delete_model_version(name, made.version)
        return kept
    return made


def _why_not(champion: Mapping[str, str], facts: Mapping[str, str]) -> str | None:
    """Return why a model must not replace the champion; None: it is to."""
    same = ("hpo.data", "hpo.metric", "hpo.direction")
    differ = [key.removeprefix("hpo.") for key in same if champion.get(key) != facts[key]]
    if differ:
        return f"the two cannot be compared, since their {', '.join(differ)} differ"
    try:
        theirs, ours = float(champion["hpo.test"]), float(facts["hpo.test"])
    except (KeyError, ValueError):
        return "the two cannot be compared, since one has no test result"
    if ours > theirs if facts["hpo.direction"] == "maximize" else ours < theirs:
        return None
    return f"test {facts['hpo.metric']} {ours:.4g} is not better than its {theirs:.4g}"
