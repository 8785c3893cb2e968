"""The objective of a round: a metric and its direction."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class Direction(StrEnum):
    """Which values of a metric are better, by Optuna's names."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"


@dataclass(frozen=True, slots=True)
class Objective:
    """A metric as the objective of a round."""

    metric: str = "eval_loss"
    """Name of the metric in the round file."""
    direction: Direction = Direction.MINIMIZE
    per: Literal["evaluation", "trial"] = "evaluation"
    """Whether each evaluation has a value, which then chooses the best step, or each complete trial."""
    is_relative_to_gained: bool = False
    """Whether differences are relative to what the best trial gained over the base model, else to the value
    itself. So it is of metrics that are maximised or have an upper bound."""

    @property
    def noun(self) -> str:
        """Return its name in messages: `loss`, or the metric's name."""
        return "loss" if self.metric == "eval_loss" else self.metric

    def cost(self, value: float) -> float:
        """Return the value with its sign set so that lower is better. The function is its own inverse."""
        return value if self.direction == Direction.MINIMIZE else -value


LOSS = Objective()
"""The default: the evaluation loss."""
