"""tuner's own loop on a task's table: its advisor, its reading of a round, its promotion, its trunks."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import optuna

from tuner.playbook import NextRound, RoundResults, plan_next_round, read_round
from tuner.playbook.advice import Outcome, outcomes
from tuner.playbook.passes import Longer, following
from tuner.playbook.schedule import trunk_steps
from tuner.records import (
    Checkpoint,
    Evaluated,
    Event,
    Fixed,
    Hyperparameters,
    Promotion,
    RoundRecord,
    Space,
    Trial,
    Value,
)
from tuner.spec import CheckpointsSpec, EvaluationSpec, RunSpec, SearchSpec
from tuner.store import MemoryStore
from tuner.store.facts import Fact, RoundBegun, TrialAsked
from tuner.study.checkpoints import CheckpointFolder, StartingPoint
from tuner.study.continuation import Continuations
from tuner.study.loop import RoundLoop
from tuner.study.sampling import Advisor, Proposal
from tuner.workers import RecordedCurves, SimulatedWorker
from tuner.workers.simulated import keep_trunk_names

from .baselines import RUNGS, rungs
from .task import Ledger, Task

TRIALS = 27
"""Trials of a round at the first horizon: as many as a bracket of the halving methods begins with."""
MULTIPLE = 3
"""A round is so many times as long as the one before, up to full length."""


def tuner_passes(ledger: Ledger) -> None:
    """What `study auto --passes` does: a round at the first horizon; longer ones that carry over the best
    third of what shorter ones left behind; then the first horizon again, sampled by `tpe` from all
    rounds so far. Horizons are three times the last, up to full length."""
    _Study(ledger).run()


def tuner_promotions(ledger: Ledger) -> None:
    """What `study promote` plans by default: three trials are carried over and new ones added. After
    full length, from the first horizon again, in a study that knows nothing of the one before."""
    _Study(ledger, by_promotions=True).run()


@dataclass(frozen=True)
class TablePlan:
    """What a `RoundPlan` is to the loop, for a table's hyperparameters, which no round file can name."""

    name: str
    spec: TableRound
    space: Space
    has_branches: bool = False

    @property
    def absolute(self) -> TableRound:
        return self.spec

    @property
    def checkpoints(self) -> Path:
        return Path(self.name)

    def trunk_steps(self, hyperparameters: Hyperparameters) -> tuple[int, ...]:
        return trunk_steps(hyperparameters, self.spec.max_train_steps, branches=False)


@dataclass(frozen=True)
class TableRound:
    """What a `RoundSpec` is to the loop."""

    max_train_steps: int
    search: SearchSpec
    evaluation: EvaluationSpec
    checkpoints: CheckpointsSpec
    run: RunSpec


