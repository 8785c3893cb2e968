"""`trial reproduce`: run a trial again from its hyperparameters and seed, outside the study.

No fact is recorded and no checkpoint of the study is touched: the run has a folder of its own, which is
deleted at its end, and Optuna is not told.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tuner.config import RoundSpec
from tuner.engines import Worker, wait_for_former_workers
from tuner.errors import InputError, Interrupted, TunerError, WorkerError
from tuner.methods.optimizers import optimizer
from tuner.methods.registry import expected, is_known
from tuner.methods.table import HYPERPARAMETERS
from tuner.playbook import reproduction
from tuner.playbook.reproduction import Reproduction
from tuner.playbook.schedule import evaluation_steps
from tuner.records import (
    Assignment,
    Checkpoint,
    CheckpointKind,
    Continuation,
    Died,
    Ended,
    Evaluated,
    Evaluation,
    Ready,
    RoundRecord,
    Saved,
    Started,
    Trial,
    TrialState,
)
from tuner.report import View
from tuner.report.format import count
from tuner.store import Store
from tuner.study.continuation import continued_checkpoint
from tuner.study.folder import StudyFolder, opened
from tuner.study.plan import CheckpointFolder, StartingPoint
from tuner.study.run import first_worker

FOLDER = "reproduced"
"""Beside the round's checkpoint directory; reproduced runs are stored here while they last."""


class SoloMaker(Protocol):
    """Makes the worker that runs the trial."""

    def __call__(self, spec: RoundSpec, *, cache: Path, place: Path) -> Worker:
        """Return a worker with one slot for a round file with absolute paths; its lock and log go into
        `place`.
        """
        ...


@dataclass(frozen=True)
class Rerun:
    """A trial that is to be run again, with its first and last step."""

    trial: Trial
    record: RoundRecord
    spec: RoundSpec
    """The round's file as recorded, with absolute paths."""
    cache: Path
    start: StartingPoint | None
    """The checkpoint of a trial that continues another; None at step 0."""
    to_step: int
    environments: tuple[dict[str, str], ...]
    """Those of the recorded attempts behind the compared evaluations."""
    remarks: tuple[str, ...] = ()

    @property
    def from_step(self) -> int:
        """Return the step at which it starts."""
        return self.start.step if self.start else 0

    @property
    def is_whole(self) -> bool:
        """Return whether it runs to the end of the trial, so that the ends can be compared."""
        return self.trial.state != TrialState.PRUNED and self.to_step == self.record.max_train_steps


def planned_rerun(
    folder: StudyFolder, trial: Trial, *, to_step: int | None, engine: str | None = None
) -> Rerun:
    """Return the plan of running a trial again, on the round's engine or another.

    Raises InputError for a trial without a result to compare, or an engine that cannot train.
    """
    name = trial.name
    if engine is not None:
        _refuse_engine(engine)
    if folder.is_dry_run:
        raise InputError(f"{folder.directory}: a dry run trains nothing, so there is nothing to reproduce")
    if not trial.state.is_result or not trial.evaluations:
        why = f" ({trial.reason})" if trial.reason else ""
        raise InputError(
            f"{name} is {trial.state}{why}: it has no result to reproduce. See: tuner trial list"
        )
    with opened(folder) as store:
        record = store.round(trial.round)
        assert record is not None
        spec = RoundSpec.recorded(record.spec).absolute(folder.directory)
        # Only the curve is compared: the best adapter's answers follow from it.
        evaluation = spec.evaluation.model_copy(update={"answers": None})
        spec = spec.model_copy(update={"evaluation": evaluation})
        spec = folder.as_trained(trial, spec)
        wanted = _last_step(name, trial, record, spec, to_step)
        spec, moved = _on_engine(spec, engine)
        start, remarks = _start(trial, store, Path(spec.checkpoints.directory), to_step=wanted)
        ran = _ran_by(trial, store, from_step=start.step if start else 0)
    return Rerun(
        trial,
        record,
        spec,
        cache=folder.directory / ".tuner-cache",
        start=start,
        to_step=wanted,
        environments=tuple(dict(a.environment) for t in ran for a in t.attempts if a.environment),
        remarks=(*moved, *remarks),
    )


def _refuse_engine(engine: str) -> None:
    if not is_known("engine", engine):
        raise InputError(f"--engine {engine}: expects {expected('engine')}")
    if engine == "simulated":
        raise InputError("--engine simulated: a dry run trains nothing, so there is nothing to reproduce")


