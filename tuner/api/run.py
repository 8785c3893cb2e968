"""Connect a running round to an engine, a worker program, a view, the clock and what stops it."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from tuner.config import RoundFile, RoundSpec, load_round, with_plug_ins, without_secrets
from tuner.engines import (
    Engine,
    Job,
    LocalEngine,
    Program,
    Worker,
    end_all_processes,
    make_engine,
    start_workers,
)
from tuner.errors import InputError, Interrupted, RoundStopped, WorkerError
from tuner.methods.registry import expected, is_known
from tuner.playbook.reproduction import Reproduction
from tuner.process_log import harmless
from tuner.records import Evaluation, Trial, TrialState, to_json
from tuner.report import View
from tuner.report.format import GpuReading
from tuner.report.live import ProgressBar, Silence
from tuner.report.notify import NotifiedRound, Notifier
from tuner.report.trackers import FollowedRound, followed
from tuner.study.dry_run import dry_run_file, forgotten_if_refused
from tuner.study.folder import StudyFolder, dry_run_banner, is_dry_run, open_folder, opened
from tuner.study.plan import CACHE, RoundPlan
from tuner.study.reproduction import Rerun, planned_rerun, reproduce
from tuner.study.restoration import Take, restored
from tuner.study.run import recorded_data, run_round
from tuner.whole import keep_others_out

if TYPE_CHECKING:
    from tuner.data import PreparedData


TRAINING = ("-m", "tuner.training")
"""Interpreter arguments of the worker program that trains packed LoRA trials."""
COMMANDS = ("-m", "tuner.commands")
"""Of the one whose trials are runs of a command."""

Prepare = Callable[[RoundSpec, Path], "PreparedData"]
"""Prepares a round's rows in the folder of tokenised rows; may show progress."""
Tell = Callable[[str], None]
"""Receives the messages that the command line prints."""
Gpus = Callable[[], Sequence[GpuReading]]
EngineNamed = Callable[[str], Engine]
OpenView = Callable[[RoundFile, Gpus], View]
"""Opens the view of a running round; the second argument reads the GPUs in use."""


@dataclass(frozen=True)
class Where:
    """Where and how rounds run; never affects their results."""

    slots: int | Literal["auto"] | None = None
    """Trials trained together; None uses `run.slots`."""
    workers: int | Literal["auto"] = "auto"
    """Number of worker processes; auto uses every GPU, or one process without a GPU."""
    engine: str | None = None
    """None: as `run.engine` says."""
    ray_address: str | None = None
    """Cluster of the engine `ray`; None: as `run.ray_address` says."""
    notify: tuple[str, ...] = ()
    """A program and its arguments that is told the round's news; empty: as `run.notify` says."""

    def __post_init__(self) -> None:
        for name, number in (("slots", self.slots), ("workers", self.workers)):
            if number not in (None, "auto") and (type(number) is not int or number < 1):
                raise InputError(f"{name}={number!r}: expects auto or a whole number of at least 1")
        if self.engine is not None and not isinstance(self.engine, str):
            raise InputError(f"engine={self.engine!r}: expects a name, {expected('engine')}")

    @property
    def options(self) -> str:
        """Options to repeat in a command that resumes, without secrets: a log may keep what is printed."""
        given = {
            "slots": self.slots,
            "workers": None if self.workers == "auto" else self.workers,
            "engine": self.engine,
            "ray-address": self.ray_address,
            "notify": shlex.join(self.notify) or None,
        }
        options = (
            f" --{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None
        )
        return harmless("".join(options))

    def file(self, path: Path) -> RoundFile:
        """Return the file to run: the dry run's copy if the engine is `simulated`."""
        file = load_round(path)
        return dry_run_file(file) if self.engine_of(file) == "simulated" else file

    def engine_of(self, file: RoundFile) -> str:
        """Return a round's engine.

        Raises InputError for an unknown one, for training a dry run, or for a cluster that it does not use.
        """
        engine = self.engine or file.spec.run.engine
        if not is_known("engine", engine):
            raise InputError(f"--engine {engine}: expects {expected('engine')}")
        if engine != "simulated" and is_dry_run(file):
            raise InputError(
                f"{file.path}: this file belongs to a dry run; to train, run the file in the study's own "
                "folder"
            )
        if self.ray_address is not None and engine in ("local", "simulated"):
            raise InputError(
                f"--ray-address {self.ray_address}: the engine {engine} uses no cluster; add --engine ray"
            )
        return engine


