"""What every Worker keeps its word on."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.engines import Worker
from tuner.playbook.schedule import evaluation_steps
from tuner.records import (
    Assignment,
    Checkpoint,
    CheckpointKind,
    Ended,
    Evaluated,
    Event,
    Preparing,
    Ready,
    RunId,
    Saved,
    Started,
)

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
ENDLESS = 100_000  # steps of a trial that runs until a test ends it, on the slowest machine too


class WorkerContract:
    """Subclasses give fixtures: `worker`, a new one with two slots; `ready_worker`, one that has said that it
    is ready and is free, which tests may share; and `directory`."""

    def test_prepares_and_is_ready_before_anything_else(self, worker: Worker) -> None:
        events = collect(worker, until=lambda seen: any(not isinstance(e, Preparing) for e in seen))
        first = next(e for e in events if not isinstance(e, Preparing))
        assert isinstance(first, Ready)
        assert first.slots == 2

    def test_runs_a_trial_from_its_first_evaluation_to_its_last(
        self, ready_worker: Worker, directory: Path
    ) -> None:
        ready_worker.start(assignment(directory, 0))
        assert ready_worker.capacity() == 1
        events = collect(ready_worker, until=lambda seen: any(isinstance(e, Ended) for e in seen))
        started = [e for e in events if isinstance(e, Started)]
        assert [(e.trial, e.attempt, e.step) for e in started] == [(0, 1, 0)]
        steps = [e.evaluation.step for e in events if isinstance(e, Evaluated)]
        assert steps == list(evaluation_steps(6, 2))
        assert isinstance(events[-1], Ended)
        assert (events[-1].outcome, events[-1].step) == ("complete", 6)
        assert ready_worker.capacity() == 2

    def test_runs_two_trials_side_by_side_and_refills_a_slot(
        self, ready_worker: Worker, directory: Path
    ) -> None:
        ready_worker.start(assignment(directory, 0, steps=2))
        ready_worker.start(assignment(directory, 1, steps=6))
        assert ready_worker.capacity() == 0
        seen = collect(ready_worker, until=lambda events: ended(events) >= {0})
        ready_worker.start(assignment(directory, 2, steps=2))
        seen += collect(ready_worker, until=lambda events: ended(seen + events) == {0, 1, 2})
        assert {e.trial for e in seen if isinstance(e, Evaluated)} == {0, 1, 2}

    def test_a_stopped_trial_leaves_and_the_other_goes_on(
        self, ready_worker: Worker, directory: Path
    ) -> None:
        ready_worker.start(assignment(directory, 0, steps=ENDLESS))
        ready_worker.start(assignment(directory, 1, steps=4))
        ready_worker.stop(RunId("round1", 0))
        seen = collect(ready_worker, until=lambda events: ended(events) == {0, 1})
        outcomes = {e.trial: e.outcome for e in seen if isinstance(e, Ended)}
        assert outcomes == {0: "stopped", 1: "complete"}
        paths = [checkpoint.path for checkpoint in saved(seen)]
        assert len(set(paths)) == len(paths), "saved again, while the first may be on its way"

    def test_keeps_the_trunk_and_a_longer_run_goes_on_from_it(
        self, ready_worker: Worker, directory: Path
    ) -> None:
        ready_worker.start(replace(assignment(directory, 0), trunk_steps=(3, 4)))
        first = collect(ready_worker, until=lambda seen: ended(seen) == {0})
        trunks = [c for c in saved(first) if c.kind == CheckpointKind.TRUNK]
        assert [trunk.step for trunk in trunks] == [3, 4]
        assert all((directory / trunk.path).is_dir() for trunk in trunks)
        assert {c.kind for c in saved(first)} == set(CheckpointKind)
        going_on = replace(
            assignment(directory, 1, steps=10),
            resume_from=str(directory / trunks[1].path),
            resume_sha256=trunks[1].sha256,
        )
        ready_worker.start(going_on)
        ready_worker.start(assignment(directory, 2, steps=10))
        both = collect(ready_worker, until=lambda seen: ended(seen) == {1, 2})
        assert {e.trial: e.step for e in both if isinstance(e, Started)} == {1: 4, 2: 0}
        assert losses(both, 1) == pytest.approx(losses(both, 2), rel=1e-5)
        assert list(losses(both, 1)) == list(evaluation_steps(10, 2))
        assert {e.outcome for e in both if isinstance(e, Ended)} == {"complete"}

    def test_a_stopped_trial_goes_on_from_where_it_was_saved(
        self, ready_worker: Worker, directory: Path
    ) -> None:
        ready_worker.start(assignment(directory, 0, steps=40))
        seen = collect(ready_worker, until=lambda events: 2 in losses(events, 0))
        ready_worker.stop(RunId("round1", 0))
        seen += collect(ready_worker, until=lambda events: ended(events) == {0})
        last = [c for c in saved(seen) if c.kind == CheckpointKind.LAST][-1]
        stopped = seen[-1]
        assert isinstance(stopped, Ended)
        assert last.step == stopped.step > 0
        again = replace(
            assignment(directory, 0, steps=40),
            attempt=2,
            resume_from=str(directory / last.path),
            resume_sha256=last.sha256,
        )
        ready_worker.start(again)
        rest = collect(ready_worker, until=lambda events: ended(events) == {0})
        assert [e.step for e in rest if isinstance(e, Started)] == [last.step]
        assert list(losses(rest, 0)) == list(evaluation_steps(40, 2))
        assert losses(rest, 0)[2] == losses(seen, 0)[2]

    def test_a_checkpoint_that_is_gone_fails_the_attempt_and_frees_the_slot(
        self, ready_worker: Worker, directory: Path
    ) -> None:
        gone = str(directory / "trial-0000" / "trunk" / "step-000004")
        ready_worker.start(replace(assignment(directory, 1), resume_from=gone))
        (last,) = (
            e
            for e in collect(ready_worker, until=lambda events: ended(events) == {1})
            if isinstance(e, Ended)
        )
        assert last.outcome == "failed"
        assert "step-000004" in str(last.reason)
        assert ready_worker.capacity() == 2

    def test_a_trial_that_diverges_is_infeasible_with_a_reason(
        self, ready_worker: Worker, directory: Path
    ) -> None:
        wild = {**HYPERPARAMETERS, "learning_rate": 1e9}
        ready_worker.start(replace(assignment(directory, 0, steps=40), hyperparameters=wild))
        events = collect(ready_worker, until=lambda seen: ended(seen) == {0})
        last = events[-1]
        assert isinstance(last, Ended)
        assert (last.outcome, last.step < 40) == ("infeasible", True)
        assert last.reason

    def test_closing_stops_every_trial_and_leaves_what_was_said(
        self, worker: Worker, directory: Path
    ) -> None:
        wait_until_ready(worker)
        worker.start(assignment(directory, 0, steps=ENDLESS))
        collect(worker, until=lambda events: any(isinstance(e, Evaluated) for e in events))
        worker.close()
        last = worker.events(0.0)
        assert [e.outcome for e in last if isinstance(e, Ended)] == ["stopped"]
        worker.close()  # a second time is no error
        worker.stop(assignment(directory, 0).run)  # nor is a trial that it does not hold any more


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


def losses(events: list[Event], trial: int) -> dict[int, float]:
    """A trial's evaluation losses by step, in the order in which they were said first."""
    return {
        e.evaluation.step: e.evaluation.eval_loss
        for e in events
        if isinstance(e, Evaluated) and e.trial == trial
    }


def saved(events: list[Event]) -> list[Checkpoint]:
    """Checkpoints that were said, in their order."""
    return [event.checkpoint for event in events if isinstance(event, Saved)]


def ended(events: list[Event]) -> set[int]:
    """Trials that have ended."""
    return {event.trial for event in events if isinstance(event, Ended)}
