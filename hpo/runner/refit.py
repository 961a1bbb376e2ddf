"""After the search: the best params are trained from scratch on train + validation, tested once, and exported."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpo.errors import ExportError, HpoError
from hpo.export.bundle import export
from hpo.export.formats import Formats, formats_of
from hpo.export.model import Model
from hpo.log import log
from hpo.runner.again import saying_path
from hpo.runner.beside import Contest
from hpo.runner.confirm import confirm
from hpo.runner.custom import train_outside
from hpo.runner.default import has_all_epochs, train_default
from hpo.runner.keeping import bundle_of
from hpo.runner.outcome import Outcome, is_of_other_names, networks_of, outcome, remember, tests_of
from hpo.runner.prepare import Plan
from hpo.runner.returned import few_rows, link_in
from hpo.runner.several import exported, over_seeds, seeds_of, train_several
from hpo.runner.tracked import tell_result
from hpo.runner.turns import take_turn
from hpo.runner.worker import EXAMPLE_ROWS, chosen_before
from hpo.search import schema
from hpo.search.beside import Beside
from hpo.search.confirmed import chosen, confirmation, sentences
from hpo.search.search import Search
from hpo.search.view import NO_TRIAL, Best, StudyView
from hpo.stacks.alone import NotStackable
from hpo.stacks.cost import records
from hpo.stacks.vmap_stack import VmapStack
from hpo.study.data import Data
from hpo.study.sealed import sealed, sealing
from hpo.tracking.base import Tracker
from hpo.training.batches import Batches, make_batches
from hpo.training.evaluation import evaluate, measure, outputs_of
from hpo.training.faults import TrialError
from hpo.training.loop import Results, train
from hpo.training.loop_stack import LoopStack
from hpo.training.memory import free_all, is_out_of_memory
from hpo.training.stack import Member, SingleStack, Stack, Task
from hpo.training.torch_settings import torch_settings


def bundle_folder(plan: Plan, number: int | None = None) -> Path:
    """Return where the study's bundle goes, or that of its trial `number`."""
    return bundle_of(plan.spec, None if number is None else f"{plan.spec.name}-trial-{number}")


def conclude(
    plan: Plan,
    data: Data,
    search: Search,
    tracker: Tracker,
    stopping: Callable[[], bool],
    seen: StudyView | None = None,
) -> Outcome | None:
    """Finish the study with its best trial, unless that was done already; None where no trial is complete.

    Of several workers on this machine that come here at once, one does it and the others take its outcome. `seen` is a
    view of the study, if there is a fresh one; before a refit the study is read again. Raises Interrupted.
    """
    folder = bundle_folder(plan)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = take_turn(folder, "refits and exports the best trial of this study", stopping)
    except OSError as error:
        why = f"{folder.parent} cannot be written ({error.strerror})"
        raise HpoError(f"{why}; no trial is lost, run it again") from error
    with held:
        now = seen or search.view()
        best = chosen(search, now)
        done = outcome(search, best)
        if done is None and seen is not None:  # a peer may have finished more trials, and the study, since then
            now = search.view()
            best = chosen(search, now)
            done = outcome(search, best)
        if now.best() is None:
            return None
        if done is None or best is None:
            _say_what_is_lost(plan, search, best, folder)
            size = chosen_before(plan, search)
            with torch_settings(plan.device, threads=size.threads if size else None):
                best = best or confirm(plan, data, search, now, stopping)
                done = finish(plan, data, search, best, folder, stopping, seen=now)
            remember(search, done)
    tell_result(plan, search, tracker, now, best, done)
    return done


def _say_what_is_lost(plan: Plan, search: Search, best: Best | None, folder: Path) -> None:
    stored = search.attrs.get(schema.RESULT)
    if best is None or not isinstance(stored, Mapping) or stored.get("number") != best.number or not folder.is_dir():
        return
    if is_of_other_names(search, stored):  # which has been said
        return
    if stored.get("bundle") == str(folder) and stored.get("networks", [1, 1]) == networks_of(plan.spec):
        log.warning(f"{folder} is no more what this study has exported: damaged, or another's; it is made again")


