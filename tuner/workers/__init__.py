"""Where trials run: a process on this machine, or a simulation on a virtual clock.

A worker takes Assignments and says Events. It knows trials and directories, never a database.
"""

from tuner.workers.local import LocalWorker
from tuner.workers.protocol import Worker
from tuner.workers.simulated import SimulatedWorker

__all__ = ["LocalWorker", "SimulatedWorker", "Worker"]
