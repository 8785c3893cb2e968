"""What the scores of single answers come to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from tuner.records import AnswerScore


def answer_score(scores: Sequence[float], *, step: int, metric: str, is_objective: bool) -> AnswerScore:
    """The mean of answers' scores, of which there is at least one, and its standard error.

    `step` is that of the adapter that answered. Rule: this project's decision, "The best step of a trial":
    the step is chosen by the loss, its answers are scored once.
    """
    count = len(scores)
    return AnswerScore(
        step=step,
        metric=metric,
        mean=fmean(scores),
        standard_error=stdev(scores) / math.sqrt(count) if count > 1 else None,
        num_examples=count,
        is_objective=is_objective,
    )
