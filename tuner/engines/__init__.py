"""Where workers run: on this machine, in a simulation on a virtual clock, or in a custom engine.

A worker takes Assignments and reports Events. It knows trials and directories, never a database.
"""

from __future__ import annotations

from tuner.engines.devices import driver_version, gpu_meter, open_nvml, visible_devices, worker_environments
from tuner.engines.local import LocalEngine, LocalProcess, wait_for_former_workers
from tuner.engines.program import Process, ProgramWorker, WorkerPool, end_all_processes
from tuner.engines.protocol import Engine, Job, Program, Worker
from tuner.engines.ray.engine import RayEngine
from tuner.engines.simulated import SimulatedEngine, SimulatedWorker
from tuner.engines.synthetic import LoraFormula, RecordedCurves
from tuner.errors import InputError, TunerError, WorkerError, last_words, one_of
from tuner.methods.registry import load

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
    """Return the job's workers. Raises what `Engine.start` may, and WorkerError for any other error of it."""
    try:
        return engine.start(job)
    except (TunerError, OSError):
        raise
    except Exception as error:  # a plug-in may raise anything
        said = last_words(error, __file__)
        raise WorkerError(f"{type(engine).__name__} could not start the workers: {said}") from error


_METHODS = ("start", "gpu_readings", "now", "close")


def _made(name: str, found: object) -> object:
    try:
        return found()  # type: ignore[operator]
    except Exception as error:  # it may raise anything
        said = last_words(error, __file__)
        raise InputError(f"engine {name}: cannot be created without arguments: {said}") from error
