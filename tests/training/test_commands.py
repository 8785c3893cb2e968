from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

from tests.training.driving import assignment
from tuner.pipes import CommandReader
from tuner.records import Assignment, RunId, to_json


def lines(*written: object) -> io.StringIO:
    return io.StringIO("".join(json.dumps(command) + "\n" for command in written))


def until_closed(commands: CommandReader) -> list[Assignment]:
    taken: list[Assignment] = []
    commands.listen()
    while not commands.closed:
        taken += commands.assignments(wait=True)
    return [*taken, *commands.assignments(wait=False)]


def test_orders(tmp_path: Path) -> None:
    first, second = assignment(tmp_path, 0), assignment(tmp_path, 1)
    commands = CommandReader(
        lines(
            {"slots": 2},
            {"order": "start", "assignment": to_json(first)},
            {"order": "stop", "run": to_json(RunId("round1", 7))},
            {"order": "start", "assignment": to_json(second)},
            {"order": "close"},
        )
    )
    assert commands.read_document() == {"slots": 2}
    assert until_closed(commands) == [first, second]
    assert commands.unwanted == {RunId("round1", 7)}


def test_does_not_wait_when_trials_run() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as written, os.fdopen(writing, "w") as parent:
        commands = CommandReader(written, on_parent_gone=lambda: None)
        commands.listen()
        assert list(commands.assignments(wait=False)) == []
        parent.write('{"order": "close"}\n')


def test_start_makes_a_trial_wanted_again(tmp_path: Path) -> None:
    commands = CommandReader(
        lines(
            {"order": "stop", "run": to_json(RunId("round1", 0))},
            {"order": "start", "assignment": to_json(assignment(tmp_path, 0))},
            {"order": "close"},
        )
    )
    until_closed(commands)
    assert commands.unwanted == set()


def test_parent_gone() -> None:
    gone = threading.Event()
    CommandReader(
        lines({"order": "stop", "run": to_json(RunId("round1", 1))}), on_parent_gone=gone.set
    ).listen()
    assert gone.wait(60)


def test_close_is_not_the_parent_gone() -> None:
    gone = threading.Event()
    commands = CommandReader(lines({"order": "close"}), on_parent_gone=gone.set)
    commands.listen()
    assert list(commands.assignments(wait=True)) == []
    assert commands.closed
    assert not gone.wait(0.05)
