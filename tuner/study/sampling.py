"""Optuna's side of a round: what it proposes next, and what it is told of each trial.

Optuna advises and shows; it holds no fact. A proposal depends on how many there were before it, so
that a resumed round goes on where it stopped; everything told can be told again.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from sqlalchemy import event

from tuner.config import SearchSpec
from tuner.errors import InputError
from tuner.methods.registry import load
from tuner.playbook import best_evaluation, settled_step
from tuner.playbook.observations import Lesson, Objective, Outcome, lessons, outcomes, startup_trials
from tuner.playbook.selection import objective_score
from tuner.records import (
    Choices,
    Evaluation,
    Hyperparameters,
    Range,
    Space,
    Trial,
    TrialState,
    Value,
    active,
    complete_hyperparameters,
    num_points,
    searched,
)
from tuner.store import normal_url
from tuner.study.points import (
    PointValues,
    every_point,
    quasi_random_points,
    random_point,
    values_of,
)

MAX_REPORTS = 20
"""Evaluations of a trial that Optuna is shown: 10,000 trials with 100 each made the first `ask` take 36 s."""

_TRIES = {"quasi-random": 1000, "random": 1000, "grid": 1000, "tpe": 20, "gp": 3}
"""Proposals of a sampler that may all be points of the round already, before one is looked for without it.
One of `gp` takes half a second or more, and a second one is mostly the same."""
_TRIES_OF_ANOTHER = 10
_RANDOM_TRIES = 1000
"""Random points that may, before a finite space is gone through in order."""

_OPEN = (optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING)


@dataclass(frozen=True)
class Proposal:
    """What to try next."""

    chosen: Mapping[str, Value]
    """Values of the searched hyperparameters."""
    optuna_trial: int
    """Number of the trial made in Optuna's study."""