@contextmanager
def keeping_workers() -> Iterator[EngineNamed]:
    """Return what makes engines for several rounds: the local one keeps its workers between them."""
    local = LocalEngine(keeps_workers=True)
    try:
        yield lambda name: local if name == "local" else make_engine(name)
    finally:
        local.end_workers()


def run_here(
    file: RoundFile,
    where: Where,
    *,
    open_view: OpenView,
    stopping: Callable[[], bool],
    restarts: int = 0,
    engine_named: EngineNamed = make_engine,
) -> None:
    """Start or resume a round on its engine, with a live view. Raises what `run_round` does."""
    with forgotten_if_refused(file):
        _run_here(
            with_plug_ins(file),
            where,
            open_view=open_view,
            stopping=stopping,
            restarts=restarts,
            engine_named=engine_named,
        )


def _run_here(
    file: RoundFile,
    where: Where,
    *,
    open_view: OpenView,
    stopping: Callable[[], bool],
    restarts: int,
    engine_named: EngineNamed,
) -> None:
    name = where.engine_of(file)
    is_dry_run = name == "simulated"
    try:
        engine = engine_named(name)
    except InputError as error:
        raise file.placed(error) from None
    begun_at = engine.now()
    view = open_view(file, engine.gpu_readings)
    umask = keep_others_out()
    notifier = None
    try:
        if is_dry_run:
            view.message(dry_run_banner(file.directory))
        else:
            view = followed(view, file.spec.run.report_to, _followed_round(file))
            if command := where.notify or file.spec.run.notify:
                view = notifier = Notifier(view, _notified_round(file, command))

        def start(plan: RoundPlan, base: Callable[[], Evaluation | None]) -> Worker:
            return start_workers(engine, replace(round_job(plan, base, where), say=view.message))

        passes = restarts + 1
        with nullcontext() if notifier is None else _end_notified(notifier):
            run_round(file, make_worker=start, view=view, stopping=stopping, passes=passes, clock=engine.now)
            if is_dry_run:
                view.message(f"{engine.now() - begun_at:.0f} seconds simulated")
    except InputError as error:
        raise file.placed(error) from None
    finally:
        os.umask(umask)
        engine.close()
        view.close()


@contextmanager
def _end_notified(notifier: Notifier) -> Iterator[None]:
    """Tell how the round in the block ended, unless its input was bad."""
    try:
        yield
    except Interrupted as stop:
        notifier.ended("stopped", str(stop))
        raise
    except (WorkerError, RoundStopped) as error:
        notifier.ended("failed", str(error))
        raise
    notifier.ended("complete")


def round_job(plan: RoundPlan, base: Callable[[], Evaluation | None], where: Where) -> Job:
    """Return the engine's job for a round; `base` returns the base model's evaluation once known."""
    spec = plan.absolute
    if spec.command is not None and where.slots not in (None, 1, "auto"):
        raise InputError(
            f"--slots {where.slots}: a command trains one trial at a time; use --workers for more"
        )
    run = spec.run.model_copy(
        update={
            "slots": where.slots or spec.run.slots,
            "engine": where.engine or spec.run.engine,
            "ray_address": where.ray_address or spec.run.ray_address,
        }
    )
    with opened(open_folder(plan.file.directory)) as store:
        first = next((record.max_train_steps for record in store.rounds()), spec.max_train_steps)

    def trials() -> Sequence[Trial]:
        with opened(open_folder(plan.file.directory)) as store:
            return store.trials(plan.name)

    return _job(
        spec.model_copy(update={"run": run}),
        directory=plan.checkpoints,
        beside=plan.file.directory,
        base=base,
        data=lambda: recorded_data(plan),
        trials=trials,
        workers=where.workers,
        first_horizon=first,
    )


