"""What a worker can do: five methods, the same for a process, a machine far away and a simulation."""

from __future__ import annotations

from typing import Protocol

from tuner.records import Assignment, Event, RunId


class Worker(Protocol):
    """A place with slots in which trials run."""

    def capacity(self) -> int:
        """Slots that are free now."""
        ...

    def start(self, assignment: Assignment) -> None:
        """Begin a trial's attempt in a free slot. Its `Started` or `Ended` follows among the events."""
        ...

    def stop(self, run: RunId) -> None:
        """Ask a run to save itself and leave; its `Ended` with outcome `stopped` follows."""
        ...

    def events(self, timeout_seconds: float) -> list[Event]:
        """What was said since the last call, in order; waits for the first at most so long.

        After `Died` the worker holds no trial, and the next `start` begins a new one.
        """
        ...

    def close(self) -> None:
        """Save all trials, end, and leave what was said meanwhile for a last call of `events`."""
        ...
