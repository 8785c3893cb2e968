"""What rounds are wired to while they run: worker processes or a rehearsal, a view, and the clock."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tuner.config import RoundFile, RoundSpec, load_round, with_plug_ins
from tuner.engines import (
    LocalWorker,
    SimulatedWorker,
    Worker,
    WorkerPool,
    gpu_meter,
    open_nvml,
    visible_devices,
    wait_for_former_workers,
    worker_environments,
)
from tuner.errors import InputError
from tuner.records import Evaluation, to_json
from tuner.report import View
from tuner.report.format import GpuReading
from tuner.report.trackers import FollowedRound, followed
from tuner.study.dry_run import rehearsed_file, simulated_worker, virtual_clock
from tuner.study.folder import REHEARSAL_BANNER, is_rehearsal, open_folder
from tuner.study.plan import RoundPlan
from tuner.study.run import run_round

ENGINES = ("local", "simulated")
"""What `run.engine` and `--engine` may say."""

Gpus = Callable[[], Sequence[GpuReading]]
OpenView = Callable[[RoundFile, Gpus | None], View]
"""Opens what shows a round while it runs; the second argument reads the GPUs in use."""


@dataclass(frozen=True)
class Where:
    """Where and how rounds are run; never what they do."""

    slots: int | Literal["auto"] | None = None
    """Trials trained together; None: as `run.slots` says."""
    workers: int | Literal["auto"] = "auto"
    """Processes that train; auto is one for each GPU, or one."""
    engine: str | None = None
    """None: as `run.engine` says."""

    def __post_init__(self) -> None:
        for name, number in (("slots", self.slots), ("workers", self.workers)):
            if number not in (None, "auto") and (isinstance(number, (bool, str)) or number < 1):
                raise InputError(f"{name}={number!r}: expects auto or a whole number of at least 1")

    @property
    def options(self) -> str:
        """What a command that goes on has to say of it."""
        return "" if self.engine is None else f" --engine {self.engine}"

    def file(self, path: Path) -> RoundFile:
        """The file that is run: the rehearsal's copy with the engine `simulated`."""
        file = load_round(path)
        return rehearsed_file(file) if self.engine_of(file) == "simulated" else file

    def engine_of(self, file: RoundFile) -> str:
        """Where a round runs. Raises InputError for a name that is none, or a rehearsal to be trained."""
        engine = self.engine or file.spec.run.engine
        if engine not in ENGINES:
            raise InputError(f"--engine {engine}: expects one of {', '.join(ENGINES)}")
        if engine != "simulated" and is_rehearsal(file):
            raise InputError(
                f"{file.path}: this is a rehearsal's file; to train, run the round file in the study's own "
                "folder"
            )
        return engine


def run_here(
    file: RoundFile,
    where: Where,
    *,
    open_view: OpenView,
    stopping: Callable[[], bool],
    passes: int = 1,
) -> None:
    """Run or go on with a round on this machine, shown as it runs. Raises what `run_round` does."""
    file = with_plug_ins(file)
    is_simulated = where.engine_of(file) == "simulated"
    devices = () if is_simulated else visible_devices()
    used = devices if where.workers == "auto" else devices[: where.workers]
    view = open_view(file, gpu_meter(open_nvml(), used) if used else None)
    try:
        if is_simulated:
            _rehearse(file, where, view=view, stopping=stopping, passes=passes)
        else:
            view = followed(view, file.spec.run.report_to, _followed_round(file))
            make = partial(_local_worker, where=where, devices=devices)
            run_round(file, make_worker=make, view=view, stopping=stopping, passes=passes)
    finally:
        view.close()


def _local_worker(
    plan: RoundPlan, base: Callable[[], Evaluation | None], *, where: Where, devices: tuple[str, ...]
) -> Worker:
    """Processes on this machine, one for each of its GPUs or as many as are wanted."""

    def document() -> dict[str, object]:
        slots = where.slots or plan.spec.run.slots
        return worker_document(
            plan.absolute, slots=slots, cache=plan.cache, place=plan.checkpoints, base=base()
        )

    wait_for_former_workers(plan.checkpoints / "worker.lock")
    environments = worker_environments(where.workers, devices, cores=os.cpu_count() or 1)
    names = ["worker", *(f"worker-{number}" for number in range(1, len(environments)))]
    makers = [
        partial(LocalWorker, document, log=plan.checkpoints / f"{name}.log", environment=environment)
        for name, environment in zip(names, environments, strict=True)
    ]
    return makers[0]() if len(makers) == 1 else WorkerPool(makers)


def worker_document(
    spec: RoundSpec, *, slots: int | str, cache: Path, place: Path, base: Evaluation | None = None
) -> dict[str, object]:
    """What a worker process is told: the file with absolute paths, and what it need not find out.

    `place` is where its lock lies; `base` is the untouched base's evaluation, where it is known.
    """
    return {
        "spec": spec.model_dump(mode="json"),
        "slots": slots,
        "cache": str(cache),
        "lock": str(place / "worker.lock"),
        "base": None if base is None else to_json(base),
    }


def rerun_worker(spec: RoundSpec, *, cache: Path, place: Path) -> LocalWorker:
    """A process of its own with one slot, in which a trial runs again."""
    (environment,) = worker_environments(1, visible_devices(), cores=os.cpu_count() or 1)
    document = worker_document(spec, slots=1, cache=cache, place=place)
    return LocalWorker(lambda: document, log=place / "worker.log", environment=environment)


def _rehearse(
    file: RoundFile, where: Where, *, view: View, stopping: Callable[[], bool], passes: int
) -> None:
    workers: list[SimulatedWorker] = []

    def make(plan: RoundPlan, base: Callable[[], Evaluation | None]) -> Worker:
        slots = where.slots or plan.spec.run.slots
        workers.append(simulated_worker(plan, slots=slots))
        return workers[-1]

    view.message(REHEARSAL_BANNER)
    clock = virtual_clock(time.time(), workers)
    run_round(file, make_worker=make, view=view, stopping=stopping, passes=passes, clock=clock)
    view.message(f"{sum(worker.seconds for worker in workers):.0f} seconds were simulated")


def _followed_round(file: RoundFile) -> FollowedRound:
    spec = file.spec.absolute(file.directory)
    return FollowedRound(
        study=spec.study,
        round=spec.round,
        goal=spec.goal,
        max_train_steps=spec.max_train_steps,
        checkpoints=Path(spec.checkpoints.directory),
    )


def has_begun(file: RoundFile) -> bool:
    """Whether the round is in the study's facts."""
    store = open_folder(file.directory).open()
    try:
        return any(record.name == file.spec.round for record in store.rounds())
    finally:
        store.close()
