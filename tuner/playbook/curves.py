"""The shape of one trial's curves: turned up, still falling, restless, periodic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.playbook.noise import (
    BY_VALUE,
    SIGNIFICANT,
    Scale,
    difference_error,
    is_number,
    measured,
    paired_standard_error,
    residual_spread,
    smoothed,
    smoothed_costs,
)
from tuner.playbook.selection import best_evaluation
from tuner.records import Evaluation

FITTED_TRAIN_LOSS = 0.05
"""Nats per token below which the training set counts as fitted."""


@dataclass(frozen=True, slots=True)
class Rise:
    """How far an evaluation loss ends above its best."""

    best_step: int
    last_step: int
    amount: float
    """Last minus best value of the objective, worse is positive: of a loss in nats per token."""
    standard_error: float
    train_loss_falls: bool | None
    """Whether the train loss kept falling; None if unknown."""

    @property
    def is_overfitting(self) -> bool:
        """Return whether the train loss falls, or does not contradict overfitting."""
        return self.train_loss_falls is not False


def rise_after_best(evaluations: Sequence[Evaluation]) -> Rise | None:
    """Return the rise of the evaluation loss after its best step; None unless it is significant at the end.

    The rise must exceed two standard errors at the last evaluation. Since the best of many evaluations is low
    partly by luck, and the last one may be high by luck, the means of up to three evaluations around the best
    and at the end must differ significantly too. Rule: Deep Learning Tuning Playbook, "Examining the training
    curves" (problematic overfitting); the test is this project's.
    """
    if (found := _end_above_best(evaluations)) is None:
        return None
    finite, best, last = found
    error = difference_error(finite, last, best)
    amount = last.cost - best.cost
    if error is None or amount <= SIGNIFICANT * error or _lasting_rise(finite) <= SIGNIFICANT * error:
        return None
    return Rise(best.step, last.step, amount, error, _train_loss_falls_after(finite, finite.index(best)))


def may_rise_after_best(evaluations: Sequence[Evaluation]) -> bool:
    """Return False where `rise_after_best` finds no rise whatever the losses of single examples are.

    Rule: as for `rise_after_best`.
    """
    found = _end_above_best(evaluations)
    return found is not None and _lasting_rise(found[0]) > 0


def _end_above_best(
    evaluations: Sequence[Evaluation],
) -> tuple[Sequence[Evaluation], Evaluation, Evaluation] | None:
    """Return the usable evaluations, the best and the last of them; None where the last is the best."""
    finite = measured(evaluations)
    best = best_evaluation(finite)
    return None if best is None or finite[-1] is best else (finite, best, finite[-1])


def _lasting_rise(finite: Sequence[Evaluation]) -> float:
    """Return how far the smoothed curve ends above its lowest point."""
    costs = smoothed_costs(finite)
    return costs[-1] - min(costs)


def plateau_step(evaluations: Sequence[Evaluation]) -> int | None:
    """Return the earliest step not significantly worse than the best, both on the smoothed curve; or None.

    `settled_step` uses single evaluations, of which the best is lucky, so it comes late: on 93 synthetic
    saturated rounds 1.25 times its 90th percentile was within a factor 1.5 of the truth in 4%, with this
    function in 97%. Rule: this project's decision, "saturated".
    """
    curve = smoothed(evaluations)
    best = best_evaluation(curve)
    if best is None:
        return None
    return next(
        evaluation.step
        for evaluation in curve
        if evaluation.cost - best.cost
        <= SIGNIFICANT * (difference_error(evaluations, evaluation, best) or 0.0)
    )


@dataclass(frozen=True, slots=True)
class LateDrop:
    """Drop of a smoothed objective from a step to the last one, relative as a gain is."""

    relative: float
    """Negative if the loss rose."""
    standard_error: float

    @property
    def is_significant(self) -> bool:
        """Return whether the loss was still falling."""
        return self.relative > SIGNIFICANT * self.standard_error

    @property
    def at_most(self) -> float:
        """Return the largest drop compatible with the evaluations."""
        return self.relative + SIGNIFICANT * self.standard_error


def late_drop(evaluations: Sequence[Evaluation], at: float, scale: Scale | None = None) -> LateDrop | None:
    """Return the drop of the smoothed loss from step `at` to the last one.

    The smoothed curve is interpolated linearly between evaluations. It is relative by `scale`, by
    default to the value at `at`. None if there are no evaluations on both
    sides of `at`, no finite one at the end, or no standard error. Rule: Deep Learning Tuning Playbook,
    "Deciding how long to train when training is not compute-bound": the last 25% of the steps; the test is
    this project's decision.
    """
    curve = smoothed(evaluations)
    if not curve or not is_number(evaluations[-1].cost):
        return None
    last = curve[-1]
    before = max((e for e in curve if e.step <= at), key=lambda e: e.step, default=None)
    after = min((e for e in curve if e.step >= at), key=lambda e: e.step, default=None)
    if before is None or after is None or last.step <= at:
        return None
    errors = [difference_error(evaluations, e, last) for e in (before, after)]
    if (first := errors[0]) is None or (second := errors[1]) is None:
        return None
    share = (at - before.step) / (after.step - before.step) if after.step > before.step else 0.0
    start = before.cost + share * (after.cost - before.cost)
    scale = scale or BY_VALUE
    if scale.gained is None and start <= 0:
        return None
    error = (1 - share) * first + share * (0.0 if after is last else second)
    return LateDrop(scale.share(start - last.cost, of=start), scale.share(error, of=start))


def _train_loss_falls_after(evaluations: Sequence[Evaluation], at: int) -> bool | None:
    known = [(i, e.train_loss) for i, e in enumerate(evaluations) if e.train_loss is not None]
    after = [loss for i, loss in known if i > at]
    if not after:
        return None
    before = [loss for i, loss in known if i <= at][-3:] or after[:1]
    ending = after[-3:]
    return sum(ending) / len(ending) < sum(before) / len(before)


def train_losses(evaluations: Sequence[Evaluation]) -> tuple[float, ...]:
    """Return the finite train losses, by step. Rule: this project's decision: others are ignored."""
    losses = (evaluation.train_loss for evaluation in evaluations)
    return tuple(loss for loss in losses if loss is not None and is_number(loss))


