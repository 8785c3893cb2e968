"""A worker program without torch: losses by a formula, commands and events as JSON lines."""

import json
import sys
import time

from tests.studies import formula
from tuner.engines import SimulatedWorker
from tuner.records import Event, assignment_from_json, event_to_json


def say(events: list[Event]) -> None:
    for event in events:
        print(json.dumps(event_to_json(event)), flush=True)


def main() -> int:
    """Obey until told to close; 1 when the parent is gone."""
    document = json.loads(sys.stdin.readline())
    worker = SimulatedWorker(formula, slots=document["slots"])
    say(worker.events(0))
    for line in sys.stdin:
        command = json.loads(line)
        match command["order"]:
            case "start":
                worker.start(assignment_from_json(command["assignment"]))
                while worker.capacity() < document["slots"]:
                    say(worker.events(0))
                    time.sleep(document.get("pause", 0.0))
            case "close":
                return 0
        say(worker.events(0))
    return 1


if __name__ == "__main__":
    sys.exit(main())
