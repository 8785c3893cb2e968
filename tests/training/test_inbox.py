from __future__ import annotations

import io
import json
import os
import threading
from pathlib import Path

from tests.training.driving import assignment
from tuner.records import (
    Assignment,
    RunId,
    to_json,
)
from tuner.training.commands import Inbox


def lines(*orders: object) -> io.StringIO:
    return io.StringIO("".join(json.dumps(order) + "\n" for order in orders))


def until_closed(inbox: Inbox) -> list[Assignment]:
    taken: list[Assignment] = []
    inbox.listen()
    while not inbox.closed:
        taken += inbox.assignments(wait=True)
    return [*taken, *inbox.assignments(wait=False)]


def test_orders(tmp_path: Path) -> None:
    first, second = assignment(tmp_path, 0), assignment(tmp_path, 1)
    inbox = Inbox(
        lines(
            {"slots": 2},
            {"order": "start", "assignment": to_json(first)},
            {"order": "stop", "run": to_json(RunId("round1", 7))},
            {"order": "start", "assignment": to_json(second)},
            {"order": "close"},
        )
    )
    assert inbox.read_document() == {"slots": 2}
    assert until_closed(inbox) == [first, second]
    assert inbox.unwanted == {RunId("round1", 7)}


def test_does_not_wait_when_trials_run() -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as orders, os.fdopen(writing, "w") as parent:
        inbox = Inbox(orders, on_parent_gone=lambda: None)
        inbox.listen()
        assert list(inbox.assignments(wait=False)) == []
        parent.write('{"order": "close"}\n')


def test_start_makes_a_trial_wanted_again(tmp_path: Path) -> None:
    inbox = Inbox(
        lines(
            {"order": "stop", "run": to_json(RunId("round1", 0))},
            {"order": "start", "assignment": to_json(assignment(tmp_path, 0))},
            {"order": "close"},
        )
    )
    until_closed(inbox)
    assert inbox.unwanted == set()


def test_parent_gone() -> None:
    gone = threading.Event()
    Inbox(lines({"order": "stop", "run": to_json(RunId("round1", 1))}), on_parent_gone=gone.set).listen()
    assert gone.wait(10)


def test_close_is_not_the_parent_gone() -> None:
    gone = threading.Event()
    inbox = Inbox(lines({"order": "close"}), on_parent_gone=gone.set)
    inbox.listen()
    assert list(inbox.assignments(wait=True)) == []
    assert inbox.closed
    assert not gone.wait(0.05)
