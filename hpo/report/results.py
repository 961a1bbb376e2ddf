"""A study as a notebook sees it: its trials as a table, its best, its curves, its counts, its bundle."""

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial

from hpo.errors import InputError, StorageError, did_you_mean, masked
from hpo.export.files import finite
from hpo.report.facts import Facts, leases_of, read
from hpo.report.place import default_path, write
from hpo.report.rows import as_best, best_of, columns_of, fixed_in, row_of
from hpo.search import schema
from hpo.search.address import exists
from hpo.search.beside import Beside, beside_in
from hpo.search.budget import Counts, count, holders, wrong_row, wrong_values
from hpo.search.confirmed import confirmed_in
from hpo.search.curves import curves_in, steps_in
from hpo.search.front import front_of, maximizes, others_in
from hpo.search.opening import stored_space
from hpo.search.retrained import Confirmed
from hpo.search.samplers import at_most
from hpo.search.stop import budget, stopped_in
from hpo.search.storage import close_storage, open_storage
from hpo.search.view import Best, own


class Study:
    """A study in its storage. Each property reads the storage; nothing is written, and no objective is imported.

    Made by `hpo.run` and `hpo.open_study`.

    >>> study = hpo.run({"objective": "iris", "trials": 2, "epochs": 2, "tracking": "off"}, quiet=True)
    >>> study
    Study('iris': 2 of 2 trials finished, best accuracy ... (trial ...))
    >>> list(study.trials["state"])
    ['COMPLETE', 'COMPLETE']
    >>> study.counts.complete
    2
    """

    def __init__(self, name: str, storage: str) -> None:
        """Open study `name`. Raises InputError where the storage has none, StorageError where it does not open."""
        self.name = name
        self._storage = storage
        if not exists(storage):
            raise InputError(f"there is no storage {masked(storage)}; give the one that study {name!r} was run with")
        with self._opened() as study:
            identity = study.user_attrs.get(schema.IDENTITY)
            if not isinstance(identity, Mapping):
                raise InputError(f"study {name!r} in {masked(storage)} was not made by hpo; see `hpo adopt`")
            self.metric = str(identity.get("metric", "value"))
            self.maximize, self.others = maximizes(study), others_in(identity)
            self._fixed = fixed_in(identity)

    @property
    def trials(self) -> pd.DataFrame:
        """One row for each trial of the budget, indexed by its number.

        Columns: `state` (Optuna's: COMPLETE, PRUNED, FAIL, RUNNING, WAITING; or PAUSED), `value`, the params that were
        searched as `params_<name>`, `epochs` (how many were reported), `best_epoch` (counted from 1), `seconds` (of
        training), `worker`, `retry_of` (the trial that it resumes), `error`. A trial that was interrupted and retried
        stands there once.

        Of a study of several metrics `value` is of the one that leads, and `values_<name>` of each other one.

        Of a study with constraints also `feasible` (None: not known), `violation` (by how much, as parts of the bounds,
        added up), and the values as `constrained_<name>` (a latency in milliseconds).
        """
        rows = [row_of(trial, self.others) for trial in self._trials()]
        return pd.DataFrame(rows, columns=columns_of(rows)).set_index("number")

    @property
    def best(self) -> Best | None:
        """The best complete trial that breaks no constraint; None: there is none.

        It has `number`, `value`, `params` (all of them), `epoch` (from 0) and `metrics`. Of several metrics it is the
        best one in the one that leads (`metric`); `others` has its values of the other ones.
        """
        return best_of(self._trials(), self._fixed, maximize=self.maximize, others=self.others)

    @property
    def front(self) -> list[Best]:
        """The Pareto front of a study of several metrics, the trials first that lead; empty: it has one metric."""
        trials = front_of(self._trials(), [self.maximize, *self.others.values()])
        return [as_best(trial, self._fixed, self.others) for trial in trials]

    def curves(self, trial: int) -> pd.DataFrame:
        """Return what trial number `trial` reported: a row for each epoch, counted from 1, a column for each metric.

        Of a plain function that counts steps of its own there is a row for each of those steps.
        Raises InputError where the study has no such trial.
        """
        with self._opened() as study:
            trials = {each.number: each for each in own(study.get_trials(deepcopy=False))}
        if trial not in trials:
            last = f"its trials are 0 to {max(trials)}" if trials else "it has none yet"
            raise InputError(f"study {self.name!r} has no trial {trial!r}; {last}")
        curves = curves_in(trials[trial], f"valid_{self.metric}")
        frame = pd.DataFrame({name: pd.Series(values, dtype=float) for name, values in curves.items()})
        steps = steps_in(trials[trial])
        epochs = pd.RangeIndex(1, len(frame) + 1, name="epoch")
        frame.index = epochs if steps is None else pd.Index(steps, name="step")
        return frame

    @property
    def counts(self) -> Counts:
        """How many trials of the budget are complete, pruned, failed, running, waiting; `finished`, `unfinished`."""
        with self._opened() as study:
            counted = holders(own(study.get_trials(deepcopy=False)))
            return count(counted, budget(_budget(study), counted, stopped_in(study.user_attrs.get(schema.STOPPED))))

    @property
    def stopped(self) -> str | None:
        """Why the search was ended by `stop` before its budget was spent, in words; None: it was not."""
        with self._opened() as study:
            stopped = stopped_in(study.user_attrs.get(schema.STOPPED))
        return None if stopped is None else stopped.text()

    @property
    def confirmed(self) -> Confirmed | None:
        """What fresh seeds have shown of the best configurations (`confirm:` in the study file); None: nothing yet.

        Its `winner` has `number`, `mean`, `deviation` and `values`; `interval`, `chances`, `optimism`; `as_dict()`.
        """
        with self._opened() as study:
            return confirmed_in(study.user_attrs.get(schema.CONFIRMED), maximize=self.maximize)

    @property
    def baselines(self) -> Beside | None:
        """What the test result stands beside: cheap models and the default configuration; None: nothing yet.

        It has `network` (the value), `baselines` (`name`, `metrics`, `seconds`), `difference` from the best of them,
        `default`, `sentences()` for a person, and `as_dict()`. A key of the study file, `baseline: false`, leaves it
        out.
        """
        return beside_in(self._result().get("baselines"))

    @property
    def bundle(self) -> Path | None:
        """The folder of the exported model, as the run wrote it (from the folder it ran in); None: there is none."""
        stored = self._result().get("bundle")
        return Path(stored) if isinstance(stored, str) and Path(stored).is_dir() else None

    @property
    def test(self) -> dict[str, float]:
        """The metrics on the test split of the model that was refitted and exported; empty until that is done."""
        stored = self._result().get("test")
        return dict(stored) if isinstance(stored, Mapping) else {}

    def report(self, path: str | Path | None = None) -> Path:
        """Write the page that `hpo report` writes, without what needs the objective's data, and return its path.

        Default: `reports/<name>/report.html` in the study's `output`. Raises InputError where it cannot be written.

        >>> study = hpo.run({"objective": "iris"}, trials=2, epochs=2, tracking="off", quiet=True)
        >>> print(study.report("iris.html"))
        iris.html
        """
        from hpo.report.page import page

        facts = self._facts()
        where = default_path(facts.origin.output, self.name) if path is None else Path(path)
        write(where, page(facts))
        return where

    def plot_curves(self, metric: str | None = None) -> Any:
        """Return a plotly Figure of all trials' learning curves: the best bold; `metric` as in `curves`.

        Default: the study's own. Raises InputError where no trial has reported such a metric.

        >>> study = hpo.run({"objective": "iris"}, trials=2, epochs=2, tracking="off", quiet=True)
        >>> study.plot_curves("train_accuracy").layout.yaxis.title.text
        'train_accuracy'
        """
        from plotly.graph_objects import Figure

        from hpo.report.figures import curves

        facts = self._facts()
        name = facts.main_curve if metric is None else metric
        if name not in facts.curves:
            raise InputError(f"no trial of study {self.name!r} has reported {name}{did_you_mean(name, facts.curves)}")
        return Figure(finite(curves(facts, name).figure))

    def to_optuna(self) -> optuna.Study:
        """Return the study as Optuna has it, for its plots and its dashboard. Its storage is closed with it."""
        storage = open_storage(self._storage)
        study = optuna.load_study(study_name=self.name, storage=storage)
        weakref.finalize(study, close_storage, storage)
        return study

    def __repr__(self) -> str:
        counts, best = self.counts, self.best
        done = f"{counts.finished} of {counts.finished + counts.unfinished} trials finished"
        if best is None:
            return f"Study({self.name!r}: {done}, no {'feasible' if counts.complete else 'complete'} one yet)"
        return f"Study({self.name!r}: {done}, best {self.metric} {best.value:.4g} (trial {best.number}))"

    @contextmanager
    def _opened(self) -> Iterator[optuna.Study]:
        storage = open_storage(self._storage)
        try:
            names = [study.study_name for study in storage.get_all_studies()]
            if self.name not in names:
                where = masked(self._storage)
                raise InputError(f"the storage {where} has no study {self.name!r}{did_you_mean(self.name, names)}")
            yield optuna.load_study(study_name=self.name, storage=storage)
        finally:
            close_storage(storage)

    def _facts(self) -> Facts:
        with self._opened() as study:
            storage = study._storage
            return read(study, self._sound(study), leases_of(storage, self.name), budget=_budget(study))

    def _trials(self) -> list[FrozenTrial]:
        with self._opened() as study:
            return holders(self._sound(study))

    def _sound(self, study: optuna.Study) -> list[FrozenTrial]:
        trials = own(study.get_trials(deepcopy=False))
        for trial in trials:
            if (wrong := wrong_row(trial) or wrong_values(trial, len(study.directions))) is not None:
                raise StorageError(f"trial {trial.number} of study {self.name!r}: {wrong}; hpo did not write that")
        return trials

    def _result(self) -> Mapping[str, Any]:
        with self._opened() as study:
            stored = study.user_attrs.get(schema.RESULT)
        return stored if isinstance(stored, Mapping) else {}


def _budget(study: optuna.Study) -> int:
    """Return how many trials the study is to have, as its last run said; else how many there are.

    Where each configuration is tried once, no more than there are.
    """
    try:
        kept = json.loads(study.user_attrs[schema.STUDY_FILE])
        sampler = kept.get("sampler")
        name = sampler.get("name") if isinstance(sampler, Mapping) else sampler
        return at_most(int(kept["trials"]), name, stored_space(study.user_attrs[schema.IDENTITY]))
    except (KeyError, TypeError, ValueError):
        return len(holders(own(study.get_trials(deepcopy=False))))