def _job(
    spec: RoundSpec,
    *,
    directory: Path,
    beside: Path,
    base: Callable[[], Evaluation | None] = lambda: None,
    data: Callable[[], str | None] = lambda: None,
    trials: Callable[[], Sequence[Trial]] = lambda: (),
    workers: int | Literal["auto"] = 1,
    first_horizon: int = 1,
) -> Job:
    """Return a job for the program of the round, including what the parent already knows.

    `beside` is the folder of the round file. Raises InputError for more GPUs per worker than its model uses.
    """
    of_one_gpu = [("loader", "unsloth", "transformers"), ("kernels", "liger", "torch")]
    for key, one_gpu, several in of_one_gpu:
        if spec.run.gpus_per_worker > 1 and spec.command is None and getattr(spec.model, key) == one_gpu:
            raise InputError(
                f"run.gpus_per_worker: {spec.run.gpus_per_worker}: model.{key}: {one_gpu} uses one GPU; set "
                f"model.{key}: {several}, or remove this line"
            )

    def document() -> dict[str, object]:
        known = base()
        return {
            "spec": spec.model_dump(mode="json") | {"storage": without_secrets(spec.storage)},
            "slots": spec.run.slots,
            "cache": str(beside / CACHE),
            "lock": str(directory / "worker.lock"),
            "base": None if known is None else to_json(known),
            "data": data(),
        }

    def document_of_command() -> dict[str, object]:
        before = trials()
        return {
            **document(),
            "directory": str(beside),
            "has_reported": any(e.step for trial in before for e in trial.evaluations),
            "has_completed": any(trial.state == TrialState.COMPLETE for trial in before),
        }

    program = Program(TRAINING, document) if spec.command is None else Program(COMMANDS, document_of_command)
    return Job(spec, program, directory, workers, first_horizon, beside / CACHE)


def run_again(
    rerun: Rerun,
    *,
    view: View,
    stopping: Callable[[], bool],
    where: Where | None = None,
    take: Take | None = None,
) -> Reproduction:
    """Run a trial again in one worker with one slot, on its plan's engine. Raises what `reproduce` does."""
    engine = make_engine(rerun.spec.run.engine)
    address = (where and where.ray_address) or rerun.spec.run.ray_address

    def start(spec: RoundSpec, *, cache: Path, place: Path) -> Worker:
        alone = spec.model_copy(
            update={"run": spec.run.model_copy(update={"slots": 1, "ray_address": address})}
        )
        job = replace(_job(alone, directory=place, beside=cache.parent), say=view.message)
        return start_workers(engine, job)

    try:
        return reproduce(rerun, make_worker=start, view=view, stopping=stopping, take=take)
    finally:
        engine.close()
        view.close()


def restored_adapter(
    folder: StudyFolder,
    trial: Trial,
    *,
    open_view: Callable[[Rerun], View],
    stopping: Callable[[], bool],
    where: Where | None = None,
) -> tuple[str, Reproduction | None]:
    """Put a trial's best adapter back; see `restored`.

    `open_view` shows a new run, where one is needed; it runs as `where` says, by default as the round.
    """

    def write_best(directory: Path, target: Path, sha256: str) -> None:
        from tuner.training.checkpoints import write_best_of  # loads torch: only where there is a copy

        write_best_of(directory, target, sha256=sha256)

    def again(take: Take) -> Reproduction:
        engine = None if where is None else where.engine
        rerun = planned_rerun(folder, trial, to_step=None, engine=engine)
        return run_again(rerun, view=open_view(rerun), stopping=stopping, where=where, take=take)

    return restored(folder, trial, write_best=write_best, run_again=again)


