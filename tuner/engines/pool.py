"""Several workers as one: one per device, each with its own slots."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from tuner.engines.protocol import Worker
from tuner.records import Assignment, Died, Event, Ready, RunId

MAX_DEATHS = 2
"""Consecutive deaths before being ready after which a device counts as broken."""
_POLL_SECONDS = 0.02


class WorkerPool:
    """A worker that combines several. The first starts at once, the others with the first trial.

    By then, the first one has prepared the data and measured the base model, and the others reuse both.
    """

    def __init__(self, makers: Sequence[Callable[[], Worker]]) -> None:
        self._waiting = list(makers[1:])
        self._workers = [makers[0]()]
        self._holder: dict[RunId, Worker] = {}
        """Run -> its worker."""
        self._deaths: dict[Worker, int] = {}
        """Consecutive deaths of a worker before being ready."""

    def capacity(self) -> int:
        """Number of free slots in workers that are ready."""
        return sum(worker.capacity() for worker in self._workers)

    def start(self, assignment: Assignment) -> None:
        """Start a trial on the worker with the most free slots."""
        while self._waiting:
            self._workers.append(self._waiting.pop(0)())
        worker = max(self._workers, key=lambda worker: worker.capacity())
        self._holder[assignment.run] = worker
        worker.start(assignment)

    def stop(self, run: RunId) -> None:
        """Ask a run to save and stop."""
        if run in self._holder:
            self._holder[run].stop(run)

    def events(self, timeout_seconds: float) -> list[Event]:
        """Return all events since the last call; wait up to the timeout for the first."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            said = [event for worker in list(self._workers) for event in self._heard(worker)]
            left = deadline - time.monotonic()
            if said or left <= 0:
                return said
            time.sleep(min(_POLL_SECONDS, left))

    def _heard(self, worker: Worker) -> list[Event]:
        """Return a worker's events; drop a worker that keeps dying early if there is another."""
        said = worker.events(0.0)
        for event in said:
            if isinstance(event, Ready):
                self._deaths.pop(worker, None)
            elif isinstance(event, Died):
                self._deaths[worker] = self._deaths.get(worker, 0) + 1
                if self._deaths[worker] == MAX_DEATHS and len(self._workers) > 1:
                    self._workers.remove(worker)
        return said

    def close(self) -> None:
        """Save every trial, then end the workers one after another."""
        self._waiting.clear()
        for worker in self._workers:
            worker.close()
