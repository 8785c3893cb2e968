"""Metrics that a round can use as its objective, and how to find one by name.

A metric of your own is an instance of `Metric` in a module, such as

    WORST = Metric(Direction.MINIMIZE, "Loss of the worst tenth.", compute=worst_tenth)

which a round file names as `package.module:WORST`, or by an entry point in the group `tuner.metrics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, SupportsFloat

from tuner.errors import InputError, MetricError
from tuner.methods.registry import described
from tuner.records import Direction, Objective

if TYPE_CHECKING:
    import numpy as np

_KEY = "objective.metric"


@dataclass(frozen=True, slots=True)
class ExampleScores:
    """Results of an evaluation: arrays of equal length, with one entry per example."""

    nll: np.ndarray
    """Sum of the negative log-likelihoods of the target tokens, in nats."""
    tokens: np.ndarray
    """Number of target tokens, at least one."""
    correct: np.ndarray
    """Number of target tokens that are the model's top prediction."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: how to compute it, and which direction is better."""

    direction: Direction
    meaning: str
    """A sentence for the reference pages."""
    compute: Callable[[ExampleScores], float] | None = None
    """Computes the value of an evaluation from its examples. None if `per` is `trial`."""
    per: Literal["evaluation", "trial"] = "evaluation"
    """Whether it is measured at each evaluation or once per complete trial."""
    bounds: tuple[float | None, float | None] = (None, None)
    """The lowest and the highest possible value; None where there is none."""

    def __post_init__(self) -> None:
        if (self.compute is None) != (self.per == "trial"):
            raise ValueError("a metric requires `compute` if, and only if, it is per evaluation")
        object.__setattr__(self, "direction", Direction(self.direction))

    def objective(self, name: str) -> Objective:
        """Return the metric as an objective, with its name in the round file."""
        is_maximised = self.direction == Direction.MAXIMIZE
        return Objective(
            metric=name,
            direction=self.direction,
            per=self.per,
            is_relative_to_gained=is_maximised or self.bounds[1] is not None,
        )


def metric(name: str) -> Metric:
    """Return the metric with this name.

    Raises InputError if it cannot be imported or is not a metric.
    """
    found = described("metric", name, Metric)
    if found.per == "trial" and name != "answers":
        raise InputError(
            f"{_KEY}: {name} has one value per trial, which is supported only for answers: set "
            "evaluation.answers.metric to a function that compares an answer with the row's completion, and "
            "write `objective: {metric: answers}`"
        )
    return found


def values(name: str, measured: Metric, examples: ExampleScores) -> Mapping[str, float]:
    """Return the values of a metric that an evaluation records besides its loss, by name.

    The value is NaN, without calling the metric, if the loss of an example is not finite. Raises MetricError
    if a user's metric raises, or does not return a number.
    """
    if measured.compute is None or name == "eval_loss":
        return {}
    if not all(map(math.isfinite, examples.nll)):
        return {name: math.nan}
    try:
        found = measured.compute(examples)
        number = float(found) if isinstance(found, SupportsFloat) else None
    except Exception as error:
        raise _at_fault(name, f"it raised {type(error).__name__}: {error}") from error
    if number is None:
        raise _at_fault(name, f"it returned {found!r}, not a number")
    low, high = measured.bounds
    best = -math.inf if measured.direction == Direction.MINIMIZE else math.inf
    if math.isnan(number) or number == best:
        raise _at_fault(name, f"it returned {number} though every loss is finite")
    if not (_or(low, -math.inf) <= number <= _or(high, math.inf)):
        raise _at_fault(name, f"it returned {number}, outside its bounds {measured.bounds}")
    return {name: number}


def _or(bound: float | None, default: float) -> float:
    return default if bound is None else bound


def _at_fault(name: str, what: str) -> MetricError:
    return MetricError(
        f"{_KEY}: {name}: {what}; it takes the scores of an evaluation's examples and returns a number"
    )
