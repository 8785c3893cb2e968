"""The training loop: trials in slots, one packed micro-step after another.

A tick gives every trial in a slot one micro-batch. A trial whose update is whole steps its own
optimizer; one at an evaluation step is evaluated; one at its end leaves its slot to the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tuner.errors import TunerError
from tuner.methods.table import HYPERPARAMETERS
from tuner.playbook import is_diverged
from tuner.records import (
    Answered,
    Assignment,
    CheckpointKind,
    Ended,
    Evaluated,
    Event,
    Measured,
    Outcome,
    Progressed,
    Saved,
    Started,
)
from tuner.training.checkpoints import read_snapshot
from tuner.training.commands import Inbox
from tuner.training.packed_passes import evaluate, tick
from tuner.training.trial_run import TrialRun
from tuner.training.worker_state import Workplace

_log = logging.getLogger(__name__)

LAST_EVERY_SHARE = 0.05
"""Of the time, at most this much goes into `last` checkpoints, once one takes more than a second."""


def train(place: Workplace, inbox: Inbox, say: Callable[[Event], None]) -> None:
    """Run assignments from `inbox` until it closes; a close saves every trial first.

    Raises TunerError, every trial saved, where the round's answers cannot be scored.
    """
    runs: dict[int, TrialRun] = {}
    waiting: list[Assignment] = []
    room_for = place.pack.num_slots  # less once memory did not have it: then one begins when another has left
    last_saved: dict[int, tuple[float, float]] = {}
    last_said = 0.0

    while not inbox.closed:
        # --- new trials take free slots, unwanted ones leave
        waiting += inbox.assignments(wait=not runs and not waiting)
        room_for = _fill_slots(place, runs, waiting, room_for, say)
        for assignment in [each for each in waiting if each.trial in inbox.unwanted]:
            waiting.remove(assignment)
            _decline(assignment, "stopped", None, say)
        for slot, run in list(runs.items()):
            if run.assignment.trial in inbox.unwanted:
                _leave(run, "stopped", None, say, save=True)
                del runs[slot]

        # --- evaluations that are due: at step 0, every so many steps, and at the horizon
        due = {slot: run for slot, run in runs.items() if run.is_due and run.reason_infeasible is None}
        with place.meter.timing("evaluating"):
            evaluations = evaluate(place, due)
        for slot, evaluation in evaluations.items():
            run = runs[slot]
            run.reason_infeasible = is_diverged(run.evaluations, place.base.vocabulary_size)
            with place.meter.timing("saving"):
                _save(run, last_saved, slot, say)
            say(Evaluated(*_name(run), evaluation))
        if evaluations:
            say(Measured(place.meter.read(place.base.device)))
        for slot, run in runs.items():
            if run.is_at_trunk and slot not in due and not run.micro_batches:
                say(Saved(*_name(run), run.save(CheckpointKind.TRUNK)))
        _end_what_is_over(place, runs, inbox, say)

        # --- one micro-step for every trial, and the updates that are whole
        with place.meter.timing("training"):
            tick(place, runs)
        if (now := time.monotonic()) - last_said > 1.0:
            last_said = now
            for run in runs.values():
                if run.train_loss is not None:
                    say(Progressed(*_name(run), run.step, run.train_loss))

    for run in runs.values():
        _leave(run, "stopped", None, say, save=True)
    for assignment in waiting:
        _decline(assignment, "stopped", None, say)
    say(Measured(place.meter.read(place.base.device)))


# --- a trial enters and leaves --------------------------------------------------------------------


class _NoRoomBesideOthers(Exception):
    """Memory has no room for a trial while others are in the slots."""


def _fill_slots(
    place: Workplace,
    runs: dict[int, TrialRun],
    waiting: list[Assignment],
    room_for: int,
    say: Callable[[Event], None],
) -> int:
    """Let trials that wait begin in free slots; for how many trials memory has room, as far as is known."""
    while waiting and len(runs) < room_for:
        free = next(slot for slot in range(place.pack.num_slots) if slot not in runs)
        try:
            run = _begin(place, waiting[0], free, say, is_alone=not runs)
        except _NoRoomBesideOthers:
            return len(runs)
        del waiting[0]
        if run is not None:
            runs[free] = run
    return room_for


def _begin(
    place: Workplace, assignment: Assignment, slot: int, say: Callable[[Event], None], *, is_alone: bool
) -> TrialRun | None:
    """Put a trial into a slot, from its checkpoint or from PEFT's initialisation.

    None where it has ended at once. Raises _NoRoomBesideOthers where it might fit alone.
    """
    try:
        run = _placed(place, assignment, slot)
    except TunerError as error:
        _log.error("trial %d: %s", assignment.trial, error)
        _decline(assignment, "failed", str(error), say)
        return None
    if run is None and not is_alone:
        _log.warning("out of memory: trial %d waits until another has left its slot", assignment.trial)
        raise _NoRoomBesideOthers
    if run is None:
        _decline(
            assignment, "infeasible", "out of memory alone: no room for its adapter beside the base", say
        )
        return None
    say(Started(*_name(run), run.step, place.environment))
    if run.evaluations:
        best = run.save_best()
        if best is not None:
            say(Saved(*_name(run), best))
    for evaluation in run.evaluations:
        say(Evaluated(*_name(run), evaluation))
    return run


def _placed(place: Workplace, assignment: Assignment, slot: int) -> TrialRun | None:
    """The trial in its slot; None when out of memory, of which nothing is then held here any more."""
    try:
        if assignment.resume_from is not None:
            snapshot = read_snapshot(Path(assignment.resume_from), sha256=assignment.resume_sha256)
            run = TrialRun(assignment, snapshot.adapter, device=place.base.device)
            run.restore(snapshot)
            run.reason_infeasible = is_diverged(run.evaluations, place.base.vocabulary_size)
        else:
            start = place.new_adapter(assignment.hyperparameters, seed=_seed(assignment))
            run = TrialRun(assignment, start, device=place.base.device)
        place.pack.occupy(slot, run.adapter)
        place.pack.load({slot: run.optimizer.weights})
    except torch.OutOfMemoryError:
        return None
    return run


def _decline(
    assignment: Assignment, outcome: Outcome, reason: str | None, say: Callable[[Event], None]
) -> None:
    """End an attempt that never began."""
    say(Ended(assignment.round, assignment.trial, assignment.attempt, 0, outcome, reason))


def _end_what_is_over(
    place: Workplace, runs: dict[int, TrialRun], inbox: Inbox, say: Callable[[Event], None]
) -> None:
    """Trials that are infeasible or at their horizon leave; raises TunerError as `train` does."""
    for slot, run in list(runs.items()):
        if run.reason_infeasible is not None:
            _leave(run, "infeasible", run.reason_infeasible, say)
            del runs[slot]
        elif run.step >= run.assignment.max_train_steps:
            try:
                has_answered = _answer(place, run, slot, inbox, say)
            except TunerError:
                for each in runs.values():
                    _leave(each, "stopped", None, say, save=True)
                raise
            _leave(run, "complete" if has_answered else "stopped", None, say, save=not has_answered)
            del runs[slot]


def _answer(place: Workplace, run: TrialRun, slot: int, inbox: Inbox, say: Callable[[Event], None]) -> bool:
    """Let the best adapter of a trial at its horizon answer, where the round asks; a branch is no trial.

    False when the trial or the worker is to stop before the last answer. The other slots wait.
    """
    if place.exam is None or run.assignment.trial < 0:
        return True
    assert run.best_step is not None
    assert run.best_weights is not None
    score = place.exam.score(
        place.pack,
        slot,
        run.best_weights,
        step=run.best_step,
        stopping=lambda: inbox.closed or run.assignment.trial in inbox.unwanted,
    )
    if score is None:
        return False
    say(Answered(*_name(run), score))
    return True


def _leave(
    run: TrialRun, outcome: Outcome, reason: str | None, say: Callable[[Event], None], *, save: bool = False
) -> None:
    """End an attempt; `save` keeps its progress for the next one."""
    if save:
        say(Saved(*_name(run), run.save(CheckpointKind.LAST)))
    say(Ended(*_name(run), run.step, outcome, reason))


def _save(
    run: TrialRun, last_saved: dict[int, tuple[float, float]], slot: int, say: Callable[[Event], None]
) -> None:
    """After an evaluation: the best adapter if it is this one, and where to go on from."""
    if run.best_step == run.step and (best := run.save_best()) is not None:
        say(Saved(*_name(run), best))
    if run.is_at_trunk:
        say(Saved(*_name(run), run.save(CheckpointKind.TRUNK)))
    begun = time.monotonic()
    saved_at, took = last_saved.get(slot, (0.0, 0.0))
    is_over = run.step >= run.assignment.max_train_steps
    if took < 1.0 or is_over or (begun - saved_at) * LAST_EVERY_SHARE > took:
        say(Saved(*_name(run), run.save(CheckpointKind.LAST)))
        last_saved[slot] = (time.monotonic(), time.monotonic() - begun)


def _name(run: TrialRun) -> tuple[str, int, int]:
    return run.assignment.round, run.assignment.trial, run.assignment.attempt


def _seed(assignment: Assignment) -> int:
    return int(HYPERPARAMETERS["training_seed"].number(assignment.hyperparameters))
