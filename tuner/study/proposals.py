"""The next point that a round tries: enqueued entries, then the sampler's proposals; no point twice.

A proposal is a function of the facts, `search.seed` and its ordinal, so that a resumed round continues as it
would have.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial

from tuner.config import SearchSpec
from tuner.errors import InputError, RoundStopped, last_words
from tuner.methods.registry import load
from tuner.playbook.observations import (
    Observation,
    Outcome,
    observations,
    outcomes,
    startup_trials,
)
from tuner.records import (
    LOSS,
    Choices,
    Direction,
    Hyperparameters,
    Objective,
    Range,
    Space,
    Trial,
    Value,
    active,
    complete_hyperparameters,
    num_points,
    searched,
)
from tuner.study.samplers import (
    GridSampler,
    Observed,
    PointSampler,
    QuasiRandomSampler,
    RandomSampler,
    RankGPSampler,
    RankTPESampler,
    Request,
)
from tuner.study.samplers.points import Dimensions, Point, every_point, random_points

PointValues: TypeAlias = tuple[Value | None, ...]
"""A point by the values of the searched names, in their order; None for one that is not active."""

_TRIES = {"quasi-random": 1000, "random": 1000, "grid": 1000, "tpe": 20, "gp": 3}
"""Proposals of a sampler that may all be points of the round already, before one is looked for without it.
One of `gp` takes half a second or more, and a second one is mostly the same."""
_TRIES_OF_ANOTHER = 10
_LEARNS_NOTHING = ("quasi-random", "random", "grid")
_PENALTY = 10.0
"""What an infeasible trial is told as while nothing is complete: a loss that no model has."""
_TRIED_RESULTS = 12
"""Results that `try_sampler` shows: Optuna's TPE and GP model the results from the tenth on."""
_NOT_THE_SAMPLERS = (__file__, str(Path(optuna.__file__).parent), inspect.__file__)
"""Files and folders whose lines do not name a mistake in a sampler."""
_RANDOM_TRIES = 1000
"""Random points that may, before a finite space is gone through in order."""


