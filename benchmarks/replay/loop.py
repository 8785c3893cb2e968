"""A round of the real loop without files: what it needs beside a worker and an round_study."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.config import CheckpointsSpec, EvaluationSpec, RunSpec, SearchSpec
from tuner.engines import SimulatedWorker
from tuner.playbook.comparison_runs import ComparisonRule, trunk_steps
from tuner.records import (
    Checkpoint,
    Fact,
    Hyperparameters,
    Promotion,
    RoundBegun,
    RoundRecord,
    Space,
    Trial,
    TrialAsked,
)
from tuner.store import MemoryStore
from tuner.study.continuation import Continuations
from tuner.study.loop import RoundLoop
from tuner.study.plan import CheckpointFolder, StartingPoint
from tuner.study.sampling import RoundStudy


@dataclass(frozen=True)
class LoopPlan:
    """What a `RoundPlan` is to the loop, for a round that has no file."""

    name: str
    spec: LoopRound
    space: Space
    comparison_rule: ComparisonRule = False

    @property
    def absolute(self) -> LoopRound:
        return self.spec

    @property
    def checkpoints(self) -> Path:
        return Path(self.name)

    def trunk_steps(self, hyperparameters: Hyperparameters) -> tuple[int, ...]:
        return trunk_steps(hyperparameters, self.spec.max_train_steps, branches=self.comparison_rule)


@dataclass(frozen=True)
class LoopRound:
    """What a `RoundSpec` is to the loop."""

    max_train_steps: int
    search: SearchSpec
    evaluation: EvaluationSpec
    checkpoints: CheckpointsSpec
    run: RunSpec
    is_sweep: bool = False
    command: None = None
    """As of a round that trains a base model."""


WORKLOAD = "replay"
"""The fingerprint of every replayed round: trials of one go on in another."""


def loop_plan(name: str, space: Space, search: SearchSpec, *, horizon: int, every: int) -> LoopPlan:
    """The plan of a round of that horizon, evaluated every so many steps."""
    spec = LoopRound(
        horizon, search, EvaluationSpec(every_steps=every), CheckpointsSpec(directory="."), RunSpec()
    )
    return LoopPlan(name, spec, space)


def begin_round(store: RoundStores, plan: LoopPlan, *, begun_at: float) -> None:
    """Record that the round has begun."""
    record = RoundRecord(plan.name, plan.spec.max_train_steps, {}, begun_at, workload=WORKLOAD)
    store.record(RoundBegun(record))


def run_loop(
    plan: Any,
    store: RoundStores,
    round_study: RoundStudy,
    worker: SimulatedWorker,
    *,
    spent: Callable[[], float],
) -> None:
    """Run a begun round to its end, or go on with it; `spent` is the clock."""
    RoundLoop(
        plan=plan,
        store=store,
        round_study=round_study,
        worker=worker,
        folder=NamesOnly(Path(plan.name)),
        continuations=NamedContinuations(plan, store, WORKLOAD),
        view=Nobody(),
        clock=spent,
    ).run()


def unchecked_search(
    trials: int, sampler: str, seed: int, enqueue: Sequence[dict[str, Any]] = ()
) -> SearchSpec:
    """What a round searches, unchecked: a round file's check knows only LoRA's names."""
    return SearchSpec.model_construct(trials=trials, sampler=sampler, seed=seed, enqueue=list(enqueue))


class RoundStores:
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

    def round(self, name: str) -> RoundRecord | None:
        return self._rounds[name].round(name) if name in self._rounds else None

    def trials(self, name: str) -> tuple[Trial, ...]:
        if name not in self._trials:
            self._trials[name] = self._rounds[name].trials(name) if name in self._rounds else ()
        return self._trials[name]

    def trial(self, name: str, number: int) -> Trial:
        return self._rounds[name].trial(name, number)

    def promotions(self) -> tuple[Promotion, ...]:
        return ()

    def close(self) -> None: ...


def _round_of(fact: Any) -> str:
    if isinstance(fact, RoundBegun):
        return fact.round.name
    return str(fact.trial.round if isinstance(fact, TrialAsked) else fact.round)


class NamesOnly(CheckpointFolder):
    """Checkpoints that are names without files."""

    def point(self, checkpoint: Checkpoint) -> StartingPoint:
        return StartingPoint(self.root / checkpoint.path, checkpoint.sha256, checkpoint.step)


class NamedContinuations(Continuations):
    def _folder(self, round_name: str) -> CheckpointFolder:
        return NamesOnly(Path(round_name))


class Nobody:
    """A view that nobody looks at."""

    def trials(self, trials: object) -> None: ...

    def event(self, event: object) -> None: ...

    def message(self, text: str) -> None: ...
