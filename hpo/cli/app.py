"""The command line, `hpo` or `python -m hpo`: the only place that prints or exits.

Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted. Nothing heavy is imported before a command runs, so that
`--help` answers at once.
"""

import gc
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from hpo.cli import managing
from hpo.cli.options import Device, Json, LogFile, Quiet, Set, Stack, Storage, Study, Tracking, Trials
from hpo.cli.options import count as _count
from hpo.cli.options import finish as _finish
from hpo.cli.options import overrides as _overrides
from hpo.cli.output import Output, continue_without_output, end, lost_text, say_how_dashes_are_written
from hpo.errors import HpoError, InputError, SpecError, masked
from hpo.garbage import uncollected

app = typer.Typer(
    name="hpo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Hyperparameter search and experiment tracking for PyTorch.\n\nExample: hpo run studies/breast_cancer.yaml",
)


def _version(asked: bool) -> None:
    if asked:
        import hpo

        print(hpo.__version__)
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show hpo's version.")
    ] = False,
) -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:  # torch's libraries would end the process, and say something else
        raise InputError("the current folder has been deleted; cd to one that is there") from error


@app.command()
def run(
    study: Study,
    trials: Trials = None,
    storage: Storage = None,
    tracking: Tracking = None,
    device: Device = None,
    stack: Stack = None,
    workers: Annotated[str, typer.Option(metavar="N", help="Local processes; auto: one a GPU, or one a core.")] = "1",
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Workers on Ray: local, auto, an address.")] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="On Ray, where the cluster has GPUs: 1; 0.5: two workers share one.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start a new study; one of that name is kept as <name>-1, -2...")
    ] = False,
    quiet: Quiet = False,
    log_file: LogFile = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Search, then train the best params from scratch, test and export them. Run again to resume.

    Example: hpo run studies/breast_cancer.yaml --trials 20 --set params.batch_size=32
    """
    started = time.monotonic()
    continue_without_output()
    from hpo.cli.screen import Shown, announce

    overrides = _overrides(set_, trials=trials, storage=storage, tracking=tracking, device=device, stack=stack)
    if not quiet:
        announce(study, overrides)

    commands = _commands()
    from hpo.runner.study import WorkerOptions

    options = WorkerOptions(workers=_count(workers), ray=ray, gpus_per_worker=gpus_per_worker)
    _finish(commands.run(study, overrides, options, fresh, Shown(quiet, log_file, started)), json_)


@app.command()
def worker(
    study: Annotated[Path | None, typer.Argument(metavar="[STUDY]", help="The study file; or give --study.")] = None,
    name: Annotated[
        str | None, typer.Option("--study", help="A study that the storage knows, in place of a file.")
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(help="With --study: the code that may be run, as the study names it; repeatable."),
    ] = None,
    trust_storage: Annotated[
        bool, typer.Option("--trust-storage", help="With --study: run whatever code the storage names.")
    ] = False,
    storage: Storage = None,
    tracking: Tracking = None,
    device: Device = None,
    stack: Stack = None,
    quiet: Quiet = False,
    log_file: LogFile = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Join a study from any machine: train its trials until there are none left. `hpo run` ends it.

    Example: hpo worker studies/breast_cancer.yaml --storage postgresql://host/hpo
    """
    from hpo.cli.screen import Shown

    continue_without_output()
    commands = _commands()

    overrides = _overrides(set_, storage=storage, tracking=tracking, device=device, stack=stack)
    named = None if trust_storage else (objective or [])
    _finish(commands.worker(study, name, overrides, named, Shown(quiet, log_file)), json_)


@app.command()
def repair(
    study: Study, storage: Storage = None, tracking: Tracking = None, set_: Set = None, json_: Json = False
) -> None:
    """Free the budget slots of trials whose workers died, and end the MLflow runs that they left open.

    Example: hpo repair studies/breast_cancer.yaml --storage postgresql://host/hpo
    """
    continue_without_output()
    commands = _commands()

    _finish(commands.repair(study, _overrides(set_, storage=storage, tracking=tracking)), json_)


@app.command()
def serve(
    study: Study,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = 13000,
    host: Annotated[str, typer.Option(help="The address to listen on; there is no login.")] = "127.0.0.1",
    storage: Storage = None,
    set_: Set = None,
) -> None:
    """Serve the study's database to hundreds of workers, as grpc://host:port.

    Example: hpo serve studies/breast_cancer.yaml --port 13000 --host 0.0.0.0
    """
    commands = _commands()

    commands.serve(study, _overrides(set_, storage=storage), host, port)


@app.command()
def check(
    study: Study, storage: Storage = None, tracking: Tracking = None, device: Device = None, set_: Set = None
) -> None:
    """Find everything that is wrong before anything runs; show the space, the model and the data.

    Example: hpo check studies/breast_cancer.yaml
    """
    commands = _commands()

    commands.check(study, _overrides(set_, storage=storage, tracking=tracking, device=device))


