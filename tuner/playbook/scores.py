"""Scores that never choose a step: of generated answers, and of the final trial on `data.test`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from tuner.playbook.noise import loss_error
from tuner.records import AnswerScore, Evaluation, FinalScore, Trial


def answer_score(scores: Sequence[float], *, step: int, metric: str, is_objective: bool) -> AnswerScore:
    """Return the mean of at least one answer's score, and its standard error.

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


def final_score(
    example_nll: Sequence[float], example_tokens: Sequence[int], *, step: int, rows: str, scored_at: float
) -> FinalScore:
    """Return the score that per-example sums and target tokens add up to.

    `rows` is the examples' fingerprint, `step` the adapter's. Rule: this project's decision, "The best step
    of a trial": the minimum over many evaluations is optimistic, this number is not.
    """
    tokens = tuple(example_tokens)
    loss = math.fsum(example_nll) / sum(tokens)
    made = Evaluation(step, loss, example_nll=tuple(example_nll), example_tokens=tokens)
    return FinalScore(
        step=step,
        loss=loss,
        standard_error=loss_error(made),
        num_examples=len(tokens),
        num_tokens=sum(tokens),
        rows=rows,
        scored_at=scored_at,
    )


def scored_trials(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Return the trials that have a score, in the order in which they were scored.

    Rule: this project's decision, "The best step of a trial".
    """
    found = [(trial.final_score.scored_at, trial) for trial in trials if trial.final_score is not None]
    return tuple(
        trial for _, trial in sorted(found, key=lambda pair: (pair[0], pair[1].round, pair[1].number))
    )


def scored_before(trial: Trial, scored: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials that were scored on the same rows before this one; after any, its score is selected.

    `scored` is as `scored_trials` orders it. Rule: this project's decision, "The best step of a trial": a
    repeated look may keep the better number.
    """
    score = trial.final_score
    if score is None:
        return ()
    names = [(other.round, other.number) for other in scored]
    before = scored[: names.index((trial.round, trial.number))]
    return tuple(o for o in before if o.final_score is not None and o.final_score.rows == score.rows)
