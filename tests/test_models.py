"""The best model in MLflow: logged with the study's run, registered, the best of all its champion."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

from hpo.export.bundle import export
from hpo.export.formats import formats_of
from hpo.export.model import Model
from hpo.study.data import DataInfo, Split
from hpo.tracking.experiment import open_experiment
from hpo.tracking.values import sqlite_address
from tests.mlflows import Mlflow, by_default_in_sqlite, quietly

INPUTS = {"named": {"features": 3}, "plain": {"features": 3}, "several": {"left": 2, "right": 3}}
CODES = {"codes": {"categorical": 3}}
"""A table of categories only."""


class Joined(nn.Module):
    """One or two inputs side by side into one unit."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, 1)

    def forward(self, one: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(one.float() if other is None else torch.cat([one, other], 1))


def bundle(folder: Path, kind: str = "named", formats: str | None = None) -> nn.Module:
    """Export a small model and return what was exported."""
    torch.manual_seed(0)
    sizes = {**INPUTS, **CODES}[kind]
    rows = Split(inputs={name: torch.randn(40, n) for name, n in sizes.items()}, targets=torch.zeros(40))
    if kind in CODES:
        rows = Split(inputs={"categorical": torch.randint(0, 4, (40, 3))}, targets=rows.targets)
    model = Model(
        preprocess=nn.Identity(),
        network=Joined(sum(sizes.values())),
        head=nn.Identity(),
        params={"n_hidden": 3},
        info=DataInfo(
            inputs={name: (n,) for name, n in sizes.items()},
            input_dtypes=dict.fromkeys(sizes, "int64" if kind in CODES else "float32"),
            feature_names=("a", "b", "c") if kind in ("named", "codes") else (),
        ),
        about={"study": "s", "objective": "o", "trial": 3, "metric": "r2", "value": 0.5, "metrics": {"test": {}}},
    )
    export(model, rows, folder, formats_of(formats))
    return model.predictor()


def tell(mlflow: Mlflow, folder: Path, trial: int = 3, r2: float = 0.5, sent: bool | None = True, **other: Any) -> None:
    facts = {"metric": "r2", "direction": "maximize", "test": {"r2": r2, "loss": 1 - r2}, "data": "d"}
    with quietly():  # as the process that sends is
        tracker = mlflow.tracker()
        tracker.start_study({}, {})
        tracker.log_metrics(None, 20, {f"test_{name}": value for name, value in {"r2": r2, "loss": 1 - r2}.items()})
        tracker.log_model(folder, trial, facts | {"torch": str(torch.__version__)} | other)
        assert tracker.end_study("COMPLETE") is sent or sent is None


def champion(mlflow: Mlflow) -> tuple[str, str]:
    """Return the champion's version, and the trial that it has the params of."""
    with quietly():
        version = mlflow.client.get_model_version_by_alias(mlflow.study, "champion")
    return version.version, version.tags["hpo.trial"]


def versions(mlflow: Mlflow) -> list[Any]:
    with quietly():
        return list(mlflow.client.search_model_versions(f"name = '{mlflow.study}'"))


@pytest.fixture
def here(mlflow: Mlflow) -> Any:
    """Have MLflow's own functions use the store of the test."""
    import mlflow as library

    before = library.get_tracking_uri()
    library.set_tracking_uri(mlflow.uri)
    yield library
    library.set_tracking_uri(before)


@pytest.mark.parametrize("kind", INPUTS)
@by_default_in_sqlite
def test_what_mlflow_loads_is_the_model_that_was_exported(mlflow: Mlflow, here: Any, tmp_path: Path, kind: str) -> None:
    eager = bundle(tmp_path / "b", kind)
    tell(mlflow, tmp_path / "b")
    inputs = [torch.randn(7, n) for n in INPUTS[kind].values()]
    address = f"models:/{mlflow.study}@champion"
    with quietly():
        torch.testing.assert_close(here.pytorch.load_model(address)(*inputs), eager(*inputs))
        if kind == "several":
            return
        python = here.pyfunc.load_model(address)
        if kind == "plain":
            found = python.predict(inputs[0].numpy())
        else:  # by their names, in whatever order
            found = python.predict(pd.DataFrame(inputs[0].numpy(), columns=["a", "b", "c"])[["c", "a", "b"]]).to_numpy()
    torch.testing.assert_close(torch.from_numpy(found), eager(*inputs))


@pytest.mark.parametrize("dtype", ["float64", "int64", "float32", "bool"])
@by_default_in_sqlite
def test_a_frame_of_whatever_numbers_is_answered_here_and_by_a_server(
    mlflow: Mlflow, here: Any, tmp_path: Path, dtype: str
) -> None:
    eager = bundle(tmp_path / "b")
    tell(mlflow, tmp_path / "b")
    frame = pd.DataFrame([[3, 0, 1], [0, 7, 1]], columns=["a", "b", "c"], index=["one", "two"]).astype(dtype)
    expected = eager(torch.tensor(frame.to_numpy("float32")))
    with quietly():
        from mlflow.pyfunc.scoring_server import infer_and_parse_data

        python = here.pyfunc.load_model(f"models:/{mlflow.study}@champion")
        asked = {"dataframe_split": frame[["c", "a", "b"]].to_dict("split")}
        sent = infer_and_parse_data(asked, python.metadata.get_input_schema())
        for found in (python.predict(frame), python.predict(frame[["b", "c", "a"]]), python.predict(sent)):
            torch.testing.assert_close(torch.tensor(found.to_numpy()), expected)
            assert list(found.index) == ["one", "two"]
        with pytest.raises(here.exceptions.MlflowException, match=r"missing inputs \['b'\]"):
            python.predict(frame[["a", "c"]])


@by_default_in_sqlite
def test_a_table_of_categories_only_is_no_python_function_that_could_never_answer(
    mlflow: Mlflow, here: Any, tmp_path: Path
) -> None:
    eager = bundle(tmp_path / "b", "codes")
    tell(mlflow, tmp_path / "b")
    address, codes = f"models:/{mlflow.study}@champion", torch.randint(0, 4, (5, 3))
    with quietly():
        torch.testing.assert_close(here.pytorch.load_model(address)(codes), eager(codes))
        assert list(here.models.get_model_info(address).flavors) == ["pytorch"]


def test_a_model_is_logged_once_with_its_metrics_and_params(mlflow: Mlflow, tmp_path: Path) -> None:
    bundle(tmp_path / "b")
    for _ in range(2):
        tell(mlflow, tmp_path / "b")
    with quietly():
        (model,) = mlflow.client.search_logged_models([mlflow.experiment.experiment_id])
    assert (model.name, model.params, str(model.status)) == ("trial-3", {"n_hidden": "3"}, "READY")
    assert {each.key: each.value for each in model.metrics} == {"test_r2": 0.5, "test_loss": 0.5}
    run = mlflow.runs()["study"]
    assert mlflow.curve("study", "test_r2") == [(20, 0.5)]
    assert [each.model_id for each in run.outputs.model_outputs] == [model.model_id]
    (version,) = versions(mlflow)
    assert (version.source, version.run_id) == (f"models:/{model.model_id}", run.info.run_id)


@by_default_in_sqlite
def test_the_champion_gives_way_to_a_better_one_on_the_same_test_rows_only(mlflow: Mlflow, tmp_path: Path) -> None:
    bundle(tmp_path / "b")
    told: list[tuple[dict[str, Any], str]] = [
        ({"r2": 0.5}, "0"),
        ({"r2": 0.4}, "0"),
        ({"r2": 0.5}, "0"),
        ({"r2": 0.6}, "3"),
        ({"r2": 0.9, "data": "e"}, "3"),
        ({"r2": 0.1, "metric": "loss", "direction": "minimize"}, "3"),
    ]
    for trial, (facts, best) in enumerate(told):
        about = tmp_path / "b/bundle.json"
        about.write_text(about.read_text() + "\n")  # so that it is another bundle
        tell(mlflow, tmp_path / "b", trial, **facts)
        assert champion(mlflow)[1] == best, facts
    assert len(versions(mlflow)) == len(told)


@by_default_in_sqlite
def test_an_attempt_that_failed_midway_leaves_one_model(
    mlflow: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from mlflow import MlflowClient

    bundle(tmp_path / "b")
    real, asked = MlflowClient.create_model_version, []

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        if len(asked) == 1:
            raise ConnectionError("it is away")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", create)
    tell(mlflow, tmp_path / "b", sent=None)  # it may be tried twice by then
    tell(mlflow, tmp_path / "b")
    with quietly():
        assert len(mlflow.client.search_logged_models([mlflow.experiment.experiment_id])) == 1
    assert len(versions(mlflow)) == 1
    assert len(said) == 1
    assert "does not take files (ConnectionError: it is away)" in said[0]


@by_default_in_sqlite
def test_a_peer_that_registers_the_same_bundle_meanwhile_makes_no_second_version(
    mlflow: Mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    from mlflow import MlflowClient

    bundle(tmp_path / "b")
    real = MlflowClient.create_model_version

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        real(self, *args, **kwargs)  # the peer's, which is faster
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "create_model_version", create)
    tell(mlflow, tmp_path / "b")
    assert [str(each.version) for each in versions(mlflow)] == ["1"]
    assert (str(champion(mlflow)[0]), champion(mlflow)[1]) == ("1", "3")
    with quietly():  # as if this process had looked before the other one was done
        mlflow.client.delete_tag(mlflow.runs()["study"].info.run_id, "hpo.model")
    tell(mlflow, tmp_path / "b")
    assert [str(each.version) for each in versions(mlflow)] == ["1"]
    assert said == []


@by_default_in_sqlite
def test_a_bundle_without_that_file_is_no_registered_model(mlflow: Mlflow, tmp_path: Path) -> None:
    bundle(tmp_path / "b", formats="torchscript")
    tell(mlflow, tmp_path / "b")
    tell(mlflow, tmp_path / "gone")
    assert versions(mlflow) == []


@pytest.mark.parametrize("name", ["p%41", "p%x"])
def test_a_folder_whose_models_mlflow_cannot_load_is_said_once(tmp_path: Path, said: list[str], name: str) -> None:
    with quietly():
        for _ in range(2):
            open_experiment(sqlite_address(tmp_path / name / "mlflow.db"), "s")
    assert ["as an escape" in each for each in said] == [True] * (name == "p%41")
