"""`study run`: from a checked round file to a round that is complete, or saved half-way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from optuna.exceptions import StorageInternalError

from tuner.config import RoundFile, RoundSpec, refused_changes, without_secrets
from tuner.engines import Worker, end_at_once
from tuner.errors import (
    InputError,
    Interrupted,
    Mistake,
    RoundFileError,
    RoundStopped,
    StorageAway,
    StorageError,
    StudyTaken,
    WorkerError,
)
from tuner.installation import install_command
from tuner.methods.metrics import metric
from tuner.methods.registry import is_built_in
from tuner.methods.variants.initialisations import starts_with_zero_b
from tuner.process_log import kept_in
from tuner.records import Died, Evaluation, Objective, Preparing, Ready, RoundBegun, RoundRecord, Trial
from tuner.report import View
from tuner.report.format import count
from tuner.report.trackers import not_installed, refuse_unusable
from tuner.store import CachedStore, Store, exists, hold_study, open_store, refuse_damaged
from tuner.study.continuation import Continuations
from tuner.study.dashboard import round_report, write_pages
from tuner.study.disk import DiskWatch, RoundDisk, free_bytes, taken_back
from tuner.study.folder import open_folder
from tuner.study.lookup import at_rest
from tuner.study.loop import MAX_STILLBORN, RoundLoop
from tuner.study.outage import Outage, WaitingStore
from tuner.study.plan import CheckpointFolder, RoundPlan
from tuner.study.proposals import try_sampler
from tuner.study.results import earlier_outcomes, keep_unwritten_rule
from tuner.study.sampling import RoundStudy, optuna_storage


class WorkerMaker(Protocol):
    """Makes the worker that trains the trials."""

    def __call__(self, plan: RoundPlan, base: Callable[[], Evaluation | None]) -> Worker:
        """Return a worker for a round; `base` returns the base model's evaluation once it is known."""
        ...


def run_round(
    file: RoundFile,
    *,
    make_worker: WorkerMaker,
    view: View,
    stopping: Callable[[], bool],
    passes: int = 1,
    clock: Callable[[], float] = time.time,
    free: Callable[[Path], int] = free_bytes,
) -> None:
    """Start or resume a round and run it until every trial has ended.

    Raises InputError before anything is recorded if file, model, data, database or directory cannot be used,
    or the disk is too small; Interrupted if `stopping` returns True, with all progress saved; RoundStopped if
    disk, database or something a worker needs fails once it has loaded; WorkerError if the round cannot be
    completed. `passes` is that of `study auto`, if it runs the round: trials that a later pass may continue
    keep their checkpoints. `free` returns the free bytes at a path, which may not exist yet.
    """
    plan = RoundPlan(file)
    storage = plan.absolute.storage
    folder = open_folder(file.directory)
    disk = RoundDisk(plan, free)
    _refuse_unusable(plan, disk)
    plan = RoundPlan(keep_unwritten_rule(file, _begun(plan)))
    refuse_uninstalled(plan)
    objective = load_plug_ins(plan)
    is_known = exists(storage)
    with hold_study(file.directory, storage, plan.spec.study) as lock, ExitStack() as in_use:
        outage = Outage(storage, lock, plan.spec.run.storage_seconds, view.message, stopping)
        with taken_back(plan.checkpoints, plan.cache):
            earlier = _trials_so_far(plan, storage)
            known_base = [base_evaluation(earlier)]
            for note in _notes(plan):
                view.message(note)
            view.trials([at_rest(trial, is_running=False) for trial in earlier])
            worker, ready = first_worker(
                lambda: make_worker(plan, lambda: known_base[0]),
                view,
                stopping,
                spec=plan.spec,
                begun=len(earlier),
            )
            in_use.callback(worker.close)
            known_base[0] = ready.base
            disk.refuse_too_small(ready, earlier)
            with _while_opening():
                store = _opened(plan, outage, is_known=is_known)
                in_use.callback(store.close)
                _begin(plan, store, ready, clock, objective)
        in_use.enter_context(kept_in(plan.checkpoints / "tuner.log", plan.name))
        watch = DiskWatch(
            disk,
            ready,
            plan.spec.run.storage_seconds,
            workers_pause=ready.waits_for_disk,
            say=view.message,
            stopping=stopping,
        )
        with _outside_failures(watch, worker):
            round_study = outage.through(lambda: _round_study(plan, store, objective))
            in_use.callback(round_study.close)
            loop = RoundLoop(
                plan=plan,
                store=store,
                round_study=round_study,
                worker=worker,
                folder=CheckpointFolder(plan.checkpoints),
                continuations=Continuations(plan, store, ready.workload, objective),
                view=view,
                clock=clock,
                stopping=lambda: stopping() or watch.is_short(),
                through=outage.through,
                room_bytes=disk.room_bytes(ready),
                passes=passes,
            )
            loop.run()
            # The record read before does not include the comparison runs.
            ended = store.round(plan.name)
            assert ended is not None
            report = outage.through(lambda: round_report(folder, store, ended))
            loop.through_optuna(lambda: write_pages(round_study.study, report))