class RoundSampler(optuna.samplers.BaseSampler):
    """The sampler of a round's Optuna study. It gets the facts before each `study.ask`."""

    def __init__(
        self,
        space: Space,
        search: SearchSpec,
        *,
        max_train_steps: int,
        earlier: Sequence[Outcome] = (),
        objective: Objective = LOSS,
    ) -> None:
        self._all = space
        self._space = searched(space)
        self._search = search
        self._max_train_steps = max_train_steps
        self._earlier = tuple(earlier)
        self._objective = objective
        self._enqueued = [self._given(entry) for entry in search.enqueue]
        self._run_before = self._finished_alike()
        self._ordinal = 0
        self._trials: tuple[Trial, ...] = ()
        self._again: Hyperparameters | None = None
        self._answer: dict[str, Any] | None = None
        self.is_overruled = False
        self.distributions = distributions(self._space)

    # --- Optuna's side ----------------------------------------------------------------------------

    def follow(
        self, ordinal: int, trials: Sequence[Trial] = (), *, again: Hyperparameters | None = None
    ) -> None:
        """Take the facts that the next `study.ask` is answered from; see `RoundStudy.propose`."""
        self._ordinal, self._trials, self._again = ordinal, tuple(trials), again
        self._answer = None

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See whether somebody has enqueued the trial, so that its values are not the sampler's."""
        self.is_overruled = "fixed_params" in trial.system_attrs

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return all that the round searches."""
        return dict(self.distributions)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the proposal given by the facts."""
        if self._answer is None:
            point = self._proposed(study, trial) if self._again is None else self._again
            self._answer = self.encoded(point)
        return self._answer

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return a value of the proposal that lies outside of its range: Optuna asks for it once more."""
        return self.sample_relative(study, trial, {})[param_name]

    def _proposed(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Value]:
        """The proposal; what an imported sampler notes on it is kept with the round's trial."""
        source = self._source(self._ordinal, self._trials, study)
        point = self.point(self._ordinal, self._trials, source=source)
        if isinstance(source, ImportedSampler):
            for key, value in source.notes_on(self.encoded(point)).items():
                study._storage.set_trial_system_attr(trial._trial_id, key, value)
        return point

    # --- the proposal -----------------------------------------------------------------------------

    @property
    def num_points(self) -> float:
        """Return the number of different points: infinite if a range of real numbers is searched."""
        return num_points(self._space)

    def point(
        self, ordinal: int, trials: Sequence[Trial] = (), *, source: PointSampler | None = None
    ) -> dict[str, Value]:
        """Return a value for each active name: enqueued ones first, the rest from the sampler; no point
        twice."""
        given = self._enqueued[ordinal] if ordinal < len(self._enqueued) else {}
        if self._is_whole(given):
            return {name: given[name] for name in self.active(given)}
        source = source or self._source(ordinal, trials)
        taken = self._taken(trials)
        for avoided in (taken | self._run_before, taken):
            for point in self._candidates(source, self._request(ordinal, trials), given):
                if self._values_of(point) not in avoided:
                    return point
        raise AssertionError(f"all {self.num_points} points of the search space are taken")

    def active(self, point: Hyperparameters) -> dict[str, Choices | Range]:
        """Return the searched dimensions that a point has, as far as its own values decide it.

        An empty point has those that no value decides.
        """
        return active(self._space, point)

    def encoded(self, point: Hyperparameters) -> dict[str, Any]:
        """Return the point's searched values in Optuna's form."""
        return {name: encoded(point[name]) for name in self._space if name in point}

    def stored(self, point: Hyperparameters) -> dict[str, Any]:
        """Return `params` and `distributions` of a point as arguments for Optuna.

        A value outside of its range, which an entry may have, is left out: Optuna refuses it.
        """
        params = self.encoded(point)
        known = {name: self.distributions[name] for name in self.active(point) if name in params}
        fitting = {
            name: each for name, each in known.items() if each._contains(each.to_internal_repr(params[name]))
        }
        return {"params": {name: params[name] for name in fitting}, "distributions": fitting}

    def decoded(self, params: Mapping[str, Any]) -> dict[str, Value]:
        """Return a point from Optuna's form."""
        return {name: _decode(d, params[name]) for name, d in self._space.items() if name in params}

    def _is_whole(self, point: Hyperparameters) -> bool:
        return all(name in point for name in self.active(point))

    def _holds(self, point: Hyperparameters) -> bool:
        return all(name in point and d.contains(point[name]) for name, d in self.active(point).items())

    def _values_of(self, point: Hyperparameters) -> PointValues:
        """Return a key of the point, in which equal numbers are equal however they are written."""
        active = self.active(point)
        return tuple(point.get(name) if name in active else None for name in self._space)

    def _taken(self, trials: Sequence[Trial]) -> set[PointValues]:
        """Return the points that have a trial in this round, in any state, or that the file enqueues."""
        tried = (self._values_of(trial.hyperparameters) for trial in trials)
        return {*tried, *(self._values_of(entry) for entry in self._enqueued if self._is_whole(entry))}

    def _finished_alike(self) -> set[PointValues]:
        """Points of a finite space that an earlier round has run for as many steps.

        They come last: run again, they give the same.
        """
        if math.isinf(self.num_points):
            return set()
        return {
            self._values_of(point)
            for outcome in self._earlier
            if outcome.horizon == self._max_train_steps and self._holds(point := outcome.hyperparameters)
            if complete_hyperparameters(self._all, point) == dict(point)
        }

    def _given(self, entry: Mapping[str, Any]) -> dict[str, Value]:
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in entry.items()
            if name in self._space
        }

    def _candidates(
        self, source: PointSampler, request: Request, given: Mapping[str, Value]
    ) -> Iterator[dict[str, Value]]:
        """Yield points in the order in which they are to be proposed, unless they are taken.

        Of a finite space every point is among them; where an entry leaves no free one, others follow.
        """
        first = self.active({})
        sampled = source.points(self._distributions_of(first), self._restricted(request, first))
        for params in itertools.islice(sampled, _TRIES.get(self._search.sampler, _TRIES_OF_ANOTHER)):
            yield self._completed({**self.decoded(params), **given}, source, request)
        yield from self._any_point(given, request.random)
        yield from self._any_point({}, request.random)

    def _completed(
        self, point: Mapping[str, Value], source: PointSampler, request: Request
    ) -> dict[str, Value]:
        """Ask, in further steps, for the names that the point's values activate; leave out all others."""
        while left := {name: d for name, d in self.active(point).items() if name not in point}:
            params = next(source.points(self._distributions_of(left), self._restricted(request, left)))
            point = {**point, **self.decoded(params)}
        return {name: point[name] for name in self.active(point)}

    def _distributions_of(self, names: Iterable[str]) -> dict[str, BaseDistribution]:
        return {name: self.distributions[name] for name in names}

    def _any_point(
        self, given: Mapping[str, Value], random: np.random.Generator
    ) -> Iterator[dict[str, Value]]:
        """Yield random points with what is given; of a finite space some, and then every one in its order."""
        left_open = {name: d for name, d in self._space.items() if name not in given}
        limit = _RANDOM_TRIES if math.isfinite(num_points(left_open)) else None
        dimensions = self._distributions_of(name for name in self.active({}) if name not in given)
        source, request = RandomSampler(), Request(0, random)
        for params in itertools.islice(random_points(dimensions, random), limit):
            yield self._completed({**self.decoded(params), **given}, source, request)
        yield from self._every_point(given)

    def _every_point(self, point: Mapping[str, Value]) -> Iterator[dict[str, Value]]:
        left = [name for name in self.active(point) if name not in point]
        if not left:
            yield {name: point[name] for name in self.active(point)}
            return
        for params in every_point(self._distributions_of(left)):
            yield from self._every_point({**point, **self.decoded(params)})

    # --- whom it asks, and with what --------------------------------------------------------------

    def _source(
        self, ordinal: int, trials: Sequence[Trial], study: optuna.Study | None = None
    ) -> PointSampler:
        """The sampler that the file names; one that is imported finds its notes in the round's study."""
        seed = self._search.seed
        total = int(min(self._search.trials, self.num_points))
        startup = startup_trials(enqueued=len(self._enqueued), total=total)
        match self._search.sampler:
            case "quasi-random":
                # An entry's missing values come from a sequence of their own: the round's stays balanced.
                return QuasiRandomSampler(seed=seed + (1 if ordinal < len(self._enqueued) else 0))
            case "random":
                return RandomSampler(seed=seed)
            case "grid":
                return GridSampler(seed=seed)
            case "tpe":
                return RankTPESampler(seed=seed, n_startup_trials=startup)
            case "gp":
                return RankGPSampler(seed=seed, n_startup_trials=startup)
            case _:
                return ImportedSampler(
                    self._search,
                    is_maximised=self._objective.direction == Direction.MAXIMIZE,
                    observed=[self._observed(found) for found in self._observations(trials)],
                    notes=self._notes(trials, study) if study is not None else (),
                )

    def _request(self, ordinal: int, trials: Sequence[Trial]) -> Request:
        """What the proposal may depend on, in Optuna's terms.

        A sequence begins at the place that the proposal has without any point taken: all before have theirs.
        """
        num_enqueued = len(self._enqueued)
        of_entry = 0 if self._search.sampler == "grid" else ordinal
        known = sorted(self._observations(trials), key=lambda found: (found.objective, found.loss))
        running = [
            self.encoded(trial.hyperparameters)
            for trial in trials
            if not trial.state.is_final and self._holds(trial.hyperparameters)
        ]
        return Request(
            place=of_entry if ordinal < num_enqueued else ordinal - num_enqueued,
            # Its own for each proposal: a resumed round repeats none.
            random=np.random.default_rng((self._search.seed, ordinal)),
            observed=[self._observed(found) for found in known],
            running=running,
        )

    def _restricted(self, request: Request, names: Mapping[str, Any]) -> Request:
        """Return the request restricted to points that have all of these names."""
        return replace(
            request,
            observed=[found for found in request.observed if names.keys() <= found.params.keys()],
            running=[params for params in request.running if names.keys() <= params.keys()],
        )

    def _observations(self, trials: Sequence[Trial]) -> list[Observation]:
        """Return the results of the workload's rounds in this space, in the order they were first tried."""
        if self._search.sampler in _LEARNS_NOTHING:
            return []
        now = outcomes(trials, max_train_steps=self._max_train_steps)
        found = observations([*self._earlier, *now], objective=self._objective)
        return [each for each in found if self._holds(each.hyperparameters)]

    def _observed(self, found: Observation) -> Observed:
        active = self.active(found.hyperparameters)
        point = {name: found.hyperparameters[name] for name in active}
        return Observed(self.encoded(point), found.objective)

    def _notes(self, trials: Sequence[Trial], study: optuna.Study) -> list[Noted]:
        """Return the attributes that the sampler set on the round's trials, such as their generation."""
        attributes = {trial.number: trial.system_attrs for trial in study.get_trials(deepcopy=False)}
        return [
            (self.encoded(trial.hyperparameters), attributes.get(trial.optuna_trial, {}))
            for trial in trials
            if trial.optuna_trial is not None
        ]


