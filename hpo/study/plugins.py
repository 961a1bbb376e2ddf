"""Samplers and pruners as a study file names them."""

from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from hpo.study.checking import near

SAMPLERS = ("tpe", "gp", "nsgaii", "cmaes", "qmc", "random", "grid", "brute_force")
PRUNERS = (
    "median",
    "halving",
    "percentile",
    "successive_halving",
    "hyperband",
    "patient",
    "threshold",
    "wilcoxon",
    "none",
)


class Plugin(BaseModel):
    """A sampler or a pruner: a name and the keys of Optuna's own class, checked against it in `hpo.search.search`."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)
    name: str

    @property
    def keys(self) -> dict[str, Any]:
        """All that stands beside `name`."""
        return dict(self.model_extra or {})


def named(value: Any) -> Any:
    """Return a plugin as a mapping: `sampler: tpe` is short for `sampler: {name: tpe}`."""
    return {"name": value} if isinstance(value, str) else {"name": "none"} if value is None else value


def one_of(known: tuple[str, ...]) -> AfterValidator:
    """Return a validator that takes a plugin with one of the `known` names."""

    def check(plugin: Plugin) -> Plugin:
        if plugin.name not in known:
            raise ValueError(f"must be one of {', '.join(known)}, but got {plugin.name!r}{near(plugin.name, known)}")
        return plugin

    return AfterValidator(check)
