"""Where workers run: on this machine, in a simulation on a virtual clock, or in a custom engine.

A worker takes Assignments and reports Events. It knows trials and directories, never a database.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

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

_BUILT_IN = {"local": LocalEngine, "ray": RayEngine, "simulated": SimulatedEngine}


def make_engine(name: str) -> Engine:
    """Create an engine by name: built in, registered by an installed package, or `package.module:Name`.

    Raises InputError if it cannot be imported or is not an engine.
    """
    made: object = _BUILT_IN[name]() if name in _BUILT_IN else _made(name, load("engine", name))
    missing = [method for method in _METHODS if not callable(getattr(made, method, None))]
    if missing:
        raise InputError(f"engine {name}: {type(made).__name__} has no method {one_of(missing)}")
    return made  # type: ignore[return-value]


def start_workers(engine: Engine, job: Job) -> Worker:
    """Return the job's workers. Raises what `Engine.start` may, and WorkerError for any other error of it.

    So do methods of workers that an engine of the user's returns.
    """
    name = type(engine).__name__
    try:
        worker: object = engine.start(job)
    except (TunerError, OSError):
        raise
    except Exception as error:  # a plug-in may raise anything
        said = last_words(error, __file__)
        raise WorkerError(f"{name} could not start the workers: {said}") from error
    if type(engine) in _BUILT_IN.values():
        return worker  # type: ignore[return-value]
    missing = [method for method in _WORKER_METHODS if not callable(getattr(worker, method, None))]
    if missing:
        raise WorkerError(f"{name}.start returned a {type(worker).__name__} without {one_of(missing)}")
    return _ForeignWorker(worker, name)  # type: ignore[arg-type]


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

    @contextmanager
    def _named(self, method: str) -> Iterator[None]:
        try:
            yield
        except (TunerError, OSError):
            raise
        except Exception as error:  # a plug-in may raise anything
            said = last_words(error, __file__, contextlib.__file__)
            raise WorkerError(f"a worker of {self._engine} raised in {method}: {said}") from error


_METHODS = ("start", "gpu_readings", "now", "close")
_WORKER_METHODS = ("capacity", "start", "stop", "events", "close")


def _made(name: str, found: object) -> object:
    try:
        return found()  # type: ignore[operator]
    except Exception as error:  # it may raise anything
        said = last_words(error, __file__)
        raise InputError(f"engine {name}: cannot be created without arguments: {said}") from error
