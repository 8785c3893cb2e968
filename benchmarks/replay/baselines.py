"""What people would otherwise use: samplers at full length, halving, Optuna's and syne-tune's."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import optuna
from scipy.stats import qmc

from .task import Ledger

RUNGS = (2, 6, 18, 50)
"""4%, 12%, 36% and all of a run, in evaluation intervals: the rungs of every method that has rungs."""
BRACKET = (27, 9, 3, 1)
"""Trials of a bracket of synchronous successive halving on each rung."""
TWO_ROUNDS = (27, 3)
"""Two rounds from scratch: trials to the second rung, and how many are run again at full length."""

WORST = 1e3
"""Loss that is told of a run that diverged, where a scheduler wants a number."""


def rungs(ledger: Ledger) -> tuple[int, ...]:
    """The rungs of a table with another number of evaluations."""
    full = ledger.task.full
    return tuple(sorted({max(1, round(rung * full / RUNGS[-1])) for rung in RUNGS}))


# --- at full length -------------------------------------------------------------------------------


def random_full_length(ledger: Ledger) -> None:
    """Uniform random points of the space, each to the end."""
    generator = np.random.default_rng(ledger.seed)
    while True:
        ledger.run(ledger.snap_unit(generator.random(len(ledger.task.space))), 0, ledger.task.full)


def quasi_random_full_length(ledger: Ledger) -> None:
    """A scrambled Sobol sequence, each point to the end."""
    for unit in _sobol(ledger):
        ledger.run(ledger.snap_unit(unit), 0, ledger.task.full)


def tpe_full_length(ledger: Ledger) -> None:
    """Optuna's default sampler, each point to the end."""
    study = _OptunaStudy(ledger)
    while True:
        row, trial = study.ask()
        loss = ledger.run(row, 0, ledger.task.full)
        study.tell(trial, loss)


# --- halving --------------------------------------------------------------------------------------


def successive_halving(ledger: Ledger) -> None:
    """Brackets of random points; those promoted go on where they stopped."""
    generator = np.random.default_rng(ledger.seed)
    levels = (0, *rungs(ledger))
    while True:
        rows = [ledger.snap_unit(generator.random(len(ledger.task.space))) for _ in range(BRACKET[0])]
        for count, start, end in zip(BRACKET, levels, levels[1:], strict=False):
            losses = {row: ledger.run(row, start, end) for row in rows[:count]}
            rows = sorted((row for row in losses if losses[row] < math.inf), key=losses.__getitem__)


def two_rounds_from_scratch(ledger: Ledger) -> None:
    """Short runs of random points; the best of them again from step 0, at full length."""
    generator = np.random.default_rng(ledger.seed)
    (count, top), short = TWO_ROUNDS, rungs(ledger)[1]
    while True:
        rows = [ledger.snap_unit(generator.random(len(ledger.task.space))) for _ in range(count)]
        losses = {row: ledger.run(row, 0, short) for row in rows}
        for row in sorted(rows, key=losses.__getitem__)[:top]:
            if losses[row] < math.inf:
                ledger.run(row, 0, ledger.task.full)


def optuna_halving(ledger: Ledger) -> None:
    """TPE with Optuna's SuccessiveHalvingPruner."""
    first = rungs(ledger)[0]
    _with_pruner(ledger, optuna.pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=3))


def optuna_hyperband(ledger: Ledger) -> None:
    """TPE with Optuna's HyperbandPruner."""
    levels = rungs(ledger)
    _with_pruner(
        ledger,
        optuna.pruners.HyperbandPruner(min_resource=levels[0], max_resource=levels[-1], reduction_factor=3),
    )


def syne_tune_asha(ledger: Ledger) -> None:
    """syne-tune's ASHA: random points, stopped at rungs."""
    _syne_tune(ledger, "ASHA")


def syne_tune_bohb(ledger: Ledger) -> None:
    """syne-tune's BOHB: the same rungs, points from a kernel density model of the logarithms."""
    _syne_tune(ledger, "BOHB")