def _opened(plan: RoundPlan, outage: Outage, *, is_known: bool) -> Store:
    """Open the study's facts; `is_known` says whether the database was there before the worker loaded."""
    storage = plan.absolute.storage

    def opened() -> Store:
        # To create it again would begin the round anew, over the checkpoints of its trials.
        if is_known and not exists(storage):
            raise StorageAway(f"{without_secrets(storage)}: the database is gone; put it back")
        return open_store(storage, study=plan.spec.study)

    return CachedStore(WaitingStore(outage.through(opened), outage))


def _refuse_unusable(plan: RoundPlan, disk: RoundDisk) -> None:
    """Raise InputError for a directory, a disk, a database or a changed file that the round cannot use."""
    disk.refuse_unwritable()
    disk.refuse_full()
    refuse_damaged(plan.absolute.storage)
    refuse_changed_file(plan)
    refuse_lost_database(plan)


def _notes(plan: RoundPlan) -> Iterator[str]:
    """Yield what to know of a round before it runs."""
    yield from plan.file.hints
    if plan.spec.ends_early is not None:
        yield plan.spec.ends_early
    if plan.spec.trains_alone:
        yield plan.spec.trains_alone
    if plan.spec.model.trust_remote_code:
        yield f"warning: {plan.spec.model.warning_of_code}"


def _round_study(plan: RoundPlan, store: Store, objective: Objective) -> RoundStudy:
    """Open the round's Optuna study."""
    record = store.round(plan.name)
    assert record is not None
    return RoundStudy(
        optuna_storage(plan.absolute.storage),
        f"{plan.spec.study}/{plan.name}",
        plan.space,
        plan.spec.search,
        max_train_steps=plan.spec.max_train_steps,
        earlier=earlier_outcomes(store, record),
        objective=objective,
    )


@contextmanager
def _while_opening() -> Iterator[None]:
    """Turn a database that went, or was taken, while the worker was loading into RoundStopped.

    The file is right, and another process may use the folder by now, which an InputError would take back.
    """
    try:
        yield
    except (StorageAway, StudyTaken) as error:
        what = "Fix the problem" if isinstance(error, StorageAway) else "Wait until nobody else writes"
        raise RoundStopped(f"{error}. This run recorded nothing. {what}") from error


@contextmanager
def _outside_failures(watch: DiskWatch, worker: Worker) -> Iterator[None]:
    """Turn failures outside the round, a full disk or a lost database, into RoundStopped."""
    try:
        yield
    except Interrupted as stop:
        if watch.shortage is None:
            raise
        raise RoundStopped(f"no disk: {watch.shortage}. Free some space ({stop})") from stop
    except StudyTaken as error:
        end_at_once(worker)  # what it would save is in no fact
        raise RoundStopped(f"{error}. Its workers are stopped. Wait until nobody else writes") from error
    except (StorageError, StorageInternalError, OSError) as error:
        # Optuna says "invalid data in the commit" of whatever its database says, and that is the cause.
        cause = error.__cause__ if isinstance(error, StorageInternalError) else None
        said = " ".join(str(getattr(cause, "orig", None) or cause or error).split())
        if (shortage := watch.disk.shortage(watch.ready)) is not None:
            raise RoundStopped(f"no disk: {shortage}. Free some space ({said})") from error
        is_gone = isinstance(error.__cause__ or error, FileNotFoundError)  # and the records with it
        kept = "" if is_gone else "Earlier records are kept. "
        raise RoundStopped(f"{said}. {kept}Fix the problem") from error


def refuse_lost_database(plan: RoundPlan) -> None:
    """Raise InputError if there are trials on disk that the database does not know."""
    if _begun(plan) is not None:
        return
    trials = sorted(plan.checkpoints.glob("trial-[0-9]*"))
    if trials:
        raise InputError(
            f"{plan.checkpoints} has checkpoints of {count(len(trials), 'trial')}, and the database "
            f"{without_secrets(plan.absolute.storage)} does not know the round {plan.name}: was it deleted "
            f"or moved? Put it back; or, to begin {plan.name} anew, move {plan.checkpoints} away"
        )


