"""Where trials run: a process on this machine, or a simulation on a virtual clock.

A worker takes Assignments and says Events. It knows trials and directories, never a database.
"""

from tuner.workers.devices import visible_devices, worker_environments
from tuner.workers.formula import LoraFormula
from tuner.workers.local import LocalWorker, wait_for_former_workers
from tuner.workers.nvml import driver_version, gpu_meter, open_nvml
from tuner.workers.pool import WorkerPool
from tuner.workers.protocol import Worker
from tuner.workers.recorded import RecordedCurves
from tuner.workers.simulated import SimulatedWorker

__all__ = [
    "LocalWorker",
    "LoraFormula",
    "RecordedCurves",
    "SimulatedWorker",
    "Worker",
    "WorkerPool",
    "driver_version",
    "gpu_meter",
    "open_nvml",
    "visible_devices",
    "wait_for_former_workers",
    "worker_environments",
]
