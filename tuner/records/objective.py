"""What a round ranks its trials by: a metric, and which way it is better."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Direction(StrEnum):
    """Which values of a metric are better. The names are Optuna's."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@dataclass(frozen=True, slots=True)
class Objective:
    """A metric as the objective of a round."""

    metric: str = "eval_loss"
    """As the round file names it."""
    direction: Direction = Direction.MINIMIZE
    per: Literal["evaluation", "trial"] = "evaluation"
    """Whether each evaluation has a value, which chooses the best step, or each complete trial has one."""
    is_relative_to_gained: bool = False
    """Whether differences are relative to what the best trial gained over the base model, else to the value
    itself. So it is of metrics that are maximised or have an upper bound."""

    @property
    def noun(self) -> str:
        """What messages call it: `loss`, or the metric's name."""
        return "loss" if self.metric == "eval_loss" else self.metric

    def cost(self, value: float) -> float:
        """Return the value with the sign that makes lower better. It is its own inverse."""
        return value if self.direction == Direction.MINIMIZE else -value


LOSS = Objective()
"""The default: the evaluation loss."""