def _with_pruner(ledger: Ledger, pruner: optuna.pruners.BasePruner) -> None:
    study = _OptunaStudy(ledger, pruner)
    while True:
        row, trial = study.ask()
        start, loss, is_pruned = 0, math.inf, False
        for rung in rungs(ledger):
            loss = ledger.run(row, start, rung)
            if loss == math.inf:
                break
            trial.report(loss, rung)
            start = rung
            # At the last rung nothing is left to save.
            if rung < ledger.task.full and trial.should_prune():
                is_pruned = True
                break
        study.tell(trial, loss, is_pruned=is_pruned)


def _syne_tune(ledger: Ledger, name: str) -> None:
    from syne_tune.backend.trial_status import Trial
    from syne_tune.config_space import uniform
    from syne_tune.optimizer import baselines
    from syne_tune.optimizer.scheduler import SchedulerDecision

    logging.getLogger("syne_tune").setLevel(logging.ERROR)
    # Its searchers draw from the global generators too, whatever `random_seed` says.
    random.seed(ledger.seed)
    np.random.seed(ledger.seed)
    levels = rungs(ledger)
    # BOHB's densities know no logarithmic scale: given loguniform, they take 1e-8 and 1e-4 for neighbours.
    space = {key: uniform(math.log(d.low), math.log(d.high)) for key, d in ledger.task.space.items()}
    scheduler = getattr(baselines, name)(
        space,
        metric="loss",
        time_attr="intervals",
        max_t=levels[-1],
        grace_period=levels[0],
        reduction_factor=3,
        random_seed=ledger.seed,
    )
    number = 0
    while True:
        with _quiet():
            suggestion = scheduler.suggest()
        row = ledger.snap({key: math.exp(suggestion.config[key]) for key in space})
        point = {
            key: min(max(math.log(value), space[key].lower), space[key].upper)
            for key, value in ledger.task.point(row).items()
        }
        trial = Trial(number, point, None)
        number += 1
        scheduler.on_trial_add(trial)
        start, result = 0, {"loss": WORST, "intervals": levels[0]}
        for rung in levels:
            loss = ledger.run(row, start, rung)
            start = rung
            result = {"loss": min(loss, WORST), "intervals": rung}
            if rung == levels[-1]:
                break
            with _quiet():
                decision = scheduler.on_trial_result(trial, result)
            if decision != SchedulerDecision.CONTINUE or loss == math.inf:
                break
        with _quiet():
            if result["intervals"] == levels[-1]:
                scheduler.on_trial_complete(trial, result)
            else:
                scheduler.on_trial_remove(trial)


class _OptunaStudy:
    """Asks Optuna's default sampler, snaps, and lets it know what was really run."""

    def __init__(self, ledger: Ledger, pruner: optuna.pruners.BasePruner | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._ledger = ledger
        self._distributions = {
            name: optuna.distributions.FloatDistribution(d.low, d.high, log=True)
            for name, d in ledger.task.space.items()
        }
        self._sampler = optuna.samplers.TPESampler(seed=ledger.seed)
        self._study = optuna.create_study(
            study_name=f"seed {ledger.seed}",  # Hyperband deals out its brackets by a hash of it
            sampler=self._sampler,
            pruner=pruner or optuna.pruners.NopPruner(),
        )

    def ask(self) -> tuple[int, optuna.Trial]:
        """A configuration, and the trial that has its values."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proposed = self._study.ask(self._distributions)
            self._study.tell(proposed, state=optuna.trial.TrialState.FAIL)
            row = self._ledger.snap(proposed.params)
            self._study.enqueue_trial(self._ledger.task.point(row))
            self._study.sampler = _NOTHING
            trial = self._study.ask(self._distributions)
            self._study.sampler = self._sampler
        return row, trial

    def tell(self, trial: optuna.Trial, loss: float, *, is_pruned: bool = False) -> None:
        """A diverged run is a violated constraint; a pruned one has its last report."""
        if loss == math.inf or is_pruned:
            self._study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self._study.tell(trial, loss)


_NOTHING = optuna.samplers.RandomSampler(seed=0)


def _sobol(ledger: Ledger) -> Iterator[np.ndarray]:
    sequence = qmc.Sobol(len(ledger.task.space), scramble=True, rng=ledger.seed)
    while True:
        yield from sequence.random(64)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


Method = Callable[[Ledger], None]
