"""Where workers run: on this machine, in a simulation on a virtual clock, or in a custom engine.

A worker takes Assignments and reports Events. It knows trials and directories, never a database.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from tuner.engines.devices import driver_version, gpu_meter, open_nvml, visible_devices, worker_environments
from tuner.engines.local import LocalEngine, LocalProcess, wait_for_former_workers
from tuner.engines.program import Process, ProgramWorker, WorkerPool, end_all_processes, end_at_once
from tuner.engines.protocol import Engine, Job, Program, Worker
from tuner.engines.ray.engine import RayEngine
from tuner.engines.simulated import SimulatedEngine, SimulatedWorker
from tuner.engines.synthetic import LoraFormula, RecordedCurves
from tuner.errors import InputError, TunerError, WorkerError, last_words, one_of
from tuner.methods.registry import load
from tuner.records import Assignment, Event, RunId
from tuner.report.format import GpuReading

__all__ = [
    "Engine",
    "Job",
    "LocalEngine",
    "LocalProcess",
    "LoraFormula",
    "Process",
    "Program",
    "ProgramWorker",
    "RayEngine",
    "RecordedCurves",
    "SimulatedEngine",
    "SimulatedWorker",
    "Worker",
    "WorkerPool",
    "driver_version",
    "end_all_processes",
    "end_at_once",
    "gpu_meter",
    "make_engine",
    "open_nvml",
    "start_workers",
    "visible_devices",
    "wait_for_former_workers",
    "worker_environments",
]

_log = logging.getLogger(__name__)
_BUILT_IN: dict[str, Callable[[], Engine]] = {
    "local": LocalEngine,
    "ray": RayEngine,
    "simulated": SimulatedEngine,
}


def make_engine(name: str) -> Engine:
    """Create an engine by name: built in, registered by an installed package, or `package.module:Name`.

    Raises InputError if it cannot be imported or is not an engine.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]()
    made = _made(name, load("engine", name))
    missing = [method for method in _METHODS if not callable(getattr(made, method, None))]
    if missing:
        raise InputError(f"engine {name}: {type(made).__name__} has no method {one_of(missing)}")
    return _ForeignEngine(made)  # type: ignore[arg-type]


def start_workers(engine: Engine, job: Job) -> Worker:
    """Return the job's workers. Raises what `Engine.start` may, and WorkerError for any other error of it."""
    name = engine.name if isinstance(engine, _ForeignEngine) else type(engine).__name__
    with _named(f"{name} could not start the workers"):
        return engine.start(job)


class _ForeignEngine:
    """An engine that tuner does not have, whose errors name it, as do those of its workers.

    It is closed only if it was asked to start. What goes wrong then is a message: it must not hide how the
    round ended.
    """

    def __init__(self, inner: Engine) -> None:
        self._inner, self.name = inner, type(inner).__name__
        self._say: Callable[[str], None] | None = None
        """Set by `start`."""
        self._is_blind = False

    def start(self, job: Job) -> Worker:
        """As `Engine` says."""
        self._say = job.say
        worker: object = self._inner.start(job)
        missing = [method for method in _WORKER_METHODS if not callable(getattr(worker, method, None))]
        if missing:
            returned = type(worker).__name__
            raise WorkerError(f"{self.name}.start returned a {returned} without {one_of(missing)}")
        return _ForeignWorker(worker, self.name)  # type: ignore[arg-type]

    def gpu_readings(self) -> Sequence[GpuReading]:
        """As `Engine` says; after an error, which the thread that draws has nobody to tell, none."""
        try:
            return () if self._is_blind else tuple(self._inner.gpu_readings())
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything
            self._is_blind = True
            _log.warning("%s raised in gpu_readings: %s", self.name, last_words(error, __file__))
            return ()

    def now(self) -> float:
        """As `Engine` says."""
        with _named(f"{self.name} raised in now"):
            return self._inner.now()

    def close(self) -> None:
        """As `Engine` says."""
        if self._say is None:
            return
        try:
            self._inner.close()
        except Exception as error:  # noqa: BLE001  a plug-in may raise anything
            self._say(f"warning: {self.name} raised in close: {last_words(error, __file__)}")


class _ForeignWorker:
    """A worker of an engine that tuner does not have, whose errors name it."""

    def __init__(self, inner: Worker, engine: str) -> None:
        self._inner, self._engine = inner, engine

    def capacity(self) -> int:
        """As `Worker` says."""
        with self._named("capacity"):
            return self._inner.capacity()

    def start(self, assignment: Assignment) -> None:
        """As `Worker` says."""
        with self._named("start"):
            self._inner.start(assignment)

    def stop(self, run: RunId) -> None:
        """As `Worker` says."""
        with self._named("stop"):
            self._inner.stop(run)

    def events(self, timeout_seconds: float) -> list[Event]:
        """As `Worker` says."""
        with self._named("events"):
            return self._inner.events(timeout_seconds)

    def close(self) -> None:
        """As `Worker` says."""
        with self._named("close"):
            self._inner.close()

    def kill(self) -> None:
        """As `HasProcesses` says."""
        with self._named("kill"):
            end_at_once(self._inner)

    def _named(self, method: str) -> AbstractContextManager[None]:
        return _named(f"a worker of {self._engine} raised in {method}")


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Begin the message of an error of a plug-in with what went wrong."""
    try:
        yield
    except (TunerError, OSError):
        raise
    except Exception as error:  # a plug-in may raise anything
        raise WorkerError(f"{what}: {last_words(error, __file__, contextlib.__file__)}") from error


_METHODS = ("start", "gpu_readings", "now", "close")
_WORKER_METHODS = ("capacity", "start", "stop", "events", "close")


def _made(name: str, found: object) -> object:
    try:
        return found()  # type: ignore[operator]
    except Exception as error:  # it may raise anything
        said = last_words(error, __file__)
        raise InputError(f"engine {name}: cannot be created without arguments: {said}") from error
