"""`hpo ui`: MLflow's pages and Optuna's dashboard of one study, on this machine, until Ctrl-C."""

import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

from hpo.cli.pages import Page, get, port_of
from hpo.cli.screen import screen
from hpo.errors import InputError, masked
from hpo.export.files import FILES, MORE_FILES
from hpo.report.place import default_path
from hpo.search.address import kind_of, parsed_url
from hpo.search.named import found, named, opened, stored_spec
from hpo.stopping import signals
from hpo.study.spec import StudySpec

_MLFLOW_PORT, _DASHBOARD_PORT = 5000, 8080
_SECONDS = 0.2
"""How often to look whether both still run."""


def ui(
    study: str,
    storage: str | None,
    tracking: str | None,
    sets: Mapping[str, str],
    *,
    port: int | None,
    mlflow: bool,
    dashboard: bool,
) -> None:
    """`hpo ui`; `sets` are laid over the study's file."""
    spec, study_id = _study(study, storage, tracking, sets)
    with screen() as out, signals() as stop, ExitStack() as stack:
        pages: list[Page] = []
        where, why = _served(spec) if mlflow else ("", "")
        if why:
            out.print(why)
        if where:
            at = port_of(port, _MLFLOW_PORT)
            pages.append(_mlflow(where, at))
            stack.callback(pages[-1].end)
        if dashboard:
            at = port_of(None if port is None else port + len(pages), _DASHBOARD_PORT)
            pages.append(_dashboard(spec, study_id, at))
            stack.callback(pages[-1].end)
        for page in pages:
            is_mlflow = page.what == "MLflow"
            page.wait_until_it_answers("/health" if is_mlflow else "/api/meta", stop.requested)
            if not stop.requested():
                path = _runs_page(page, spec.name) if is_mlflow else f"/dashboard/studies/{study_id}"
                out.print(f"{page.what}: {page.address}{path}")
        if pages:
            out.print("Ctrl-C ends them" if len(pages) > 1 else "Ctrl-C ends it")
        while pages and not stop.requested():
            for page in pages:
                page.require_running()
            time.sleep(_SECONDS)


def _study(study: str, storage: str | None, tracking: str | None, sets: Mapping[str, str]) -> tuple[StudySpec, int]:
    """Return a study's spec and its id in Optuna's storage. Raises InputError where there is none."""
    what = named(study, storage, sets)
    with opened(what.storage, what.outage) as there:
        stored = found(there, what.storage, what.name)
    spec = what.file or stored_spec(stored, what.storage)
    return spec if tracking is None else spec.model_copy(update={"tracking": tracking}), stored._study_id


def _served(spec: StudySpec) -> tuple[str, str]:
    """Return the address of a database that MLflow is to serve, or nothing; and what is to be said of another."""
    tracking = spec.tracking
    if tracking == "off":
        return "", "MLflow: left out, the study is not tracked (tracking: off)"
    if tracking.startswith(("http://", "https://")):
        return "", f"MLflow: its server is {masked(tracking)}, experiment {spec.name}"
    if ":***@" in tracking:
        raise InputError(
            f"the storage keeps no password, and {tracking} has one; give the study file, --tracking with the whole "
            "address, or --no-mlflow"
        )
    if kind_of(tracking) == "sqlite" and not Path(str(parsed_url(tracking).database)).is_file():
        return "", f"MLflow: left out, there is no {masked(tracking)} yet"
    return tracking, ""


def _mlflow(tracking: str, port: int) -> Page:
    """Start MLflow's server; the address comes by the environment, so that no `ps` shows a password."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environ = {
        "MLFLOW_BACKEND_STORE_URI": tracking,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    return Page("MLflow", command, port, environ, "")


def _dashboard(spec: StudySpec, study_id: int, port: int) -> Page:
    """Start Optuna's dashboard; the study's bundle and report, once they are there, are its artifacts."""
    bundle = Path(spec.output).absolute() / "bundles" / spec.name
    files = [*(bundle / name for name in (*FILES, *MORE_FILES)), default_path(spec.output, spec.name).absolute()]
    shown = json.dumps({"storage": spec.storage, "study": study_id, "files": [str(file) for file in files]})
    command = [sys.executable, "-m", "hpo.report.dashboard", str(port)]
    return Page("Optuna's dashboard", command, port, {}, f"{shown}\n")


def _runs_page(page: Page, experiment: str) -> str:
    """Return the path of an experiment's training runs in MLflow's pages, which open on language models'."""
    answer = get(f"{page.address}/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(experiment)}")
    if answer is None:  # nothing has arrived there yet
        return "/#/experiments"
    return f"/#/experiments/{json.loads(answer)['experiment']['experiment_id']}/runs?workflowType=machine_learning"