def finish(
    plan: Plan,
    data: Data,
    search: Search,
    best: Best,
    folder: Path,
    stopping: Callable[[], bool],
    formats: Formats | None = None,
    seen: StudyView | None = None,
) -> Outcome:
    """Train `best`'s params from scratch on train + validation, evaluate on the test set once, export to `folder`.

    With a view of the study, `best` is what it ends with, and is compared with the default configuration. With
    `formats`, in these, and what was exported is loaded in a process of its own, too, which takes some seconds.
    Every reading of the test set is counted in the study's attributes. Raises ExportError, Interrupted.
    """
    again = _Again(plan, search, best, data, plan.spec.epochs if has_all_epochs(plan) else best.epoch + 1, stopping)
    log.info(f"training the params of trial {best.number} from scratch on train + validation, {again.epochs} epochs")
    with sealing(plan.given):
        networks = again.networks()
        if not networks:
            log.info("train returned no network: there is nothing to test or to export")
            return Outcome(number=best.number, test={}, bundle=None, parity=None)
        rows = few_rows(plan, data, again.preprocess)
        network = exported(plan, networks, data, rows, best.params)
        contest = again.contest(network, seen)
    test, seeds, beside = again.tested(network, networks, contest)
    log.info("exporting, and comparing what was exported with the model that was measured")
    written = export(
        Model(
            preprocess=again.preprocess,
            network=network,
            head=plan.objective.head(),
            params=best.params,
            info=data.info,
            about=_about(plan, data, search, best, again.epochs, test, seeds, beside),
            link=link_in(plan, rows, network, best.params),
        ),
        data.test,
        folder,
        formats_of(None) if formats is None else formats,
        fresh=formats is not None,
    )
    parity = max(result["max_difference"] for result in written["parity"].values())
    n_tests = len(tests_of(search))
    return Outcome(
        number=best.number, test=test, bundle=folder, parity=parity, seeds=seeds, n_tests=n_tests, beside=beside
    )


class _Again:
    """The params of `best` trained from scratch on train + validation, and what the test rows then say of them."""

    def __init__(
        self, plan: Plan, search: Search, best: Best, data: Data, epochs: int, stopping: Callable[[], bool]
    ) -> None:
        self._plan, self._search, self._best, self._data = plan, search, best, data
        self.epochs, self._stopping = epochs, stopping
        self._seconds = 0.0
        """How long a network of these epochs was trained."""

    @cached_property
    def _whole(self) -> Data:
        return sealed(self._data).for_refit()

    @cached_property
    def preprocess(self) -> nn.Module:
        """The objective's `preprocess`, fitted on train + validation."""
        return self._plan.objective.preprocess(self._whole.train)

    @cached_property
    def _batches(self) -> Batches:
        return make_batches(self._whole.train, self.preprocess, self._plan.device, self._plan.spec.loading)

    @property
    def _task(self) -> Task:
        return self._plan.task(self._data.info, len(self._whole.train))

    def networks(self) -> list[nn.Module]:
        """Return the networks that were trained, one for each seed of the refit, as far as there are any."""
        plan, best, whole, seeds = self._plan, self._best, self._whole, seeds_of(self._plan, self._best)
        start = time.perf_counter()
        if plan.objective.train is not None:
            trained = (
                _refit_custom(plan, best, seed, whole, self.preprocess, self.epochs, self._stopping) for seed in seeds
            )
            return [network for network in trained if network is not None]
        if len(seeds) > 1:
            several = train_several(plan, self._search, best, whole, self.preprocess, self.epochs, self._stopping)
        else:
            several = [self._alone(best, self.epochs)]
        self._seconds = (time.perf_counter() - start) / len(seeds)
        return several

    def _alone(self, best: Best, epochs: int) -> nn.Module:
        return _refit(self._plan, self._search, self._task, best, self._batches, epochs, self._stopping)

    def contest(self, network: nn.Module, seen: StudyView | None) -> Contest | None:
        """Return what `network` is compared with; None: the study file does not ask for it, or nothing is known of it.

        Without a view of the study that is without the default configuration. Raises Interrupted.
        """
        plan = self._plan
        if not plan.spec.baseline or plan.objective.train is not None:
            return None
        default = None
        if seen is not None:
            took = self._seconds, self.epochs
            data = sealed(self._data)
            default = train_default(plan, self._search, seen, self._best, data, self._alone, took, self._stopping)
        rows = self._whole.train
        return Contest(plan, self._task, self._best.params, network, rows, self.preprocess, default)

    def tested(
        self, network: nn.Module, networks: Sequence[nn.Module], contest: Contest | None
    ) -> tuple[dict[str, float], dict[str, Any], Beside | None]:
        """Return the test metrics of the exported `network`, those over seeds, and what stands beside the result.

        That is one reading of the test rows, and is counted.
        """
        plan, params, task = self._plan, self._best.params, self._task
        metrics = {name: metric.to(plan.device) for name, metric in plan.objective.metrics().items()}
        batches = make_batches(self._data.test, self.preprocess, plan.device, plan.spec.loading)
        with torch.no_grad(), task.guarding():
            outputs = outputs_of(task, network, batches)
            test = measure(plan.objective, outputs, batches.targets, params, metrics)
        of_each = [test if each is network else evaluate(task, each, batches, params, metrics) for each in networks]
        readings = [*tests_of(self._search), {"number": self._best.number, "test": test}]
        self._search.remember(schema.TEST_EVALUATIONS, readings)
        if contest is None:
            return test, over_seeds(of_each), None
        first = outputs if network is networks[0] else outputs_of(task, networks[0], batches)
        return test, over_seeds(of_each), contest.measured(self._data.test, batches, outputs, first)


