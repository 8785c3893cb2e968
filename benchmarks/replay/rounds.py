"""tuner's own loop on a task's table: its advisor, its reading of a round, its promotion, its trunks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna

from tuner.errors import TunerError
from tuner.playbook import NextRound, RoundResults, plan_next_round, read_round
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
)
from tuner.spec import CheckpointsSpec, EvaluationSpec, SearchSpec
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


@dataclass(frozen=True)
class Policy:
    """What a user does beside running rounds and promoting them."""

    share: float | None = None
    """Of a round's trials, how many `--top` carries over; None leaves it at its default."""
    new_trials: bool = True
    """Whether a longer round runs what promote adds to the trials carried over."""
    prior: bool = False
    """Whether a round begun anew learns from all earlier rounds of its horizon, and samples by TPE."""
    pool: bool = False
    """Whether promotion chooses among all earlier trials of the horizon that were not carried over."""


def tuner_rounds(ledger: Ledger) -> None:
    """What tuner does: rounds as promote plans them; after full length, from the first horizon again."""
    _Study(ledger, Policy()).run()


def tuner_wide_rounds(ledger: Ledger) -> None:
    """A proposal: a third of a round is carried over (`--top`), and longer rounds add no trials."""
    _Study(ledger, Policy(share=1 / 3, new_trials=False)).run()


def tuner_learning_rounds(ledger: Ledger) -> None:
    """A proposal: also, a round begun anew samples by TPE from all earlier results of its horizon, and
    promotion chooses among all that these left behind."""
    _Study(ledger, Policy(share=1 / 3, new_trials=False, prior=True, pool=True)).run()


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


class _Study:
    """Rounds on the table, one after another, until the ledger says that it is over."""

    def __init__(self, ledger: Ledger, policy: Policy) -> None:
        self._ledger = ledger
        self._policy = policy
        self._task = ledger.task
        self._store = _TableStore()
        self._curves = recorded_curves(ledger.task)
        self._optuna = optuna.storages.InMemoryStorage()
        self._results: list[RoundResults] = []
        self._carried: set[tuple[str, int]] = set()

    def run(self) -> None:
        for number in itertools.count():
            self._run_to_full_length(number)

    def _run_to_full_length(self, number: int) -> None:
        """A first round, and promotions of it until full length or until nothing is left to promote."""
        space: Space = {**self._task.space, "schedule": Fixed("constant"), "warmup_steps": Fixed(0)}
        horizon = self._task.steps[rungs(self._ledger)[0]]
        sampler = "tpe" if self._policy.prior and number else "quasi-random"
        search = _search(TRIALS, sampler, self._ledger.seed * 1000 + number)
        while True:
            results = self._run_round(space, search, horizon)
            self._results.append(results)
            if horizon >= self._task.steps[-1]:
                return
            try:
                following = self._promote(results, min(MULTIPLE * horizon, self._task.steps[-1]))
            except TunerError:
                return
            space, horizon = following.space, following.max_train_steps
            search = self._search_of(following)

    def _promote(self, results: RoundResults, horizon: int) -> NextRound:
        share = self._policy.share
        top = {} if share is None else {"top": max(1, round(share * len(results.trials)))}
        candidates = self._candidates(results)
        reading = read_round(candidates, self._results[-len(RUNGS) : -1])
        return plan_next_round(candidates, reading, to="next", max_train_steps=horizon, **top)

    def _candidates(self, results: RoundResults) -> RoundResults:
        """The round, with what earlier rounds of its horizon have left where the policy says so."""
        if not self._policy.pool:
            return results
        same = (other for other in self._results if other.max_train_steps == results.max_train_steps)
        left = (t for other in same for t in other.trials if (t.round, t.number) not in self._carried)
        return replace(results, trials=tuple(left))

    def _search_of(self, following: NextRound) -> SearchSpec:
        entries = []
        for enqueued in following.enqueue:
            trial = self._trial_of(enqueued.hyperparameters)
            self._carried.add((trial.round, trial.number))
            entries.append({**enqueued.hyperparameters, "continues": f"{trial.round}/{trial.number}"})
        total = following.trials_total if self._policy.new_trials else len(entries)
        return _search(total, following.sampler, self._ledger.seed, enqueue=entries)

    def _trial_of(self, hyperparameters: Hyperparameters) -> Trial:
        """The longest run of a configuration."""
        return next(
            trial
            for results in reversed(self._results)
            for trial in results.trials
            if all(trial.hyperparameters[name] == hyperparameters[name] for name in self._task.space)
        )

    def _run_round(self, space: Space, search: SearchSpec, horizon: int) -> RoundResults:
        name = f"round{len(self._results) + 1}"
        every = self._task.steps[1]
        spec = TableRound(horizon, search, EvaluationSpec(every_steps=every), CheckpointsSpec(directory="."))
        plan: Any = TablePlan(name, spec, space)
        self._store.record(
            RoundBegun(RoundRecord(name, horizon, {}, float(len(self._results)), workload="table"))
        )
        # To go on with the Optuna study of a round of the same horizon and space is to learn from it.
        is_first = horizon == self._task.steps[rungs(self._ledger)[0]]
        study = "first horizon" if self._policy.prior and is_first else name
        RoundLoop(
            plan=plan,
            store=self._store,
            advisor=_SnappingAdvisor(self._ledger, study, space, search, self._optuna),
            worker=_ChargedWorker(self._ledger, self._curves, seconds_per_step=1 / every),
            folder=_NamesOnly(Path(name)),
            continuations=_Continuations(plan, self._store, "table"),
            view=_Nobody(),
            clock=lambda: float(self._ledger.spent),
        ).run()
        return RoundResults(
            name=name,
            max_train_steps=horizon,
            evaluate_every=every,
            space=space,
            trials=self._store.trials(name),
            production_steps=self._task.steps[-1],
            workload="table",
        )


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

    def __init__(
        self,
        ledger: Ledger,
        name: str,
        space: Space,
        search: SearchSpec,
        storage: optuna.storages.BaseStorage,
    ) -> None:
        super().__init__(storage, name, space, search)
        self._ledger = ledger

    def propose(self, ordinal: int, *, again: Hyperparameters | None = None) -> Proposal:
        proposal = super().propose(ordinal, again=again)
        if ordinal < len(self._search.enqueue):
            return proposal
        self.study.tell(proposal.optuna_trial, state=optuna.trial.TrialState.FAIL)
        row = self._ledger.snap({name: float(proposal.chosen[name]) for name in self._ledger.task.space})
        point = self._ledger.task.point(row)
        # A model of the space can only learn from points inside it.
        inside = {name: min(max(point[name], d.low), d.high) for name, d in self._space.items()}
        sampler, self._sampler = self._sampler, lambda _: optuna.samplers.RandomSampler(seed=0)
        told = super().propose(ordinal, again=inside)
        self._sampler = sampler
        return Proposal(point, told.optuna_trial)


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
