"""Methods that spend a budget of steps on a surface, and what each then names the best configuration."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np
import optuna

from tuner.engines import SimulatedWorker
from tuner.engines.simulated import keep_trunk_names
from tuner.playbook import RoundResults, best_evaluation, plan_next_round, read_round
from tuner.playbook.observations import outcomes
from tuner.playbook.schedule import evaluation_steps
from tuner.records import (
    Choices,
    Evaluation,
    Event,
    Fixed,
    Hyperparameters,
    Range,
    Space,
    TrialState,
    Value,
)
from tuner.study.proposals import distributions
from tuner.study.samplers.points import quasi_random_point, random_point
from tuner.study.sampling import RoundStudy

from .loop import WORKLOAD, LoopPlan, RoundStores, begin_round, loop_plan, run_loop, unchecked_search
from .task import ReplayOver

DECAY_SHARE = 0.4
"""Of every run of every method."""
FIRST_TRIALS = 24
"""Trials of a first round that `study new` writes."""


class Surface(Protocol):
    """Noise-free losses of a made-up fine-tuning run."""

    @property
    def name(self) -> str: ...
    @property
    def full_steps(self) -> int:
        """Steps of the run that is to be tuned."""

    @property
    def every_steps(self) -> int:
        """Steps between evaluations, of every method."""

    @property
    def evaluation_noise(self) -> float:
        """Relative standard deviation of each evaluation."""

    @property
    def run_noise(self) -> float:
        """Relative standard deviation of what a seed adds to a run, the same at all its steps."""

    def space(self) -> Mapping[str, Range | Choices]:
        """What is searched."""

    def losses(self, hyperparameters: Hyperparameters, steps: np.ndarray, horizon: int) -> np.ndarray:
        """At each of the steps of a run to a horizon; NaN once it has diverged."""


@dataclass(frozen=True)
class Ended:
    """A run that came to its horizon."""

    point: Mapping[str, Value]
    """Values of what is searched."""
    horizon: int
    observed: float
    """Its lowest evaluation, noise included."""


@dataclass
class Contest:
    """One method on one surface with one seed: the steps it spent and the runs that ended."""

    surface: Surface
    seed: int
    budget_runs: int
    spent: int = 0
    ended: list[Ended] = field(default_factory=list)

    @property
    def budget_steps(self) -> int:
        return self.budget_runs * self.surface.full_steps

    def charge(self, steps: int) -> None:
        """Count steps. Raises ReplayOver when more are run than the budget has; these are not counted."""
        if self.spent + steps > self.budget_steps:
            raise ReplayOver
        self.spent += steps

    def named_best(self) -> Ended | None:
        """The lowest observed loss among the longest runs, which all methods name in the end."""
        longest = max((run.horizon for run in self.ended), default=0)
        runs = [run for run in self.ended if run.horizon == longest]
        return min(runs, key=lambda run: run.observed, default=None)

    def figure(self) -> float:
        """The noise-free loss at full length of the configuration named best; infinite where none is."""
        best = self.named_best()
        return math.inf if best is None else true_loss(self.surface, best.point)

    def evaluation(self, hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        """A `Curve` for a simulated worker: what an evaluation there says, noise included."""
        truth = float(self.surface.losses(hyperparameters, np.array([step]), horizon)[0])
        factor = self.noise(hyperparameters)[-(-step // self.surface.every_steps)]
        return Evaluation(step, truth * float(factor), train_loss=truth if step else None)

    def noise(self, hyperparameters: Hyperparameters) -> np.ndarray:
        """Factors by evaluation, from step 0 to full length; what the decay is does not change them."""
        names = self.surface.space()
        key = repr([(name, hyperparameters[name]) for name in names])
        digest = hashlib.sha256(f"{self.surface.name} {self.seed} {key}".encode()).digest()
        drawn = np.random.default_rng(int.from_bytes(digest[:8], "big")).standard_normal(
            self.surface.full_steps // self.surface.every_steps + 2
        )
        factors = 1 + self.surface.evaluation_noise * drawn[1:] + self.surface.run_noise * drawn[0]
        factors[0] = 1.0  # of the base model, which every run begins with
        return factors

    def run(self, point: Mapping[str, Value], *, start: int, end: int) -> float:
        """Train from one step to another of a full run; the lowest evaluation up to there.

        Infinite when it diverges on the way: what is left is then not run and not charged.
        """
        full, every = self.surface.full_steps, self.surface.every_steps
        steps = np.array(evaluation_steps(full, every))
        truth = self.surface.losses(full_run(self.surface, point), steps, full)
        observed = (truth * self.noise(point)[: len(steps)])[steps <= end]
        diverged = steps[: len(observed)][np.isnan(observed)]
        if len(diverged):
            self.charge(max(0, int(diverged[0]) - start))
            return math.inf
        self.charge(end - start)
        lowest = float(observed.min())
        if end == full:
            self.ended.append(Ended(dict(point), full, lowest))
        return lowest


def full_run(surface: Surface, point: Mapping[str, Value]) -> dict[str, Value]:
    """All hyperparameters of a run of full length."""
    decay = round(DECAY_SHARE * surface.full_steps)
    return {**point, "schedule": "linear", "decay_steps": decay}


def true_loss(surface: Surface, point: Mapping[str, Value]) -> float:
    """The noise-free loss at full length."""
    full = surface.full_steps
    return float(surface.losses(full_run(surface, point), np.array([full]), full)[0])


Method: TypeAlias = Callable[[Contest], None]
"""Spends a contest's budget; it ends with ReplayOver."""


