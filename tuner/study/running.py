"""`study run`: from a checked round file to a round that is complete, or saved half-way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from tuner.errors import InputError, Interrupted, RoundFileError, StorageError, WorkerError
from tuner.records import Died, Evaluation, Ready, RoundRecord
from tuner.report import View
from tuner.spec import RoundFile, refused_changes
from tuner.store import Store, exists, hold_study, open_store
from tuner.store.facts import RoundBegun
from tuner.study.checkpoints import CheckpointFolder
from tuner.study.continuation import Continuations
from tuner.study.folder import open_folder
from tuner.study.loop import MAX_STILLBORN, RoundLoop
from tuner.study.mirror import MirroredStore
from tuner.study.pages import round_report, write_pages
from tuner.study.plan import RoundPlan
from tuner.study.sampling import Advisor, optuna_storage
from tuner.workers import Worker


class WorkerMaker(Protocol):
    """How the caller wants trials to run."""

    def __call__(self, plan: RoundPlan, base: Callable[[], Evaluation | None]) -> Worker:
        """A worker for a round; `base` gives the untouched base's evaluation once it is known."""
        ...


def run_round(
    file: RoundFile,
    *,
    make_worker: WorkerMaker,
    view: View,
    stopping: Callable[[], bool],
    clock: Callable[[], float] = time.time,
) -> None:
    """Run a round, or go on with it, until every promised trial has ended.

    Raises InputError before anything is recorded when file, model, data, database or directory
    cannot be used; Interrupted when `stopping` says so, with all progress saved; WorkerError when
    the round cannot be completed.
    """
    plan = RoundPlan(file)
    storage = plan.absolute.storage
    _refuse_changed_file(plan, storage)
    with _fresh_directory(plan.checkpoints), hold_study(file.directory, storage, plan.spec.study):
        known_base = _known_base(plan, storage)
        worker, ready = _first_worker(lambda: make_worker(plan, lambda: known_base[0]), view, stopping)
        try:
            known_base[0] = ready.base
            store = MirroredStore(open_store(storage))
            try:
                _begin(plan, store, ready, clock)
                advisor = Advisor(
                    optuna_storage(storage), f"{plan.spec.study}/{plan.name}", plan.space, plan.spec.search
                )
                RoundLoop(
                    plan=plan,
                    store=store,
                    advisor=advisor,
                    worker=worker,
                    folder=CheckpointFolder(plan.checkpoints),
                    continuations=Continuations(plan, store, ready.workload),
                    view=view,
                    clock=clock,
                    stopping=stopping,
                ).run()
                folder = open_folder(file.directory)
                record = next(record for record in store.rounds() if record.name == plan.name)
                write_pages(advisor.study, round_report(folder, store, record))
            finally:
                store.close()
        finally:
            worker.close()


def _refuse_changed_file(plan: RoundPlan, storage: str) -> None:
    """A round that has begun keeps what its results depend on. Raises RoundFileError."""
    if not exists(storage):
        return
    store = open_store(storage)
    try:
        begun = next((record for record in store.rounds() if record.name == plan.name), None)
    finally:
        store.close()
    mistakes = refused_changes(begun.spec, plan.file) if begun else []
    if mistakes:
        raise RoundFileError(plan.file.path, mistakes)


def _known_base(plan: RoundPlan, storage: str) -> list[Evaluation | None]:
    """The untouched base's evaluation where the round has it already: it is measured once a round."""
    if not exists(storage):
        return [None]
    store = open_store(storage)
    try:
        at_start = (
            evaluation
            for trial in store.trials(plan.name)
            for evaluation in trial.evaluations
            if evaluation.step == 0
        )
        return [next(at_start, None)]
    finally:
        store.close()


def _first_worker(
    make: Callable[[], Worker], view: View, stopping: Callable[[], bool]
) -> tuple[Worker, Ready]:
    """A worker that has loaded base and data; one that dies on the way is replaced, a few times."""
    view.message("loading base and data")
    for remaining in reversed(range(MAX_STILLBORN)):
        worker = make()
        try:
            return worker, _wait_until_ready(worker, view, stopping)
        except WorkerError as error:
            worker.close()
            if not remaining:
                raise
            view.message(f"{error}\nstarting another worker")
        except BaseException:
            worker.close()
            raise
    raise AssertionError("the last worker either was ready or raised")


def _wait_until_ready(worker: Worker, view: View, stopping: Callable[[], bool]) -> Ready:
    """Wait for one worker. Raises InputError, WorkerError or Interrupted."""
    while True:
        for event in worker.events(0.5):
            match event:
                case Ready():
                    view.event(event)
                    return event
                case Died(reason=reason, is_input_error=True):
                    raise InputError(reason)
                case Died(reason=reason):
                    raise WorkerError(reason)
        if stopping():
            raise Interrupted("stopped before anything was begun")


def _begin(plan: RoundPlan, store: Store, ready: Ready, clock: Callable[[], float]) -> None:
    """Record that the round has begun, or the file's allowed changes."""
    begun = next((record for record in store.rounds() if record.name == plan.name), None)
    if begun is not None and begun.workload != ready.workload:
        raise InputError(
            f"{plan.file.path.name}: the model or the data changed since {plan.name} began (the files "
            "behind the same paths): its trials would not compare. Put them back, or begin another round"
        )
    store.record(
        RoundBegun(
            RoundRecord(
                name=plan.name,
                max_train_steps=plan.spec.max_train_steps,
                spec=plan.spec.model_dump(mode="json"),
                begun_at=begun.begun_at if begun else clock(),
                train_rows=ready.train_rows,
                eval_rows=ready.eval_rows,
                workload=ready.workload,
                evaluation_share=ready.evaluation_share,
            )
        )
    )


@contextmanager
def _fresh_directory(directory: Path) -> Iterator[None]:
    """Make the round's directory; take it away again when bad input left it without a trial."""
    existed = directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"checkpoints.directory: cannot write in {directory}: {error.strerror}") from error
    try:
        yield
    except InputError:
        if not existed and not any(directory.glob("trial-*")):
            for path in directory.glob("worker*"):
                path.unlink()
            directory.rmdir()
        raise
