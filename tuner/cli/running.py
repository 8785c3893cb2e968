"""What verbs that run rounds are wired to: a worker process, the live view, signals and the clock."""

from __future__ import annotations

import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

import typer

from tuner.cli.printing import REHEARSAL_BANNER, error_output, next_command, say, spoken_by
from tuner.errors import InputError, Interrupted, RoundStopped
from tuner.records import Evaluation, searched, to_json
from tuner.report import open_view
from tuner.report.elsewhere import FollowedRound, followed
from tuner.spec import RoundFile, load_round
from tuner.study.folder import is_rehearsal, open_folder
from tuner.study.plan import RoundPlan
from tuner.study.rehearsal import rehearsed_file, simulated_worker, virtual_clock
from tuner.study.running import run_round
from tuner.workers import (
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

ENGINES = ("local", "simulated")
"""What `run.engine` and `--engine` may say."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Where:
    """Where and how rounds are run, as typed; never what they do."""

    slots: str | None = None
    workers: str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        for option, text in (("--slots", self.slots), ("--workers", self.workers)):
            parse_count(option, text or "auto")

    @property
    def options(self) -> str:
        """What a command that goes on has to say of it."""
        return "" if self.engine is None else f" --engine {self.engine}"

    def file(self, path: Path) -> RoundFile:
        """The file that is run: the rehearsal's copy with the engine `simulated`."""
        file = load_round(path)
        return rehearsed_file(file) if _engine(file, self.engine) == "simulated" else file


def run_file(path: Path, *, duration: str | None, where: Where) -> Path | None:
    """Run or go on with a round, showing it live on standard error; returns the file there is to report on.

    With the engine `simulated` that is the rehearsal's copy. It is None when the time was over before base
    and data were loaded for the first time. Raises Interrupted, naming the command that goes on, when a
    signal asked to stop.
    """
    command = f"tuner study run {shlex.quote(str(path))}{where.options}"
    with interruptible(command, duration=duration) as stopping:
        file = where.file(path)
        run_here(file, where, stopping=stopping)
    return file.path if has_begun(file) else None


@contextmanager
def interruptible(command: str, *, duration: str | None) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether to stop: a signal came, or the time is over.

    What stops on the way names the command that goes on, as it has to be typed here. The end of the time is
    no failure: it is said, and the block is left.
    """
    again = next_command(command)
    deadline = None if duration is None else time.monotonic() + parse_duration(duration)
    with stop_signals("stopping: saving every trial (once more ends at once)") as was_signalled:
        try:
            yield lambda: was_signalled() or (deadline is not None and time.monotonic() > deadline)
        except Interrupted as stop:
            if was_signalled():
                raise Interrupted(f"{stop}; go on with: {again}") from stop
            typer.echo(f"{duration} are over: {stop}; go on with: {again}", err=True)
        except RoundStopped as stop:
            raise RoundStopped(f"{stop}; then go on with: {again}") from stop


def run_here(file: RoundFile, where: Where, *, stopping: Callable[[], bool], passes: int = 1) -> None:
    """Run or go on with a round, showing it live on standard error. Raises what `run_round` does."""
    wanted_slots = None if where.slots is None else parse_count("--slots", where.slots)
    wanted_workers = parse_count("--workers", where.workers or "auto")
    is_simulated = _engine(file, where.engine) == "simulated"
    devices = () if is_simulated else visible_devices()
    used = devices if wanted_workers == "auto" else devices[:wanted_workers]
    view = open_view(
        console=error_output(),
        title=f"{file.spec.study}/{file.spec.round}",
        trials_total=file.spec.num_trials,
        max_train_steps=file.spec.max_train_steps,
        searched=tuple(searched(file.spec.space())),
        gpus=gpu_meter(open_nvml(), used) if used else None,
    )

    def make_worker(plan: RoundPlan, base: Callable[[], Evaluation | None]) -> Worker:
        def document() -> dict[str, object]:
            known = base()
            return {
                "spec": plan.absolute.model_dump(mode="json"),
                "slots": wanted_slots or plan.spec.run.slots,
                "cache": str(plan.cache),
                "lock": str(plan.checkpoints / "worker.lock"),
                "base": None if known is None else to_json(known),
            }

        lock = plan.checkpoints / "worker.lock"
        wait_for_former_workers(lock)
        environments = worker_environments(wanted_workers, devices, cores=os.cpu_count() or 1)
        names = ["worker", *(f"worker-{number}" for number in range(1, len(environments)))]
        makers = [
            partial(LocalWorker, document, log=plan.checkpoints / f"{name}.log", environment=environment)
            for name, environment in zip(names, environments, strict=True)
        ]
        return makers[0]() if len(makers) == 1 else WorkerPool(makers)

    simulated: list[SimulatedWorker] = []

    def make_simulated(plan: RoundPlan, base: Callable[[], Evaluation | None]) -> Worker:
        simulated.append(simulated_worker(plan, slots=wanted_slots or plan.spec.run.slots))
        return simulated[-1]

    with spoken_by(view.message):
        try:
            if is_simulated:
                view.message(REHEARSAL_BANNER)
                clock = virtual_clock(time.time(), simulated)
                run_round(
                    file, make_worker=make_simulated, view=view, stopping=stopping, passes=passes, clock=clock
                )
                view.message(f"{sum(worker.seconds for worker in simulated):.0f} seconds were simulated")
            else:
                view = followed(view, file.spec.run.report_to, _followed_round(file))
                run_round(file, make_worker=make_worker, view=view, stopping=stopping, passes=passes)
        finally:
            view.close()


def _followed_round(file: RoundFile) -> FollowedRound:
    spec = file.spec.absolute(file.directory)
    return FollowedRound(
        study=spec.study,
        round=spec.round,
        goal=spec.goal,
        max_train_steps=spec.max_train_steps,
        checkpoints=Path(spec.checkpoints.directory),
    )


def _engine(file: RoundFile, wanted: str | None) -> str:
    """Where the round runs. Raises InputError for a name that is none, or a rehearsal to be trained."""
    engine = wanted or file.spec.run.engine
    if engine not in ENGINES:
        raise InputError(f"--engine {engine}: expects one of {', '.join(ENGINES)}")
    if engine != "simulated" and is_rehearsal(file):
        raise InputError(
            f"{file.path}: this is a rehearsal's file; to train, run the round file in the study's own folder"
        )
    return engine


def has_begun(file: RoundFile) -> bool:
    """Whether the round is in the study's facts."""
    store = open_folder(file.directory).open()
    try:
        return any(record.name == file.spec.round for record in store.rounds())
    finally:
        store.close()


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or `1h30m`. Raises InputError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if not seconds or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise InputError(f"--for {text!r}: expects a time such as 90s, 30m, 2h or 1h30m")
    return seconds


def parse_count(option: str, text: str) -> int | Literal["auto"]:
    """A whole number of at least 1, or auto. Raises InputError."""
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{option} {text!r}: expects auto or a whole number of at least 1")
    return int(text)


@contextmanager
def stop_signals(answer: str) -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM ask to stop, and are answered; a second one ends the process at once."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        # In a thread: what was interrupted may hold the lock of the very stream that this is written to.
        threading.Thread(target=say, args=(answer,), daemon=True).start()

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
