"""Where trials run: a process on this machine, or a simulation on a virtual clock.

A worker takes Assignments and says Events. It knows trials and directories, never a database.
"""

from tuner.engines.devices import driver_version, gpu_meter, open_nvml, visible_devices, worker_environments
from tuner.engines.local import LocalWorker, wait_for_former_workers
from tuner.engines.pool import WorkerPool
from tuner.engines.protocol import Worker
from tuner.engines.simulated import SimulatedWorker
from tuner.engines.synthetic import LoraFormula, RecordedCurves

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
