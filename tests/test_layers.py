"""The house's rules, held by its own imports: layers, a home for each library, a frozen surface, the drawn tree."""

import ast
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpo.study.spec import KEYS
from tests.conftest import ROOT

ROOM = {
    "study": set(),
    "search": {"study"},
    "training": {"study"},
    "stacks": {"training", "study"},
    "tracking": set(),
    "export": {"study"},
    "runner": {"study", "search", "training", "stacks", "tracking", "export"},
    "report": {"search", "export"},
    "cli": {"study", "search", "training", "stacks", "tracking", "export", "runner", "report"},
}
"""What each package may import beside itself; the modules of the root are open to all."""
FACES = {"__init__", "__main__", "api", "data", "objective"}
"""What stands before the packages and hands their names on; no package imports one of these."""
ROOT_MODULES = FACES | {"errors", "garbage", "light", "log", "seeds", "processes", "sqlite_files", "stopping"}
HOMES = {
    "optuna": {"search", "study.space", "study.dimension", "report"},
    "mlflow": {
        "tracking.calls",
        "tracking.database",
        "tracking.experiment",
        "tracking.models",
        "tracking.parent",
        "tracking.runs",
        "tracking.single",
        "tracking.tables",
    },
    "yaml": {"study.yaml_values"},
    "pydantic": {"study.spec", "study.spec_parts", "study.plugins", "study.ranges", "study.checking", "study.draft"},
    "sqlalchemy": {"search"},
    "rich": {"cli"},
    "optuna_dashboard": {"report.dashboard"},
    "typer": {"cli.app", "cli.options", "cli.managing"},
    "plotly": {"report"},
    "jinja2": {"report.page"},
    "ray": {"runner.ray_workers"},
    "lightning": {"study.lightning_fit"},
    "pytorch_lightning": {"study.lightning_fit"},
}


