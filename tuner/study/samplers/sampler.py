"""The samplers: each says which points to try in which order, in a round of tuner or any study of Optuna."""

from __future__ import annotations

import itertools
import math
import secrets
import warnings
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import FrozenTrial, TrialState

from .points import (
    Dimensions,
    Point,
    contains,
    every_point,
    num_points,
    quasi_random_points,
    random_point,
    random_points,
)

STARTUP_TRIALS = 10
"""Trials before a model is asked; Optuna's own default."""


@dataclass(frozen=True)
class Observed:
    """How a point came out."""

    params: Mapping[str, Any]
    value: float
    """Lower is better, whatever the study's direction; infinite where the point is infeasible."""


@dataclass(frozen=True)
class Request:
    """All that a proposal may depend on besides the search space."""

    place: int
    """How many proposals there were before."""
    random: np.random.Generator
    """Of this proposal alone."""
    observed: Sequence[Observed] = ()
    """Best first; infeasible ones come last."""
    running: Sequence[Mapping[str, Any]] = ()
    """Points whose trials have not ended."""


class PointSampler(optuna.samplers.BaseSampler):
    """A sampler that proposes whole points: subclasses say which, in `points`.

    `search_space` has Optuna's distributions by name. Without it, the names that all trials so far have in
    common are sampled together, as Optuna's own samplers do; names beside them are sampled one by one. The
    proposal is a function of `seed`, the trial's number and the trials told: a study that is loaded again
    goes on as it would have. Without a seed it differs from run to run.
    """

    def __init__(
        self, search_space: Mapping[str, BaseDistribution] | None = None, *, seed: int | None = None
    ) -> None:
        self._search_space = dict(search_space) if search_space is not None else None
        self._seed = secrets.randbits(32) if seed is None else seed
        self._common_space = IntersectionSearchSpace()

    @abstractmethod
    def points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        """Yield points of the space in the order in which they are to be tried, the proposal first."""

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the names that are sampled together."""
        space = self._search_space
        if space is None:
            space = self._common_space.calculate(study)
        return {name: distribution for name, distribution in space.items() if not distribution.single()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the first of `points`."""
        return (
            next(self.points(search_space, self._request(study, trial, search_space))) if search_space else {}
        )

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a random value: the name is in no common space yet, or belongs to some trials only."""
        random = np.random.default_rng((self._seed, trial.number, zlib.crc32(param_name.encode())))
        return random_point({param_name: param_distribution}, random)[param_name]

    def _request(
        self, study: optuna.Study, trial: FrozenTrial, space: Dimensions, *, name: str = ""
    ) -> Request:
        salt = (zlib.crc32(name.encode()),) if name else ()
        return Request(trial.number, np.random.default_rng((self._seed, trial.number, *salt)))


class QuasiRandomSampler(PointSampler):
    """Points of a scrambled Sobol sequence: trial `n` has its point `n`, whatever became of the others."""

    def points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        """Yield the sequence from the request's place on."""
        yield from quasi_random_points(space, seed=self._seed, place=request.place)


class RandomSampler(PointSampler):
    """Points anywhere, drawn anew for each trial's number."""

    def points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        """Yield points of the request's own generator."""
        yield from random_points(space, request.random)


class GridSampler(PointSampler):
    """All combinations in order, the last name's values running fastest, and then again from the first."""

    def points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        """Yield the grid from the request's place to its end. Raises ValueError where a range has no step."""
        total = num_points(space)
        first = request.place % int(total) if math.isfinite(total) else 0
        yield from itertools.islice(every_point(space), first, None)


class _ModelSampler(PointSampler):
    """A sampler that learns from the order of the points observed, and not from their values."""

    def __init__(
        self,
        search_space: Mapping[str, BaseDistribution] | None = None,
        *,
        seed: int | None = None,
        n_startup_trials: int = STARTUP_TRIALS,
    ) -> None:
        super().__init__(search_space, seed=seed)
        self._n_startup_trials = n_startup_trials

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the names that all trials so far have: only these can be modelled together."""
        space = super().infer_relative_search_space(study, trial)
        common = self._common_space.calculate(study) or space
        return {name: distribution for name, distribution in space.items() if name in common}

    def points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        """Yield what the model proposes; random points while it knows too little."""
        if len(request.observed) < self._n_startup_trials:
            yield from random_points(space, request.random)
        yield from self._modelled_points(space, request)

    @abstractmethod
    def _modelled_points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        """Yield points without end. Points still running count as poor, so that no two trials are alike."""

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return what a model of this name alone proposes, of the trials that have it."""
        space = {param_name: param_distribution}
        request = self._request(study, trial, space, name=param_name)
        return next(self.points(space, request))[param_name]

    def _request(
        self, study: optuna.Study, trial: FrozenTrial, space: Dimensions, *, name: str = ""
    ) -> Request:
        request = super()._request(study, trial, space, name=name)
        others = [
            other
            for other in study.get_trials(deepcopy=False)
            if other.number != trial.number
            and all(name in other.params and contains(d, other.params[name]) for name, d in space.items())
        ]
        running = [other.params for other in others if other.state == TrialState.RUNNING]
        return Request(request.place, request.random, _ranked(study, others), running)


class RankTPESampler(_ModelSampler):
    """A tree-structured Parzen estimator over ranks, with one kernel over all dimensions (see `parzen`)."""

    def _modelled_points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        from .parzen import parzen_point  # loads scipy, and only such studies need it

        ranked = [*(observed.params for observed in request.observed), *request.running]
        while True:
            yield parzen_point(space, ranked, random=request.random)


class RankGPSampler(_ModelSampler):
    """Optuna's GPSampler, told the ranks of all points as normal scores, infeasible ones as a constraint."""

    def _modelled_points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        while True:
            yield self._proposed(space, request, seed=int(request.random.integers(2**31)))

    def _proposed(self, space: Dimensions, request: Request, *, seed: int) -> Point:
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=1))
        num = len(request.observed)
        scores = [NormalDist().inv_cdf((place + 0.5) / num) for place in range(num)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            for observed, score in zip(request.observed, scores, strict=True):
                told = optuna.create_trial(
                    params={name: observed.params[name] for name in space},
                    distributions=dict(space),
                    value=score,
                    constraints={"feasible": 0.0 if math.isfinite(observed.value) else 1.0},
                )
                study.add_trial(told)
            for params in request.running:
                study.enqueue_trial({name: params[name] for name in space})
                study.ask(dict(space))
            return study.ask(dict(space)).params


def _ranked(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[Observed]:
    """Complete trials, then pruned ones by how far they came, then those that violate a constraint."""
    sign = 1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
    found: list[tuple[tuple[float, ...], Observed]] = []
    for trial in trials:
        infeasible = any(violated > 0 for violated in trial.constraints.values())
        if trial.state == TrialState.COMPLETE:
            steps, value = math.inf, sign * trial.values[0]
        elif trial.state == TrialState.PRUNED:
            steps = trial.last_step if trial.last_step is not None else -1
            value = sign * trial.intermediate_values.get(int(steps), math.inf)
            value = value if math.isfinite(value) else float(np.finfo(float).max)
        else:
            continue
        order = (float(infeasible), -steps, value)
        found.append((order, Observed(trial.params, math.inf if infeasible else value)))
    return [observed for _, observed in sorted(found, key=lambda pair: pair[0])]
