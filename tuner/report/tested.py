"""What is said of a score on `data.test`, wherever it is shown."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.playbook.scores import scored_before
from tuner.records import FinalScore, Trial
from tuner.report import format


def in_words(trial: Trial, scored: Sequence[Trial]) -> str:
    """A scored trial's loss on `data.test`, and whether it is unbiased; `scored` are all of the study's."""
    score = trial.final_score
    assert score is not None
    rows, before = format.count(score.num_examples, "row"), scored_before(trial, scored)
    if not before:
        return f"On data.test, {rows} that nothing was chosen by, its loss is {number(score)}."
    others = ", ".join(other.name for other in before)
    return (
        f"On data.test, {rows}, its loss is {number(score)}. That is no longer unbiased: {others} had a "
        "score on them before, and the better of several is optimistic."
    )


def number(score: FinalScore) -> str:
    """The loss and its standard error."""
    if score.standard_error is None:
        return format.loss(score.loss)
    return f"{format.loss(score.loss)} ± {format.loss(score.standard_error)}"
