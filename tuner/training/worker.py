"""The training loop: trials in slots, one packed micro-step after another."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tuner.adapters.device_io import one_out_of_memory
from tuner.errors import TunerError
from tuner.methods.table import seed_of
from tuner.pipes import CommandReader
from tuner.playbook import is_diverged
from tuner.process_log import about
from tuner.records import (
    Answered,
    Assignment,
    Checkpoint,
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
from tuner.training.disk_room import NoRoom
from tuner.training.packed_passes import evaluate, micro_step, read_updates
from tuner.training.trial_run import TrialRun
from tuner.training.worker_state import WorkerState

_log = logging.getLogger(__name__)

LAST_EVERY_SHARE = 0.05
"""Share of the time that `last` checkpoints may take, once one takes more than a second."""


def train(state: WorkerState, commands: CommandReader, say: Callable[[Event], None]) -> None:
    """Run assignments from `commands` until it closes, then save every trial.

    Raises TunerError, after saving every trial, if the round's metric or answers cannot be scored; NoRoom if
    its disk stays full.
    """
    runs: dict[int, TrialRun] = {}
    waiting: list[Assignment] = []
    pulse = state.pulse
    max_runs = state.pack.num_slots  # lowered when one more runs out of memory: it then waits for a free slot
    last_saved: dict[int, tuple[float, float]] = {}
    last_said = 0.0

    while not commands.closed:
        # --- start new trials in free slots, remove unwanted ones
        if not runs and not waiting:
            pulse.wait()
        waiting += commands.assignments(wait=not runs and not waiting)
        if waiting:
            pulse.phase("starting a trial")
        max_runs = _fill_slots(state, runs, waiting, max_runs, say)
        for assignment in [each for each in waiting if each.run in commands.unwanted]:
            waiting.remove(assignment)
            _decline(assignment, "stopped", None, say)
        for slot, run in list(runs.items()):
            if run.assignment.run in commands.unwanted:
                _leave(run, "stopped", None, say, save=True)
                del runs[slot]

        # --- evaluate what is due: at step 0, every `evaluate_every` steps, and at the horizon
        due = {slot: run for slot, run in runs.items() if run.is_due and run.reason_infeasible is None}
        try:
            with state.meter.timing("evaluating"):
                evaluations = evaluate(state, due)
        except TunerError:
            for run in runs.values():
                _leave(run, "stopped", None, say, save=True)
            raise
        for slot, evaluation in evaluations.items():
            run = runs[slot]
            run.reason_infeasible = is_diverged(run.evaluations, state.base.vocabulary_size)
            pulse.phase("saving")
            with state.meter.timing("saving"):
                _save(run, last_saved, slot, say)
            say(Evaluated(*_name(run), evaluation, horizon=run.assignment.horizon))
        if evaluations:
            say(Measured(state.meter.read(*state.pack.devices)))
        for slot, run in runs.items():
            if run.is_at_trunk and slot not in due and not run.micro_batches:
                pulse.phase("saving")
                say(_saved(run, run.save(CheckpointKind.TRUNK)))
        _end_what_is_over(state, runs, commands, say)

        # --- wait while the disk is full
        state.room.wait(run.assignment for run in runs.values())

        # --- one micro-step for every trial, and the updates that it completes
        with state.meter.timing("training"):
            micro_step(state, runs)
        if (now := time.monotonic()) - last_said > 1.0:
            last_said = now
            for run in runs.values():
                if run.train_loss is not None:
                    say(
                        Progressed(*_name(run), run.loss_step, run.train_loss, horizon=run.assignment.horizon)
                    )

    pulse.phase("saving")
    for run in runs.values():
        _leave(run, "stopped", None, say, save=True)
    for assignment in waiting:
        _decline(assignment, "stopped", None, say)
    say(Measured(state.meter.read(*state.pack.devices)))


# --- a trial enters and leaves --------------------------------------------------------------------


class _OutOfMemoryBesideOthers(Exception):
    """A trial does not fit into memory while others are in the slots."""


def _fill_slots(
    state: WorkerState,
    runs: dict[int, TrialRun],
    waiting: list[Assignment],
    max_runs: int,
    say: Callable[[Event], None],
) -> int:
    """Start waiting trials in free slots; return how many trials fit into memory, as far as known."""
    while waiting and len(runs) < max_runs:
        free = next(slot for slot in range(state.pack.num_slots) if slot not in runs)
        try:
            with about(waiting[0].trial):
                run = _begin(state, waiting[0], free, say, is_alone=not runs)
        except _OutOfMemoryBesideOthers:
            return len(runs)
        del waiting[0]
        if run is not None:
            runs[free] = run
    return max_runs


def _begin(
    state: WorkerState, assignment: Assignment, slot: int, say: Callable[[Event], None], *, is_alone: bool
) -> TrialRun | None:
    """Put a trial into a slot, from its checkpoint or from PEFT's initialisation.

    None if it has ended at once. Raises _OutOfMemoryBesideOthers if it may fit alone.
    """
    try:
        run = _placed(state, assignment, slot)
    except TunerError as error:
        _log.error("%s", error)
        _decline(assignment, "failed", str(error), say)
        return None
    if run is None and not is_alone:
        _log.warning("out of memory: waits until another trial has left its slot")
        raise _OutOfMemoryBesideOthers
    if run is None:
        _decline(
            assignment, "infeasible", "out of memory alone: no room for its adapter beside the base", say
        )
        return None
    _log.info("attempt %d starts at step %d in slot %d", assignment.attempt, run.step, slot)
    say(Started(*_name(run), run.step, state.environment, horizon=run.assignment.horizon))
    if run.evaluations:
        best = run.save_best()
        if best is not None:
            say(_saved(run, best))
    for evaluation in run.evaluations:
        say(Evaluated(*_name(run), evaluation, horizon=run.assignment.horizon))
    return run


def _placed(state: WorkerState, assignment: Assignment, slot: int) -> TrialRun | None:
    """Load the trial into its slot; None if out of memory, with nothing left allocated."""
    try:
        with one_out_of_memory():
            if assignment.resume_from is not None:
                snapshot = read_snapshot(Path(assignment.resume_from), sha256=assignment.resume_sha256)
                run = state.new_run(assignment, snapshot.adapter)
                run.restore(snapshot)
                run.reason_infeasible = run.reason_infeasible or is_diverged(
                    run.evaluations, state.base.vocabulary_size
                )
            else:
                start = state.new_adapter(
                    assignment.hyperparameters, seed=seed_of(assignment.hyperparameters)
                )
                run = state.new_run(assignment, start)
            run.room = state.room
            state.pack.occupy(slot, run.adapter)
            state.pack.load({slot: run.optimizer.weights})
    except torch.OutOfMemoryError:
        return None
    return run


def _decline(
    assignment: Assignment, outcome: Outcome, reason: str | None, say: Callable[[Event], None]
) -> None:
    """End an attempt that never started."""
    name = (assignment.round, assignment.trial, assignment.attempt)
    say(Ended(*name, 0, outcome, reason, horizon=assignment.horizon))


def _end_what_is_over(
    state: WorkerState, runs: dict[int, TrialRun], commands: CommandReader, say: Callable[[Event], None]
) -> None:
    """End trials that are infeasible or at their horizon. Raises TunerError as `train` does."""
    for slot, run in list(runs.items()):
        if run.reason_infeasible is not None:
            _leave(run, "infeasible", run.reason_infeasible, say)
            del runs[slot]
        elif run.is_at_horizon:
            try:
                has_answered = _answer(state, run, slot, commands, say)
            except TunerError:
                for each in runs.values():
                    _leave(each, "stopped", None, say, save=True)
                raise
            _leave(run, "complete" if has_answered else "stopped", None, say, save=not has_answered)
            del runs[slot]


def _answer(
    state: WorkerState, run: TrialRun, slot: int, commands: CommandReader, say: Callable[[Event], None]
) -> bool:
    """Score the answers of a trial at its horizon, if the round scores them; comparison runs are not.

    False if the trial or the worker is to stop before the last answer. The other slots wait.
    """
    if state.generation_eval is None or run.assignment.is_comparison:
        return True
    assert run.best_step is not None
    assert run.best_weights is not None
    score = state.generation_eval.score(
        state.pack,
        slot,
        run.best_weights,
        step=run.best_step,
        stopping=lambda: commands.closed or run.assignment.run in commands.unwanted,
    )
    if score is None:
        return False
    say(Answered(*_name(run), score))
    return True


def _leave(
    run: TrialRun, outcome: Outcome, reason: str | None, say: Callable[[Event], None], *, save: bool = False
) -> None:
    """End an attempt; `save` keeps its progress for the next one.

    A step is saved once: its parent may already fetch and delete the first checkpoint of that name.
    """
    read_updates([run])
    with about(run.assignment.trial):
        try:
            if save and run.last_saved_step != run.step:
                say(_saved(run, run.save(CheckpointKind.LAST)))
        except NoRoom as error:
            _log.error("not saved, and resumes from its checkpoint before: %s", error)
        _log.info("attempt %d: %s at step %d", run.assignment.attempt, outcome, run.step)
    say(Ended(*_name(run), run.step, outcome, reason, horizon=run.assignment.horizon))


def _save(
    run: TrialRun, last_saved: dict[int, tuple[float, float]], slot: int, say: Callable[[Event], None]
) -> None:
    """After an evaluation, save the best adapter if it is this one, and the last checkpoint."""
    if run.best_step == run.step and (best := run.save_best()) is not None:
        say(_saved(run, best))
    if run.is_at_trunk:
        say(_saved(run, run.save(CheckpointKind.TRUNK)))
    begun = time.monotonic()
    saved_at, took = last_saved.get(slot, (0.0, 0.0))
    if took < 1.0 or run.is_at_horizon or (begun - saved_at) * LAST_EVERY_SHARE > took:
        say(_saved(run, run.save(CheckpointKind.LAST)))
        last_saved[slot] = (time.monotonic(), time.monotonic() - begun)


def _saved(run: TrialRun, checkpoint: Checkpoint) -> Saved:
    return Saved(*_name(run), checkpoint, horizon=run.assignment.horizon)


def _name(run: TrialRun) -> tuple[str, int, int]:
    return run.assignment.round, run.assignment.trial, run.assignment.attempt
