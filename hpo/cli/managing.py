"""The commands that look after studies and change nothing in how they are trained: their options."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hpo.cli import options
from hpo.cli.options import Json, finish

Named = Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or a study's name in the storage.")]
Storage = Annotated[
    str | None, typer.Option(help="Optuna's storage; default: that of the file, else sqlite:///mlruns/optuna.db.")
]


def add_to(app: typer.Typer) -> None:
    """Give `app` these commands."""
    for command in (report, studies, compare, rename, delete, ui):
        app.command()(command)


def report(
    study: options.Study,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; - is stdout; default: see --format.")
    ] = None,
    format_: Annotated[
        Literal["html", "md", "json", "csv"] | None,
        typer.Option("--format", help="html, to reports/<name>/report.html in `output`; md, json, csv, to stdout."),
    ] = None,
    baselines: Annotated[
        bool | None, typer.Option(help="Fit simple models beside the best trial; default: up to 100,000 rows.")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="Keep the page with the study's run in MLflow, too.")] = False,
    storage: options.Storage = None,
    tracking: options.Tracking = None,
    set_: options.Set = None,
) -> None:
    """Write all that a study has found as one page: best, curves, params, timeline, every trial. It needs no network.

    Example: hpo report studies/breast_cancer.yaml --out report.html
    """
    from hpo.cli import report as command

    overrides = options.overrides(set_, storage=storage, tracking=tracking)
    command.report(study, overrides, format_, out, baselines, log_it=log)


def studies(storage: Storage = None, json_: Json = False) -> None:
    """List the studies in a storage: state, trials, best value, and when each was active last.

    Example: hpo studies --storage sqlite:///mlruns/optuna.db
    """
    from hpo.cli import studies as command

    finish(command.studies(storage), json_)


def compare(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Study files, or names in the storage.")],
    storage: Storage = None,
    json_: Json = False,
) -> None:
    """Show studies side by side: what each has found and cost, which is best, and in what they differ.

    Example: hpo compare studies/breast_cancer.yaml breast_cancer-1
    """
    from hpo.cli import compare as command

    finish(command.compare(studies, storage), json_)


def rename(study: Named, new: Annotated[str, typer.Argument(metavar="NEW")], storage: Storage = None) -> None:
    """Rename a study in its storage, with its checkpoints and its bundle. MLflow's runs stay where they are.

    Example: hpo rename breast_cancer breast_cancer-small
    """
    from hpo.cli import studies as command

    command.rename(study, storage, new)


def delete(
    study: Named,
    storage: Storage = None,
    bundle: Annotated[bool, typer.Option("--bundle", help="Delete its exported model, too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even while workers train it.")] = False,
) -> None:
    """Delete a study from its storage, and its checkpoints. Its bundle and MLflow's runs are kept.

    Example: hpo delete breast_cancer --storage sqlite:///mlruns/optuna.db
    """
    from hpo.cli import studies as command

    command.delete(study, storage, bundle=bundle, yes=yes, force=force)


def ui(
    study: Named,
    storage: Storage = None,
    tracking: Annotated[str | None, typer.Option(help="MLflow's database; default: that of the study.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65534, help="MLflow's port, the dashboard's is the next; default: free ones."),
    ] = None,
    no_mlflow: Annotated[bool, typer.Option("--no-mlflow", help="Without MLflow's pages.")] = False,
    no_dashboard: Annotated[bool, typer.Option("--no-dashboard", help="Without Optuna's dashboard.")] = False,
    set_: options.Set = None,
) -> None:
    """Open a study in MLflow's pages and in Optuna's dashboard, on this machine, until Ctrl-C.

    Example: hpo ui studies/breast_cancer.yaml
    """
    if no_mlflow and no_dashboard:
        raise typer.BadParameter("leaves nothing to show beside --no-mlflow", param_hint="--no-dashboard")
    from hpo.cli import ui as command

    sets = options.overrides(set_)
    command.ui(study, storage, tracking, sets, port=port, mlflow=not no_mlflow, dashboard=not no_dashboard)
