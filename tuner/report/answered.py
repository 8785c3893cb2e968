"""What is said of an answer score, wherever it is shown."""

from __future__ import annotations

from tuner.records import AnswerScore
from tuner.report import format

HEADER = "answers"
"""Of a column of answer scores."""


def number(score: AnswerScore | None) -> str:
    """The mean and its standard error."""
    if score is None:
        return format.NOTHING
    mean = format.number(score.mean)
    return mean if score.standard_error is None else f"{mean} ± {format.number(score.standard_error)}"


def in_words(score: AnswerScore) -> str:
    """The same with what it is the mean of: `0.42 ± 0.07, the mean of 50 answers by exact_match`."""
    return f"{number(score)}, the mean of {format.count(score.num_examples, 'answer')} by {score.metric}"
