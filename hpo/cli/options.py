"""The options that several commands share, and what is made of them."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hpo.cli.output import lost_text
from hpo.errors import HpoError

Study = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file, e.g. studies/breast_cancer.yaml.")]
Trials = Annotated[int | None, typer.Option(help="How many trials in all, over all runs of the study.")]
Storage = Annotated[str | None, typer.Option(help="Optuna's storage, e.g. sqlite:///mlruns/optuna.db.")]
Tracking = Annotated[str | None, typer.Option(help="MLflow's address, e.g. http://host:5000, or off.")]
Device = Annotated[str | None, typer.Option(help="auto, cuda, cuda:1, mps or cpu.")]
Stack = Annotated[str | None, typer.Option(help="auto, or how many trials to train at once, as one stack.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the file; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="End with one JSON object, on the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only warnings, and the result.")]
LogFile = Annotated[
    Path | None, typer.Option("--log-file", metavar="FILE", help="Add all that is said to a file, each with its time.")
]


def overrides(pairs: list[str] | None, **options: object) -> dict[str, str]:
    """Return `--set` and the options as one mapping of dotted keys to YAML text; an option is laid over `--set`."""
    overrides: dict[str, str] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip(".") or "" in key.split("."):
            raise typer.BadParameter(f"write KEY=VALUE (params.batch_size=64), but got {pair!r}", param_hint="--set")
        overrides[key] = value
    given = {key: value for key, value in options.items() if value is not None}
    plain = {key: str(value) if key == "stack" else json.dumps(value) for key, value in given.items()}
    return overrides | plain


def count(workers: str) -> int | None:
    if workers == "auto":
        return None
    if not workers.isdecimal() or int(workers) < 1:
        raise typer.BadParameter(
            f"must be auto, or a number of at least 1, but got {workers!r}", param_hint="--workers"
        )
    return int(workers)


def finish(summary: dict[str, object], as_json: bool) -> None:
    if not as_json:
        return
    sys.stdout.flush()
    print(json.dumps(summary))
    sys.stdout.flush()
    if (lost := getattr(sys.stdout, "lost", None)) is not None:  # the command has done its work without stdout
        raise HpoError(f"--json: {lost_text(lost)}")
