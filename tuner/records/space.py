"""What a round searches: the objective, and values, choices, ranges and conditions of hyperparameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar


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


Value: TypeAlias = bool | int | float | str | tuple[str, ...] | tuple[int, ...]
"""A hyperparameter's value. A tuple holds layer names (`target_modules`) or numbers."""

Hyperparameters: TypeAlias = Mapping[str, Value]
"""A point of the search space, by name. Only `config` knows which names a round file may have."""


class Condition(NamedTuple):
    """When a hyperparameter applies: with certain values of another one, such as the optimizer."""

    chosen_by: str
    """The other hyperparameter."""
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class Conditional:
    """Base of all kinds of dimensions."""

    only_with: Condition | None = field(default=None, compare=False, repr=False, kw_only=True)
    """None if it always applies. Conditions are ignored when dimensions are compared."""


@dataclass(frozen=True, slots=True)
class Fixed(Conditional):
    """One value for all trials of the round."""

    value: Value

    def contains(self, value: Value) -> bool:
        """Return whether a trial may have this value."""
        return value == self.value


@dataclass(frozen=True, slots=True)
class Choices(Conditional):
    """A list of values to search, in the file's order."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("a list of choices must not be empty")

    def contains(self, value: Value) -> bool:
        """Return whether a trial may have this value."""
        return value in self.values


@dataclass(frozen=True, slots=True)
class Range(Conditional):
    """An interval to search, including both ends."""

    low: float
    high: float
    log: bool = False
    """Search the logarithm; requires low > 0."""
    integer: bool = False
    """Only whole numbers."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"a range needs low < high, both finite; got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range needs low > 0; got {self.low}")

    def contains(self, value: Value) -> bool:
        """Return whether a trial may have this value."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        return self.low <= value <= self.high and (not self.integer or float(value).is_integer())


@dataclass(frozen=True, slots=True)
class TimesSqrtRank(Conditional):
    """`lora_alpha: {times_sqrt_r: FACTOR}`: the value follows the trial's `lora_r`."""

    factor: float

    def contains(self, value: Value) -> bool:
        """Return False: the value is derived, so it cannot be chosen."""
        return False


Dimension: TypeAlias = Fixed | Choices | Range | TimesSqrtRank
AnyDimension = TypeVar("AnyDimension", bound=Dimension)
Space: TypeAlias = Mapping[str, Dimension]
"""Every hyperparameter of a round by name, the fixed ones and the defaults included."""


def searched(space: Space) -> dict[str, Choices | Range]:
    """Return the dimensions a sampler may choose from, in the file's order."""
    return {name: d for name, d in space.items() if isinstance(d, (Choices, Range))}


def active(space: Mapping[str, AnyDimension], chosen: Hyperparameters) -> dict[str, AnyDimension]:
    """Return the dimensions that apply given these values, in the space's order.

    A condition on a hyperparameter that is not in the space is ignored.
    """
    return {name: dimension for name, dimension in space.items() if _counts(name, space, chosen)}


def _counts(name: str, space: Mapping[str, AnyDimension], chosen: Hyperparameters) -> bool:
    condition = space[name].only_with
    if condition is None or condition.chosen_by not in space:
        return True
    chooser = space[condition.chosen_by]
    if isinstance(chooser, Choices) and set(chooser.values) <= set(condition.values):
        return _counts(condition.chosen_by, space, chosen)  # whatever is chosen
    value = chooser.value if isinstance(chooser, Fixed) else chosen.get(condition.chosen_by)
    return value in condition.values and _counts(condition.chosen_by, space, chosen)


def possible(space: Space) -> dict[str, Dimension]:
    """Return the dimensions whose conditions can hold in the space."""
    return {name: dimension for name, dimension in space.items() if _can_count(dimension, space)}


def _can_count(dimension: Dimension, space: Space) -> bool:
    condition = dimension.only_with
    if condition is None or condition.chosen_by not in space:
        return True
    chooser = space[condition.chosen_by]
    return any(map(chooser.contains, condition.values)) and _can_count(chooser, space)


def num_points(space: Space) -> float:
    """Return the number of different points: infinite if a range of real numbers is searched.

    Points that differ only in hyperparameters that do not apply are equal.
    """
    conditions = (dimension.only_with for dimension in space.values())
    names = dict.fromkeys(condition.chosen_by for condition in conditions if condition is not None)
    choosers = {name: d for name in names if isinstance(d := space.get(name), Choices)}
    numbers: dict[tuple[Value | None, ...], float] = {}
    for values in itertools.product(*(chooser.values for chooser in choosers.values())):
        chosen = dict(zip(choosers, values, strict=True))
        counting = active(space, chosen)
        point = tuple(value if name in counting else None for name, value in chosen.items())
        numbers[point] = math.prod(_num_values(d) for name, d in counting.items() if name not in choosers)
    return sum(numbers.values())


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
    """Return the hyperparameters that apply to a trial: chosen, fixed and derived.

    Raises KeyError if a searched hyperparameter that applies was not chosen.
    """
    values: dict[str, Value] = {}
    counting = active(space, chosen)
    for name, dimension in counting.items():
        match dimension:
            case Fixed(value=value):
                values[name] = value
            case TimesSqrtRank():
                continue
            case _:
                values[name] = chosen[name]
    for name, dimension in counting.items():
        if isinstance(dimension, TimesSqrtRank):
            rank = values["lora_r"]
            assert isinstance(rank, (int, float))
            values[name] = dimension.factor * math.sqrt(rank)
    return values


def corners(space: Space, given: Hyperparameters) -> tuple[dict[str, Value], dict[str, Value]]:
    """Return a trial at the low end, or first choice, of every dimension, and one at the high end, or last.

    `given` are values of both.
    """
    first, last = dict(given), dict(given)
    for name, dimension in searched(space).items():
        match dimension:
            case Choices(values=values):
                ends: tuple[Value, Value] = values[0], values[-1]
            case Range(low=low, high=high, integer=is_integer):
                ends = (int(low), int(high)) if is_integer else (low, high)
        first.setdefault(name, ends[0])
        last.setdefault(name, ends[1])
    return complete_hyperparameters(space, first), complete_hyperparameters(space, last)


def hyperparameters_from_json(document: Mapping[str, Any]) -> dict[str, Value]:
    """Return hyperparameters with lists converted back to tuples."""
    found = dict(document)
    for name, value in document.items():
        if value.__class__ is list:
            found[name] = tuple(value)
    return found
