"""What tuner says of a round, and whether the longer runs agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.playbook import Diagnosis, read_round
from tuner.playbook.horizon import signs

from .cases import Case

FACTOR = 1.5
"""A prediction this close to the real gain, by factor, counts as met."""
KEEPS = (Diagnosis.RIGHT, Diagnosis.SATURATED, Diagnosis.TOO_LONG, Diagnosis.OVERFITTING)
"""Diagnoses that stand by the horizon or shorten it."""


@dataclass(frozen=True)
class Outcome:
    """What was said of a case."""

    case: Case
    diagnosis: Diagnosis
    suggested: int | None
    source: str | None
    predicted: tuple[float, ...] | None
    """Drop to each answer; None where no gain is known."""

    @property
    def keeps(self) -> bool:
        """Whether it stands by the horizon or shortens it."""
        is_longer = self.suggested is not None and self.suggested > self.case.results.max_train_steps
        return self.diagnosis in KEEPS and not is_longer

    @property
    def is_wrong_keep(self) -> bool:
        """Whether it keeps although a longer run gained more than 1% and twice its noise."""
        return self.keeps and self.case.is_worth_going_on


def judge(case: Case) -> Outcome:
    """Read a case's round, and predict the drop to each of its answers."""
    reading = read_round(case.results, case.earlier)
    # A gain of unknown noise counts as unknown.
    gain = None if reading.noise is None else signs(case.results, case.earlier).gain
    predicted = None if gain is None else tuple(gain.to(answer.ratio) for answer in case.answers)
    source = None if gain is None else str(gain.source)
    return Outcome(case, reading.diagnosis, reading.suggested_max_train_steps, source, predicted)


@dataclass(frozen=True)
class Tally:
    """How predictions turned out."""

    rounds: int
    asked: int
    """Answers that a prediction could be compared with."""
    given: int
    within: int
    median: float | None
    """Of predicted / real."""


def tally(outcomes: Sequence[Outcome]) -> Tally:
    """Count predictions, one for each answer; those within a factor 1.5 of the real drop are met."""
    asked = sum(len(outcome.case.answers) for outcome in outcomes)
    ratios = [
        predicted / answer.drop if answer.drop > 0 else math.inf
        for outcome in outcomes
        if outcome.predicted is not None
        for predicted, answer in zip(outcome.predicted, outcome.case.answers, strict=True)
    ]
    within = sum(1 / FACTOR <= ratio <= FACTOR for ratio in ratios)
    return Tally(len(outcomes), asked, len(ratios), within, statistics.median(ratios) if ratios else None)