def _on_engine(spec: RoundSpec, engine: str | None) -> tuple[RoundSpec, tuple[str, ...]]:
    """Return the file with another engine, and a remark on it."""
    before = spec.run.engine
    if engine in (None, before):
        return spec, ()
    moved = spec.model_copy(update={"run": spec.run.model_copy(update={"engine": engine})})
    return moved, (f"It runs on the engine {engine}; its round names {before}.",)


def _last_step(name: str, trial: Trial, record: RoundRecord, spec: RoundSpec, wanted: int | None) -> int:
    """Return the step to run to: the horizon, the last evaluation of a pruned trial, or that before `wanted`.

    Of an infeasible trial the end itself is reproduced, which may come after its last evaluation.
    """
    recorded = trial.evaluations[-1].step
    horizon = recorded if trial.state == TrialState.PRUNED else record.max_train_steps
    if wanted is None:
        return horizon
    planned = evaluation_steps(record.max_train_steps, spec.evaluation.every_steps)
    if not planned[1] <= wanted <= horizon:
        raise InputError(
            f"--to-step {wanted}: {name} can be compared from step {planned[1]}, its first evaluation, "
            f"to step {horizon}"
        )
    return max(step for step in planned if step <= wanted)


def _start(
    trial: Trial, store: Store, directory: Path, *, to_step: int
) -> tuple[StartingPoint | None, tuple[str, ...]]:
    """Return the stable checkpoint that a trial continues, or step 0 and why that is the same run."""
    if trial.continues is None:
        return None, ()
    folder = CheckpointFolder(directory / trial.continues.round)
    there = continued_checkpoint(store, folder, trial.continues)
    if there is not None and there.step < to_step:
        return there, (f"It continues {trial.continues}, as recorded: earlier steps are not run again.",)
    why = "its checkpoint is missing" if there is None else "nothing would be left to run"
    return None, (
        f"It is run from step 0, not from {trial.continues}: {why}. A trial continues from the stable "
        "phase, which does not depend on the horizon, so this is the same run.",
    )


def _ran_by(trial: Trial, store: Store, *, from_step: int) -> list[Trial]:
    """Return the trial, and those that it continues whose steps are run again."""
    found, wish = [trial], trial.continues
    while wish is not None and from_step == 0:
        earlier = _source(store, wish)
        found += [earlier] if earlier else []
        wish = earlier.continues if earlier else None
    return found


def _source(store: Store, wish: Continuation) -> Trial | None:
    return next((t for t in store.trials(wish.round) if t.number == wish.trial), None)


def reproduce(
    rerun: Rerun,
    *,
    make_worker: SoloMaker,
    view: View,
    stopping: Callable[[], bool],
    take: Callable[[Reproduction, Path, Checkpoint], None] | None = None,
) -> Reproduction:
    """Run a trial again and compare; `take` gets the best adapter, in its folder, before that is deleted.

    Raises Interrupted if `stopping` returns True, InputError if model or data can no longer be used, and
    WorkerError if the worker dies. In each case nothing of the run is left.
    """
    for remark in rerun.remarks:
        view.message(remark)
    with _place(rerun) as place, ExitStack() as in_use:
        worker, ready = first_worker(
            lambda: make_worker(rerun.spec, cache=rerun.cache, place=place),
            view,
            stopping,
            spec=rerun.spec,
            begun=0,
        )
        in_use.callback(worker.close)
        remarks = (*rerun.remarks, *_other_workload(rerun.record, ready))
        for remark in remarks[len(rerun.remarks) :]:
            view.message(remark)
        shown = replace(rerun.trial, state=TrialState.RUNNING, evaluations=(), reason=None)
        view.trials([shown])
        worker.start(_assignment(rerun, place))
        ran = _listen(rerun, worker, view, stopping)
        found = _compared(rerun, ran, remarks)
        if take is not None and ran.best is not None:
            take(found, place, ran.best)
    return found


def _compared(rerun: Rerun, ran: _Ran, remarks: tuple[str, ...]) -> Reproduction:
    spec = rerun.spec
    return Reproduction(
        trial=rerun.trial,
        from_step=rerun.from_step,
        to_step=rerun.to_step,
        pairs=reproduction.pairs(
            rerun.trial.evaluations, ran.evaluations, from_step=rerun.from_step, to_step=rerun.to_step
        ),
        tolerance=reproduction.tolerance(
            dtype=spec.model.dtype,
            quantization=spec.model.quantization,
            amplifies_rounding=optimizer(
                str(HYPERPARAMETERS["optimizer"].value(rerun.trial.hyperparameters))
            ).amplifies_rounding,
        ),
        ended_as=ran.ended_as,
        reason=ran.reason,
        changed=reproduction.changed(rerun.environments, ran.environment),
        remarks=remarks,
    )