def refuse_changed_file(plan: RoundPlan) -> None:
    """Refuse changes of a started round that its results depend on. Raises RoundFileError."""
    begun = _begun(plan)
    mistakes = refused_changes(begun.spec, plan.file) if begun else []
    if mistakes and not plan.checkpoints.exists():
        mistakes.insert(0, Mistake(None, "study", _begun_elsewhere(plan)))
    if mistakes:
        raise RoundFileError(plan.file.path, mistakes)


def _begun(plan: RoundPlan) -> RoundRecord | None:
    """Return the round as it is recorded; None before it has started. Creates nothing."""
    storage = plan.absolute.storage
    if not exists(storage):
        return None
    with closing(open_store(storage, study=plan.spec.study)) as store:
        return store.round(plan.name)


def refuse_uninstalled(plan: RoundPlan) -> None:
    """Refuse built-in trackers that are not installed; a dry run uses no trackers. Raises RoundFileError."""
    run = plan.spec.run
    missing = not_installed(run.report_to) if run.engine != "simulated" else []
    key = "run.report_to"
    mistakes = [
        Mistake(
            plan.file.line(key),
            key,
            f"{name} is not installed; install it with: {install_command(name)}, or remove it",
        )
        for name in missing
    ]
    if mistakes:
        raise RoundFileError(plan.file.path, mistakes)


def load_plug_ins(plan: RoundPlan) -> Objective:
    """Import the metric, the sampler and the trackers of a round that are not built in, and try the sampler.

    Returns the round's objective. Raises InputError for a plug-in that cannot be used, RoundFileError for a
    direction that is not the metric's.
    """
    objective = loaded_objective(plan)
    if not is_built_in("sampler", plan.spec.search.sampler):
        try_sampler(plan.spec.search, plan.space, objective)
    if plan.spec.run.engine != "simulated":
        for name in plan.spec.run.report_to:
            refuse_unusable(name)
    return objective


def _begun_elsewhere(plan: RoundPlan) -> str:
    return (
        f"{plan.name} of a study {plan.spec.study} has started in this database with another file, and not "
        f"from this folder: there is no {plan.checkpoints}. If this is another study, give it another name "
        "in `study:`; if it is the same, use the file that the round started with"
    )


def _trials_so_far(plan: RoundPlan, storage: str) -> tuple[Trial, ...]:
    """Return the trials that earlier runs of the round recorded. Creates nothing."""
    if not exists(storage):
        return ()
    with closing(open_store(storage, study=plan.spec.study)) as store:
        return store.trials(plan.name)


def base_evaluation(trials: Sequence[Trial]) -> Evaluation | None:
    """Return the base model's evaluation if the round has it already: it is measured once a round."""
    exact = [trial for trial in trials if starts_with_zero_b(trial.hyperparameters)]
    return next((e for trial in exact for e in trial.evaluations if e.step == 0), None)


def first_worker(
    make: Callable[[], Worker],
    view: View,
    stopping: Callable[[], bool],
    *,
    spec: RoundSpec,
    begun: int,
) -> tuple[Worker, Ready]:
    """Return a worker that has loaded what it needs; replace one that dies before, a few times."""
    view.message("loading base and data" if spec.command is None else "loading the command's files")
    for remaining in reversed(range(MAX_STILLBORN)):
        worker = make()
        with ExitStack() as undo:
            undo.callback(worker.close)
            try:
                ready = _wait_until_ready(worker, view, stopping, begun=begun)
            except WorkerError as error:
                if not remaining:
                    raise
                view.message(f"{error}\nstarting another worker")
                continue
            undo.pop_all()
            return worker, ready
    raise AssertionError("the last worker was either ready or raised")


def _wait_until_ready(worker: Worker, view: View, stopping: Callable[[], bool], *, begun: int) -> Ready:
    """Wait for one worker; `begun` trials can be resumed. Raises InputError, WorkerError or Interrupted."""
    while True:
        for event in worker.events(0.5):
            match event:
                case Preparing():
                    view.event(event)
                case Ready():
                    view.event(event)
                    for remark in event.remarks:
                        view.message(remark)
                    return event
                case Died(reason=reason, is_input_error=True):
                    raise InputError(reason)
                case Died(reason=reason):
                    raise WorkerError(reason)
        if stopping():
            kept = f"the {count(begun, 'started trial')} did not change" if begun else "nothing was started"
            raise Interrupted(f"stopped while loading; {kept}")


