"""The interface of engines and workers.

An engine decides where workers run; a worker program decides what a trial is. Neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from tuner.config import RoundSpec
from tuner.records import Assignment, Event, RunId
from tuner.report.format import GpuReading


@dataclass(frozen=True)
class Program:
    """A worker program: a process that reads commands and writes events, each a JSON document on a line.

    It sends `Ready` before it takes an assignment, and `Died` if it cannot start. It ends at the end of its
    input.
    """

    arguments: tuple[str, ...]
    """Arguments for the Python interpreter of its machine: `("-m", "tuner.training")`."""
    document: Callable[[], Mapping[str, Any]]
    """Returns the first line of its input, called at each start; JSON values only."""


@dataclass(frozen=True)
class Job:
    """The work of one round, or of one trial to run again."""

    spec: RoundSpec
    """The round file with absolute paths; its `run` section includes the command's options."""
    program: Program
    directory: Path
    """Folder of the round's checkpoints on this machine, also for the workers' logs and lock."""
    workers: int | Literal["auto"] = "auto"
    """Maximum number of workers; `auto` is one per device."""
    first_horizon: int = 1
    """`max_train_steps` of the study's first round: sets the pace of synthetic losses."""
    cache: Path | None = None
    """Folder of tokenised rows on this machine; None if the program keeps none."""
    say: Callable[[str], None] = lambda _: None
    """Receives messages for the user, such as which machines are used; call it in the main thread only."""


class Worker(Protocol):
    """Slots in which trials run: one process, several combined, or a simulation."""

    def capacity(self) -> int:
        """Return the number of free slots."""
        ...

    def start(self, assignment: Assignment) -> None:
        """Start a trial's attempt in a free slot. Its `Started` or `Ended` follows as an event."""
        ...

    def stop(self, run: RunId) -> None:
        """Ask a run to save and stop; its `Ended` with outcome `stopped` follows.

        Of a run that it does not hold any more, since it ended or died, nothing is asked.
        """
        ...

    def events(self, timeout_seconds: float) -> list[Event]:
        """Return the events since the last call, in order; wait up to the timeout for the first.

        After `Died`, the worker holds no trial, and the next `start` starts a new process.
        """
        ...

    def close(self) -> None:
        """Save all trials and end; a last call of `events` returns the remaining events.

        Repeated calls do nothing.
        """
        ...


@runtime_checkable
class HasProcesses(Protocol):
    """What a Worker that runs processes has besides."""

    def kill(self) -> None:
        """End them at once, without saving: another run of the study has taken over."""
        ...


class Engine(Protocol):
    """Where the workers of a round run.

    `run.engine` and `--engine` can name a class with this interface. An instance is created without arguments
    for each run of a round and closed at its end; creating one must neither start nor connect to anything.
    """

    def start(self, job: Job) -> Worker:
        """Start the job's program on its devices, and return them as one worker.

        Called again if a worker died before it was ready, after closing it. Raises InputError if the job can
        never run here, such as with more workers than devices; nothing is recorded then. Raises WorkerError
        if another try may succeed.
        """
        ...

    def gpu_readings(self) -> Sequence[GpuReading]:
        """Return how busy the devices in use are; empty if unknown, and before `start`.

        The live view calls this about once a second, from a separate thread.
        """
        ...

    def now(self) -> float:
        """Return the time in seconds since the epoch; a simulation may use a virtual clock."""
        ...

    def close(self) -> None:
        """Release what `start` acquired besides the workers, which are closed first. May be repeated.

        Of an engine of yours, it is called only after `start`, and an error in it is shown as a warning.
        """
        ...
