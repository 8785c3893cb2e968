"""A worker program without torch that works on several trials at once, for engines on other machines.

Its first line is `{"slots": 2, "pause": 0.0, "workload": "..."}`.
"""

import json
import queue
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tests.studies import formula
from tuner.engines import SimulatedWorker
from tuner.records import Event, Ready, RunId, assignment_from_json, event_to_json, from_json


def say(events: list[Event]) -> None:
    for event in events:
        print(json.dumps(event_to_json(event)), flush=True)


def obey(worker: SimulatedWorker, seconds: Callable[[], float]) -> int:
    """Do what the lines say and look for events at least every so many seconds; 1 when the parent is gone."""
    # Not SimpleQueue: in Python 3.11 its `get` never returns if the time is over before it begins to wait.
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [*map(lines.put, sys.stdin), lines.put("")], daemon=True).start()
    while True:
        say(worker.events(0))
        try:
            line = lines.get(timeout=seconds())
        except queue.Empty:
            continue
        if not line:
            return 1
        command = json.loads(line)
        match command["order"]:
            case "start":
                worker.start(assignment_from_json(command["assignment"]))
            case "stop":
                worker.stop(from_json(RunId, command["run"]))
            case "close":
                worker.close()
                say(worker.events(0))
                return 0


def main() -> int:
    """Obey until told to close; 1 when the parent is gone."""
    document = json.loads(sys.stdin.readline())
    print(f"working in {Path.cwd()}\ndocument {json.dumps(document)}", file=sys.stderr, flush=True)
    ready = Ready(document["slots"], "simulated", workload=document.get("workload", "the same"))
    worker = SimulatedWorker(formula, slots=document["slots"], ready=ready)

    def seconds() -> float:
        is_idle = worker.capacity() == document["slots"]
        return 1.0 if is_idle else document.get("pause", 0.0) or 1e-4

    return obey(worker, seconds)


if __name__ == "__main__":
    sys.exit(main())
