"""What the parent says to a worker: one JSON document a line on standard input.

The end of input means that the parent is gone; the process then ends at once, since whatever is on
disk is whole and the next run goes on from it.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tuner.records import Assignment, RunId, assignment_from_json, from_json


class Inbox:
    """Assignments to begin, trials to stop, and whether to close."""

    def __init__(self, lines: TextIO, *, on_parent_gone: Callable[[], None] = lambda: os._exit(1)) -> None:
        self.closed = False
        self.unwanted: set[RunId] = set()
        """Runs to save and leave."""
        self._assignments: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self._lines = lines
        self._on_parent_gone = on_parent_gone

    def read_document(self) -> dict[str, Any]:
        """The first line: what to work on. Call before `listen`."""
        line = self._lines.readline()
        if not line:
            self._on_parent_gone()
        document: dict[str, Any] = json.loads(line)
        return document

    def listen(self) -> None:
        """Start reading orders in the background."""
        threading.Thread(target=self._read, daemon=True, name="inbox").start()

    def assignments(self, *, wait: bool) -> Iterator[Assignment]:
        """What has come to begin; with `wait`, blocks until something has or the inbox closes."""
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
            order = json.loads(line)
            match order["order"]:
                case "start":
                    assignment = assignment_from_json(order["assignment"])
                    self.unwanted.discard(assignment.run)
                    self._assignments.put(assignment)
                case "stop":
                    self.unwanted.add(from_json(RunId, order["run"]))
                case "close":
                    self.closed = True
                    self._assignments.put(None)
                    return
        self._on_parent_gone()
