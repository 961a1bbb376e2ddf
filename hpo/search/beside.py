"""What a study's result is looked at beside: models that cost next to nothing, and the default configuration.

All are measured on the same test rows, in one reading. A part of the stored result (`schema.RESULT`) has it as plain
values. Whoever can write the storage writes anything: what has not that shape is left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.search.certainty import Interval


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much a network is better than something else: above 0 it is better, in whichever direction that is."""

    by: float
    interval: Interval | None
    """At 95%, over the rows that both were measured on; None: it is not known."""

    @property
    def is_clear(self) -> bool:
        """Whether it is more than these rows could show by chance; where that is not known, whether there is any."""
        return self.by != 0 and (self.interval is None or self.interval.is_clear)

    @property
    def ends_text(self) -> str:
        """The ends of an interval that is on one side of 0, as sizes; empty: it is not known."""
        if self.interval is None:
            return ""
        low, high = sorted(abs(end) for end in (self.interval.low, self.interval.high))
        return f"{low:.2g} to {high:.2g}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"by": self.by, "interval": None if self.interval is None else [self.interval.low, self.interval.high]}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A model that costs next to nothing: its test `metrics`, and the `seconds` in which it was fitted."""

    name: str
    metrics: Mapping[str, float]
    """Those of the study that such a model has, too."""
    seconds: float
    note: str = ""
    """What it was spared, where it was."""


