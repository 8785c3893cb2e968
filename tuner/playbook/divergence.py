"""When a trial's loss alone makes it infeasible: its hyperparameters' fault, and a result."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner.records import Evaluation

PATIENCE = 3
"""Evaluations in a row above the limit that make a trial infeasible."""


def divergence_limit(base_loss: float, vocabulary_size: int) -> float:
    """The loss above which a trial is worse than it can have a reason to be, in nats per token.

    min(2 L0, max((L0 + ln V) / 2, 1.1 L0)) with L0 the untouched model's loss and ln V that of a
    guess among V tokens: half-way from the one to the other, where that is between 1.1 and 2 times
    L0. Rule: this project's decision, "Infeasible".
    """
    half_way = (base_loss + math.log(vocabulary_size)) / 2
    return min(2 * base_loss, max(half_way, 1.1 * base_loss))


def is_diverged(evaluations: Sequence[Evaluation], vocabulary_size: int) -> str | None:
    """Why a trial with these evaluations is infeasible; None while it is not.

    `evaluations` are by step, the first one at step 0. Infeasible is an evaluation loss that is not
    finite, or three in a row above `divergence_limit`; that a trial has once been so is enough,
    whatever comes later. Rule: this project's decision, "Infeasible".
    """
    for evaluation in evaluations:
        if not math.isfinite(evaluation.eval_loss):
            return f"evaluation loss is {evaluation.eval_loss} at step {evaluation.step}"
    if not evaluations:
        return None
    base_loss = evaluations[0].eval_loss
    limit = divergence_limit(base_loss, vocabulary_size)
    in_a_row = 0
    for evaluation in evaluations:
        in_a_row = in_a_row + 1 if evaluation.eval_loss > limit else 0
        if in_a_row == PATIENCE:
            return (
                f"diverged: evaluation loss {evaluation.eval_loss:.3f} at step {evaluation.step}, above "
                f"{limit:.3f} for {PATIENCE} evaluations in a row (the untouched model has {base_loss:.3f})"
            )
    return None
