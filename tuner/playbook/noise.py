"""How reliable an evaluation is: smoothed curves, standard errors and significance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from tuner.records import Evaluation

WINDOW = 1.25
"""An evaluation is averaged with those whose step is within this factor."""


def smoothed(evaluations: Sequence[Evaluation]) -> tuple[Evaluation, ...]:
    """Return the finite evaluations with the objective from a local line through the neighbours, by step.

    Neighbours are within a factor 1.25 of the step, so the steep beginning and sparse evaluations stay as
    they are; the line is in the logarithm of the step. The best of many evaluations and the last one are
    lucky or unlucky by about a standard error; rules that compare them need the underlying curve. Rule: this
    project's decision.
    """
    finite = measured(evaluations)
    return tuple(e.with_cost(cost) for e, cost in zip(finite, smoothed_costs(finite), strict=True))


def smoothed_cost(finite: Sequence[Evaluation], step: int) -> float:
    """Return the smoothed cost at the step of one of these evaluations. Rule: as for `smoothed`."""
    steps = tuple(evaluation.step for evaluation in finite)
    at = steps.index(step)
    window = _windows(steps)[at]
    costs = [float(evaluation.cost) for evaluation in finite]
    return costs[at] if window is None else window.value(np.array(costs, dtype=np.float64))


def smoothed_costs(finite: Sequence[Evaluation]) -> list[float]:
    """Return the smoothed costs of evaluations with usable ones. Rule: as for `smoothed`."""
    costs = [float(evaluation.cost) for evaluation in finite]
    windows = _windows(tuple(evaluation.step for evaluation in finite))
    if not any(windows):
        return costs
    losses = np.array(costs, dtype=np.float64)
    return [
        cost if window is None else window.value(losses) for cost, window in zip(costs, windows, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Window:
    """A step's neighbours, itself included."""

    places: np.ndarray
    mean: float
    """Of the distances to the step, as logarithms."""
    centred: np.ndarray
    """The distances less their mean."""

    def value(self, losses: np.ndarray) -> float:
        """Return the value at the step of a line through the neighbours."""
        y = losses[self.places]
        slope = float(self.centred @ y) / float(self.centred @ self.centred)
        return float(np.add.reduce(y)) / len(y) - slope * self.mean  # `mean` of so few takes longer


@lru_cache(maxsize=256)
def _windows(steps: tuple[int, ...]) -> tuple[_Window | None, ...]:
    """Return the window of each step, None for one with fewer than three neighbours.

    Most trials of a round are evaluated at the same steps.
    """
    logarithms = np.log(np.maximum([float(step) for step in steps], 1e-9))
    found: list[_Window | None] = []
    for i in range(len(steps)):
        near = np.flatnonzero(np.abs(logarithms - logarithms[i]) <= math.log(WINDOW) + 1e-12)
        x = logarithms[near] - logarithms[i]
        found.append(_Window(near, float(x.mean()), x - x.mean()) if len(near) >= 3 else None)
    return tuple(found)


MAX_LOSS = 1e100
"""Nats per token above which a loss is not used in calculations; its square is still finite."""
MIN_COST = 1 / MAX_LOSS
"""A relative difference is meaningless for a value below this."""
SIGNIFICANT = 2.0
"""Standard errors above which a difference is significant."""
MIN_RESIDUAL_EVALUATIONS = 4
"""Fewer evaluations than this do not show their spread around a line."""
MIN_LATE_EVALUATIONS = 6
"""The spread is taken over at least this many of the last evaluations, if there are as many."""


_NORMAL = statistics.NormalDist()


def is_number(loss: float) -> bool:
    """Return whether a loss can be compared: finite, and small enough that its square is finite.

    Rule: this project's decision, "The best step of a trial": other evaluations never win.
    """
    return abs(loss) <= MAX_LOSS


