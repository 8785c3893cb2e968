"""Which trials run, which attempts have come to nothing too often, and which failed trials want repeating."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.records import Attempt, Trial, TrialState

MAX_ATTEMPTS = 3
"""Attempts in a row that may die without a new checkpoint before what they try is failed."""


def have_failed(attempts: Sequence[Attempt], *, newest_step: int) -> bool:
    """Whether the last attempts died, each without a checkpoint beyond where it had started.

    `newest_step` is that of the newest resumable checkpoint.
    """
    fruitless = 0
    for attempt in reversed(attempts):
        if attempt.outcome not in ("died", "failed") or (
            attempt.outcome == "died" and attempt.from_step < newest_step
        ):
            break
        fruitless += 1
    return fruitless >= MAX_ATTEMPTS


def has_open_attempt(trial: Trial) -> bool:
    """Whether the trial runs, as far as the facts know: a pruned one does until its worker has let it go."""
    return bool(trial.attempts) and trial.attempts[-1].ended_at is None


def has_failed(trial: Trial) -> bool:
    """Whether the last attempts died, each without a checkpoint beyond where it had started."""
    newest = max((c.step for c in trial.checkpoints if c.kind != "best"), default=0)
    return have_failed(trial.attempts, newest_step=newest)


def unreplaced(trials: Sequence[Trial]) -> list[Trial]:
    """Failed trials that no later trial repeats."""
    return [
        trial
        for trial in trials
        if trial.state == TrialState.FAILED
        and not any(t.number > trial.number and t.hyperparameters == trial.hyperparameters for t in trials)
    ]
