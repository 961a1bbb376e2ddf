"""A new SQLite database of MLflow's, made whole or not at all: one that was killed midway stays without its tables."""

from pathlib import Path


def make_database(path: Path) -> None:
    """Have MLflow make its tables beside `path`, and put them there. Raises what MLflow and the file system raise."""
    from mlflow import MlflowClient

    new = path.with_name(f".{path.name}.new").resolve()
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(f"sqlite:///{new}").search_experiments(max_results=1)
    new.replace(path)