@dataclass(frozen=True, kw_only=True)
class Default:
    """The default configuration: the first of `start_with` over the objective's defaults."""

    number: int | None = None
    """Its complete trial; None: there is none."""
    is_best: bool = False
    """Whether the study ends with it."""
    gain_on_validation: float | None = None
    """By how much the search's value is better than its own; None: that is not known."""
    metrics: Mapping[str, float] | None = None
    """On test, once it was trained as the best was; None: it was not."""
    epochs: int = 0
    seconds: float = 0.0
    difference: Difference | None = None
    """By how much one network of the best params is better than it on test."""
    network: float | None = None
    """The value of that network, which is not the exported one where that is an ensemble."""
    why: str = ""
    """Why it was not measured on test."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A network's result, and what stands beside it. `metric` is the study's; values are those of the test rows."""

    metric: str
    maximize: bool
    network: float
    rows: int
    """How many test rows all were measured on."""
    of_rows: int
    """How many there are."""
    baselines: Sequence[Baseline]
    absent: Sequence[str] = ()
    """Why others are not among them, in a line each."""
    difference: Difference | None = None
    """By how much the network is better than the best of the baselines."""
    default: Default | None = None

    @property
    def best_baseline(self) -> Baseline | None:
        """The baseline with the best value; None: none has one."""
        known = [each for each in self.baselines if self.metric in each.metrics]
        sign = -1 if self.maximize else 1
        return min(known, key=lambda each: sign * each.metrics[self.metric], default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain values; scripts rely on the keys."""
        best, default = self.best_baseline, self.default
        return {
            "metric": self.metric,
            "maximize": self.maximize,
            "network": self.network,
            "rows": self.rows,
            "of_rows": self.of_rows,
            "models": [
                {"name": each.name, "metrics": dict(each.metrics), "seconds": each.seconds, "note": each.note}
                for each in self.baselines
            ],
            "absent": list(self.absent),
            "best": None if best is None else best.name,
            "difference": None if self.difference is None else self.difference.as_dict(),
            "default": None if default is None else _default_as_dict(default),
            "said": self.sentences(),
        }

    def numbers(self) -> dict[str, float]:
        """Return the metrics of the study's run that a tracker keeps of it."""
        best, default, found = self.best_baseline, self.default, {}
        if best is not None:
            found = {f"baseline_{name}": value for name, value in best.metrics.items()}
            found["baseline_seconds"] = best.seconds
        if default is not None and default.metrics is not None:
            found |= {f"default_{name}": value for name, value in default.metrics.items()}
        return found

    @property
    def values_text(self) -> str:
        """Every baseline with its value and seconds, for a person, and what is not among them."""
        texts = []
        for each in self.baselines:
            value = f"{each.metrics[self.metric]:.4g}" if self.metric in each.metrics else "not known"
            more = f", {each.note}" if each.note else ""
            texts.append(f"{each.name} {value} ({each.seconds:.2f} s{more})")
        values = [f"{self.metric} on test: {', '.join(texts)}"] if texts else []
        return "; ".join([*values, *self.absent])

    @property
    def verdict(self) -> str:
        """Whether the network is better than the best of the baselines, for a person; empty: there is none."""
        best, found = self.best_baseline, self.difference
        if best is None or found is None:
            return ""
        ours, theirs = _pair(self.network, best.metrics[self.metric])
        name = f"{best.name[0].upper()}{best.name[1:]}"
        if not found.is_clear:
            if found.by == 0:
                return f"{name} is as good as the network: {self.metric} {ours} of both; it took {best.seconds:.2f} s."
            return (
                f"{name} comes to {self.metric} {theirs}, the network to {ours}: no difference that {self._rows} "
                f"could show; the baseline took {best.seconds:.2f} s."
            )
        if found.by > 0:
            return (
                f"The network is better than the best baseline, {best.name}, by {found.by:.2g}: {self.metric} {ours} "
                f"against {theirs} ({self._certainty(found)})."
            )
        return (
            f"{name} is better than the network, by {-found.by:.2g}: {self.metric} {theirs} against {ours} "
            f"({self._certainty(found)}); it took {best.seconds:.2f} s."
        )

    @property
    def default_text(self) -> str:
        """What the search has gained over the default configuration, for a person; empty: nobody asked."""
        default = self.default
        if default is None:
            return ""
        trial = "" if default.number is None else f" (trial {default.number})"
        if default.is_best:
            return f"The search gained nothing over the default configuration: that{trial} was itself the best."
        gain = default.gain_on_validation
        if default.difference is None or default.metrics is None or default.network is None:
            if gain is None:
                return f"It is not known what the search gained over the default configuration: {default.why}."
            what = f"gained {gain:.2g}" if gain > 0 else "gained nothing"
            return (
                f"On validation, where the best of many trials looks too good, the search {what} over the default "
                f"configuration{trial}; on test it was not compared: {default.why}."
            )
        return self._gained(default, default.difference, *_pair(default.network, default.metrics[self.metric]))

    def _gained(self, default: Default, found: Difference, ours: str, theirs: str) -> str:
        of_one = " of one network" if default.network != self.network else ""
        values = f"test {self.metric} {ours}{of_one} against {theirs}"
        if found.is_clear and found.by > 0:
            certainty = self._certainty(found)
            return f"The search gained {found.by:.2g} over the default configuration: {values} ({certainty})."
        gain = default.gain_on_validation
        before = "" if gain is None or gain <= 0 else f" On validation it had gained {gain:.2g}."
        if found.is_clear:
            what = f"The search lost {-found.by:.2g} against the default configuration"
            return f"{what}: {values} ({self._certainty(found)}).{before}"
        showed = f" that {self._rows} could show" if found.by else ""
        return f"The search gained nothing over the default configuration{showed}: {values}.{before}"

    @property
    def _rows(self) -> str:
        some = "" if self.rows == self.of_rows else f" of {self.of_rows:,}"
        return f"{self.rows:,}{some} test row{'' if self.of_rows == 1 else 's'}"

    def _certainty(self, found: Difference) -> str:
        if found.interval is None:
            return f"of {self._rows}; how much of it is chance is not known"
        return f"95% interval of the difference {found.ends_text}, {self._rows}"

    def sentences(self) -> list[str]:
        """Return all that is said of it, for a person."""
        values = f"Baselines: {self.values_text}." if self.values_text else ""
        return [text for text in (values, self.verdict, self.default_text) if text]


def _pair(ours: float, theirs: float) -> tuple[str, str]:
    """Return two numbers with as many digits as tell them apart, but for very many."""
    for digits in range(4, 8):
        texts = f"{ours:.{digits}g}", f"{theirs:.{digits}g}"
        if texts[0] != texts[1] or ours == theirs:
            break
    return texts


def _default_as_dict(default: Default) -> dict[str, Any]:
    return {
        "trial": default.number,
        "is_best": default.is_best,
        "gain_on_validation": default.gain_on_validation,
        "metrics": None if default.metrics is None else dict(default.metrics),
        "epochs": default.epochs,
        "seconds": default.seconds,
        "network": default.network,
        "difference": None if default.difference is None else default.difference.as_dict(),
        "why": default.why,
    }


def beside_in(stored: Any) -> Beside | None:
    """Return what the stored result has of it; None: nothing, or nothing of ours."""
    try:
        return _read(stored)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None


def _read(stored: Mapping[str, Any]) -> Beside:
    baselines = [
        Baseline(
            name=_text(each["name"], "model"),
            metrics=_numbers(each["metrics"]),
            seconds=_number(each["seconds"]),
            note=_text(each["note"]),
        )
        for each in stored["models"]
    ]
    return Beside(
        metric=_text(stored["metric"]),
        maximize=stored["maximize"] is True,
        network=_number(stored["network"]),
        rows=int(stored["rows"]),
        of_rows=int(stored["of_rows"]),
        baselines=baselines,
        absent=[_text(each) for each in stored["absent"]],
        difference=_difference(stored["difference"]),
        default=None if stored["default"] is None else _default(stored["default"], _text(stored["metric"])),
    )


def _default(stored: Mapping[str, Any], metric: str) -> Default:
    metrics = None if stored["metrics"] is None else _numbers(stored["metrics"])
    if metrics is not None:
        metrics[metric]  # it is what everything is said of
    gain, network = stored["gain_on_validation"], stored["network"]
    return Default(
        number=None if stored["trial"] is None else int(stored["trial"]),
        is_best=stored["is_best"] is True,
        gain_on_validation=None if gain is None else _number(gain),
        metrics=metrics,
        epochs=int(stored["epochs"]),
        seconds=_number(stored["seconds"]),
        network=None if network is None else _number(network),
        difference=_difference(stored["difference"]),
        why=_text(stored["why"]),
    )


def _difference(stored: Any) -> Difference | None:
    if stored is None:
        return None
    interval = stored["interval"]
    known = None if interval is None else Interval(low=_number(interval[0]), high=_number(interval[1]))
    return Difference(by=_number(stored["by"]), interval=known)


def _numbers(stored: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _number(value) for name, value in stored.items()}


def _number(stored: Any) -> float:
    if type(stored) not in (int, float) or not math.isfinite(stored):
        raise ValueError("it is no number")
    return float(stored)


def _text(stored: Any, otherwise: str = "") -> str:
    if not isinstance(stored, str):
        raise ValueError("it is no text")
    return " ".join(stored.split())[:500] or otherwise
