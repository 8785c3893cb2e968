"""Where values lie in a dimension of the search space, from 0 to 1, and points that fill a space evenly."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import numpy as np

from tuner.records import Choices, Hyperparameters, Range, Value

PointValues: TypeAlias = tuple[Value | None, ...]
"""A point by the values of the searched names, in their order."""


_BLOCK = 64
"""Points of a sequence that are made at once, after the first: few rounds need a second one."""


def quasi_random_point(space: Mapping[str, Choices | Range], *, seed: int, place: int) -> dict[str, Value]:
    """Point number `place` of a scrambled Sobol sequence over the space.

    Taken by our own count and not by Optuna's, whose trials include those that a crash left behind.
    """
    return next(quasi_random_points(space, seed=seed, place=place))


def quasi_random_points(
    space: Mapping[str, Choices | Range], *, seed: int, place: int
) -> Iterator[dict[str, Value]]:
    """The sequence of `quasi_random_point` from a place on, without end."""
    if not space:
        yield from itertools.repeat({})
    from scipy.stats import qmc  # a second of loading, and only quasi-random rounds need it

    sequence = qmc.Sobol(len(space), scramble=True, rng=seed)
    if place:
        sequence.fast_forward(place)
    for num in itertools.chain([1], itertools.repeat(_BLOCK)):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The balance properties of Sobol")
            units = sequence.random(num).tolist()
        for unit in units:
            yield {name: value_at(d, u) for (name, d), u in zip(space.items(), unit, strict=True)}


def random_point(space: Mapping[str, Choices | Range], random: np.random.Generator) -> dict[str, Value]:
    """A point anywhere in the space."""
    return {name: value_at(dimension, random.random()) for name, dimension in space.items()}


def every_point(space: Mapping[str, Choices | Range]) -> Iterator[dict[str, Value]]:
    """All points of a finite space, the last name's values running fastest."""
    for values in itertools.product(*map(_values, space.values())):
        yield dict(zip(space, values, strict=True))


def _values(dimension: Choices | Range) -> Iterable[Value]:
    if isinstance(dimension, Choices):
        return dimension.values
    assert dimension.integer, "a range of real numbers has no next value"
    return range(math.ceil(dimension.low), math.floor(dimension.high) + 1)


def values_of(space: Iterable[str], point: Hyperparameters) -> PointValues:
    """What tells a point from others: equal numbers are equal, however they are written."""
    return tuple(point.get(name) for name in space)


def value_at(dimension: Choices | Range, unit: float) -> Value:
    """The value at a place in [0, 1] of a dimension."""
    if isinstance(dimension, Choices):
        return dimension.values[min(int(unit * len(dimension.values)), len(dimension.values) - 1)]
    low, high = _ends(dimension)
    value = (
        math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
        if dimension.log
        else low + unit * (high - low)
    )
    if dimension.integer:
        return int(min(max(round(value), dimension.low), dimension.high))
    return min(max(value, dimension.low), dimension.high)


def unit_of(dimension: Choices | Range, value: Value) -> float:
    """The place of a value that the dimension holds: the inverse of `value_at`, mid-way for a choice."""
    if isinstance(dimension, Choices):
        return (dimension.values.index(value) + 0.5) / len(dimension.values)
    low, high = _ends(dimension)
    number = float(value)  # type: ignore[arg-type]
    if dimension.log:
        return (math.log(number) - math.log(low)) / (math.log(high) - math.log(low))
    return (number - low) / (high - low)


def _ends(dimension: Range) -> tuple[float, float]:
    """A whole number is as likely at the ends as between them."""
    low, high = dimension.low, dimension.high
    if dimension.integer:
        low, high = low - 0.5, high + 0.5
        if dimension.log:
            low = max(low, 0.5)
    return low, high
