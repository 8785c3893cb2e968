"""The seam of engines: what an engine is asked to run, and what it gives back.

An engine decides where workers run; a worker program decides what a trial is. Neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from tuner.config import RoundSpec
from tuner.records import Assignment, Event, RunId
from tuner.report.format import GpuReading


@dataclass(frozen=True)
class Program:
    """A worker program: a process that reads commands and says events, each a JSON document on a line.

    It says `Ready` before it takes an assignment, and `Died` when it cannot begin. At the end of its input it
    ends.
    """

    arguments: tuple[str, ...]
    """What follows the Python interpreter of the machine that it runs on: `("-m", "tuner.training")`."""
    document: Callable[[], Mapping[str, Any]]
    """The first line of its input, asked for at each start; it holds JSON values only."""


@dataclass(frozen=True)
class Job:
    """The work of one round, or of one trial that is run again."""

    spec: RoundSpec
    """The round file with absolute paths; options of the command are in its `run` section."""
    program: Program
    directory: Path
    """Of the round's checkpoints, on this machine. The workers' logs and lock go there too."""
    workers: int | Literal["auto"] = "auto"
    """The most workers to start; `auto` is one for each device."""
    first_horizon: int = 1
    """`max_train_steps` of the study's first round: the pace of synthetic losses."""


class Worker(Protocol):
    """A place with slots in which trials run: one process, several heard as one, or a simulation."""

    def capacity(self) -> int:
        """Return the number of slots that are free now."""
        ...

    def start(self, assignment: Assignment) -> None:
        """Begin a trial's attempt in a free slot. Its `Started` or `Ended` follows among the events."""
        ...

    def stop(self, run: RunId) -> None:
        """Ask a run to save itself and leave; its `Ended` with outcome `stopped` follows."""
        ...

    def events(self, timeout_seconds: float) -> list[Event]:
        """Return what was said since the last call, in order; wait for the first at most so long.

        After `Died` the worker holds no trial, and the next `start` begins a new one.
        """
        ...

    def close(self) -> None:
        """Save all trials, end, and leave what was said meanwhile for a last call of `events`.

        A second call does nothing.
        """
        ...


class Engine(Protocol):
    """Where the workers of a round run.

    A class with this interface can be named by `run.engine` and `--engine`. It is made without arguments for
    each run of a round and closed at its end; making it must neither start nor connect to anything.
    """

    def start(self, job: Job) -> Worker:
        """Start the job's program on the devices that it may use, and return all of them as one worker.

        Called again when a worker died before it was ready; by then that one is closed. Raises InputError
        when the job cannot run here whatever is done, such as more workers than devices: nothing is recorded
        then. Raises WorkerError when another try may succeed.
        """
        ...

    def gpu_readings(self) -> Sequence[GpuReading]:
        """Return how busy the devices in use are; empty where nothing is known, and before `start`.

        The live view asks about once a second, from a thread of its own.
        """
        ...

    def now(self) -> float:
        """Return the time in seconds since the epoch; an engine that trains nothing may invent it."""
        ...

    def close(self) -> None:
        """Let go of what `start` took besides the workers, which are closed first. May be repeated."""
        ...