@contextmanager
def _place(rerun: Rerun) -> Iterator[Path]:
    """Make an empty folder for the run, and delete it at the end."""
    parent = Path(rerun.spec.checkpoints.directory).parent / FOLDER
    place = parent / f"{rerun.trial.round}-{rerun.trial.number:04d}"
    try:
        wait_for_former_workers(place / "worker.lock")
        shutil.rmtree(place)
        place.mkdir()
    except OSError as error:
        raise InputError(f"{place}: cannot be written: {error.strerror}") from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _assignment(rerun: Rerun, place: Path) -> Assignment:
    trial = rerun.trial
    return Assignment(
        round=trial.round,
        trial=trial.number,
        attempt=1,
        hyperparameters=trial.hyperparameters,
        max_train_steps=rerun.record.max_train_steps,
        evaluate_every=rerun.spec.evaluation.every_steps,
        directory=str(CheckpointFolder(place).trial_directory(trial.number)),
        resume_from=str(rerun.start.path) if rerun.start else None,
        resume_sha256=rerun.start.sha256 if rerun.start else None,
        trunk_steps=_further_evaluations(rerun) if rerun.spec.command is not None else (),
    )


def _further_evaluations(rerun: Rerun) -> tuple[int, ...]:
    """Return recorded steps that the round did not plan: a command also evaluates where it saves."""
    planned = evaluation_steps(rerun.record.max_train_steps, rerun.spec.evaluation.every_steps)
    recorded = (evaluation.step for evaluation in rerun.trial.evaluations)
    return tuple(s for s in recorded if s not in planned and rerun.from_step < s <= rerun.to_step)


def _other_workload(record: RoundRecord, ready: Ready) -> tuple[str, ...]:
    if record.workload == ready.workload:
        return ()
    then, now = ((rows.train_rows, rows.eval_rows) for rows in (record, ready))
    counts = "the number of rows is the same" if then == now else f"{_rows(*then)} then, {_rows(*now)} now"
    return (
        f"The model or the data are not those that {record.name} started with: the files at these paths "
        f"changed, or a library reads them differently ({counts}).",
    )


def _rows(train: int, evaluation: int) -> str:
    return f"{count(train, 'train row')} and {count(evaluation, 'eval row')}"


@dataclass(frozen=True)
class _Ran:
    evaluations: tuple[Evaluation, ...]
    environment: dict[str, str]
    best: Checkpoint | None
    ended_as: TrialState | None = None
    reason: str | None = None


def _listen(rerun: Rerun, worker: Worker, view: View, stopping: Callable[[], bool]) -> _Ran:
    """Collect the worker's events, up to the last evaluation that is compared or to the run's end."""
    evaluations: dict[int, Evaluation] = {}
    environment: dict[str, str] = {}
    best: Checkpoint | None = None
    is_infeasible = rerun.trial.state == TrialState.INFEASIBLE
    while not stopping():
        for event in worker.events(1.0):
            view.event(event)
            match event:
                case Started():
                    environment = dict(event.environment)
                case Saved(checkpoint=Checkpoint(kind=CheckpointKind.BEST) as saved):
                    best = saved
                case Evaluated(evaluation=evaluation):
                    evaluations[evaluation.step] = evaluation
                    made = tuple(evaluations.values())
                    if is_infeasible and evaluation.step > rerun.trial.evaluations[-1].step:
                        return _Ran(made, environment, best, TrialState.RUNNING)
                    if evaluation.step == rerun.to_step and not rerun.is_whole:
                        return _Ran(made, environment, best)
                case Ended(outcome="complete" | "infeasible" as outcome, reason=reason):
                    return _Ran(tuple(evaluations.values()), environment, best, TrialState(outcome), reason)
                case Ended(reason=reason):
                    raise TunerError(f"the trial could not be run again: {reason}")
                case Died(reason=reason, is_input_error=is_input_error):
                    raise (InputError if is_input_error else WorkerError)(reason)
    raise Interrupted("stopped; nothing of the run is kept")