Noted: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Any]]
"""A point, and the attributes that a sampler has given its trial."""


class SamplerStopped(RoundStopped):
    """An imported sampler raised an error instead of proposing a point."""


class ImportedSampler(PointSampler):
    """Any Optuna sampler, run on an in-memory study with all observations.

    It is created again for each proposal: the same facts give the same proposal. Attributes it sets on trials
    are kept with the round's trials and given back.
    """

    def __init__(
        self,
        search: SearchSpec,
        *,
        is_maximised: bool,
        observed: Sequence[Observed],
        notes: Sequence[Noted] = (),
    ) -> None:
        super().__init__(seed=search.seed)
        self._search = search
        self._sign = -1.0 if is_maximised else 1.0
        self._observed = observed
        self._notes = list(notes)

    def points(self, space: Dimensions, request: Request) -> Iterator[Point]:
        """Yield the sampler's proposals, each with another seed."""
        while True:
            yield self._asked(dict(space), request, seed=int(request.random.integers(2**31)))

    def notes_on(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the attributes that the sampler set on a trial of this point."""
        return next((notes for point, notes in reversed(self._notes) if point == params), {})

    def _asked(self, space: dict[str, BaseDistribution], request: Request, *, seed: int) -> Point:
        sampler = make_sampler(self._search, seed=seed)
        study = optuna.create_study(direction="maximize" if self._sign < 0 else "minimize", sampler=sampler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a user cannot change: experimental calls, other spaces
            study.add_trials(self._told(space))
            try:
                for params in request.running:
                    study.enqueue_trial({name: params[name] for name in space})
                    study.ask(space)
                asked = study.ask(space)
            except Exception as error:  # a sampler may raise anything
                raise SamplerStopped(
                    f"search.sampler {self._search.sampler}: cannot propose a trial: "
                    f"{last_words(error, *_NOT_THE_SAMPLERS)}"
                ) from error
        frozen = study.get_trials(deepcopy=False)[asked.number]
        self._notes.append((dict(frozen.params), dict(frozen.system_attrs)))
        return dict(frozen.params)

    def _told(self, space: dict[str, BaseDistribution]) -> list[FrozenTrial]:
        """Return each observation as a complete trial; an infeasible one gets the worst value."""
        known = [found for found in self._observed if space.keys() <= found.params.keys()]
        finite = [found.value for found in known if math.isfinite(found.value)]
        worst = max(finite, default=_PENALTY if self._sign > 0 else 0.0)
        constrained = len(finite) < len(known)
        return [
            optuna.create_trial(
                params={name: found.params[name] for name in space},
                distributions=space,
                value=self._sign * (found.value if math.isfinite(found.value) else worst),
                system_attrs=dict(self.notes_on(found.params)),
                constraints=_feasible(math.isfinite(found.value)) if constrained else None,
            )
            for found in known
        ]


def _feasible(is_feasible: bool) -> dict[str, float]:
    return {"feasible": 0.0 if is_feasible else 1.0}


def make_sampler(search: SearchSpec, *, seed: int) -> optuna.samplers.BaseSampler:
    """Create a sampler from outside of tuner, with the file's arguments, and a seed if it accepts one.

    Raises InputError where it cannot be imported or made, or is no sampler of Optuna's.
    """
    made_by = load("sampler", search.sampler)
    place = f"search.sampler {search.sampler}"
    if not callable(made_by):
        raise InputError(f"{place}: expects a class, got {made_by!r}")
    try:
        takes_seed = "seed" in inspect.signature(made_by).parameters
        arguments = {"seed": seed, **search.sampler_arguments} if takes_seed else search.sampler_arguments
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made = made_by(**arguments)
    except Exception as error:  # a class may raise anything
        said = last_words(error, *_NOT_THE_SAMPLERS)
        raise InputError(f"{place}: cannot be created with {search.sampler_arguments}: {said}") from error
    if not isinstance(made, optuna.samplers.BaseSampler):
        raise InputError(f"{place}: expects an Optuna sampler, got a {type(made).__name__}")
    return made


def try_sampler(search: SearchSpec, space: Space, objective: Objective) -> None:
    """Ask a sampler from outside of tuner for a first point, and for one after several results.

    A library that it imports late, or a dimension that it does not support, is found now and not in the
    middle of the round. Raises InputError.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    dimensions = distributions(active(searched(space), {}))
    known = itertools.islice(random_points(dimensions, np.random.default_rng(0)), _TRIED_RESULTS)
    results = [Observed(point, value=1.0 + 1.0 / (1 + number)) for number, point in enumerate(known)]
    for observed in ([], results):
        source = ImportedSampler(
            search, is_maximised=objective.direction == Direction.MAXIMIZE, observed=observed
        )
        try:
            next(source.points(dimensions, Request(0, np.random.default_rng(0))))
        except SamplerStopped as error:
            raise InputError(str(error)) from error


def distributions(space: Mapping[str, Choices | Range]) -> dict[str, BaseDistribution]:
    """Return the dimensions of a search space as Optuna has them."""
    return {name: _distribution(dimension) for name, dimension in space.items()}


def _distribution(dimension: Choices | Range) -> BaseDistribution:
    match dimension:
        case Choices(values=values):
            return CategoricalDistribution([encoded(value) for value in values])
        case Range(low=low, high=high, log=log, integer=True):
            return IntDistribution(int(low), int(high), log=log)
        case Range(low=low, high=high, log=log):
            return FloatDistribution(low, high, log=log)


def encoded(value: Value) -> bool | int | float | str:
    """Return a value as Optuna stores it: lists of module names become JSON text."""
    return json.dumps(list(value)) if isinstance(value, tuple) else value


def _decode(dimension: Choices | Range, value: Any) -> Value:
    if isinstance(dimension, Choices):
        return next(choice for choice in dimension.values if encoded(choice) == value)
    return value  # type: ignore[no-any-return]
