"""What is stored in Optuna: each key is named once, in `hpo.search.schema`, and keeps its meaning for ever."""

import ast
import re
from pathlib import Path

import pytest

from hpo.search import schema
from tests.conftest import ROOT

PATH = ROOT / "hpo" / "search" / "schema.py"
MODULES = sorted(path for path in (ROOT / "hpo").rglob("*.py") if path != PATH)
KEYS = {name: value for name, value in vars(schema).items() if name.isupper()}
STORED = {
    "IDENTITY": "hpo:identity",
    "MAKING": "hpo:making",
    "DATA": "hpo:data",
    "NAMES": "hpo:names",
    "CODE": "hpo:code",
    "CODES": "hpo:codes",
    "HELD": "hpo:held",
    "HELD_BY_FILE": "hpo:held_by_file",
    "STUDY_FILE": "hpo:study_file",
    "TIMED_OUT": "hpo:timed_out",
    "ENDS": "hpo:ends",
    "STOPPED": "hpo:stopped",
    "PRUNER": "hpo:pruner",
    "MADE_WITH": "hpo:made_with",
    "NOTE": "hpo:note",
    "STACK": "hpo:stack",
    "STACK_PATHS": "hpo:stack_paths",
    "RESULT": "hpo:result",
    "TEST_EVALUATIONS": "hpo:test_evaluations",
    "CONFIRMED": "hpo:confirmed",
    "TRACKED": "hpo:tracked",
    "OWN_RUNS": "hpo:own_runs",
    "WORKER_LEASE": "hpo:lease:",
    "OPENED": "hpo:opened:",
    "SLOT": "place",
    "SEED": "seed",
    "START_WITH": "start_with",
    "RETRY_OF": "retry_of",
    "ATTEMPT": "attempt",
    "LINEAGE": "lineage",
    "WITHDRAWN": "withdrawn",
    "ERROR": "error",
    "BEST_EPOCH": "best_epoch",
    "METRICS": "metrics",
    "N_PARAMETERS": "n_parameters",
    "JOINED": "joined",
    "ROUNDS": "rounds",
    "PAUSED_AT": "paused_at",
    "TRAINED": "trained",
    "SECONDS": "trained_seconds",
    "RESTARTED": "restarted",
    "RUN_ID": "mlflow_run_id",
    "ADOPTED": "hpo:adopted",
    "CURVES": "curves",
    "CONSTRAINED": "constrained",
    "LEASE": "hpo:lease",
    "LEASE_WORKER": "worker",
    "LEASE_ID": "lease",
    "LEASE_UNTIL": "until",
    "LEASE_ATTEMPT": "attempt",
    "CONSTRAINT": "constraints:",
    "FIXED_PARAMS": "fixed_params",
    "GRID_ID": "grid_id",
    "SEARCH_SPACE": "search_space",
    "X_FOR_TELL": "x_for_tell",
}
"""Stored studies have these: a key may be added, none may be renamed."""
CALLS = {
    "annotate",
    "remember",
    "set_user_attr",
    "set_system_attr",
    "set_trial_user_attr",
    "set_trial_system_attr",
    "set_study_user_attr",
    "set_study_system_attr",
    "get",
    "pop",
    "setdefault",
}
"""What takes a key: of these `get`, `pop` and `setdefault` only where they are of attributes or of a lease."""
NOT_STORED = {
    ("search/identity.py", "seed"),  # a key of the study's identity, which is one stored value
    ("search/samplers.py", "seed"),  # a key of Optuna's samplers, as a study file gives them
    ("search/samplers.py", "search_space"),
    ("search/beside.py", "metrics"),  # a key of the study's result, which is one stored value
    ("search/named.py", "start_with"),  # a key of the study file
}
"""Strings of `hpo/search` that are keys of something else."""


def bare_keys(path: Path) -> list[str]:
    """Return, with its line, each string of a module that is a key of the schema where it means one.

    In `hpo/search` that is every such string; elsewhere one that subscripts, is looked for in, or is given to what
    holds attributes. Whatever looks like `hpo:name` is a key anywhere.
    """
    tree, home = ast.parse(path.read_text()), path.parent == PATH.parent
    name = path.relative_to(ROOT / "hpo").as_posix()
    suspects = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if home or (isinstance(node.value, str) and re.fullmatch("hpo:[a-z_]+", node.value)):
                suspects.append(node)
        elif isinstance(node, ast.Subscript) and holds_attributes(node.value):
            suspects += strings(node.slice)
        elif isinstance(node, ast.Compare) and any(map(holds_attributes, node.comparators)):
            suspects += strings(node.left)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
            reads = node.func.attr in ("get", "pop", "setdefault")
            if not reads or holds_attributes(node.func.value):
                suspects += [each for argument in node.args[: 1 if reads else None] for each in strings(argument)]
                suspects += [ast.Constant(k.arg, lineno=node.lineno) for k in node.keywords if not reads and k.arg]
    values = set(KEYS.values())
    return sorted(
        {
            f"{name}:{node.lineno}: {node.value!r}"
            for node in suspects
            if isinstance(node.value, str)
            and (node.value in values or re.fullmatch("hpo:[a-z_]+", node.value))
            and (name, node.value) not in NOT_STORED
        }
    )


def holds_attributes(node: ast.expr) -> bool:
    return re.search(r"(attrs|lease)(\(.*\))?$|lease_of\(", ast.unparse(node)) is not None


def strings(node: ast.expr) -> list[ast.Constant]:
    """Return the strings that an expression may be, or that a dict has as keys."""
    if isinstance(node, ast.Constant):
        return [node]
    if isinstance(node, ast.Dict):
        return [each for key in node.keys if key is not None for each in strings(key)]
    if isinstance(node, ast.BinOp):
        return strings(node.left) + strings(node.right)
    if isinstance(node, ast.IfExp):
        return strings(node.body) + strings(node.orelse)
    return []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT / "hpo").as_posix())
def test_no_stored_key_is_a_bare_string(path: Path) -> None:
    assert not bare_keys(path), "name it in hpo/search/schema.py, and use that name"


@pytest.mark.parametrize(
    "line",
    [
        'X = "hpo:new_key"',
        'trial.user_attrs["error"]',
        'trial.user_attrs.get("place", 0)',
        '"retry_of" in trial.user_attrs',
        'search.annotate(1, {"metrics": {}})',
        'search.annotate(1, {"a": 1} | {"joined": 2})',
        "search.annotate(1, best_epoch=3)",
        'lease_of(trial).get("worker")',
        'storage.set_trial_user_attr(1, "curves", {})',
        'attrs = {"seed": 1}',
    ],
)
def test_such_a_string_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    home = line.startswith("attrs =")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PATH", tmp_path / "hpo" / "search" / "schema.py")
    path = tmp_path / "hpo" / ("search" if home else "runner") / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert len(bare_keys(path)) == 1


def test_the_stored_strings_are_those_of_stored_studies() -> None:
    assert STORED == KEYS


def test_each_key_says_what_it_is() -> None:
    body = ast.parse(PATH.read_text()).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Assign):
            documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert documented, f"{ast.unparse(node)} has no docstring"