# --- rounds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Path:
    """How a study goes from its first round to full length, before the last round gets more trials."""

    divisors: Sequence[int] = (9, 3, 1)
    """Each round's horizon is full length divided by so much."""
    first_trials: int = FIRST_TRIALS
    top: int = 3
    """Trials that are carried over at most; as `promote --top`."""
    shrink: float | None = None
    """A round has so many times fewer trials than the one before; None: as the playbook has it."""

    def horizons(self, full_steps: int) -> list[int]:
        """Of the rounds, the last one at full length."""
        return [round(full_steps / divisor) for divisor in self.divisors]


def decay_of(horizon: int) -> int:
    """The decay of a round."""
    return round(DECAY_SHARE * horizon)


def comparison_steps(horizon: int) -> int:
    """What a round's comparison run costs: a decay branch to half the horizon."""
    return decay_of(round(horizon / 2))


def rounds(path: Path) -> Method:
    """The method that follows a path."""
    return partial(_follow, path)


def _follow(path: Path, contest: Contest) -> None:
    horizons = path.horizons(contest.surface.full_steps)
    study = _Study(contest)
    try:
        this = study.first_round(horizons[0], path.first_trials)
        for horizon in horizons[1:]:
            this = study.promoted(this, horizon, path)
        study.add_trials(this)
    finally:
        contest.ended += study.ended()


@dataclass(frozen=True)
class _Round:
    """What a round file would say."""

    name: str
    space: Space
    horizon: int
    trials: int
    sampler: str
    enqueue: Sequence[dict[str, Any]] = ()
    seed: int = 0

    def plan(self, every_steps: int) -> LoopPlan:
        search = unchecked_search(self.trials, self.sampler, self.seed, self.enqueue)
        return loop_plan(self.name, self.space, search, horizon=self.horizon, every=every_steps)


class _Study:
    """Rounds of a study, through the real loop."""

    def __init__(self, contest: Contest) -> None:
        self._contest = contest
        self._store = RoundStores()
        self._storage = optuna.storages.InMemoryStorage()
        self._results: list[RoundResults] = []
        """Of the rounds whose planned trials have ended."""

    def first_round(self, horizon: int, trials: int) -> _Round:
        """Run a round that covers the space."""
        space: Space = {
            **self._contest.surface.space(),
            "schedule": Fixed("linear"),
            "decay_steps": Fixed(decay_of(horizon)),
        }
        return self._begun(_Round("round1", space, horizon, trials, "quasi-random", seed=self._contest.seed))

    def promoted(self, last: _Round, horizon: int, path: Path) -> _Round:
        """Plan and run the next round, as `study promote --max-train-steps` and `study run` do."""
        *before, results = self._results
        planned = plan_next_round(
            results,
            read_round(results, before),
            to=f"round{len(self._results) + 1}",
            max_train_steps=horizon,
            top=path.top,
            decay="share",
        )
        enqueue = [
            {**trial.hyperparameters, "continues": f"{trial.round}/{trial.trial}"}
            for trial in planned.enqueue
        ]
        trials = planned.trials_total
        if path.shrink is not None:
            trials = max(round(last.trials / path.shrink), len(enqueue) + 1)
        return self._begun(
            _Round(
                planned.to_round, planned.space, horizon, trials, planned.sampler, enqueue, self._contest.seed
            )
        )

    def add_trials(self, last: _Round) -> None:
        """Raise the last round's trials by one until the budget is spent."""
        while True:
            last = replace(last, trials=last.trials + 1)
            self._loop(last)

    def ended(self) -> list[Ended]:
        """The runs that came to their horizons, in all rounds."""
        names = self._contest.surface.space()
        found = []
        for record in self._store.rounds():
            for trial in self._store.trials(record.name):
                best = best_evaluation(trial.evaluations)
                if trial.state == TrialState.COMPLETE and best is not None:
                    point = {name: trial.hyperparameters[name] for name in names}
                    found.append(Ended(point, record.max_train_steps, best.eval_loss))
        return found

    def _begun(self, this: _Round) -> _Round:
        """Run a new round, and the comparison run that `run.decay_branches: auto` makes."""
        every = self._contest.surface.every_steps
        begin_round(self._store, this.plan(every), begun_at=float(len(self._results) + 1))
        self._loop(this)
        self._results.append(
            RoundResults(
                name=this.name,
                max_train_steps=this.horizon,
                evaluate_every=every,
                space=this.space,
                trials=self._store.trials(this.name),
                production_steps=self._contest.surface.full_steps,
                workload=WORKLOAD,
            )
        )
        self._contest.charge(comparison_steps(this.horizon))
        return this

    def _loop(self, this: _Round) -> None:
        """Run the trials that a round still has to run."""
        plan = this.plan(self._contest.surface.every_steps)
        before = [results for results in self._results if results.name != this.name]
        round_study = RoundStudy(
            self._storage,
            this.name,
            this.space,
            plan.spec.search,
            max_train_steps=this.horizon,
            earlier=[o for r in before for o in outcomes(r.trials, max_train_steps=r.max_train_steps)],
        )
        worker = _ChargedWorker(self._contest)
        run_loop(plan, self._store, round_study, worker, spent=lambda: float(self._contest.spent))


