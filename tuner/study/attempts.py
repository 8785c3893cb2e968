"""When attempts have come to nothing too often to try again."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.records import Attempt

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
