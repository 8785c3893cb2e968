"""Hyperparameters and the space they are searched in: points and dimensions, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Value: TypeAlias = bool | int | float | str | tuple[str, ...] | tuple[int, ...]
"""A hyperparameter's value. A tuple holds layer names (`target_modules`) or numbers."""

Hyperparameters: TypeAlias = Mapping[str, Value]
"""A point of the search space, by name. Which names a round file may hold only `spec` knows."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """One value for all trials of the round."""

    value: Value

    def contains(self, value: Value) -> bool:
        """Whether a trial may have this value."""
        return value == self.value


@dataclass(frozen=True, slots=True)
class Choices:
    """A list of values to search, in the file's order."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a list of choices must not be empty")

    def contains(self, value: Value) -> bool:
        """Whether a trial may have this value."""
        return value in self.values


@dataclass(frozen=True, slots=True)
class Range:
    """An interval to search, both ends included."""

    low: float
    high: float
    log: bool = False
    """Search the logarithm; needs low > 0."""
    integer: bool = False
    """Only whole numbers."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range needs low < high, both finite; got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0; got {self.low}")

    def contains(self, value: Value) -> bool:
        """Whether a trial may have this value."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and (not self.integer or float(value).is_integer())


@dataclass(frozen=True, slots=True)
class TimesSqrtRank:
    """`lora_alpha: {times_sqrt_r: FACTOR}`: the value follows the trial's `lora_r`."""

    factor: float

    def contains(self, value: Value) -> bool:
        """Never: the value is derived, so nobody may choose it."""
        return False


Dimension: TypeAlias = Fixed | Choices | Range | TimesSqrtRank
Space: TypeAlias = Mapping[str, Dimension]
"""Every hyperparameter of a round by name, the fixed ones and the defaults included."""


def searched(space: Space) -> dict[str, Choices | Range]:
    """The dimensions a sampler may choose from, in the file's order."""
    return {name: d for name, d in space.items() if isinstance(d, (Choices, Range))}


def num_points(space: Space) -> float:
    """How many different points there are: infinite where a range of real numbers is searched."""
    return math.prod(_num_values(dimension) for dimension in space.values())


def _num_values(dimension: Dimension) -> float:
    match dimension:
        case Choices(values=values):
            return len(values)
        case Range(low=low, high=high, integer=True):
            return math.floor(high) - math.ceil(low) + 1
        case Range():
            return math.inf
        case _:
            return 1


def complete_hyperparameters(space: Space, chosen: Hyperparameters) -> dict[str, Value]:
    """All hyperparameters of a trial: what was chosen, what is fixed, what follows from these.

    Raises KeyError when a searched name was not chosen.
    """
    values: dict[str, Value] = {}
    for name, dimension in space.items():
        match dimension:
            case Fixed(value=value):
                values[name] = value
            case TimesSqrtRank():
                continue
            case _:
                values[name] = chosen[name]
    for name, dimension in space.items():
        if isinstance(dimension, TimesSqrtRank):
            rank = values["lora_r"]
            assert isinstance(rank, (int, float))
            values[name] = dimension.factor * math.sqrt(rank)
    return values


def hyperparameters_from_json(document: Mapping[str, Any]) -> dict[str, Value]:
    """Hyperparameters whose lists became tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}