class _ChargedWorker(SimulatedWorker):
    """A simulated worker with one slot, whose steps are charged."""

    def __init__(self, contest: Contest) -> None:
        super().__init__(contest.evaluation, slots=1, keep=keep_trunk_names)
        self._contest = contest

    def events(self, timeout_seconds: float) -> list[Event]:
        before = self.seconds
        said = super().events(timeout_seconds)
        self._contest.charge(round(self.seconds - before))
        return said


# --- what people would otherwise use --------------------------------------------------------------


def random_full_length(contest: Contest) -> None:
    """Uniform random points of the space, each to the end."""
    generator = np.random.default_rng(contest.seed)
    while True:
        contest.run(
            random_point(distributions(contest.surface.space()), generator),
            start=0,
            end=contest.surface.full_steps,
        )


def quasi_random_full_length(contest: Contest) -> None:
    """A scrambled Sobol sequence, each point to the end."""
    space = distributions(contest.surface.space())
    for place in itertools.count():
        point = quasi_random_point(space, seed=contest.seed, place=place)
        contest.run(point, start=0, end=contest.surface.full_steps)


def tpe_full_length(contest: Contest) -> None:
    """Optuna's default sampler, each point to the end."""
    _optuna(contest, optuna.pruners.NopPruner(), [contest.surface.full_steps])


def tpe_with_halving(contest: Contest) -> None:
    """TPE with Optuna's SuccessiveHalvingPruner: from a ninth of full length on, factor 3."""
    _halving(contest, 9)


def tpe_with_early_halving(contest: Contest) -> None:
    """The same from a 27th of full length on."""
    _halving(contest, 27)


def _halving(contest: Contest, divisor: int) -> None:
    full = contest.surface.full_steps
    rungs = [full // divisor * 3**rung for rung in range(round(math.log(divisor, 3)))]
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs[0], reduction_factor=3)
    _optuna(contest, pruner, [*rungs, full])


def _optuna(contest: Contest, pruner: optuna.pruners.BasePruner, rungs: Sequence[int]) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=contest.seed), pruner=pruner)
    distributions = {name: _distribution(d) for name, d in contest.surface.space().items()}
    while True:
        trial = study.ask(distributions)
        loss, start, is_pruned = math.inf, 0, False
        for rung in rungs:
            loss = contest.run(trial.params, start=start, end=rung)
            if loss == math.inf:
                break
            trial.report(loss, rung)
            start = rung
            if rung < rungs[-1] and trial.should_prune():
                is_pruned = True
                break
        if loss == math.inf or is_pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, loss)


def _distribution(dimension: Range | Choices) -> optuna.distributions.BaseDistribution:
    match dimension:
        case Choices(values=values):
            return optuna.distributions.CategoricalDistribution(list(values))
        case Range(low=low, high=high, integer=True):
            return optuna.distributions.IntDistribution(int(low), int(high))
        case Range(low=low, high=high, log=log):
            return optuna.distributions.FloatDistribution(low, high, log=log)
