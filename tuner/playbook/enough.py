"""When a study has had enough rounds: no further one is worth running without a person's say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tuner.playbook.horizon import Diagnosis
from tuner.playbook.reading import Reading, read_round
from tuner.playbook.results import RoundResults

MAX_GROWTH = 9
"""Times the first horizon up to which rounds follow each other where nothing else bounds them."""


@dataclass(frozen=True, slots=True)
class Enough:
    """Why no further round is run."""

    reason: str
    taught_nothing: bool = False
    """Whether the round failed to say how long to train: nothing complete, or nothing learned."""


def next_horizon(
    results: RoundResults,
    reading: Reading,
    earlier: Sequence[RoundResults] = (),
    *,
    has_deadline: bool = False,
) -> int | Enough:
    """Return the horizon of the round that follows by itself, or why none does.

    `too_short` and `undetermined` ask for a longer one, and so does an edge of the learning rates for another
    at the same horizon. The second `undetermined` in a row ends a study, and so do `run.production_steps`
    and, where neither that nor a deadline is set, nine times the first horizon. `earlier` are the study's
    rounds before, oldest first. Rule: Deep Learning Tuning Playbook, "Deciding the number of steps for each
    training run" (one to three rounds); the bounds are this project's decision.
    """
    steps, suggested = results.max_train_steps, reading.suggested_max_train_steps
    if suggested is None:
        return Enough(_nothing_taught(reading), taught_nothing=True)
    if reading.widens_rates:
        return suggested
    match reading.diagnosis:
        case Diagnosis.TOO_SHORT | Diagnosis.UNDETERMINED:
            pass
        case Diagnosis.OVERFITTING:
            return Enough("the best trial overfits, so more steps would not help")
        case Diagnosis.RIGHT:
            return Enough(f"{steps} steps are about right")
        case _:
            return Enough(f"more than {steps} steps would not help")
    same = [other for other in earlier if other.workload == results.workload]
    if reading.diagnosis == Diagnosis.UNDETERMINED and _was_undetermined(same):
        return Enough(
            "for the second time in a row the round cannot tell whether more steps would help; its report "
            f"says what would. The next horizon to try is {suggested} steps"
        )
    if suggested <= steps and results.production_steps is None:
        return Enough(f"a horizon of {steps} leaves no step to add: set a longer max_train_steps")
    if suggested <= steps:
        return Enough(f"run.production_steps, {results.production_steps}, does not allow longer runs")
    return _bounded(suggested, results, same, has_deadline=has_deadline)


def _bounded(
    suggested: int, results: RoundResults, earlier: Sequence[RoundResults], *, has_deadline: bool
) -> int | Enough:
    """The suggestion, within nine times the first horizon where nothing else bounds it."""
    if has_deadline or results.production_steps is not None:
        return suggested
    most = MAX_GROWTH * min(r.max_train_steps for r in (*earlier, results))
    if results.max_train_steps >= most:
        return Enough(
            f"{results.max_train_steps} steps are {MAX_GROWTH} times the first horizon, the most without "
            f"run.production_steps or --for. The next horizon would be {suggested} steps"
        )
    return min(suggested, most)


def _was_undetermined(earlier: Sequence[RoundResults]) -> bool:
    if not earlier:
        return False
    *before, last = earlier
    reading = read_round(last, before)
    return reading.diagnosis == Diagnosis.UNDETERMINED and not reading.widens_rates


def _nothing_taught(reading: Reading) -> str:
    if reading.diagnosis == Diagnosis.NO_LEARNING:
        return "no trial beat the base model: look at data, loss masks and learning rates first"
    return "no trial is complete, so nothing says how long to train"