class _Study:
    """Rounds on the table, one after another, until the ledger says that it is over."""

    def __init__(self, ledger: Ledger, *, by_promotions: bool = False) -> None:
        self._ledger = ledger
        self._by_promotions = by_promotions
        self._task = ledger.task
        self._store = _TableStore()
        self._curves = recorded_curves(ledger.task)
        self._rounds: list[RoundResults] = []
        self._outcomes: list[Outcome] = []
        self._num_rounds = 0

    def run(self) -> None:
        space: Space = {**self._task.space, "schedule": Fixed("constant"), "warmup_steps": Fixed(0)}
        first = self._task.steps[rungs(self._ledger)[0]]
        for number in itertools.count():
            sampler = "tpe" if number and not self._by_promotions else "quasi-random"
            search = _search(TRIALS, sampler, self._ledger.seed * 1000 + number)
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
            search = _search(planned.trials_total, planned.sampler, self._ledger.seed, enqueue=entries)

    def _longer(self, last: RoundResults) -> NextRound | None:
        full = self._task.steps[-1]
        longer = min(MULTIPLE * last.max_train_steps, full) if last.max_train_steps < full else None
        step = following(self._rounds, longer=longer, passes=1_000_000)
        if not isinstance(step, Longer):
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
        spec = TableRound(
            horizon, search, EvaluationSpec(every_steps=every), CheckpointsSpec(directory="."), RunSpec()
        )
        plan: Any = TablePlan(name, spec, space)
        begun_at = float(self._num_rounds)
        self._store.record(RoundBegun(RoundRecord(name, horizon, {}, begun_at, workload="table")))
        RoundLoop(
            plan=plan,
            store=self._store,
            advisor=_SnappingAdvisor(
                self._ledger, name, space, search, max_train_steps=horizon, earlier=self._outcomes
            ),
            worker=_ChargedWorker(self._ledger, self._curves, seconds_per_step=1 / every),
            folder=_NamesOnly(Path(name)),
            continuations=_Continuations(plan, self._store, "table"),
            view=_Nobody(),
            clock=lambda: float(self._ledger.spent),
        ).run()
        results = RoundResults(
            name=name,
            max_train_steps=horizon,
            evaluate_every=every,
            space=space,
            trials=self._store.trials(name),
            production_steps=self._task.steps[-1],
            workload="table",
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


def _search(trials: int, sampler: str, seed: int, enqueue: Sequence[dict[str, Any]] = ()) -> SearchSpec:
    # Unchecked: a round file's check knows only LoRA's names.
    return SearchSpec.model_construct(trials=trials, sampler=sampler, seed=seed, enqueue=list(enqueue))


class _SnappingAdvisor(Advisor):
    """An Advisor whose new proposals are snapped to the table; it learns what was really run."""

    def __init__(self, ledger: Ledger, name: str, space: Space, search: SearchSpec, **more: Any) -> None:
        super().__init__(optuna.storages.InMemoryStorage(), name, space, search, **more)
        self._ledger = ledger

    def _point(self, ordinal: int, trials: Sequence[Trial]) -> dict[str, Value]:
        point = super()._point(ordinal, trials)
        if ordinal < len(self._search.enqueue):
            return point
        table = self._ledger.task
        row = self._ledger.snap({name: float(point[name]) for name in table.space})
        return dict(table.point(row))

    def propose(
        self, ordinal: int, trials: Sequence[Trial] = (), *, again: Hyperparameters | None = None
    ) -> Proposal:
        with warnings.catch_warnings():
            # In a narrowed space, the nearest that is left may lie outside.
            warnings.filterwarnings("ignore", message="Fixed parameter")
            return super().propose(ordinal, trials, again=again)


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


class _TableStore:
    """A Store of one MemoryStore a round: the loop reads a round's trials at every event."""

    def __init__(self) -> None:
        self._rounds: dict[str, MemoryStore] = {}
        self._trials: dict[str, tuple[Trial, ...]] = {}

    def record(self, *facts: Fact) -> None:
        for fact in facts:
            name = _round_of(fact)
            self._rounds.setdefault(name, MemoryStore()).record(fact)
            self._trials.pop(name, None)

    def rounds(self) -> tuple[RoundRecord, ...]:
        return tuple(record for store in self._rounds.values() for record in store.rounds())

    def trials(self, name: str) -> tuple[Trial, ...]:
        if name not in self._trials:
            self._trials[name] = self._rounds[name].trials(name) if name in self._rounds else ()
        return self._trials[name]

    def promotions(self) -> tuple[Promotion, ...]:
        return ()

    def close(self) -> None: ...


def _round_of(fact: Any) -> str:
    if isinstance(fact, RoundBegun):
        return fact.round.name
    return str(fact.trial.round if isinstance(fact, TrialAsked) else fact.round)


class _NamesOnly(CheckpointFolder):
    """Checkpoints that are names without files."""

    def point(self, checkpoint: Checkpoint) -> StartingPoint:
        return StartingPoint(self.root / checkpoint.path, checkpoint.sha256, checkpoint.step)


class _Continuations(Continuations):
    def _folder(self, round_name: str) -> CheckpointFolder:
        return _NamesOnly(Path(round_name))


class _Nobody:
    """A view that nobody looks at."""

    def trials(self, trials: object) -> None: ...

    def event(self, event: object) -> None: ...

    def message(self, text: str) -> None: ...
