"""Metrics that a round may have as its objective: what one is, and how one is found by name.

A metric of yours is one value of `Metric` in a module, such as

    WORST = Metric(Direction.MINIMIZE, "Loss of the worst tenth.", compute=worst_tenth)

which a round file names as `package.module:WORST`, or by an entry point of the group `tuner.metrics`.
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
    """What an evaluation knows of each of its examples: arrays of equal length, one entry for each."""

    nll: np.ndarray
    """Sum of the negative log-likelihoods of the target tokens, in nats."""
    tokens: np.ndarray
    """Target tokens, at least one."""
    correct: np.ndarray
    """Target tokens than which the model finds no other likelier."""


@dataclass(frozen=True, slots=True)
class Metric:
    """What a metric measures, and which way it is better."""

    direction: Direction
    meaning: str
    """For reference pages: a sentence."""
    compute: Callable[[ExampleScores], float] | None = None
    """The value of one evaluation, from what it knows of its examples. None where `per` is `trial`."""
    per: Literal["evaluation", "trial"] = "evaluation"
    """Whether each evaluation has a value, or each complete trial has one."""
    bounds: tuple[float | None, float | None] = (None, None)
    """The lowest and the highest value that there can be."""

    def __post_init__(self) -> None:
        if (self.compute is None) != (self.per == "trial"):
            raise ValueError("a metric needs `compute` if, and only if, it is per evaluation")
        object.__setattr__(self, "direction", Direction(self.direction))

    def objective(self, name: str) -> Objective:
        """Return the metric as an objective, by the name that the round file gives it."""
        is_maximised = self.direction == Direction.MAXIMIZE
        return Objective(
            metric=name,
            direction=self.direction,
            per=self.per,
            is_relative_to_gained=is_maximised or self.bounds[1] is not None,
        )


def metric(name: str) -> Metric:
    """Return the metric of a name.

    Raises InputError where it leads nowhere or to something else.
    """
    found = described("metric", name, Metric)
    if found.per == "trial" and name != "answers":
        raise InputError(
            f"{_KEY}: {name} has one value for each trial, which only answers can have: put a function that "
            "compares an answer with the row's completion into evaluation.answers.metric, and write "
            "`objective: {metric: answers}`"
        )
    return found


def values(name: str, measured: Metric, examples: ExampleScores) -> Mapping[str, float]:
    """Return the numbers that an evaluation keeps of a metric beside its loss, by name.

    NaN, without asking the metric, where the loss of an example is not finite. Raises MetricError where a
    metric of the user's raises, or returns no number.
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
    if not math.isnan(number) and not (_or(low, -math.inf) <= number <= _or(high, math.inf)):
        raise _at_fault(name, f"it returned {number}, outside of its bounds {measured.bounds}")
    return {name: number}


def _or(bound: float | None, default: float) -> float:
    return default if bound is None else bound


def _at_fault(name: str, what: str) -> MetricError:
    return MetricError(
        f"{_KEY}: {name}: {what}; it takes the scores of an evaluation's examples and returns a number"
    )
