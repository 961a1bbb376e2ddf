"""README and docs/: the pages build, their code runs, their commands, keys, messages, links and figures' scripts exist.

Code blocks are marked by the words after the language:

    python              runs in a process of its own, after the page's earlier blocks, in the page's folder
    python file=NAME    is a file in that folder; `yaml file=NAME` too, and then `hpo check` takes it
    python api          the same as without the word; it marks what needs the public API (`import hpo`)
    python other        another project's code: it must parse, and is not run
    yaml                a study file, or some of its keys; `yaml other` is neither
"""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

import hpo
from hpo.cli.app import app
from hpo.study import spec
from hpo.study.draft import read
from tests import warm
from tests.cli import invoke
from tests.conftest import ROOT, run_hpo

sys.path.insert(0, str(ROOT / "docs" / "_ext"))
import generated

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A code block of a page; `words` are those after its language."""

    page: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str | None:
        """The name under which the block is saved, if it is."""
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for match in FENCE.finditer(text):
        language, *words = match[1].split() or [""]
        yield Block(page, text.count("\n", 0, match.start()) + 1, language, tuple(words), match[2])


def blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def prose_of(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text())


def write_files(page: Path, folder: Path) -> None:
    for block in blocks_of(page):
        if block.file:
            (folder / block.file).write_text(block.text)


# The site, and the size of README.


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for page in DOCS.glob("*.md"):
        assert (tmp_path / f"{page.stem}.html").is_file()


def test_readme_has_at_most_a_thousand_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_readme_has_the_two_commands_that_decide_whether_a_change_lands() -> None:
    lines = (ROOT / ".ci" / "run").read_text().replace("pip install -q", "pip install").splitlines()
    commands = [line for line in lines if line.startswith("pip install")]
    assert len(commands) == 2
    for page in (ROOT / "README.md", DOCS / "quickstart.md"):
        shown = [line.partition("  #")[0].rstrip() for block in blocks_of(page) for line in block.text.splitlines()]
        assert set(commands) <= set(shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_in_plain_english(page: Path) -> None:
    text = re.sub(r"`[^`]*`", "", prose_of(page))
    private = re.findall(r"\b(anew|goes on|go on|went on|begun|mended|told)\b", text)
    assert not private, f"{page.name}: {private}"


# Study files.


@pytest.mark.parametrize("block", [b for b in blocks("yaml") if "other" not in b.words], ids=str)
def test_study_files_have_no_faults(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"
    with_objective = re.search(r"^objective:", block.text, re.M)
    path.write_text(block.text if with_objective else f"objective: breast_cancer\n{block.text}")
    draft = read(path)
    assert not draft.faults, draft.document.render(draft.faults)


def test_the_study_file_page_shows_each_key_and_its_default() -> None:
    files = {block.file: block.text for block in blocks_of(DOCS / "study-file.md")}
    defaults, optional = (yaml.safe_load(files[name]) for name in ("all-defaults.yaml", "all-optional.yaml"))
    assert {*defaults, *optional, "direction"} == set(spec.KEYS)
    shown = spec.StudySpec.model_validate(defaults | {"name": "x"})
    for key in defaults.keys() - {"objective"}:
        assert getattr(shown, key) == spec.StudySpec.model_fields[key].get_default(call_default_factory=True), key


def test_the_study_file_page_is_made_from_the_code() -> None:
    page = generated.expanded((DOCS / "study-file.md").read_text())
    for name in generated.CLASSES:
        for field_name, field in getattr(spec, name).model_fields.items():
            assert f"\n`{field.alias or field_name}`\n: *" in page
    assert "`epochs`\n: *whole number, at least 1; default `20`.*" in page
    assert "`timeout`\n: *a length of time: seconds, or `90s`" in page
    assert "`sampler`\n: *a name, or a mapping of `name` and Optuna's own keys; default `tpe`.*" in page
    assert "`or`\n: *number; optional.*" in page


def test_the_keys_of_the_study_file_have_docstrings() -> None:
    for name in ("StudySpec", "Loading", "Confirm"):
        assert not generated.missing_docstrings(name), name


def test_samplers_and_pruners_on_the_search_page_are_those_there_are() -> None:
    page = (DOCS / "search.md").read_text()
    samplers, pruners = (
        part.split("\n\n")[0] for part in re.split(r"^\| `(?:sampler|pruner):` .*\n", page, flags=re.M)[1:]
    )
    assert tuple(re.findall(r"^\| `(\w+)` \|", samplers, re.M)) == spec.SAMPLERS
    assert tuple(re.findall(r"^\| `(\w+)` \|", pruners, re.M)) == spec.PRUNERS


# Python.


@pytest.mark.parametrize("block", [b for b in blocks("python") if "other" in b.words], ids=str)
def test_other_code_parses(block: Block) -> None:
    ast.parse(block.text)


def runnable(page: Path) -> list[Block]:
    return [b for b in blocks_of(page) if b.language == "python" and "other" not in b.words and b.file is None]


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_the_pages_python_runs(page: Path, tmp_path: Path) -> None:
    write_files(page, tmp_path)
    for block in runnable(page):
        done = warm.run(block.text, folder=tmp_path)
        assert done.returncode == 0, f"{block}:\n{done.stderr}"


def checkable() -> list[Block]:
    """Return the study files whose objective is on the same page, or comes with hpo and needs no file."""
    found = []
    for block in blocks("yaml"):
        files = {other.file for other in blocks_of(block.page)}
        objective = str(yaml.safe_load(block.text).get("objective")) if block.file else ""
        if objective.partition(":")[0] in files or (block.file and objective == "breast_cancer"):
            found.append(block)
    return found


@pytest.mark.parametrize("block", checkable(), ids=str)
def test_study_files_are_checked(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(block.page, tmp_path)
    assert "nothing is wrong" in invoke("check", block.file)


def test_readmes_objective_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(ROOT / "README.md", tmp_path)
    done = run_hpo("run", "wine.yaml", "--trials", "2", "--set", "epochs=2", "--tracking", "off")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mlruns" / "bundles" / "wine" / "bundle.json").is_file()


def test_readmes_table_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(ROOT / "README.md", tmp_path)
    rows = "".join(f"{i},{'ab'[i % 2]},{3 * i + i % 7}\n" for i in range(80))
    (tmp_path / "data.csv").write_text("size,kind,price\n" + rows)
    done = run_hpo("run", "table.yaml", "--trials", "2", "--set", "epochs=2", "--tracking", "off")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mlruns" / "bundles" / "table" / "bundle.json").is_file()


def test_the_api_page_has_all_public_names() -> None:
    named = re.findall(r"^<!-- api: ([\w, ]+) -->$", (DOCS / "api.md").read_text(), re.M)
    assert {name for names in named for name in re.findall(r"\w+", names)} == set(hpo.__all__)


# Commands.


def command_lines() -> list[tuple[str, str]]:
    """Return each `hpo ...` in a block of shell commands, with its place."""
    found = []
    for block in blocks("bash", "sh", "console"):
        for line in block.text.splitlines():
            for part in re.split(r"&&|;|&(?!\w)|\"", re.sub(r"(^|\s)#.*$", "", line)):
                if match := re.search(r"(?:^|\s)(?:python -m )?hpo (.*)$", part.strip()):
                    found.append((match[1].strip(), f"{block}"))
    return found


COMMANDS = typer.main.get_command(app)


@pytest.mark.parametrize(("line", "where"), command_lines(), ids=lambda text: text.replace("/", "_"))
def test_commands_and_their_options_exist(line: str, where: str) -> None:
    name, *arguments = shlex.split(line)
    assert name in COMMANDS.commands, f"{where}: there is no command {name}"
    COMMANDS.commands[name].make_context(name, arguments)  # raises for an unknown option, or a missing argument


def test_commands_in_the_text_exist() -> None:
    for page in PAGES:
        for command, rest in re.findall(r"`hpo ([a-z]+)([^`]*)`", prose_of(page)):
            assert command in COMMANDS.commands, f"{page.name}: hpo {command}"
            known = {opt for param in COMMANDS.commands[command].params for opt in param.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= known, f"{page.name}: hpo {command}{rest}"


def test_the_commands_page_has_all_commands() -> None:
    page = (DOCS / "commands.md").read_text()
    assert set(re.findall(r"^\| `hpo ([a-z]+)", page, re.M)) == set(COMMANDS.commands)


def test_scripts_of_figures_exist_with_their_options() -> None:
    found = [
        (page, script, options)
        for page in PAGES
        for script, options in re.findall(r"`(?:python )?(benchmarks/\w+\.py)([^`]*)`", page.read_text())
    ]
    assert len(found) > 8
    for page, script, options in found:
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z-]+", options):
            assert option in source, f"{page.name}: {script} {option}"


# What the pages say of the code and of the tests.


def messages() -> list[str]:
    """Return every text in hpo and its objectives, with `...` for what a message fills in."""
    found = []
    for file in [*(ROOT / "hpo").rglob("*.py"), *(ROOT / "objectives").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_on_the_troubleshooting_page_are_those_of_the_code() -> None:
    shown = re.findall(r"^`([^`]+)`\n: ", (DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(shown) > 30
    texts = messages()
    for message in shown:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        pattern = re.compile(".*?".join(parts), re.S)
        whole = any(pattern.search(text) for text in texts)
        assert whole or all(any(re.search(part, text) for text in texts) for part in parts), message


def test_the_tests_that_hold_the_promises_exist() -> None:
    named = re.findall(r"`((?:tests/|benchmarks/)?\w+\.py)`", (DOCS / "guarantees.md").read_text())
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).is_file() or (ROOT / "tests" / name).is_file(), name


def test_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:hpo|objectives|studies|tests|benchmarks|docs)/[\w/.-]+\.\w+)`", page.read_text()):
            if "NAME" not in name:
                assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_modules_that_the_architecture_page_names_exist() -> None:
    text = prose_of(DOCS / "architecture.md")
    packages = {path.name for path in (ROOT / "hpo").iterdir() if path.is_dir()}
    named = [
        *re.findall(r"`(\w+)/(\w+)\.py`", text),
        *((package, module) for package, module in re.findall(r"`(\w+)\.(\w+)(?:\.[A-Z]\w+)?`", text)),
    ]
    ours = [each for each in named if each[0] in packages and each[1] != "NAME"]
    assert len(ours) > 20
    for package, module in ours:
        assert (ROOT / "hpo" / package / f"{module}.py").is_file(), f"{package}.{module}"
