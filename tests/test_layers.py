"""The house's rules, held by its own imports: layers, a home for each library, a frozen surface, README's tree."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpo.study.spec import KEYS
from tests.conftest import ROOT

LAYERS = {
    "__init__": 0,
    "errors": 0,
    "seeds": 0,
    "progress": 0,
    "processes": 0,
    "stopping": 0,
    "stacked_optim": 0,
    "schedules": 0,
    "memory": 0,
    "kinds": 0,
    "structure": 1,
    "document": 1,
    "catalog": 1,
    "losses": 1,
    "budget": 1,
    "faults": 1,
    "spec": 2,
    "data": 2,
    "tracking": 2,
    "outbox": 3,
    "mlflow_runs": 4,
    "mlflow_tracker": 5,
    "optim": 2,
    "objective": 3,
    "space": 3,
    "journal": 1,
    "remote": 1,
    "sqlite": 1,
    "storage": 2,
    "lease": 3,
    "away": 3,
    "outage": 4,
    "bundle": 3,
    "cmaes": 3,
    "trust": 3,
    "samplers": 4,
    "feed": 3,
    "frames": 4,
    "stack": 4,
    "measuring": 5,
    "vmap_stack": 6,
    "pool": 7,
    "sizing": 8,
    "training": 5,
    "plan": 5,
    "firststep": 6,
    "tryout": 7,
    "search": 5,
    "checkpoints": 6,
    "trial": 7,
    "own": 8,
    "selection": 9,
    "launch": 8,
    "ray_workers": 10,
    "worker": 10,
    "console": 7,
    "commands": 11,
    "__main__": 12,
}
HOMES = {
    "optuna": {
        "space",
        "samplers",
        "cmaes",
        "journal",
        "remote",
        "sqlite",
        "storage",
        "budget",
        "lease",
        "away",
        "outage",
        "search",
    },
    "mlflow": {"mlflow_runs"},
    "yaml": {"document"},
    "pydantic": {"spec"},
    "sqlalchemy": {"remote", "sqlite", "storage", "away"},
    "rich": {"console", "commands"},
    "typer": {"__main__"},
    "ray": {"ray_workers"},
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return (module, whether at the module's top) for every import in a file; `from hpo import x` is `hpo.x`."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "hpo":
            found += [(f"hpo.{alias.name}", top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((str(node.module), top))
    return found


MODULES = sorted((ROOT / "hpo").glob("*.py"))


def test_every_module_has_a_layer() -> None:
    assert {path.stem for path in MODULES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_run_downward_and_each_library_has_its_home(path: Path) -> None:
    for module, _ in imports(path):
        package, _, rest = module.partition(".")
        if package == "hpo" and rest:
            assert LAYERS[rest] < LAYERS[path.stem], f"{path.stem} imports {rest}, which is no layer below it"
        if package in HOMES:
            assert path.stem in HOMES[package], f"{path.stem} imports {package}, whose home is {HOMES[package]}"
        assert package != "objectives", f"{path.stem}: the engine knows no objective"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in MODULES:
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if path.stem not in ("__main__", "commands"):
            assert not {"print", "sys.exit", "exit", "quit"} & set(calls), path


def test_mlflow_is_imported_only_when_first_used() -> None:
    assert not [module for module, top in imports(ROOT / "hpo/mlflow_runs.py") if top and module.startswith("mlflow")]


COMMANDS = ("run", "check", "status", "export", "worker", "repair", "serve", "objectives")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy_and_has_an_example(command: list[str]) -> None:
    code = (
        "import sys; from hpo.__main__ import main; sys.argv[0] = 'hpo'\n"
        "try: main()\nexcept SystemExit as e: status = e.code\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'pandas', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Example: hpo" in done.stdout


def test_help_answers_within_half_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "hpo", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5


def test_the_surface_is_frozen() -> None:
    assert KEYS == (
        "name",
        "objective",
        "options",
        "metric",
        "direction",
        "value",
        "epochs",
        "patience",
        "trials",
        "timeout",
        "seed",
        "sampler",
        "pruner",
        "params",
        "start_with",
        "storage",
        "tracking",
        "device",
        "precision",
        "deterministic",
        "loading",
        "checkpoint_every",
        "grace",
        "retries",
        "outage",
        "catch",
        "stack",
    )
    options = {}
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "hpo", command, "--help"], capture_output=True, text=True, check=True
        )
        options[command] = set(re.findall(r"^  (--[a-z-]+)", done.stdout, re.M)) - {"--help"}
    assert options == {
        "run": {
            "--trials",
            "--storage",
            "--tracking",
            "--device",
            "--stack",
            "--workers",
            "--ray",
            "--gpus-per-worker",
            "--set",
            "--json",
        },
        "check": {"--storage", "--tracking", "--device", "--set"},
        "status": {"--trials", "--storage", "--set", "--json"},
        "export": {"--trial", "--out", "--storage", "--tracking", "--device", "--set", "--json"},
        "worker": {
            "--study",
            "--objective",
            "--trust-storage",
            "--storage",
            "--tracking",
            "--device",
            "--stack",
            "--set",
            "--json",
        },
        "repair": {"--storage", "--tracking", "--set", "--json"},
        "serve": {"--port", "--host", "--storage", "--set"},
        "objectives": set(),
    }


def test_readme_tree_is_the_tree() -> None:
    block = (ROOT / "README.md").read_text().split("```tree\n")[1].split("```")[0]
    told, folder = set(), ""
    for line in block.splitlines():
        name = line.split()[0]
        folder = name if name.endswith("/") and not line.startswith(" ") else folder
        told.add(name if not line.startswith(" ") else folder + name)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    there = {f for f in files if re.fullmatch(r"(hpo|objectives|studies|benchmarks)/[^/]+", f) and "__init__" not in f}
    assert {name for name in told if re.fullmatch(r"(hpo|objectives|studies|benchmarks)/.+", name)} == there