class Advisor:
    """The Optuna study of one round, `STUDY/ROUND`."""

    def __init__(
        self,
        storage: optuna.storages.BaseStorage,
        name: str,
        space: Space,
        search: SearchSpec,
        *,
        max_train_steps: int,
        earlier: Sequence[Outcome] = (),
        objective: Objective = "loss",
    ) -> None:
        """`earlier` are the outcomes of the workload's rounds before, oldest first: they advise `tpe` and
        `gp`, and never become trials of this round's study. The loss is minimised, answers are maximised."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = searched(space)
        self._search = search
        self._max_train_steps = max_train_steps
        self._earlier = tuple(earlier)
        self._enqueued = [self._given(entry) for entry in search.enqueue]
        self._run_before = self._finished_alike(space)
        self._objective: Objective = objective
        self._distributions = {key: _distribution(d) for key, d in self._space.items()}
        self._storage = storage
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="minimize" if objective == "loss" else "maximize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),
        )
        if objective == "answers":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.study.set_metric_names(["answer score"])  # what the dashboard calls a trial's value

    def close(self) -> None:
        """Let go of the database."""
        if isinstance(self._storage, optuna.storages.RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    # --- asking -----------------------------------------------------------------------------------

    @property
    def num_points(self) -> float:
        """How many different proposals there are: infinite where a range of real numbers is searched."""
        return num_points(self._space)

    def propose(
        self, ordinal: int, trials: Sequence[Trial] = (), *, again: Hyperparameters | None = None
    ) -> Proposal:
        """The round's proposal number `ordinal`, from 0; the enqueued ones come first.

        `trials` are all of the round so far, whose points are not proposed again. `again` repeats the
        hyperparameters of a failed trial instead. Makes a running trial in Optuna's study.
        """
        if again is not None:
            chosen: Mapping[str, Value] = {name: again[name] for name in self._space if name in again}
        else:
            chosen = self._point(ordinal, trials)
        self.study.enqueue_trial(self._encoded(chosen))
        return Proposal(dict(chosen), self.study.ask(self._asked(chosen)).number)

    def _point(self, ordinal: int, trials: Sequence[Trial]) -> dict[str, Value]:
        """A value for each searched name: what is enqueued, the rest by the sampler; no point twice."""
        given = self._enqueued[ordinal] if ordinal < len(self._enqueued) else {}
        if self._is_whole(given):
            return dict(given)
        taken = self._taken(trials)
        for avoided in (taken | self._run_before, taken):
            for point in self._candidates(ordinal, trials, given):
                counting = self._counting(point)
                if values_of(self._space, counting) not in avoided:
                    return counting
        raise AssertionError(f"all {self.num_points} points of the search space are taken")

    def _taken(self, trials: Sequence[Trial]) -> set[PointValues]:
        """Points that have their trial in this round, whatever came of it, or are going to by the file."""
        tried = (values_of(self._space, trial.hyperparameters) for trial in trials)
        whole = (entry for entry in self._enqueued if self._is_whole(entry))
        return {*tried, *(values_of(self._space, entry) for entry in whole)}

    def _finished_alike(self, space: Space) -> set[PointValues]:
        """Points of a finite space that an earlier round has run for as many steps.

        They come last: run again, they give the same.
        """
        if math.isinf(self.num_points):
            return set()
        return {
            values_of(self._space, point)
            for outcome in self._earlier
            if outcome.horizon == self._max_train_steps and self._holds(point := outcome.hyperparameters)
            if complete_hyperparameters(space, point) == dict(point)
        }

    def _given(self, entry: Mapping[str, Any]) -> dict[str, Value]:
        return self._counting({name: _tupled(value) for name, value in entry.items() if name in self._space})

    def _counting(self, point: Mapping[str, Value]) -> dict[str, Value]:
        """A point without what does not count beside the rest of it."""
        return {name: point[name] for name in active(self._space, point) if name in point}

    def _is_whole(self, point: Mapping[str, Value]) -> bool:
        return point.keys() >= active(self._space, point).keys()

    def _candidates(
        self, ordinal: int, trials: Sequence[Trial], given: Mapping[str, Value]
    ) -> Iterator[dict[str, Value]]:
        """Points in the order in which they are to be proposed, unless they are taken.

        Of a finite space every point is among them; where an entry leaves no free one, others follow.
        """
        # Its own for each proposal: a resumed round repeats none.
        random = np.random.default_rng((self._search.seed, ordinal))
        sampled = self._sampled(ordinal, trials, random)
        for point in itertools.islice(sampled, _TRIES.get(self._search.sampler, _TRIES_OF_ANOTHER)):
            yield {**point, **given}
        left_open = {name: dimension for name, dimension in self._space.items() if name not in given}
        for point in _any_point(left_open, random):
            yield {**point, **given}
        yield from _any_point(self._space, random)

    def _sampled(
        self, ordinal: int, trials: Sequence[Trial], random: np.random.Generator
    ) -> Iterator[dict[str, Value]]:
        """What the sampler proposes; as much as is taken already, it is asked again.

        A sequence begins at the place that the proposal has without any point taken: all before have theirs.
        """
        num_enqueued = len(self._enqueued)
        is_entry = ordinal < num_enqueued
        match self._search.sampler:
            case "quasi-random":
                # An entry's missing values come from a sequence of their own: the round's stays balanced.
                seed = self._search.seed + (1 if is_entry else 0)
                place = ordinal if is_entry else ordinal - num_enqueued
                yield from quasi_random_points(self._space, seed=seed, place=place)
            case "grid":
                place = 0 if is_entry else ordinal - num_enqueued
                yield from itertools.islice(every_point(self._space), place, None)
            case "random":
                yield from _random_points(self._space, random)
            case "tpe" | "gp" as sampler:
                yield from self._modelled_points(sampler, trials, random)
            case _:
                while True:
                    yield self._point_of_another(trials, seed=int(random.integers(2**31)))

    def _modelled_points(
        self, sampler: Literal["tpe", "gp"], trials: Sequence[Trial], random: np.random.Generator
    ) -> Iterator[dict[str, Value]]:
        """What a model of all that was tried proposes; random points while there is too little of it."""
        now = outcomes(trials, max_train_steps=self._max_train_steps)
        learned = lessons([*self._earlier, *now], objective=self._objective)
        known = [lesson for lesson in learned if self._holds(lesson.hyperparameters)]
        total = int(min(self._search.trials, self.num_points))
        startup = startup_trials(enqueued=len(self._search.enqueue), total=total)
        if len(known) < startup:
            yield from _random_points(self._space, random)
        known.sort(key=lambda lesson: (lesson.merit, lesson.loss))
        # What still runs is taken to be poor, so that trials side by side are not alike.
        running = [
            trial.hyperparameters
            for trial in trials
            if not trial.state.is_final and self._holds(trial.hyperparameters)
        ]
        if sampler == "tpe":
            from tuner.study.parzen import parzen_point  # loads scipy, and only such rounds need it

            ranked = [*(lesson.hyperparameters for lesson in known), *running]
            while True:
                yield parzen_point(self._space, ranked, random=random)
        while True:
            yield self._gaussian_process_point(known, running, seed=int(random.integers(2**31)))

    def _gaussian_process_point(
        self, ranked: Sequence[Lesson], running: Sequence[Hyperparameters], *, seed: int
    ) -> dict[str, Value]:
        """What Optuna's GPSampler proposes in a study of its own, which is told ranks as normal scores.

        It ignores pruned trials: infeasible ones are told as the worst, and as violated constraints.
        """
        study = optuna.create_study(sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=1))
        scores = [NormalDist().inv_cdf((place + 0.5) / len(ranked)) for place in range(len(ranked))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            for lesson, score in zip(ranked, scores, strict=True):
                told = optuna.create_trial(
                    params=self._encoded(lesson.hyperparameters),
                    distributions=self._asked(lesson.hyperparameters),
                    value=score,
                    constraints={"feasible": 0.0 if math.isfinite(lesson.merit) else 1.0},
                )
                study.add_trial(told)
            for point in running:
                study.enqueue_trial(self._encoded(point))
                study.ask(self._distributions)
            found = study.ask(self._distributions).params
        return {name: self._decode(name, found[name]) for name in self._space}

    def _point_of_another(self, trials: Sequence[Trial], *, seed: int) -> dict[str, Value]:
        """What a sampler that is not tuner's proposes, in a study of its own that is told the round.

        The same facts give the same proposal. An infeasible trial is told as the worst of all.
        """
        study = optuna.create_study(
            direction=self.study.direction, sampler=make_sampler(self._search, seed=seed)
        )
        told = {t.number: self._value(t) for t in trials if t.state == TrialState.COMPLETE}
        is_loss = self._objective == "loss"
        worst = (max if is_loss else min)(told.values(), default=10.0 if is_loss else 0.0)
        values = told | {t.number: worst for t in trials if t.state == TrialState.INFEASIBLE}
        for trial in trials:
            if not self._holds(trial.hyperparameters) or trial.state == TrialState.FAILED:
                continue
            params = self._encoded(trial.hyperparameters)
            if trial.number in values:
                value = values[trial.number]
                asked = self._asked(trial.hyperparameters)
                known = optuna.create_trial(params=params, distributions=asked, value=value)
                study.add_trial(known)
            elif not trial.state.is_final:
                study.enqueue_trial(params)
                study.ask(self._distributions)
        found = study.ask(self._distributions).params
        return {name: self._decode(name, found[name]) for name in self._space}

    def _holds(self, point: Hyperparameters) -> bool:
        counting = active(self._space, point)
        return all(name in point and d.contains(point[name]) for name, d in counting.items())

    def _encoded(self, point: Hyperparameters) -> dict[str, Any]:
        return {name: _encode(point[name]) for name in self._space if name in point}

    def _asked(self, point: Hyperparameters) -> dict[str, BaseDistribution]:
        return {name: d for name, d in self._distributions.items() if name in point}

    def _decode(self, name: str, value: Any) -> Value:
        dimension = self._space[name]
        if isinstance(dimension, Choices):
            return next(choice for choice in dimension.values if _encode(choice) == value)
        return value  # type: ignore[no-any-return]

    # --- telling ----------------------------------------------------------------------------------

    def report(self, trial: Trial, evaluation: Evaluation, planned: Sequence[int]) -> None:
        """Show Optuna an evaluation of a running trial, unless it is one too many or not finite.

        Nothing where answers are the objective: Optuna takes the last value that was shown of a pruned trial,
        which is how infeasible ones are told, for the trial's own, and would list a loss among the scores.
        """
        assert trial.optuna_trial is not None
        if self._objective == "answers":
            return
        if evaluation.step not in shown_steps(planned) or not math.isfinite(evaluation.eval_loss):
            return
        if evaluation.step not in self._frozen(trial).intermediate_values:
            self._handle(trial).report(evaluation.eval_loss, evaluation.step)

    def tell(self, trial: Trial, *, max_train_steps: int) -> None:
        """Tell Optuna how a trial ended. Telling it again changes nothing."""
        assert trial.optuna_trial is not None
        if self._frozen(trial).state not in _OPEN:
            return
        handle = self._handle(trial)
        for key, value in _attributes(trial, max_train_steps).items():
            handle.set_user_attr(key, value)
        is_infeasible = trial.state == TrialState.INFEASIBLE
        if trial.state != TrialState.FAILED:
            self._set_feasible(trial, handle, not is_infeasible)
        match trial.state:
            case TrialState.COMPLETE:
                self.study.tell(trial.optuna_trial, self._value(trial))
            case TrialState.INFEASIBLE if self._search.sampler == "gp" and self._objective == "loss":
                # GPSampler ignores pruned trials: a penalty and the constraint are what it learns from.
                self.study.tell(trial.optuna_trial, self._penalty())
            case TrialState.INFEASIBLE | TrialState.PRUNED:
                self.study.tell(trial.optuna_trial, state=optuna.trial.TrialState.PRUNED)
            case TrialState.FAILED:
                self.study.tell(trial.optuna_trial, state=optuna.trial.TrialState.FAIL)
            case other:
                raise ValueError(f"trial {trial.number} is {other}: only an ended trial can be told")

    def _value(self, trial: Trial) -> float:
        """What a complete trial came to, by the round's objective."""
        if self._objective == "answers":
            score = objective_score(trial)
            assert score is not None  # recorded before the trial's end
            return score
        best = best_evaluation(trial.evaluations)
        assert best is not None
        return best.eval_loss

    def heal(self, trials: Sequence[Trial], *, max_train_steps: int) -> None:
        """After a crash: end what Optuna has and the facts do not, and tell what was not told."""
        known = {trial.optuna_trial for trial in trials}
        for frozen in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,)):
            if frozen.number not in known:
                self.study.ask()
        for frozen in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if frozen.number not in known:
                self.study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
        for trial in trials:
            if trial.state.is_final:
                self.tell(trial, max_train_steps=max_train_steps)

    def _handle(self, trial: Trial) -> optuna.Trial:
        return optuna.Trial(self.study, self._trial_id(trial))

    def _frozen(self, trial: Trial) -> optuna.trial.FrozenTrial:
        """One trial, read alone: `get_trials` reads all that are running."""
        return self._storage.get_trial(self._trial_id(trial))

    def _trial_id(self, trial: Trial) -> int:
        assert trial.optuna_trial is not None
        return self._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, trial.optuna_trial)

    def _set_feasible(self, trial: Trial, handle: optuna.Trial, feasible: bool) -> None:
        handle.set_constraint("feasible", 0.0 if feasible else 1.0)
        # optuna-dashboard's best trial reads this older attribute alone.
        self._storage.set_trial_system_attr(self._trial_id(trial), "constraints", [0.0 if feasible else 1.0])

    def _penalty(self) -> float:
        losses = [t.value for t in self.study.get_trials(deepcopy=False) if t.value is not None]
        return max(losses, default=10.0)