@app.command()
def status(
    study: Study,
    seconds: Annotated[float | None, typer.Argument(metavar="SECONDS", min=0.1, help="With --watch; else 2.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again until the study is done, or Ctrl-C.")] = False,
    trials: Trials = None,
    storage: Storage = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Show a study's trials by state, its best so far, what is running, and the time used and left.

    Example: hpo status studies/breast_cancer.yaml --watch 5
    """
    if seconds is not None and not watch:
        raise typer.BadParameter(f"{seconds:g}: seconds are for --watch", param_hint="SECONDS")
    if watch and json_:
        raise typer.BadParameter("prints one state; leave out --watch", param_hint="--json")
    with uncollected():
        from hpo.cli import status as command

    every = (2.0 if seconds is None else seconds) if watch else None
    _finish(command.status(study, _overrides(set_, trials=trials, storage=storage), every), json_)


@app.command()
def export(
    study: Study,
    trial: Annotated[int | None, typer.Option(help="A trial's number; default: the best.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; default: bundles/<name> in the study's `output`.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option(help="Also pt2 (by default, where it can be), onnx, safetensors; state_dict, torchscript always."),
    ] = None,
    storage: Storage = None,
    tracking: Tracking = None,
    device: Device = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Train a trial's params from scratch on train + validation, test and export them.

    Example: hpo export studies/breast_cancer.yaml --trial 7 --out model/
    """
    continue_without_output()
    commands = _commands()

    overrides = _overrides(set_, storage=storage, tracking=tracking, device=device)
    _finish(commands.export(study, overrides, trial, out, formats), json_)


@app.command()
def predict(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, or the study's file.")],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="A .csv, .parquet, .npz, .pt, an image, a folder of them; -: stdin.")
    ],
    format_: Annotated[
        str | None, typer.Option("--format", help="csv, or jsonl: a JSON object a line; default: by --out's ending.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; - is stdout, the default.")] = None,
    top_k: Annotated[int | None, typer.Option(help="So many of the likeliest classes.")] = None,
    keep: Annotated[str | None, typer.Option("--id", metavar="COLUMN", help="A column to copy.")] = None,
) -> None:
    """Predict with an exported model: a row for each row or image of INPUT, in their order.

    Example: hpo predict mlruns/bundles/breast_cancer new.csv --out predictions.csv
    """
    from hpo.cli import predict as command

    command.predict(bundle, source, format_, out, top_k, keep)


@app.command()
def replay(
    study: Study,
    trial: Annotated[int, typer.Option(help="The trial's number.")],
    epochs: Annotated[int | None, typer.Option(help="How many epochs; default: all that it has reported.")] = None,
    storage: Storage = None,
    device: Device = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Train a trial once more, alone, and compare it epoch by epoch with what was recorded.

    Example: hpo replay studies/breast_cancer.yaml --trial 7
    """
    commands = _commands()

    _finish(commands.replay(study, _overrides(set_, storage=storage, device=device), trial, epochs), json_)


@app.command()
def adopt(
    study: Study,
    source: Annotated[str, typer.Option("--from", metavar="STORAGE", help="The storage of an Optuna study.")],
    name: Annotated[str, typer.Option("--study", help="Its name there.")],
    storage: Storage = None,
    set_: Set = None,
) -> None:
    """Give a study the trials of an existing Optuna study, as history for its sampler; they take no slot of its budget.

    Example: hpo adopt wine.yaml --from sqlite:///old.db --study first_try
    """
    continue_without_output()
    commands = _commands()

    commands.adopt(study, _overrides(set_, storage=storage), source, name)


@app.command()
def objectives() -> None:
    """List the objectives there are, one line each.

    Example: hpo objectives
    """
    from hpo.study import catalog

    found = catalog.names()
    for name, line in found.items():
        print(f"{name:<{max(map(len, found))}}  {line}")


managing.add_to(app)


def _commands() -> ModuleType:
    """Import what the commands need."""
    is_first = "hpo.cli.commands" not in sys.modules
    with uncollected():
        commands = import_module("hpo.cli.commands")
    if is_first:
        gc.freeze()  # all of torch stays: a look for garbage passes over it, which saves a third of a second each time
    return commands


def main() -> None:
    """Run the command line, and exit with its status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever has started this: what is printed goes nowhere
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # until the process ends
    sys.stdout = output = Output(sys.stdout)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while importing, too: `hpo.stopping` is not there yet
    try:
        try:
            app()
        except SystemExit as done:
            if done.code == 130:  # by which typer ends a command that a signal has interrupted, without a word
                raise KeyboardInterrupt from done
            if done.code == 2:
                say_how_dashes_are_written(sys.argv[1:])
            sys.stdout.flush()
            output.require_written(done.code)
            raise
        finally:
            gc.freeze()  # the interpreter would look for garbage in all of torch before it ends: a second or two
    except HpoError as error:
        end(str(error) if isinstance(error, SpecError) else f"hpo: {error}", error.exit_status)
    except BrokenPipeError:
        end("", 1)
    except Exception as error:
        if error is output.lost:
            end(f"hpo: {lost_text(output.lost)}", 1)
        if not type(error).__module__.startswith(("optuna.", "sqlalchemy.")):
            end(masked("".join(traceback.format_exception(error))).rstrip(), 1)
        lines = [line for e in (error.__cause__, error) if e is not None for line in str(e).splitlines()[:1]]
        end(f"hpo: the storage failed: {masked('; '.join(lines))}; run the same command again to resume", 1)
    except KeyboardInterrupt:
        end("hpo: interrupted", 130)
