"""A worker program's side of its pipes: its parent's commands on standard input, events on standard output.

One JSON document a line. The end of input means that the parent is gone.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tuner.records import Assignment, Event, RunId, assignment_from_json, event_to_json, from_json

RESTING = "resting between two rounds"
"""What a worker says that it does once it holds nothing of a round any more."""


def event_writer() -> Callable[[Event], None]:
    """Return a function that sends an event to the parent.

    From now on standard output, whatever prints there, goes to standard error, which the parent keeps as the
    worker's log.
    """
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(event: Event) -> None:
        with lock:
            events.write(json.dumps(event_to_json(event)) + "\n")
            events.flush()

    return say


class CommandReader:
    """Assignments to start, trials to stop, and whether to close."""

    def __init__(self, lines: TextIO, *, on_parent_gone: Callable[[], None] = lambda: os._exit(1)) -> None:
        self.closed = False
        """Whether the round is over for this worker."""
        self.rests = False
        """Whether another round may follow."""
        self.unwanted: set[RunId] = set()
        """Runs to save and remove."""
        self._assignments: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self._documents: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._is_at_rest = threading.Event()
        self._lines = lines
        self._on_parent_gone = on_parent_gone

    def read_document(self) -> dict[str, Any]:
        """Read the first line, which describes the work. Call before `listen`."""
        line = self._lines.readline()
        if not line:
            self._on_parent_gone()
        document: dict[str, Any] = json.loads(line)
        return document

    def next_document(self) -> dict[str, Any] | None:
        """Wait for another round, after `rests`; return its description, None to end.

        What was asked of the round before is forgotten first, and nothing is read before that.
        """
        self.closed = self.rests = False
        self.unwanted = set()
        self._assignments = queue.SimpleQueue()
        self._is_at_rest.set()
        return self._documents.get()

    def listen(self) -> None:
        """Start reading commands in the background."""
        threading.Thread(target=self._read, daemon=True, name="commands").start()

    def assignments(self, *, wait: bool) -> Iterator[Assignment]:
        """Yield the assignments received so far; with `wait`, block until there is one or `close` arrives."""
        while True:
            try:
                assignment = self._assignments.get(block=wait)
            except queue.Empty:
                return
            if assignment is None:
                return
            wait = False
            yield assignment

    def _read(self) -> None:
        for line in self._lines:
            command = json.loads(line)
            match command["order"]:
                case "start":
                    assignment = assignment_from_json(command["assignment"])
                    self.unwanted.discard(assignment.run)
                    self._assignments.put(assignment)
                case "stop":
                    self.unwanted.add(from_json(RunId, command["run"]))
                case "rest":
                    self.closed = self.rests = True
                    self._assignments.put(None)
                    self._is_at_rest.wait()
                    self._is_at_rest.clear()
                case "round":
                    self._documents.put(command["document"])
                case "close":
                    self.closed = True
                    self._assignments.put(None)
                    self._documents.put(None)
                    return
        self._on_parent_gone()