def loaded_objective(plan: RoundPlan) -> Objective:
    """Return the round's objective, loading a metric of the user's.

    Raises InputError if the name leads nowhere, RoundFileError if the file says another direction.
    """
    written = plan.spec.objective
    if plan.spec.command is not None:
        return plan.spec.recorded_objective
    found = metric(written.metric).objective(written.metric)
    if written.direction not in (None, found.direction):
        key = "objective.direction"
        message = f"is {written.direction}, but {written.metric} says {found.direction}; leave this out"
        raise RoundFileError(plan.file.path, [Mistake(plan.file.line(key), key, message)])
    return found


def _begin(
    plan: RoundPlan, store: Store, ready: Ready, clock: Callable[[], float], objective: Objective
) -> None:
    """Record that the round has started, or the file's allowed changes."""
    begun = store.round(plan.name)
    if begun is not None and begun.workload != ready.workload:
        raise other_workload(plan)
    store.record(
        RoundBegun(
            RoundRecord(
                name=plan.name,
                max_train_steps=plan.spec.max_train_steps,
                spec=_recorded_spec(plan.spec, objective, ready),
                begun_at=begun.begun_at if begun else clock(),
                train_rows=ready.train_rows,
                eval_rows=ready.eval_rows,
                workload=ready.workload,
                evaluation_share=ready.evaluation_share,
                kind=plan.kind,
            )
        )
    )


def other_workload(plan: RoundPlan) -> InputError:
    """Return the error of a model, data or command that the round did not start with."""
    if plan.spec.command is not None:
        return InputError(
            f"{plan.file.path.name}: the command is not the one that {plan.name} started with (its "
            "arguments, its configuration, a script that it names, or run.gpus_per_worker changed): its "
            "trials would not be comparable. Restore it, or start another round"
        )
    return InputError(
        f"{plan.file.path.name}: the model or the data are not those that {plan.name} started with (the "
        "files at these paths changed, this version of tuner reads some rows differently, see the "
        f"changelog, or another folder started a study {plan.spec.study} in this database): its trials "
        "would not be comparable. Restore them, finish the round with the version that started it, or "
        "start another round or study"
    )


def recorded_workload(plan: RoundPlan) -> str | None:
    """Return the fingerprint of the workload that the round started with."""
    begun = _begun(plan)
    return None if begun is None else begun.workload


def refuse_other_data(plan: RoundPlan, fingerprint: str) -> None:
    """Raise InputError for data that the round did not start with."""
    recorded = recorded_data(plan)
    if recorded is not None and recorded != fingerprint:
        raise other_workload(plan)


def recorded_data(plan: RoundPlan) -> str | None:
    """Return the fingerprint of the data that the round started with; None while the database is away."""
    with suppress(StorageAway):
        begun = _begun(plan)
        return None if begun is None else begun.spec.get("data_fingerprint") or None
    return None


def changed_model(plan: RoundPlan, fingerprint: str) -> str | None:
    """Return a remark where a model's files are not those that the round started with.

    `fingerprint` is that of `model_fingerprint`. Raises InputError where its configuration is another.
    """
    begun = _begun(plan)
    recorded = "" if begun is None else str(begun.spec.get("model_fingerprint", ""))
    if not (recorded and fingerprint) or recorded == fingerprint:
        return None
    (config, weights), (config_now, weights_now) = recorded.split(), fingerprint.split()
    is_commit, is_commit_now = config == weights, config_now == weights_now
    if is_commit != is_commit_now:
        return None  # a copy of what the Hub has: only the weights themselves can be compared
    if config != config_now and not is_commit:
        raise other_workload(plan)
    return (
        f"warning: the files of the model {plan.spec.model.path} have changed since {plan.name} started. If "
        "the weights have changed too, `tuner study run` refuses them; `tuner study check --probe` compares "
        "them now"
    )


def _recorded_spec(spec: RoundSpec, objective: Objective, ready: Ready) -> dict[str, Any]:
    """The file as JSON, with the metric's own direction where it leaves that out, and no password."""
    document = spec.model_dump(mode="json")
    objective_now = {**document["objective"], "direction": objective.direction.value}
    known = {"data_fingerprint": ready.data_fingerprint, "model_fingerprint": ready.model_fingerprint}
    data = {name: value for name, value in known.items() if value}
    return {**document, **data, "objective": objective_now, "storage": without_secrets(spec.storage)}
