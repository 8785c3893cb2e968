"""A tree-structured Parzen estimator: the next point where good points are dense and the others are not.

Bergstra et al., "Algorithms for Hyper-Parameter Optimization" (2011); one kernel over all dimensions, its
width by Scott's rule. Optuna's TPESampler takes the distance to the neighbouring point, which with few good
points is most of the range: on recorded curves it needed 1.6 times as many full-length runs (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from scipy.special import ndtr, ndtri

from .points import Dimensions, Point, unit_of, value_at

GOOD_SHARE = 0.1
MAX_GOOD = 25
"""Points that count as good are a tenth of all, and no more than so many."""
CANDIDATES = 24
"""Points drawn among the good ones, of which the most promising is proposed."""
WIDTH = 0.2
"""Of a kernel around a single point, as a share of the range."""


def parzen_point(
    space: Dimensions, ranked: Sequence[Mapping[str, Any]], *, random: np.random.Generator
) -> Point:
    """Return the next point of a space, from others that lie in it, best first."""
    num_good = min(math.ceil(GOOD_SHARE * len(ranked)), MAX_GOOD)
    units = np.array([[unit_of(d, point[name]) for name, d in space.items()] for point in ranked])
    units = units.reshape(len(ranked), len(space))
    choices = np.array(
        [len(d.choices) if isinstance(d, CategoricalDistribution) else 0 for d in space.values()]
    )
    good, others = _Density(units[:num_good], choices), _Density(units[num_good:], choices)
    candidates = good.draw(CANDIDATES, random)
    chosen = candidates[int(np.argmax(good.log_at(candidates) - others.log_at(candidates)))]
    return {name: value_at(d, float(u)) for (name, d), u in zip(space.items(), chosen, strict=True)}


@dataclass(frozen=True)
class _Density:
    """A kernel for each point and a flat one, which keeps every place possible, in the unit cube."""

    points: np.ndarray
    """[points, dimensions]; a choice lies in the middle of its share of the dimension."""
    choices: np.ndarray
    """By dimension how many choices it has; 0 for a range."""

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Points of this density, [count, dimensions]."""
        drawn = random.random((count, len(self.choices)))
        kernels = random.integers(len(self.points) + 1, size=count)
        near = kernels < len(self.points)
        centres = self.points[kernels[near]]
        low, high = ndtr(-centres / self._width), ndtr((1 - centres) / self._width)
        around = centres + self._width * ndtri(low + drawn[near] * (high - low))
        stays = random.random(centres.shape) < self._same
        of_choice = np.where(stays, centres, drawn[near])
        drawn[near] = np.clip(np.where(self.choices > 0, of_choice, around), 0.0, 1.0)
        return drawn

    def log_at(self, places: np.ndarray) -> np.ndarray:
        """Logarithm of the density at each place."""
        distances = places[:, None, :] - self.points[None]
        inside = ndtr((1 - self.points) / self._width) - ndtr(-self.points / self._width)
        around = -0.5 * (distances / self._width) ** 2 - np.log(math.sqrt(2 * math.pi) * self._width * inside)
        cells = np.maximum(self.choices, 1)
        is_same = np.floor(places * cells)[:, None, :] == np.floor(self.points * cells)[None]
        of_choice = np.log(np.where(is_same, self._same * cells, 0.0) + (1.0 - self._same))
        kernels = np.where(self.choices > 0, of_choice, around).sum(axis=2)
        flat = np.zeros((len(places), 1))
        return np.asarray(np.logaddexp.reduce(np.hstack([kernels, flat]), axis=1)) - math.log(
            len(self.points) + 1
        )

    @property
    def _width(self) -> float:
        count = len(self.points)
        by_scott = WIDTH * math.pow(max(1, count), -1 / (len(self.choices) + 4))
        return max(by_scott, 1 / min(100, 2 + count))

    @property
    def _same(self) -> float:
        """Probability that a kernel of a choice keeps it instead of drawing any."""
        return (len(self.points) + 1) / (len(self.points) + 2)
