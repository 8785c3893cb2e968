"""Where values lie in a dimension of the search space, from 0 to 1, and points that fill a space evenly."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

Dimensions: TypeAlias = Mapping[str, BaseDistribution]
"""The search space of a proposal: Optuna's distributions by name."""
Point: TypeAlias = dict[str, Any]

_BLOCK = 64
"""Points of a sequence that are made at once, after the first: few rounds need a second one."""


def quasi_random_point(space: Dimensions, *, seed: int, place: int) -> Point:
    """Return point number `place` of a scrambled Sobol sequence over the space."""
    return next(quasi_random_points(space, seed=seed, place=place))


def quasi_random_points(space: Dimensions, *, seed: int, place: int) -> Iterator[Point]:
    """Yield the sequence of `quasi_random_point` from a place on, without end."""
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


def random_point(space: Dimensions, random: np.random.Generator) -> Point:
    """Return a point anywhere in the space."""
    return {name: value_at(dimension, random.random()) for name, dimension in space.items()}


def random_points(space: Dimensions, random: np.random.Generator) -> Iterator[Point]:
    """Yield points anywhere in the space, without end."""
    while True:
        yield random_point(space, random)


def every_point(space: Dimensions) -> Iterator[Point]:
    """Yield all points of a finite space, the last name's values running fastest.

    Raises ValueError where a range of real numbers has no step.
    """
    for values in itertools.product(*map(_values, space.values())):
        yield dict(zip(space, values, strict=True))


def num_points(space: Dimensions) -> float:
    """Return how many points there are: infinite where a range of real numbers has no step."""
    return math.prod(math.inf if _is_real(d) else len(_values(d)) for d in space.values())


def _is_real(distribution: BaseDistribution) -> bool:
    return isinstance(distribution, FloatDistribution) and distribution.step is None


def _values(distribution: BaseDistribution) -> Sequence[Any]:
    match distribution:
        case CategoricalDistribution(choices=choices):
            return choices
        case IntDistribution(low=low, high=high, step=step):
            return range(low, high + 1, step)
        case FloatDistribution(low=low, high=high, step=float(step)):
            return [low + number * step for number in range(round((high - low) / step) + 1)]
        case _:
            raise ValueError(f"{distribution} has no next value: give it a step, or choose another sampler")


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a trial may have this value."""
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and bool(distribution._contains(value))


def value_at(distribution: BaseDistribution, unit: float) -> Any:
    """Return the value at a place in [0, 1] of a dimension."""
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        return choices[min(int(unit * len(choices)), len(choices) - 1)]
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = _ends(distribution)
    value = (
        math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
        if distribution.log
        else low + unit * (high - low)
    )
    step = distribution.step
    if isinstance(distribution, IntDistribution) and step == 1:
        value = round(value)
    elif step is not None:
        value = distribution.low + round((value - distribution.low) / step) * step
    return min(max(value, distribution.low), distribution.high)


def unit_of(distribution: BaseDistribution, value: Any) -> float:
    """Return the place of a value in its dimension: the inverse of `value_at`; a choice is mid-way."""
    if isinstance(distribution, CategoricalDistribution):
        return (distribution.choices.index(value) + 0.5) / len(distribution.choices)
    assert isinstance(distribution, (FloatDistribution, IntDistribution))
    low, high = _ends(distribution)
    number = float(value)
    if low == high:
        return 0.5
    if distribution.log:
        return (math.log(number) - math.log(low)) / (math.log(high) - math.log(low))
    return (number - low) / (high - low)


def _ends(distribution: FloatDistribution | IntDistribution) -> tuple[float, float]:
    """With a step, as whole numbers have one, a value is as likely at the ends as between them."""
    low, high = distribution.low, distribution.high
    if distribution.step is not None:
        low, high = low - distribution.step / 2, high + distribution.step / 2
        if distribution.log:
            low = max(low, 0.5)
    return low, high
