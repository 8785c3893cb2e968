"""Optuna's side of a round: what it proposes next, and what it is told of each trial.

Optuna advises and shows; it holds no fact. A proposal depends on how many there were before it, so
that a resumed round goes on where it stopped; everything told can be told again.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from sqlalchemy import event

from tuner.playbook import best_evaluation, settled_step
from tuner.playbook.search import startup_trials
from tuner.records import (
    Choices,
    Evaluation,
    Hyperparameters,
    Range,
    Space,
    Trial,
    TrialState,
    Value,
    searched,
)
from tuner.spec import SearchSpec

MAX_REPORTS = 20
"""Evaluations of a trial that Optuna is shown: 10,000 trials with 100 each made the first `ask` take 36 s."""

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
        self, storage: optuna.storages.BaseStorage, name: str, space: Space, search: SearchSpec
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = searched(space)
        self._search = search
        self._distributions = {key: _distribution(d) for key, d in self._space.items()}
        self._storage = storage
        self.study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="minimize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),
        )

    # --- asking -----------------------------------------------------------------------------------

    @property
    def num_points(self) -> float:
        """How many different proposals there are: infinite except for a grid."""
        if self._search.sampler != "grid":
            return math.inf
        return len(self._search.enqueue) + math.prod(len(values) for values in self._grid())

    def propose(self, ordinal: int, *, again: Hyperparameters | None = None) -> Proposal:
        """The round's proposal number `ordinal`, from 0; the enqueued ones come first.

        `again` repeats the hyperparameters of a failed trial instead. Makes a running trial in
        Optuna's study.
        """
        if again is not None:
            given: Mapping[str, Value] = {name: again[name] for name in self._space}
        else:
            given = self._given(ordinal)
        if given:
            encoded = {name: _encode(value) for name, value in given.items()}
            self.study.enqueue_trial(encoded)
        finished = len(self.study.get_trials(deepcopy=False))
        self.study.sampler = self._sampler(finished)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.study.ask(self._distributions)
        self.study.sampler = optuna.samplers.RandomSampler()
        chosen = {name: self._decode(name, trial.params[name]) for name in self._space}
        return Proposal(chosen, trial.number)

    def _given(self, ordinal: int) -> dict[str, Value]:
        """The values that are known without asking a sampler: all of them, some, or none."""
        num_enqueued = len(self._search.enqueue)
        entry = dict(self._search.enqueue[ordinal]) if ordinal < num_enqueued else {}
        given = {name: _tupled(value) for name, value in entry.items() if name in self._space}
        match self._search.sampler:
            case "quasi-random":
                # An entry's missing values come from a sequence of their own: the round's stays balanced.
                seed = self._search.seed + (1 if entry else 0)
                place = ordinal if entry else ordinal - num_enqueued
                return {**quasi_random_point(self._space, seed=seed, place=place), **given}
            case "grid":
                points = list(itertools.product(*self._grid()))
                place = 0 if entry else ordinal - num_enqueued
                return {**dict(zip(self._space, points[place], strict=True)), **given}
            case _:
                return given

    def _grid(self) -> list[tuple[Value, ...]]:
        return [d.values for d in self._space.values() if isinstance(d, Choices)]

    def _sampler(self, num_trials: int) -> optuna.samplers.BaseSampler:
        """A sampler whose seed follows the number of trials: a resumed round repeats no proposal."""
        seed = (self._search.seed * 1_000_003 + num_trials) % 2**32
        match self._search.sampler:
            case "tpe":
                startup = startup_trials(enqueued=len(self._search.enqueue), total=self._search.trials)
                return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
            case "gp":
                startup = startup_trials(enqueued=len(self._search.enqueue), total=self._search.trials)
                return optuna.samplers.GPSampler(seed=seed, n_startup_trials=startup)
            case _:
                return optuna.samplers.RandomSampler(seed=seed)

    def _decode(self, name: str, value: Any) -> Value:
        dimension = self._space[name]
        if isinstance(dimension, Choices):
            return next(choice for choice in dimension.values if _encode(choice) == value)
        return value  # type: ignore[no-any-return]

    # --- telling ----------------------------------------------------------------------------------

    def report(self, trial: Trial, evaluation: Evaluation, planned: Sequence[int]) -> None:
        """Show Optuna an evaluation of a running trial, unless it is one too many or not finite."""
        assert trial.optuna_trial is not None
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
                best = best_evaluation(trial.evaluations)
                assert best is not None
                self.study.tell(trial.optuna_trial, best.eval_loss)
            case TrialState.INFEASIBLE if self._search.sampler == "gp":
                # GPSampler ignores pruned trials: a penalty and the constraint are what it learns from.
                self.study.tell(trial.optuna_trial, self._penalty())
            case TrialState.INFEASIBLE | TrialState.PRUNED:
                self.study.tell(trial.optuna_trial, state=optuna.trial.TrialState.PRUNED)
            case TrialState.FAILED:
                self.study.tell(trial.optuna_trial, state=optuna.trial.TrialState.FAIL)
            case other:
                raise ValueError(f"trial {trial.number} is {other}: only an ended trial can be told")

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


def shown_steps(planned: Sequence[int]) -> frozenset[int]:
    """At most `MAX_REPORTS` of the planned evaluation steps, evenly spread, the last one among them."""
    if len(planned) <= MAX_REPORTS:
        return frozenset(planned)
    stride = (len(planned) - 1) / (MAX_REPORTS - 1)
    return frozenset(planned[round(number * stride)] for number in range(MAX_REPORTS))


def quasi_random_point(space: Mapping[str, Choices | Range], *, seed: int, place: int) -> dict[str, Value]:
    """Point number `place` of a scrambled Sobol sequence over the space.

    Taken by our own count and not by Optuna's, whose trials include those that a crash left behind.
    """
    if not space:
        return {}
    from scipy.stats import qmc  # a second of loading, and only quasi-random rounds need it

    sequence = qmc.Sobol(len(space), scramble=True, rng=seed)
    if place:
        sequence.fast_forward(place)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The balance properties of Sobol")
        unit = sequence.random(1)[0].tolist()
    return {name: _at(dimension, u) for (name, dimension), u in zip(space.items(), unit, strict=True)}


def _at(dimension: Choices | Range, unit: float) -> Value:
    """The value at a place in [0, 1) of a dimension."""
    if isinstance(dimension, Choices):
        return dimension.values[min(int(unit * len(dimension.values)), len(dimension.values) - 1)]
    low, high = dimension.low, dimension.high
    if dimension.integer:
        low, high = low - 0.5, high + 0.5
        if dimension.log:
            low = max(low, 0.5)
    value = (
        math.exp(math.log(low) + unit * (math.log(high) - math.log(low)))
        if dimension.log
        else low + unit * (high - low)
    )
    if dimension.integer:
        return int(min(max(round(value), dimension.low), dimension.high))
    return min(max(value, dimension.low), dimension.high)


def _distribution(dimension: Choices | Range) -> BaseDistribution:
    match dimension:
        case Choices(values=values):
            return CategoricalDistribution([_encode(value) for value in values])
        case Range(low=low, high=high, log=log, integer=True):
            return IntDistribution(int(low), int(high), log=log)
        case Range(low=low, high=high, log=log):
            return FloatDistribution(low, high, log=log)


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
    if trial.reason:
        attributes["reason"] = trial.reason
    if trial.continues:
        attributes["continues"] = str(trial.continues)
    return attributes


def optuna_storage(url: str) -> optuna.storages.RDBStorage:
    """Optuna's tables in the study's database, beside tuner's own."""
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
        super().__init__(url, engine_kwargs=_engine_arguments(url))
        self._prefix = f"{study}/"

    def get_all_studies(self) -> list[Any]:
        """The rounds of the study."""
        return [found for found in super().get_all_studies() if found.study_name.startswith(self._prefix)]


def _engine_arguments(url: str) -> dict[str, Any]:
    return {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