def train_loss_still_falls(evaluations: Sequence[Evaluation]) -> bool | None:
    """Return whether a line through the second half of the train losses falls significantly; None if unknown.

    Rule: Deep Learning Tuning Playbook, "Deciding the number of steps for each training run": training is
    compute-bound while more steps still lower the train loss.
    """
    losses = np.array(train_losses(evaluations), dtype=np.float64)
    losses = losses[len(losses) // 2 :]
    if len(losses) < 2:
        return None
    steps = np.arange(len(losses)) - (len(losses) - 1) / 2
    slope = float(steps @ losses) / float(steps @ steps)
    if len(losses) == 2:
        return slope < 0
    residuals = losses - losses.mean() - slope * steps
    error = math.sqrt(float(residuals @ residuals) / (len(losses) - 2) / float(steps @ steps))
    return slope < -SIGNIFICANT * error


def train_loss_rise(evaluations: Sequence[Evaluation]) -> float:
    """Return the mean train loss of the last quarter minus that of the first; 0 if not significant.

    In nats per token. Each train loss is that of a few batches, so the difference must exceed two of its
    standard errors. They are estimated from the changes of one train loss to the next, which neither a fall
    nor a rise hides. Rule: Deep Learning Tuning Playbook, "Examining the training curves": a train loss that
    goes up is usually a bug; the test is this project's.
    """
    losses = np.array(train_losses(evaluations), dtype=np.float64)
    if len(losses) < 2:
        return 0.0
    quarter = max(1, len(losses) // 4)
    rise = float(losses[-quarter:].mean() - losses[:quarter].mean())
    error = float(np.sqrt(np.square(np.diff(losses)).mean() / quarter))
    return rise if rise > SIGNIFICANT * error else 0.0


def restless_changes(evaluations: Sequence[Evaluation]) -> tuple[int, int]:
    """Return how many changes of the last quarter are significant, and how many there are.

    Changes from evaluation to evaluation, at least the last four, each against the standard error of the
    pair, with and without their mean: neither a trend nor a bend counts. (0, changes) unless they turn at
    least twice: a loss that falls and then rises turns once, and that is overfitting. Rule: Deep Learning
    Tuning Playbook, "Examining the training curves" (variance late in training).
    """
    finite = measured(evaluations)
    last = finite[-max(5, math.ceil(len(finite) / 4) + 1) :]
    pairs = list(itertools.pairwise(last))
    spread = residual_spread(finite)
    changes = [later.cost - sooner.cost for sooner, later in pairs]
    paired = (paired_standard_error(later, sooner) for sooner, later in pairs)
    errors = [known for error in paired if (known := spread if error is None else error) is not None]
    if not changes or len(errors) < len(changes):
        return 0, len(changes)
    trend = sum(changes) / len(changes)
    signs = [_direction(c, trend, SIGNIFICANT * error) for c, error in zip(changes, errors, strict=True)]
    significant = [sign for sign in signs if sign]
    turns = sum(sooner != later for sooner, later in itertools.pairwise(significant))
    return (len(significant) if turns >= 2 else 0), len(changes)


def _direction(change: float, trend: float, limit: float) -> int:
    """Return 1 for a significant rise, -1 for a fall, with and without the trend; 0 for neither."""
    if min(change, change - trend) > limit:
        return 1
    return -1 if max(change, change - trend) < -limit else 0


def periodicity(evaluations: Sequence[Evaluation], period_steps: float) -> float | None:
    """Return the share of the detrended evaluation losses' variance that repeats with a period, in [0, 1].

    The first quarter is left out because it falls too steeply; the rest is detrended by a cubic in log step,
    and the periodic component is the first harmonic. None if there are fewer than twelve evaluations, fewer
    than three in a period, or fewer than three periods. Rule: this project's decision, "periodic_evaluation",
    after the Deep Learning Tuning Playbook's "Examining the training curves".
    """
    finite = measured(evaluations)
    points = [(e.step, e.cost) for e in finite if e.step > 0 and e.step >= finite[-1].step / 4]
    if len(points) < 12:
        return None
    steps, losses = np.array(points, dtype=np.float64).T
    interval = float(np.median(np.diff(steps)))
    if period_steps < 3 * interval or steps[-1] - steps[0] < 3 * period_steps:
        return None
    trend = np.vander(np.log(steps / steps[-1]), 4)
    angle = 2 * np.pi * steps / period_steps
    left = _residual_variance(trend, losses)
    explained = _residual_variance(np.column_stack([trend, np.cos(angle), np.sin(angle)]), losses)
    return 1.0 - explained / left if left > 1e-18 * float(losses @ losses) else 0.0


def _residual_variance(design: np.ndarray, values: np.ndarray) -> float:
    solution, *_ = np.linalg.lstsq(design, values, rcond=None)
    residuals = values - design @ solution
    return float(residuals @ residuals)
