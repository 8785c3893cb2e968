"""`study check --probe`: a worker of the round's engine times a few steps, or runs a trial of a command."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from tuner.api.run import Where, round_job
from tuner.engines import Program, Worker, make_engine, start_workers
from tuner.engines.processes import end_left_over
from tuner.errors import ModelError, WorkerError
from tuner.records import Assignment, Died, Ended, Event, Ready
from tuner.study.plan import RoundPlan

_PREFIX = ".tuner-probe-"
_YOUNG_SECONDS = 60.0


def probed_worker(plan: RoundPlan, where: Where, say: Callable[[str], None]) -> Ready:
    """Load base model and data in a worker, which times a few steps; return what it says.

    `say` receives what the engine says, such as which machines are used.

    Raises ModelError or InputError if they cannot be used, WorkerError if the worker dies.
    """
    with _folder(plan) as folder, _first_worker(plan, where, folder, say) as (_, ready):
        return ready


def run_probe(
    plan: RoundPlan,
    where: Where,
    say: Callable[[str], None],
    assignment: Callable[[Path], Assignment],
    hear: Callable[[Event], None],
    is_enough: Callable[[], bool],
) -> None:
    """Run a trial of a command in a worker until `is_enough`; `assignment` is given the folder for it."""
    with _folder(plan) as folder, _first_worker(plan, where, folder, say) as (worker, _):
        trial = assignment(folder)
        worker.start(trial)
        is_stopping = False
        for event in _heard(worker):
            hear(event)
            if isinstance(event, Ended):
                return
            if not is_stopping and is_enough():
                worker.stop(trial.run)
                is_stopping = True


@contextmanager
def _first_worker(
    plan: RoundPlan, where: Where, folder: Path, say: Callable[[str], None]
) -> Iterator[tuple[Worker, Ready]]:
    """Start one worker of the round's engine and wait until it is ready; a dry run's is on this machine."""
    name = where.engine or plan.spec.run.engine
    name = "local" if name == "simulated" else name
    job = round_job(plan, lambda: None, replace(where, engine=name, workers=1))
    own = {"lock": str(folder / "worker.lock"), "probe": True}
    program = Program(job.program.arguments, lambda: {**job.program.document(), **own})
    engine = make_engine(name)
    try:
        worker = start_workers(engine, replace(job, program=program, directory=folder, say=say))
        try:
            ready = next(event for event in _heard(worker) if isinstance(event, Ready))
            yield worker, ready
        finally:
            worker.close()
    finally:
        engine.close()


def _heard(worker: Worker) -> Iterator[Event]:
    while True:
        for event in worker.events(0.5):
            if isinstance(event, Died):
                raise (ModelError if event.is_input_error else WorkerError)(event.reason)
            yield event


@contextmanager
def _folder(plan: RoundPlan) -> Iterator[Path]:
    """Make a folder beside the checkpoints, on the same disk, and delete it with what the probe made.

    Folders of probes that were killed go, too.
    """
    checkpoints = plan.checkpoints
    parent = next(place for place in (checkpoints, *checkpoints.parents) if place.is_dir())
    for left in parent.glob(f"{_PREFIX}*"):
        _delete_left(left)
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=parent) as name:
        held = os.open(name, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_SH)
            yield Path(name)
        finally:
            os.close(held)


def _delete_left(folder: Path) -> None:
    """Delete the folder of a probe that was killed: no process holds it, and it is not just being made."""
    with suppress(OSError):
        if time.time() - folder.stat().st_mtime < _YOUNG_SECONDS:
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end_left_over(folder)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