def measured(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Return the evaluations with a usable value of the objective.

    Rule: this project's decision, "The best step of a trial".
    """
    return [evaluation for evaluation in evaluations if abs(evaluation.cost) <= MAX_LOSS]


def paired_standard_error(one: Evaluation, other: Evaluation) -> float | None:
    """Return the standard error of `one.cost - other.cost` over the same examples, in nats per token.

    By the delta method, since the loss is a ratio of sums: the spread of each example's difference around the
    value its tokens predict. None unless both losses are usable and over the same examples, at least two;
    and None for any other objective, whose share of single examples is unknown. Rule: this project's
    decision, "settled_step".
    """
    if one.objective is not None or other.objective is not None:
        return None
    if len(one.example_nll) < 2 or one.example_tokens != other.example_tokens:
        return None
    if len(measured((one, other))) < 2:
        return None
    tokens = np.asarray(one.example_tokens, dtype=np.float64)
    if (total := float(tokens.sum())) <= 0:
        return None
    differences = np.asarray(one.example_nll) - np.asarray(other.example_nll)
    residuals = differences - tokens * (float(differences.sum()) / total)
    variance = float(residuals @ residuals) * len(tokens) / (len(tokens) - 1) / total**2
    return math.sqrt(variance) if math.isfinite(variance) else None


def largest_differences(curves: Sequence[tuple[Sequence[Evaluation], Evaluation]]) -> list[float]:
    """Bounds above which an evaluation's difference to its curve's best exceeds the standard error.

    Of all evaluations of all curves; each curve comes with its best one. Infinite where the paired standard
    error is not known. Rule: this project's decision, "settled_step".
    """
    every = [evaluation for curve, _ in curves for evaluation in curve]
    own = every[0].example_tokens if every else ()  # held once for a round: mostly the same object
    has_others = any(e.objective or (e.example_tokens is not own and e.example_tokens != own) for e in every)
    tokens, total = _tokens(own)
    if len(tokens) < 2 or has_others or total <= 0:
        return [math.inf] * len(every)
    best = np.repeat(_example_losses([best for _, best in curves]), [len(c) for c, _ in curves], axis=0)
    differences = _example_losses(every) - best
    residuals = differences - (np.add.reduce(differences, axis=1) / total)[:, None] * tokens
    variances = np.einsum("ij,ij->i", residuals, residuals) * (len(tokens) / (len(tokens) - 1) / total**2)
    # A little more than the error itself, whose last digits depend on the order of the sums.
    bounds = (1 + 1e-6) * np.sqrt(variances)
    return [bound if math.isfinite(bound) else math.inf for bound in bounds.tolist()]


def _example_losses(evaluations: Sequence[Evaluation]) -> np.ndarray:
    """Return the losses of single examples, a row an evaluation."""
    try:
        content = b"".join([e.example_nll.content for e in evaluations])  # type: ignore[union-attr]
    except AttributeError:  # kept as tuples
        return np.array([np.asarray(e.example_nll) for e in evaluations])
    return np.frombuffer(content, dtype="<f8").reshape(len(evaluations), -1)


@lru_cache(maxsize=64)
def _tokens(example_tokens: tuple[int, ...]) -> tuple[np.ndarray, float]:
    """Return the examples' numbers of tokens, and their sum."""
    tokens = np.asarray(example_tokens, dtype=np.float64)
    return tokens, float(tokens.sum())


def loss_error(evaluation: Evaluation) -> float | None:
    """Return the standard error of an evaluation's loss over its examples, in nats per token.

    That which a command reported as `eval_loss_se`, where there are no examples. None unless the loss is
    usable and over at least two examples. Rule: this project's decision, "settled_step".
    """
    tokens = evaluation.example_tokens
    if not tokens:
        return reported_error(replace(evaluation, objective=None))
    nothing = Evaluation(evaluation.step, 0.0, example_nll=(0.0,) * len(tokens), example_tokens=tokens)
    return paired_standard_error(replace(evaluation, objective=None), nothing)


def residual_spread(evaluations: Sequence[Evaluation]) -> float | None:
    """Return the standard deviation of the late evaluations' objective around a line through them.

    It uses the last quarter of the finite evaluations, but at least the last six; all of them if there are
    four or five; None if there are fewer. It replaces the paired standard error when per-example losses are
    unknown. Rule: this project's decision, "settled_step".
    """
    finite = measured(evaluations)
    last = finite[-max(MIN_LATE_EVALUATIONS, math.ceil(len(finite) / 4)) :]
    if len(last) < MIN_RESIDUAL_EVALUATIONS:
        return None
    steps = np.array([evaluation.step for evaluation in last], dtype=np.float64)
    losses = np.array([evaluation.cost for evaluation in last], dtype=np.float64)
    steps -= steps.mean()
    losses -= losses.mean()
    residuals = losses - steps * float(steps @ losses) / float(steps @ steps)
    return math.sqrt(float(residuals @ residuals) / (len(last) - 2))


def difference_error(evaluations: Sequence[Evaluation], one: Evaluation, other: Evaluation) -> float | None:
    """Return the standard error of the difference of two evaluations of a trial, in nats per token.

    Paired if both have per-example losses, otherwise the residual spread of the trial's curve; of a curve
    too short for that, from the standard errors that a command reported. None if none is available. Rule:
    this project's decision, "settled_step".
    """
    paired = paired_standard_error(one, other)
    if paired is not None:
        return paired
    spread = residual_spread(evaluations)
    return _reported_difference(one, other) if spread is None else spread


REPORTED_ERROR = "_se"
"""End of the name under which a command reports a metric's standard error."""


def reported_error(evaluation: Evaluation) -> float | None:
    """Return the standard error of the objective that a command reported, such as `eval_loss_se`.

    None if it reported none that can be used. Rule: this project's decision, "settled_step".
    """
    name = "eval_loss" if evaluation.objective is None else evaluation.objective.metric
    error = evaluation.metrics.get(name + REPORTED_ERROR)
    return error if error is not None and 0 < error <= MAX_LOSS else None


def _reported_difference(one: Evaluation, other: Evaluation) -> float | None:
    """Return the error of a difference as if its evaluations were on rows of their own.

    They are on the same rows, whose share of the error cancels, so that this is an upper bound.
    """
    errors = [reported_error(each) for each in (one, other)]
    known = [error for error in errors if error is not None]
    return math.hypot(*known) if len(known) == len(errors) else None


@dataclass(frozen=True, slots=True)
class Scale:
    """What differences of the objective are relative to; costs are lower where better."""

    gained: float | None = None
    """What the best trial gained over the base model, positive; None: the value itself."""

    def can_compare(self, *costs: float) -> bool:
        """Whether relative differences of these make sense: a value has to be above 0 to be relative to."""
        return self.gained is not None or min(costs) >= MIN_COST

    def share(self, difference: float, *, of: float) -> float:
        """Return a difference relative to the cost `of`, or to what was gained."""
        return difference / (of if self.gained is None else self.gained)

    def amount(self, share: float, *, of: float) -> float:
        """The inverse of `share`."""
        return share * (of if self.gained is None else self.gained)

    def drop(self, before: float, after: float) -> float:
        """Return the fall from one cost to another on the scale on which doublings are a series.

        That of the logarithm where differences are relative to the value, else of what was gained.
        """
        return math.log(before / after) if self.gained is None else (before - after) / self.gained


BY_VALUE = Scale()
"""Of the loss, and of any other metric that is minimised and has no upper bound."""


def significant_among(count: int) -> float:
    """Return by how many standard errors the best of `count` evaluations must differ; 2 for one.

    Bonferroni's correction: by chance, none of them exceeds it more often than a single one exceeds two.
    Rule: this project's decision, "Leading trials".
    """
    return -_NORMAL.inv_cdf(_NORMAL.cdf(-SIGNIFICANT) / max(1, count))


def majority_probability(hits: int, count: int) -> float:
    """Return the posterior probability that a share is above one half, after `hits` of `count`.

    Under Jeffreys' prior: 1 - I(1/2; hits + 1/2, count - hits + 1/2). Rule: this project's decision on what
    "consistently" means in the Deep Learning Tuning Playbook's sentence on best steps.
    """
    from scipy.special import betaincc  # a sixth of a second of loading, and most verbs ask for none of it

    return float(betaincc(hits + 0.5, count - hits + 0.5, 0.5))
