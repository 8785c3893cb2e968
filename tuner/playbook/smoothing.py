"""A learning curve without the jitter of single evaluations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tuner.playbook.precision import measured
from tuner.records import Evaluation

WINDOW = 1.25
"""An evaluation is averaged with those whose step is at most this factor away."""


def smoothed(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """The finite evaluations with losses from a local line through each one's neighbours, by step.

    Neighbours are within a factor 1.25 of the step, so that the steep beginning stays as it is and
    sparse evaluations are not touched; the line is in the logarithm of the step. The best of many
    evaluations and the last one are lucky or not by a standard error or so, and rules that compare
    them need the curve below. Rule: this project's decision.
    """
    finite = measured(evaluations)
    steps, losses = _curve(finite)
    return tuple(
        replace(evaluation, eval_loss=_local_value(steps, losses, i)) for i, evaluation in enumerate(finite)
    )


def smoothed_loss(evaluations: Sequence[Evaluation], step: int) -> float:
    """The smoothed loss at the step of one of the evaluations. Rule: as for `smoothed`."""
    finite = measured(evaluations)
    steps, losses = _curve(finite)
    at = next(i for i, evaluation in enumerate(finite) if evaluation.step == step)
    return _local_value(steps, losses, at)


def _curve(finite: Sequence[Evaluation]) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the steps, and losses."""
    steps = np.log(np.maximum([float(evaluation.step) for evaluation in finite], 1e-9))
    return steps, np.array([evaluation.eval_loss for evaluation in finite], dtype=np.float64)


def _local_value(steps: np.ndarray, losses: np.ndarray, i: int) -> float:
    near = np.abs(steps - steps[i]) <= math.log(WINDOW) + 1e-12
    x, y = steps[near] - steps[i], losses[near]
    if len(x) < 3:
        return float(losses[i])
    centred = x - x.mean()
    slope = float(centred @ y) / float(centred @ centred)
    return float(y.mean() - slope * x.mean())