PACKAGES = {"hpo", *(f"hpo.{name}" for name in ROOM)}


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return (module, whether at the module's top) for every import in a file, `from hpo.study import spec` too."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            found += [(alias.name, top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            found += [(f"{node.module}.{alias.name}", top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((str(node.module), top))
    return found


MODULES = sorted((ROOT / "hpo").rglob("*.py"))


def name_of(path: Path) -> str:
    """Return a module's name within `hpo`: `study.spec`, `errors`."""
    return ".".join(path.relative_to(ROOT / "hpo").with_suffix("").parts)


def test_the_packages_are_those_of_the_table() -> None:
    assert {name_of(path).partition(".")[0] for path in MODULES if path.parent != ROOT / "hpo"} == {*ROOM, "objectives"}
    assert {path.stem for path in MODULES if path.parent == ROOT / "hpo"} == ROOT_MODULES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_keep_to_the_table_and_each_library_has_its_home(path: Path) -> None:
    name = name_of(path)
    room = name.partition(".")[0]
    for module, _ in imports(path):
        package, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if package == "hpo" and other in ROOM and name not in FACES:
            assert other == room or other in ROOM.get(room, set()), f"{name} imports {module}; {room} may not"
        assert package != "hpo" or room not in ROOM or other not in FACES, f"{name} imports the face {module}"
        if package in HOMES:
            at_home = name in HOMES[package] or room in HOMES[package]
            assert at_home, f"{name} imports {package}, whose home is {HOMES[package]}"
        assert package != "objectives", f"{name}: the engine knows no objective"


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = {name_of(path): path for path in MODULES if path.stem != "__init__"}
    arrows = {
        name: {module.removeprefix("hpo.") for module, _ in imports(path)} & set(known) for name, path in known.items()
    }
    left = dict(arrows)
    while free := [name for name, to in left.items() if not to & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or above one: {sorted(left)}"


MOST_LINES, MOST_LINES_OF_A_FUNCTION = 350, 50


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_stay_short_enough_to_be_read_at_once(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {length} lines"


def test_only_the_command_line_prints_or_exits() -> None:
    for path in MODULES:
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if path.parent.name != "cli":
            assert not {"print", "sys.exit", "exit", "quit"} & set(calls), path


def test_the_logger_whose_records_are_masked_is_the_only_one_of_ours() -> None:
    for path in MODULES:
        calls = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        ours = [call for call in calls if re.match(r"(logging\.)?getLogger\(('hpo|__name__)", call)]
        assert ours == (["logging.getLogger('hpo')"] if name_of(path) == "log" else []), path


@pytest.fixture(scope="module")
def imported() -> tuple[set[str], set[str]]:
    """Return what else is imported with what a run needs, and with all modules."""
    modules = [f"hpo.{name_of(path)}" for path in MODULES if path.stem not in ("__init__", "__main__")]
    code = f"import sys, hpo.runner.opening, hpo.runner.worker\nprint(*sys.modules)\nimport {', '.join(modules)}\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}print(*sys.modules)"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, then = done.stdout.splitlines()
    return set(first.split()), set(then.split())


def test_mlflow_is_imported_only_when_first_used(imported: tuple[set[str], set[str]]) -> None:
    assert "mlflow" not in imported[1]
    assert importlib.util.find_spec("mlflow") is not None, "else that says nothing"


def test_a_run_imports_pandas_only_where_it_has_a_table(imported: tuple[set[str], set[str]]) -> None:
    assert "pandas" not in imported[0]


COMMANDS = ("run", "check", "status", "report", "export", "predict", "worker", "repair", "serve", "adopt", "objectives")
COMMANDS += ("studies", "rename", "delete", "ui", "compare", "replay")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy_and_has_an_example(command: list[str]) -> None:
    code = (
        "import sys; from hpo.cli.app import main; sys.argv[0] = 'hpo'\n"
        "try: main()\nexcept SystemExit as e: status = e.code\n"
        "heavy = {'torch', 'mlflow', 'optuna', 'pandas', 'sklearn', 'plotly'} & set(sys.modules)\n"
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
        "prune_on",
        "constraints",
        "value",
        "epochs",
        "patience",
        "trials",
        "timeout",
        "time",
        "stop",
        "seed",
        "sampler",
        "pruner",
        "params",
        "start_with",
        "storage",
        "tracking",
        "output",
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
        "confirm",
        "refit_seeds",
        "ensemble",
        "baseline",
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
            "--fresh",
            "--quiet",
            "--log-file",
            "--set",
            "--json",
        },
        "check": {"--storage", "--tracking", "--device", "--set"},
        "status": {"--watch", "--trials", "--storage", "--set", "--json"},
        "report": {"--out", "--format", "--baselines", "--log", "--storage", "--tracking", "--set"},
        "export": {"--trial", "--out", "--formats", "--storage", "--tracking", "--device", "--set", "--json"},
        "predict": {"--format", "--out", "--top-k", "--id"},
        "worker": {
            "--study",
            "--objective",
            "--trust-storage",
            "--storage",
            "--tracking",
            "--device",
            "--stack",
            "--quiet",
            "--log-file",
            "--set",
            "--json",
        },
        "replay": {"--trial", "--epochs", "--storage", "--device", "--set", "--json"},
        "repair": {"--storage", "--tracking", "--set", "--json"},
        "serve": {"--port", "--host", "--storage", "--set"},
        "adopt": {"--from", "--study", "--storage", "--set"},
        "objectives": set(),
        "studies": {"--storage", "--json"},
        "compare": {"--storage", "--json"},
        "rename": {"--storage"},
        "ui": {"--storage", "--tracking", "--port", "--no-mlflow", "--no-dashboard", "--set"},
        "delete": {"--storage", "--bundle", "--yes", "--force"},
    }


def test_the_tree_on_the_architecture_page_is_the_tree() -> None:
    block = (ROOT / "docs" / "architecture.md").read_text().split("```tree\n")[1].split("```")[0]
    drawn, folders = set(), [""]
    for line in block.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth + 1 :] = [folders[depth] + name]
        drawn.add(folders[depth + 1])
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    parts = ("hpo/", "objectives/", "studies/", "benchmarks/")
    there = {file for file in files if file.startswith(parts) and not file.endswith(("__init__.py", "py.typed"))}
    assert {name for name in drawn if name.startswith(parts) and not name.endswith("/")} == there


def test_the_table_on_the_architecture_page_is_the_rule() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| ([^|]*)\|$", page, re.M)
    told = {}
    for package, may in rows:
        told[package] = set(told) if "all of the above" in may else set(re.findall(r"`(\w+)`", may))
    assert told == ROOM


def test_what_the_project_says_of_itself_agrees() -> None:
    """The version in three places, the typed package, and the tests of `.ci/run`'s fast part."""
    import tomllib

    import hpo

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["version"] == hpo.__version__
    newest = re.search(r"^## \[(.+)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest is not None
    assert newest[1] == hpo.__version__
    assert (ROOT / "hpo/py.typed").is_file()
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["hpo"]
    for each in [*project["tool"]["hpo"]["ci"]["fast"], *project["tool"]["hpo"]["ci"]["fast_slow"]]:
        file, _, test = each.partition("::")
        assert f"def {test}" in (ROOT / file).read_text()