def make_sampler(search: SearchSpec, *, seed: int) -> optuna.samplers.BaseSampler:
    """A sampler that is not tuner's, with the file's arguments and a seed where it takes one.

    Raises InputError where it cannot be imported or made, or is no sampler of Optuna's.
    """
    made_by = load("sampler", search.sampler)
    place = f"search.sampler {search.sampler}"
    try:
        takes_seed = "seed" in inspect.signature(made_by).parameters
        arguments = {"seed": seed, **search.sampler_arguments} if takes_seed else search.sampler_arguments
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made = made_by(**arguments)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"{place}: cannot be made with {search.sampler_arguments}: {error}") from error
    if not isinstance(made, optuna.samplers.BaseSampler):
        raise InputError(f"{place}: gives a {type(made).__name__}, and not a sampler of Optuna's")
    return made


def shown_steps(planned: Sequence[int]) -> frozenset[int]:
    """At most `MAX_REPORTS` of the planned evaluation steps, evenly spread, the last one among them."""
    if len(planned) <= MAX_REPORTS:
        return frozenset(planned)
    stride = (len(planned) - 1) / (MAX_REPORTS - 1)
    return frozenset(planned[round(number * stride)] for number in range(MAX_REPORTS))


def _distribution(dimension: Choices | Range) -> BaseDistribution:
    match dimension:
        case Choices(values=values):
            return CategoricalDistribution([_encode(value) for value in values])
        case Range(low=low, high=high, log=log, integer=True):
            return IntDistribution(int(low), int(high), log=log)
        case Range(low=low, high=high, log=log):
            return FloatDistribution(low, high, log=log)