def view_of(progress: bool) -> OpenView:
    """Return a function that opens a bar for each round, or shows nothing."""

    def view(file: RoundFile, gpus: Gpus) -> View:
        spec = file.spec
        return shown(progress, f"{spec.study}/{spec.round}", spec.num_trials, spec.max_train_steps)

    return view


def shown(progress: bool, title: str, trials_total: int, max_train_steps: int) -> View:
    """Open a bar, in a terminal or in a notebook's cell, or show nothing."""
    if not progress:
        return Silence()
    return ProgressBar(title=title, trials_total=trials_total, max_train_steps=max_train_steps)


def unsaid(text: str) -> None:
    """Ignore messages for the command line; a caller of the library finds them in the result."""


def prepared_quietly(spec: RoundSpec, cache: Path) -> PreparedData:
    """Prepare a round's rows silently."""
    from tuner.data import load_tokenizer, prepare

    return prepare(spec, load_tokenizer(spec.model), cache, unsaid)


def _notified_round(file: RoundFile, command: Sequence[str]) -> NotifiedRound:
    spec = file.spec
    return NotifiedRound(spec.study, spec.round, file.directory, spec.max_train_steps, command)


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
    """Return whether the round is in the study's facts."""
    if is_dry_run(file) and not file.path.exists():  # `forgotten_if_refused`
        return False
    with opened(open_folder(file.directory)) as store:
        return store.round(file.spec.round) is not None


@dataclass
class Stopping:
    """Check for whether to stop, called between two events of a round."""

    deadline: float | None = None
    """Deadline by `time.monotonic()`; None for no limit."""
    was_interrupted: bool = False

    def __call__(self) -> bool:
        """Return whether to stop now."""
        return self.was_interrupted or (self.deadline is not None and time.monotonic() > self.deadline)

    @contextmanager
    def returning_at_the_end(self, has_begun: Callable[[], bool]) -> Iterator[None]:
        """Leave the block without an error when time is up, if there is a round to return."""
        try:
            yield
        except Interrupted:
            if self.was_interrupted or not has_begun():
                raise


_SECONDS_TO_END = 4.0


def end_now() -> None:
    """End every worker without saving, and raise Interrupted; end this process if that takes too long."""
    watchdog = threading.Timer(_SECONDS_TO_END, os._exit, [Interrupted.exit_code])
    watchdog.daemon = True
    watchdog.start()
    end_all_processes()
    raise Interrupted("ended at once; what was saved before is kept")


def let_go_of_terminal() -> None:
    """Read and write nothing where the terminal was: it is gone, and each write to it would fail."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        # A terminal that has hung up is none any more; its descriptor is still that of a character device.
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(null, descriptor)
    os.close(null)


@contextmanager
def interruptible(
    seconds: float | None = None,
    *,
    signals: Sequence[signal.Signals] = (signal.SIGINT,),
    answer: Callable[[], None] = lambda: None,
    second: Callable[[], None] | None = None,
) -> Iterator[Stopping]:
    """Ask to stop on the first of the signals, such as Ctrl-C or a notebook's stop button.

    `answer` is then called in a thread, because the interrupted code may hold the lock of the stream that
    `answer` writes to. `second` is called at the next signal; None leaves that to the previous handler. A
    terminal that hangs up says so several times, which counts once.
    Handlers are set on the main thread only and restored at the end; other threads only have the time limit.
    """
    if seconds is not None and (not isinstance(seconds, (int, float)) or not seconds >= 0):
        raise InputError(f"seconds={seconds!r}: expects a number of at least 0")
    stopping = Stopping(None if seconds is None else time.monotonic() + seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in signals}

    def receive(number: int, _: FrameType | None) -> None:
        is_first, stopping.was_interrupted = not stopping.was_interrupted, True
        if number == getattr(signal, "SIGHUP", None):
            signal.signal(number, signal.SIG_IGN)
            let_go_of_terminal()
        elif not is_first and second is not None:
            second()
        elif second is None:
            signal.signal(number, before[signal.Signals(number)])
        if is_first:
            threading.Thread(target=answer, daemon=True).start()

    for number in signals:
        signal.signal(number, receive)
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
