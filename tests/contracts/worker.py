"""What every Worker keeps its word on."""

from __future__ import annotations

import time
from pathlib import Path

from tuner.playbook.schedule import evaluation_steps
from tuner.records import Assignment, Ended, Evaluated, Event, Ready, Started
from tuner.workers import Worker

HYPERPARAMETERS = {
    "learning_rate": 1e-3,
    "lora_r": 2,
    "lora_alpha": 4,
    "target_modules": "all-linear",
    "batch_size": 2,
    "optimizer": "adamw",
    "warmup_steps": 1,
    "schedule": "linear",
    "decay_steps": 2,
}


class WorkerContract:
    """Subclasses give a fixture `worker` with two slots and a fixture `directory`."""

    def test_is_ready_before_anything_else(self, worker: Worker) -> None:
        first = collect(worker, until=lambda events: bool(events))[0]
        assert isinstance(first, Ready)
        assert first.slots == 2

    def test_runs_a_trial_from_its_first_evaluation_to_its_last(
        self, worker: Worker, directory: Path
    ) -> None:
        wait_until_ready(worker)
        worker.start(assignment(directory, 0))
        assert worker.capacity() == 1
        events = collect(worker, until=lambda seen: any(isinstance(e, Ended) for e in seen))
        started = [e for e in events if isinstance(e, Started)]
        assert [(e.trial, e.attempt, e.step) for e in started] == [(0, 1, 0)]
        steps = [e.evaluation.step for e in events if isinstance(e, Evaluated)]
        assert steps == list(evaluation_steps(6, 2))
        assert isinstance(events[-1], Ended)
        assert (events[-1].outcome, events[-1].step) == ("complete", 6)
        assert worker.capacity() == 2

    def test_runs_two_trials_side_by_side_and_refills_a_slot(self, worker: Worker, directory: Path) -> None:
        wait_until_ready(worker)
        worker.start(assignment(directory, 0, steps=2))
        worker.start(assignment(directory, 1, steps=6))
        assert worker.capacity() == 0
        seen = collect(worker, until=lambda events: ended(events) >= {0})
        worker.start(assignment(directory, 2, steps=2))
        seen += collect(worker, until=lambda events: ended(seen + events) == {0, 1, 2})
        assert {e.trial for e in seen if isinstance(e, Evaluated)} == {0, 1, 2}

    def test_a_stopped_trial_leaves_and_the_other_goes_on(self, worker: Worker, directory: Path) -> None:
        wait_until_ready(worker)
        worker.start(assignment(directory, 0, steps=400))
        worker.start(assignment(directory, 1, steps=4))
        worker.stop(0)
        seen = collect(worker, until=lambda events: ended(events) == {0, 1})
        outcomes = {e.trial: e.outcome for e in seen if isinstance(e, Ended)}
        assert outcomes == {0: "stopped", 1: "complete"}

    def test_closing_stops_every_trial_and_leaves_what_was_said(
        self, worker: Worker, directory: Path
    ) -> None:
        wait_until_ready(worker)
        worker.start(assignment(directory, 0, steps=400))
        collect(worker, until=lambda events: any(isinstance(e, Evaluated) for e in events))
        worker.close()
        last = worker.events(0.0)
        assert [e.outcome for e in last if isinstance(e, Ended)] == ["stopped"]
        worker.close()  # a second time is no error


def assignment(directory: Path, trial: int, *, steps: int = 6) -> Assignment:
    """A short trial."""
    return Assignment(
        "round1", trial, 1, HYPERPARAMETERS, steps, 2, directory=str(directory / f"trial-{trial:04d}")
    )


def wait_until_ready(worker: Worker) -> None:
    """Take the first `Ready`."""
    collect(worker, until=lambda events: any(isinstance(e, Ready) for e in events))


def collect(worker: Worker, *, until: object, seconds: float = 120) -> list[Event]:
    """Events until a condition on all of them holds."""
    assert callable(until)
    events: list[Event] = []
    deadline = time.monotonic() + seconds
    while not until(events):
        assert time.monotonic() < deadline, f"still waiting after {seconds} s; so far: {events}"
        events += worker.events(0.2)
    return events


def ended(events: list[Event]) -> set[int]:
    """Trials that have ended."""
    return {event.trial for event in events if isinstance(event, Ended)}
