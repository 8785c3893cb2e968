"""The first horizon: how fast a constant learning rate can fit the training set."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

GRID_LOW, GRID_HIGH, GRID_SIZE = 1e-5, 3e-3, 8
PERFECT_LOSS = 0.05
"""Nats per target token."""
PERFECT_ACCURACY = 0.99
"""Share of target tokens that are predicted first."""
SAMPLE_SIZE = 256
"""The most training examples on which the fit is measured."""
WIDENING = 10.0
MAX_WIDENINGS = 2
PRODUCTION_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class FitPoint:
    """How well a trial fits the fixed sample of training examples at a step."""

    step: int
    loss: float
    """Nats per target token; may be NaN or infinite."""
    accuracy: float | None = None
    """Share of target tokens predicted first; None if it was not counted."""


@dataclass(frozen=True, slots=True)
class SweepTrial:
    """One learning rate of the grid."""

    learning_rate: float
    points: tuple[FitPoint, ...]
    """By step; empty for a trial that was infeasible from the start."""
    is_infeasible: bool = False


@dataclass(frozen=True, slots=True)
class FirstHorizon:
    """A result: the fastest trial fitted the training set in this many steps."""

    max_train_steps: int
    learning_rate: float


@dataclass(frozen=True, slots=True)
class LongerSweep:
    """No rate fits yet: continue all trials to this horizon."""

    max_train_steps: int


@dataclass(frozen=True, slots=True)
class WiderSweep:
    """The best rate is at a bound of the grid: try these as well, at the same horizon."""

    learning_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ComputeBound:
    """The training set cannot be fitted within the steps that the user can afford."""

    max_train_steps: int
    """Where to start instead: a tenth of the production length."""
    message: str


@dataclass(frozen=True, slots=True)
class SweepProblem:
    """No result, and more steps or rates would not give one."""

    message: str


SweepDecision: TypeAlias = FirstHorizon | LongerSweep | WiderSweep | ComputeBound | SweepProblem


def default_grid() -> tuple[float, ...]:
    """Return the learning rates of a sweep: 8, log-spaced from 1e-5 to 3e-3.

    Rule: Deep Learning Tuning Playbook, "Algorithm for picking an initial candidate for max_train_steps using
    a learning rate sweep"; the bounds are this project's decision.
    """
    return log_spaced(GRID_LOW, GRID_HIGH, GRID_SIZE)


def log_spaced(low: float, high: float, count: int) -> tuple[float, ...]:
    """Return log-spaced rates, both ends included, with three digits. Rule: this project's decision."""
    ratio = math.log(high / low) / max(1, count - 1)
    return tuple(float(f"{low * math.exp(i * ratio):.3g}") for i in range(count))


def perfect_fit_step(
    points: Sequence[FitPoint], *, loss: float = PERFECT_LOSS, accuracy: float = PERFECT_ACCURACY
) -> int | None:
    """Return the first step at which the sample is fitted by either measure; None if it never is.

    Rule: Deep Learning Tuning Playbook, "Algorithm for picking an initial candidate": the fastest trial that
    perfectly fits; what counts as perfect is this project's decision.
    """
    fitted = (p.step for p in points if p.loss <= loss or (p.accuracy is not None and p.accuracy >= accuracy))
    return min(fitted, default=None)


def answer_without_a_sweep(
    *, production_steps: int | None, batch_size: int, train_rows: int
) -> ComputeBound | None:
    """Return the result that needs no sweep: a set not seen twice will not be fitted.

    Rule: this project's decision, "The first horizon".
    """
    if production_steps is None or production_steps * batch_size >= 2 * train_rows:
        return None
    return _compute_bound(production_steps, f"{production_steps} steps are fewer than two epochs")


def decide_sweep(
    trials: Sequence[SweepTrial],
    *,
    max_train_steps: int,
    production_steps: int | None,
    widenings: int = 0,
    loss: float = PERFECT_LOSS,
    accuracy: float = PERFECT_ACCURACY,
) -> SweepDecision:
    """Return what follows from a finished sweep of `max_train_steps`.

    A bound is checked first, since rates that are all too small make the horizon seem long. Then comes the
    fastest fit; or twice the steps, up to the production length; or the result that training is
    compute-bound. `widenings` counts those already made. Rule: Deep Learning Tuning Playbook, "Algorithm for
    picking an initial candidate for max_train_steps using a learning rate sweep".
    """
    if not trials:
        return SweepProblem("the sweep has no trials")
    rates = sorted(trial.learning_rate for trial in trials)
    fits = {t.learning_rate: perfect_fit_step(t.points, loss=loss, accuracy=accuracy) for t in _sound(trials)}
    best = _best_rate(trials, fits)
    if best in (None, rates[0], rates[-1]):
        at_top = best == rates[-1] and len(rates) > 1
        if widenings < MAX_WIDENINGS:
            return WiderSweep(widened_grid(rates, at_top=at_top))
        edge = rates[-1] if at_top else rates[0]
        return SweepProblem(
            f"the best learning rate is still at the edge of the grid, {edge:.3g}, after {widenings} "
            "widenings: check the data, the loss masks and the warmup"
        )
    assert best is not None
    if (fastest := fits[best]) is not None:
        return FirstHorizon(max(1, fastest), best)
    if production_steps is None or max_train_steps < production_steps:
        return LongerSweep(min(2 * max_train_steps, production_steps or 2 * max_train_steps))
    return _compute_bound(production_steps, f"no rate fits it within {production_steps} steps")


def widened_grid(rates: Sequence[float], *, at_top: bool) -> tuple[float, ...]:
    """Return new rates beyond one end of a sorted grid, up to ten times as far and about as dense.

    Rule: Deep Learning Tuning Playbook, the note on invalid search spaces under "Algorithm for picking an
    initial candidate"; the factor is this project's decision.
    """
    factors = [later / sooner for sooner, later in itertools.pairwise(rates)]
    spacing = math.exp(math.log(rates[-1] / rates[0]) / len(factors)) if factors else WIDENING
    count = max(1, round(math.log(WIDENING) / math.log(spacing))) if spacing > 1 else 1
    if at_top:
        return log_spaced(rates[-1], rates[-1] * WIDENING, count + 1)[1:]
    return log_spaced(rates[0] / WIDENING, rates[0], count + 1)[:-1]


def _sound(trials: Sequence[SweepTrial]) -> list[SweepTrial]:
    return [t for t in trials if not t.is_infeasible and any(math.isfinite(p.loss) for p in t.points)]


def _best_rate(trials: Sequence[SweepTrial], fits: dict[float, int | None]) -> float | None:
    """Return the rate of the fastest fit; if none fits, of the lowest loss; the lower of equals."""

    def lowest(trial: SweepTrial) -> float:
        return min(point.loss for point in trial.points if math.isfinite(point.loss))

    def order(trial: SweepTrial) -> tuple[float, float, float]:
        step = fits[trial.learning_rate]
        return (math.inf if step is None else step, lowest(trial), trial.learning_rate)

    best = min(_sound(trials), key=order, default=None)
    return None if best is None else best.learning_rate


def _compute_bound(production_steps: int, why: str) -> ComputeBound:
    start = max(1, round(PRODUCTION_SHARE * production_steps))
    return ComputeBound(
        start,
        f"Training is compute-bound: the training set cannot be fitted because {why}. "
        f"Start at about 10% of the production length, {start} steps.",
    )
