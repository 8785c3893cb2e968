"""tuner's own loop on a task's table: its samplers, its reading of a round, its promotion, its trunks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import optuna

from tuner.config import SearchSpec
from tuner.engines import RecordedCurves, SimulatedWorker
from tuner.engines.simulated import keep_trunk_names
from tuner.playbook import NextRound, RoundResults, plan_next_round, read_round
from tuner.playbook.observations import Outcome, outcomes
from tuner.playbook.restarts import LongerRound, following
from tuner.records import Evaluated, Event, Fixed, Space, Trial, Value
from tuner.study.proposals import RoundSampler
from tuner.study.sampling import RoundStudy

from .baselines import RUNGS, rungs
from .loop import WORKLOAD, RoundStores, begin_round, loop_plan, run_loop, unchecked_search
from .task import Ledger, Task

TRIALS = 27
"""Trials of a round at the first horizon: as many as a bracket of the halving methods begins with."""
MULTIPLE = 3
"""A round is so many times as long as the one before, up to full length."""


def tuner_passes(ledger: Ledger) -> None:
    """What `study auto --restarts` does: a round at the first horizon; longer ones that carry over the best
    third of what shorter ones left behind; then the first horizon again, sampled by `tpe` from all
    rounds so far. Horizons are three times the last, up to full length."""
    _Study(ledger).run()


def tuner_promotions(ledger: Ledger) -> None:
    """What `study promote` plans by default: three trials are carried over and new ones added. After
    full length, from the first horizon again, in a study that knows nothing of the one before."""
    _Study(ledger, by_promotions=True).run()


class _Study:
    """Rounds on the table, one after another, until the ledger says that it is over."""

    def __init__(self, ledger: Ledger, *, by_promotions: bool = False) -> None:
        self._ledger = ledger
        self._by_promotions = by_promotions
        self._task = ledger.task
        self._store = RoundStores()
        self._curves = recorded_curves(ledger.task)
        self._rounds: list[RoundResults] = []
        self._outcomes: list[Outcome] = []
        self._num_rounds = 0

    def run(self) -> None:
        space: Space = {**self._task.space, "schedule": Fixed("constant"), "warmup_steps": Fixed(0)}
        first = self._task.steps[rungs(self._ledger)[0]]
        for number in itertools.count():
            sampler = "tpe" if number and not self._by_promotions else "quasi-random"
            search = unchecked_search(TRIALS, sampler, self._ledger.seed * 1000 + number)
            if self._by_promotions:
                self._rounds, self._outcomes = [], []
            self._climb(space, search, first)

    def _climb(self, space: Space, search: SearchSpec, horizon: int) -> None:
        """A round, and longer ones that come of it until full length or until nothing is left to go on."""
        while True:
            last = self._run_round(space, search, horizon)
            planned = self._longer(last)
            if planned is None:
                return
            entries = [
                {**trial.hyperparameters, "continues": f"{trial.round}/{trial.trial}"}
                for trial in planned.enqueue
            ]
            space, horizon = planned.space, planned.max_train_steps
            search = unchecked_search(
                planned.trials_total, planned.sampler, self._ledger.seed, enqueue=entries
            )

    def _longer(self, last: RoundResults) -> NextRound | None:
        full = self._task.steps[-1]
        longer = min(MULTIPLE * last.max_train_steps, full) if last.max_train_steps < full else None
        step = following(self._rounds, longer=longer, passes=1_000_000)
        if not isinstance(step, LongerRound):
            return None
        reading = read_round(last, self._rounds[-len(RUNGS) : -1])
        plan = partial(plan_next_round, last, reading, to="next", max_train_steps=step.max_train_steps)
        if self._by_promotions:
            return plan()
        return plan(top=step.top, candidates=step.candidates, adds_trials=False)

    def _run_round(self, space: Space, search: SearchSpec, horizon: int) -> RoundResults:
        self._num_rounds += 1
        name = f"round{self._num_rounds}"
        every = self._task.steps[1]
        plan = loop_plan(name, space, search, horizon=horizon, every=every)
        begin_round(self._store, plan, begun_at=float(self._num_rounds))
        run_loop(
            plan,
            self._store,
            _SnappingRoundStudy(
                self._ledger, name, space, search, max_train_steps=horizon, earlier=self._outcomes
            ),
            _ChargedWorker(self._ledger, self._curves, seconds_per_step=1 / every),
            spent=lambda: float(self._ledger.spent),
        )
        results = RoundResults(
            name=name,
            max_train_steps=horizon,
            evaluate_every=every,
            space=space,
            trials=self._store.trials(name),
            production_steps=self._task.steps[-1],
            workload=WORKLOAD,
        )
        self._rounds.append(results)
        self._outcomes += outcomes(results.trials, max_train_steps=horizon)
        return results


def recorded_curves(task: Task) -> RecordedCurves:
    """The table as the simulated worker replays it."""
    keys = [tuple(values) for values in task.values.tolist()]
    return RecordedCurves(
        names=tuple(task.space),
        steps=task.steps,
        eval_losses=dict(zip(keys, task.curves.tolist(), strict=True)),
        train_losses=dict(zip(keys, task.train_curves.tolist(), strict=True)),
    )


class _SnappingRoundStudy(RoundStudy):
    """A RoundStudy whose new proposals are snapped to the table; it learns what was really run."""

    def __init__(self, ledger: Ledger, name: str, space: Space, search: SearchSpec, **more: Any) -> None:
        super().__init__(optuna.storages.InMemoryStorage(), name, space, search, **more)
        self.sampler = self.study.sampler = _SnappingSampler(ledger, space, search, **more)


class _SnappingSampler(RoundSampler):
    """In a narrowed space, the nearest row that is left may lie outside."""

    def __init__(self, ledger: Ledger, space: Space, search: SearchSpec, **more: Any) -> None:
        super().__init__(space, search, **more)
        self._ledger = ledger

    def point(self, ordinal: int, trials: Sequence[Trial] = (), **more: Any) -> dict[str, Value]:
        point = super().point(ordinal, trials, **more)
        if ordinal < len(self._search.enqueue):
            return point
        table = self._ledger.task
        row = self._ledger.snap({name: float(point[name]) for name in table.space})
        return dict(table.point(row))


class _ChargedWorker(SimulatedWorker):
    """A simulated worker with one slot, whose work and evaluations go into the ledger."""

    def __init__(self, ledger: Ledger, curves: RecordedCurves, *, seconds_per_step: float) -> None:
        super().__init__(curves, slots=1, seconds_per_step=seconds_per_step, keep=keep_trunk_names)
        self._ledger = ledger

    def events(self, timeout_seconds: float) -> list[Event]:
        before = self.seconds
        said = super().events(timeout_seconds)
        self._ledger.charge(round(self.seconds - before))
        for event in said:
            if isinstance(event, Evaluated):
                self._ledger.see(event.evaluation.eval_loss)
        return said
