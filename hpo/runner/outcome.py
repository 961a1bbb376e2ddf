"""What the storage holds of a study's end and of how it ran. To look at it needs neither torch nor the objective."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.errors import InputError
from hpo.export.files import FILES, read_about, verify
from hpo.runner.progress import number_text
from hpo.search import schema
from hpo.search.beside import Beside, beside_in
from hpo.search.search import Search
from hpo.search.view import Best
from hpo.study.spec import StudySpec


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The study's end: `test` metrics of the refitted model, and the folder of its bundle."""

    number: int
    test: Mapping[str, float]
    bundle: Path | None
    """None where there is no network to export: an objective's own `train` gave none."""
    parity: float | None
    n_tests: int = field(default=0, compare=False)
    """How often the test split has been read in this study."""

    seeds: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Of several networks `n`, and `mean` and `std` of each test metric over them; empty: of a single one."""

    beside: Beside | None = field(default=None, compare=False)
    """What it was compared with; None: with nothing, or by an earlier version."""

    @property
    def seeds_text(self) -> str:
        """The test metrics over seeds, for a person; empty: there is a single network."""
        if not self.seeds:
            return ""
        mean, std = self.seeds["mean"], self.seeds["std"]
        each = ", ".join(f"{name} {number_text(mean[name])} (standard deviation {std[name]:.2g})" for name in mean)
        return f"mean of {self.seeds['n']} seeds: {each}"

    @property
    def readings(self) -> str:
        """A warning where the test split was read more than once; else nothing."""
        if self.n_tests < 2:
            return ""
        return f"the test split was read {self.n_tests} times: the more often, the less it says"


def networks_of(spec: StudySpec) -> list[int]:
    """Return of how many networks the study's end is: trained, and exported as one."""
    return [max(spec.refit_seeds, spec.ensemble), spec.ensemble]


def tests_of(search: Search) -> list[Any]:
    """Return every reading of the test split so far, as far as the storage holds a list of them."""
    stored = search.attrs.get(schema.TEST_EVALUATIONS)
    return stored if isinstance(stored, list) else []


def outcome(search: Search, best: Best | None) -> Outcome | None:
    """Return the stored outcome if it is that of `best` and its bundle is still there, and still that one."""
    stored = search.attrs.get(schema.RESULT)
    if not isinstance(stored, Mapping) or best is None or stored.get("number") != best.number:
        return None
    if stored.get("networks", [1, 1]) != networks_of(search.spec):
        return None
    if is_of_other_names(search, stored):
        return None
    folder = stored["bundle"] and Path(stored["bundle"])
    if folder is not None and not _is_of(folder, best):
        return None
    return Outcome(
        number=best.number,
        test=stored["test"],
        bundle=folder,
        parity=stored["parity"],
        seeds=_seeds(stored.get("seeds")),
        n_tests=len(tests_of(search)),
        beside=beside_in(stored.get("baselines")),
    )


def is_of_other_names(search: Search, stored: Mapping[str, Any]) -> bool:
    """Whether a stored outcome is of data whose columns or classes were called otherwise than they are now."""
    return stored.get("names") not in (None, search.attrs.get(schema.NAMES))


def remember(search: Search, done: Outcome) -> None:
    """Store the study's outcome."""
    bundle = done.bundle and str(done.bundle)
    stored = {"number": done.number, "test": dict(done.test), "bundle": bundle, "parity": done.parity}
    stored |= {"seeds": dict(done.seeds), "networks": networks_of(search.spec)}
    stored |= {} if done.beside is None else {"baselines": done.beside.as_dict()}
    search.remember(schema.RESULT, stored | {"names": search.attrs.get(schema.NAMES)})


def _is_of(folder: Path, best: Best) -> bool:
    """Whether a bundle is whole and of that trial: another study of that name may have written there, too."""
    try:
        about = read_about(folder)
        verify(folder, about, FILES[0], by_size=True)
    except InputError:
        return False
    is_its_own = {"trial": best.number, "seed": best.seed, "value": best.value}
    same = all(about.get(key, value) == value for key, value in is_its_own.items())
    return same and all((folder / file).is_file() for file in FILES)


def _seeds(stored: Any) -> Mapping[str, Any]:
    """Return what is stored of the tests of several networks, if that is what hpo writes."""
    try:
        pairs = [(float(stored["mean"][name]), float(stored["std"][name])) for name in stored["mean"]]
        return stored if pairs and int(stored["n"]) > 1 else {}
    except (LookupError, TypeError, ValueError):
        return {}


def stack_paths(search: Search) -> list[str]:
    """Return how the study's stacks have run, as far as the storage holds a list of that."""
    stored = search.attrs.get(schema.STACK_PATHS)
    return [str(path) for path in stored] if isinstance(stored, list) else []