def _refit(
    plan: Plan, search: Search, task: Task, best: Best, batches: Batches, epochs: int, stopping: Callable[[], bool]
) -> nn.Module:
    """Return a network of `best`'s params and seed, trained on `batches` for so many epochs."""
    again = partial(_trained_alone, plan, search, best, batches, epochs, stopping)
    if records(task.device):  # a stack of one, whose step is replayed: a step by torch.optim takes as long as hundreds
        try:
            return again(VmapStack(task, 1, batches.head(EXAMPLE_ROWS), "graph"))
        except (NotStackable, TrialError):  # an error of its own it has alone, too
            pass
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        free_all(task.device)
    return again(LoopStack(task))


def _trained_alone(
    plan: Plan, search: Search, best: Best, batches: Batches, epochs: int, stopping: Callable[[], bool], stack: Stack
) -> nn.Module:
    """Return a network of `best`'s params and seed, trained in an empty `stack`. Raises ExportError, Interrupted."""
    member = Member(number=best.number, seed=best.seed, params=best.params)
    queue = [member]
    network = None

    def report(stack: Stack, results: Results) -> Results:
        nonlocal network
        loss = results[member]["train_loss"]
        if member.fault is None and not math.isfinite(loss):
            member.fault = f"train_loss became {loss} in epoch {member.epoch}"
        if member.fault is None and member.epoch == epochs:
            network = stack.module(member)
        return results  # one with a fault leaves anyway

    train(
        SingleStack(stack),
        batches,
        None,
        epochs=epochs,
        seed=plan.spec.seed,
        ask=lambda n: [queue.pop()] if queue and n else [],
        report=saying_path(search, report),
        stopping=stopping,
    )
    if member.fault is not None or network is None:
        what = "the default configuration" if best.number == NO_TRIAL else f"trial {best.number}"
        raise ExportError(f"{what}, trained from scratch on train + validation, failed: {member.fault}")
    return network


def _refit_custom(
    plan: Plan, best: Best, seed: int, data: Data, preprocess: nn.Module, epochs: int, stopping: Callable[[], bool]
) -> nn.Module | None:
    """Return the network that the objective's own `train` makes of `best`'s params in so many epochs, if any."""
    network, _ = train_outside(
        plan,
        best.params,
        seed,
        data,
        preprocess,
        epochs=epochs,
        enough=lambda reports: len(reports) >= epochs,
        stopping=stopping,
    )
    return network if network is None else network.to(plan.device)


def _about(
    plan: Plan,
    data: Data,
    search: Search,
    best: Best,
    epochs: int,
    test: Mapping[str, float],
    seeds: Mapping[str, Any],
    beside: Beside | None,
) -> dict[str, Any]:
    return {
        "study": plan.spec.name,
        "objective": plan.spec.objective,
        "options": plan.options,
        "trial": best.number,
        "metric": plan.metric,
        "value": best.value,
        **({"other_metrics": dict(best.others)} if best.others else {}),
        "epochs": epochs,
        "seed": best.seed,
        "trained_on": ["train", "valid"],
        "metrics": {"of_the_trial": dict(best.metrics), "test": dict(test)}
        | ({"test_mean_of_seeds": seeds["mean"], "test_std_of_seeds": seeds["std"]} if seeds else {}),
        "networks": plan.spec.ensemble,
        **_confirmed(plan, search, best),
        **({} if beside is None else {"baselines": beside.as_dict()}),
        "n_test_evaluations": len(tests_of(search)),
        "data_fingerprint": data.fingerprint(),
        "source_fingerprint": plan.source,
        "about_the_data": dict(plan.objective.about()),
    }


def _confirmed(plan: Plan, search: Search, best: Best) -> dict[str, Any]:
    """Return what was confirmed of the trial that is exported; nothing where it is another one, or none was."""
    found = None if plan.spec.confirm is None else confirmation(search, search.view())
    if found is None or found.winner.number != best.number:
        return {}
    return {"confirmed": found.as_dict() | {"said": sentences(found, plan.metric)}}