def _random_points(
    space: Mapping[str, Choices | Range], random: np.random.Generator
) -> Iterator[dict[str, Value]]:
    while True:
        yield random_point(space, random)


def _any_point(
    space: Mapping[str, Choices | Range], random: np.random.Generator
) -> Iterator[dict[str, Value]]:
    """Random points; of a finite space some, and then every one in its order."""
    if math.isinf(num_points(space)):
        yield from _random_points(space, random)
    yield from itertools.islice(_random_points(space, random), _RANDOM_TRIES)
    yield from every_point(space)


def _encode(value: Value) -> bool | int | float | str:
    """Optuna keeps scalars: a list of module names is kept as its JSON text."""
    return json.dumps(list(value)) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Value:
    return tuple(value) if isinstance(value, list) else value


def _attributes(trial: Trial, max_train_steps: int) -> dict[str, Any]:
    best = best_evaluation(trial.evaluations)
    attributes: dict[str, Any] = {
        "trial": trial.number,
        "state": str(trial.state),
        "executed_steps": trial.executed_steps,
    }
    if best is not None:
        attributes["best_step"] = best.step
        attributes["best_step_fraction"] = round(best.step / max_train_steps, 4)
        attributes["settled_step"] = settled_step(trial.evaluations)
        attributes["best_eval_loss"] = best.eval_loss
    if trial.answer_score is not None:
        attributes["answer_score"] = trial.answer_score.mean
        attributes["answer_score_standard_error"] = trial.answer_score.standard_error
        attributes["answers"] = f"{trial.answer_score.num_examples} by {trial.answer_score.metric}"
    if trial.reason:
        attributes["reason"] = trial.reason
    if trial.continues:
        attributes["continues"] = str(trial.continues)
    return attributes


def optuna_storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's tables in the study's database, beside tuner's own."""
    url = normal_url(url)
    storage = optuna.storages.RDBStorage(url, engine_kwargs=_engine_arguments(url))
    if storage.engine.dialect.name == "sqlite":
        event.listen(storage.engine, "connect", _leave_waiting_to_facts)
        storage.engine.dispose()
    return storage


def _leave_waiting_to_facts(connection: Any, _: object) -> None:
    """Optuna's commits reach the disk with the next fact's: a power cut takes what is told again anyway."""
    connection.execute("PRAGMA synchronous=NORMAL")


class StudyStorage(optuna.storages.RDBStorage):
    """Optuna's tables as far as they are of one study: what the dashboard lists, finds and shows."""

    def __init__(self, url: str, study: str) -> None:
        url = normal_url(url)
        super().__init__(url, engine_kwargs=_engine_arguments(url))
        self._prefix = f"{study}/"

    def get_all_studies(self) -> list[Any]:
        """The rounds of the study."""
        return [found for found in super().get_all_studies() if found.study_name.startswith(self._prefix)]


def _engine_arguments(url: str) -> dict[str, Any]:
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
