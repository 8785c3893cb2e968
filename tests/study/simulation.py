"""A round run with a simulated worker, whose process may be made to die at any seam."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.studies import formula, round_file, silent_view
from tuner.config import RoundFile
from tuner.engines import SimulatedWorker, Worker
from tuner.records import (
    CheckpointKind,
    Fact,
    RoundBegun,
    RoundRecord,
    Saved,
    Trial,
)
from tuner.report import View
from tuner.store import CachedStore, Store, open_store
from tuner.study.continuation import Continuations
from tuner.study.loop import RoundLoop
from tuner.study.plan import CheckpointFolder, RoundPlan
from tuner.study.sampling import Proposal, RoundStudy, optuna_storage
from tuner.whole import digest


class Crash(BaseException):
    """The process is gone: nothing after this line runs."""


@dataclass
class Fuse:
    """Burns down at every seam it is put into; at zero the process dies."""

    left: int
    passed: list[str] = field(default_factory=list)

    def burn(self, seam: str) -> None:
        self.passed.append(seam)
        self.left -= 1
        if self.left == 0:
            raise Crash(seam)


@dataclass
class DyingStore:
    """A Store that may die before or after each record."""

    inner: Store
    fuse: Fuse

    def record(self, *facts: Fact) -> None:
        names = "+".join(type(fact).__name__ for fact in facts)
        self.fuse.burn(f"before record {names}")
        self.inner.record(*facts)
        self.fuse.burn(f"after record {names}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class DyingRoundStudy(RoundStudy):
    """A RoundStudy that may die right after asking and right before telling."""

    fuse: Fuse

    def propose(self, *args: Any, **kwargs: Any) -> Proposal:
        proposal = super().propose(*args, **kwargs)
        self.fuse.burn("after ask")
        return proposal

    def tell(self, *args: Any, **kwargs: Any) -> None:
        self.fuse.burn("before tell")
        super().tell(*args, **kwargs)


def simulate(
    directory: Path,
    *,
    fuse: int = 0,
    make_worker: Callable[[], Worker] = lambda: SimulatedWorker(formula, slots=2),
    stopping: Callable[[], bool] = lambda: False,
    view: View | None = None,
    **changes: Any,
) -> Fuse:
    """Run, or go on with, a round as one process would; with a fuse it may raise Crash."""
    file = round_file(directory, **changes)
    plan = RoundPlan(file)
    burning = Fuse(fuse or -1)
    store = open_store(plan.absolute.storage, study=plan.spec.study)
    with ExitStack() as opened:
        opened.callback(store.close)
        mirrored = DyingStore(CachedStore(store), burning)
        mirrored.inner.record(RoundBegun(_record(file)))
        round_study = DyingRoundStudy(
            optuna_storage(plan.absolute.storage),
            f"{plan.spec.study}/round1",
            plan.space,
            plan.spec.search,
            max_train_steps=plan.spec.max_train_steps,
            objective=plan.spec.recorded_objective,
        )
        opened.callback(round_study.close)
        round_study.fuse = burning
        RoundLoop(
            plan=plan,
            store=mirrored,  # type: ignore[arg-type]
            round_study=round_study,
            worker=make_worker(),
            folder=CheckpointFolder(plan.checkpoints),
            continuations=Continuations(plan, mirrored, "same"),  # type: ignore[arg-type]
            view=view or silent_view(),
            clock=_seconds().__next__,
            stopping=stopping,
        ).run()
    return burning


def adopt(directory: Path, trial: Trial) -> None:
    """Record the files that somebody has put into the place of a trial's best adapter."""
    plan = RoundPlan(round_file(directory))
    best = trial.checkpoint(CheckpointKind.BEST)
    assert best is not None
    found = replace(best, sha256=digest(plan.checkpoints / best.path))
    store = open_store(plan.absolute.storage, study=plan.spec.study)
    store.record(Saved(trial.round, trial.number, trial.attempts[-1].number, found))
    store.close()


def trials(directory: Path, **changes: Any) -> tuple[Trial, ...]:
    """The facts as a new process finds them."""
    plan = RoundPlan(round_file(directory, **changes))
    store = open_store(plan.absolute.storage, study=plan.spec.study)
    try:
        return store.trials("round1")
    finally:
        store.close()


def rounds(directory: Path) -> tuple[RoundRecord, ...]:
    """The rounds as a new process finds them."""
    plan = RoundPlan(round_file(directory))
    store = open_store(plan.absolute.storage, study=plan.spec.study)
    try:
        return store.rounds()
    finally:
        store.close()


def _record(file: RoundFile) -> RoundRecord:
    return RoundRecord(
        "round1", file.spec.max_train_steps, file.spec.model_dump(mode="json"), begun_at=0.0, workload="same"
    )


def _seconds() -> Iterator[float]:
    now = 1000.0
    while True:
        now += 1.0
        yield now
