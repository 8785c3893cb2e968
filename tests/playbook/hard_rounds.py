"""Rounds with a known answer, hard ones: what newcomers bring, class by class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from tests.playbook.loss_curves import (
    Family,
    Runs,
    learning,
    levelling,
    log_uniform,
    never,
    overfitting,
    power,
    saturating,
    short_lived,
    slow,
)
from tests.playbook.rounds import (
    LEARNING_RATES,
    SPACE,
    SyntheticRound,
    diverged_trial,
    evaluation_grid,
    noisy_trial,
)
from tests.playbook.truth import Case, TrueTrial, answer
from tuner.playbook import RoundResults
from tuner.playbook.results import BranchResult
from tuner.records import Fixed, Space, Trial

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Plan:
    """What kind of round it is."""

    count: int
    """Complete trials, copies not counted."""
    horizon: int
    every: int
    schedule: Schedule
    share: float
    noise: float
    company: Literal["alike", "mixed", "clusters"] = "alike"
    has_examples: bool = True
    has_comparison: bool = True
    is_edge: bool = False
    max_copies: int = 1

    @property
    def decay_steps(self) -> int:
        return round(self.share * self.horizon) if self.schedule == "linear" else 0


CLASSES: dict[str, Callable[[Plan, np.random.Generator], Plan]] = {
    "small": lambda plan, rng: replace(plan, count=int(rng.integers(1, 4))),
    "mixed": lambda plan, rng: replace(plan, count=max(2, plan.count), company="mixed"),
    "clusters": lambda plan, rng: replace(plan, count=max(2, plan.count), company="clusters"),
    "constant": lambda plan, rng: replace(plan, schedule="constant"),
    "linear": lambda plan, rng: replace(plan, schedule="linear"),
    "cosine": lambda plan, rng: replace(plan, schedule="cosine"),
    "edges": lambda plan, rng: replace(plan, is_edge=True),
    "sparse": lambda plan, rng: replace(plan, every=max(1, plan.horizon // int(rng.integers(2, 9)))),
    "dense": lambda plan, rng: replace(plan, every=max(1, plan.horizon // int(rng.integers(60, 121)))),
    "no examples": lambda plan, rng: replace(plan, has_examples=False),
    "noisy": lambda plan, rng: replace(plan, noise=log_uniform(rng, 0.005, 0.03)),
    "copies": lambda plan, rng: replace(plan, count=min(10, plan.count), max_copies=6),
}
"""What each class fixes; the rest is drawn as for all."""


def hard_round(kind: str, rng: np.random.Generator) -> SyntheticRound:
    """A random round of a class."""
    plan = CLASSES[kind](_any_plan(rng), rng)
    return _made(plan, rng)


def _any_plan(rng: np.random.Generator) -> Plan:
    horizon = int(rng.integers(60, 1200))
    return Plan(
        count=int(rng.integers(1, 21)),
        horizon=horizon,
        every=max(1, horizon // int(rng.integers(10, 51))),
        schedule=("constant", "linear", "cosine")[int(rng.choice(3, p=[0.35, 0.4, 0.25]))],  # type: ignore[arg-type]
        share=float(rng.choice([0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 0.9])),
        noise=log_uniform(rng, 0.001, 0.0025) if rng.random() < 0.6 else log_uniform(rng, 0.0025, 0.01),
        has_examples=rng.random() < 0.85,
        has_comparison=rng.random() < 0.85,
    )


# --- what the trials are ----------------------------------------------------------------------------------

_LEARNERS: tuple[Family, ...] = (power, power, power, saturating, levelling, levelling, overfitting)


def _made(plan: Plan, rng: np.random.Generator) -> SyntheticRound:
    steps = evaluation_grid(plan.horizon, plan.every)
    runs = _company(plan, rng)
    finals = [float(run.loss(np.array(steps, dtype=np.float64), plan.horizon).min()) for run in runs]
    rates = _rates(finals, plan, rng)
    copies = [int(rng.integers(1, plan.max_copies + 1)) for _ in runs]
    num_complete = sum(copies)
    num_diverged = int(rng.integers(1, 3)) if rng.random() < (0.15 if plan.is_edge else 0.3) else 0
    numbers = iter(rng.permutation(num_complete + num_diverged).tolist())
    complete: list[Trial] = []
    for run, rate, times in zip(runs, rates, copies, strict=True):
        trial = _trial(plan, run, rate, next(numbers), steps, rng)
        complete += [trial, *(replace(trial, number=next(numbers)) for _ in range(times - 1))]
    diverged = [diverged_trial(next(numbers), steps) for _ in range(num_diverged)]
    branches = _comparison(plan, complete, runs, copies, rng)
    production = int(plan.horizon * rng.uniform(1.2, 10)) if rng.random() < 0.4 else None
    space: Space = {
        **SPACE,
        "schedule": Fixed(plan.schedule),
        "decay_steps": Fixed(plan.decay_steps),
    }
    trials = [*complete, *diverged]
    results = RoundResults(
        "round1",
        plan.horizon,
        plan.every,
        space,
        tuple(trials[i] for i in rng.permutation(len(trials))),
        10_000,
        production,
        workload="w",
        branches=branches,
    )
    case = Case(
        tuple(TrueTrial(run, rate) for run, rate in zip(runs, rates, strict=True)),
        steps,
        plan.every,
        plan.noise,
        LEARNING_RATES.high,
        LEARNING_RATES.low,
        tuple(float(str(trial.hyperparameters["learning_rate"])) for trial in diverged),
        has_examples=plan.has_examples,
        has_comparison=bool(branches),
        production_steps=production,
    )
    return SyntheticRound(results, answer(case))


def _company(plan: Plan, rng: np.random.Generator) -> list[Runs]:
    """The trials' curves: all alike; one that learns among others that do not; two kinds of best steps."""
    base_loss, drop = rng.uniform(1.0, 3.0), log_uniform(rng, 0.05, 0.6)
    benefit = log_uniform(rng, 0.01, 0.2)

    def made(family: Family, share_of_drop: float, seed: int, pace: float) -> Runs:
        shape, rise = family(np.random.default_rng(seed))
        sum_of_rates = plan.horizon / 2 if plan.schedule == "cosine" else plan.horizon - plan.decay_steps / 2
        curve = learning(base_loss, drop * share_of_drop, shape, pace * sum_of_rates, rise)
        length = max(1.0, plan.horizon / 4)
        share = plan.decay_steps / plan.horizon
        return Runs(curve, plan.schedule, share, 0.0 if family is never else benefit, length)

    def seed() -> int:
        return int(rng.integers(2**31))

    def learner() -> Family:
        return _LEARNERS[int(rng.integers(len(_LEARNERS)))]

    match plan.company:
        case "alike":
            draw = rng.random()
            family = never if draw < 0.08 else short_lived if draw < 0.16 else learner()
            one = seed()
            spread = rng.uniform(0.05, 0.5)
            return [
                made(family, 1 - spread * rng.random(), one, log_uniform(rng, 0.8, 1.25))
                for _ in range(plan.count)
            ]
        case "mixed":
            poor = (never, never, slow)
            return [
                made(learner(), 1.0, seed(), 1.0),
                *(
                    made(poor[int(rng.integers(len(poor)))], rng.uniform(0.05, 0.6), seed(), 1.0)
                    for _ in range(plan.count - 1)
                ),
            ]
        case "clusters":
            early = (short_lived, overfitting)[int(rng.integers(2))]
            families = [(early, seed()), ((power, slow)[int(rng.integers(2))], seed())]
            depth = [1.0, rng.uniform(0.5, 1.5)]
            which = rng.permutation([i % 2 for i in range(plan.count)])
            return [
                made(
                    families[i][0],
                    depth[i] * rng.uniform(0.9, 1.0),
                    families[i][1],
                    log_uniform(rng, 0.9, 1.1),
                )
                for i in which
            ]


def _rates(finals: Sequence[float], plan: Plan, rng: np.random.Generator) -> list[float]:
    """A learning rate for each trial: the best one inside of those tried, or at their edge."""
    count = len(finals)
    order = [int(i) for i in np.argsort(finals)]
    at_bound = plan.is_edge and (count < 3 or rng.random() < 0.5)
    positions = np.sort(rng.uniform(0.1, 0.8, count))[::-1]
    if at_bound:
        positions[0] = rng.uniform(0.955, 1.0)
    if plan.is_edge:
        others = order[1:] if not at_bound else [int(i) for i in rng.permutation(order[1:])]
        ranking = [order[0], *others]
    else:
        ranking = [int(i) for i in rng.permutation(order[1:])]
        ranking.insert(int(rng.integers(min(1, count - 1), count)), order[0])
    low, high = LEARNING_RATES.low, LEARNING_RATES.high
    return [float(low * (high / low) ** positions[ranking.index(i)]) for i in range(count)]


# --- what is seen of them ---------------------------------------------------------------------------------


def _trial(
    plan: Plan, run: Runs, rate: float, number: int, steps: tuple[int, ...], rng: np.random.Generator
) -> Trial:
    return noisy_trial(
        number,
        lambda at: run.loss(at, plan.horizon),
        steps,
        rng,
        noise=plan.noise,
        hyperparameters={
            "learning_rate": rate,
            "schedule": plan.schedule,
            "decay_steps": plan.decay_steps,
        },
        has_examples=plan.has_examples,
    )


def _comparison(
    plan: Plan,
    complete: Sequence[Trial],
    runs: Sequence[Runs],
    copies: Sequence[int],
    rng: np.random.Generator,
) -> tuple[BranchResult, ...]:
    """The run to T/2 that a decayed round makes for the trial that looks best."""
    if plan.schedule == "constant" or not plan.has_comparison:
        return ()
    owners = np.repeat(np.arange(len(runs)), copies)
    looks_best = min(
        range(len(complete)),
        key=lambda i: (min(e.eval_loss for e in complete[i].evaluations), complete[i].number),
    )
    trial, run = complete[looks_best], runs[owners[looks_best]]
    half = round(plan.horizon / 2)
    begins = half - max(1, round(half * plan.decay_steps / plan.horizon)) if plan.schedule == "linear" else -1
    own = [step for step in evaluation_grid(half, plan.every) if step > begins]
    measured = noisy_trial(
        0,
        lambda at: run.loss(at, half),
        tuple(own if plan.schedule == "cosine" else own[-1:]),
        rng,
        noise=plan.noise,
        has_examples=plan.has_examples,
    ).evaluations
    inherited = tuple(e for e in trial.evaluations if e.step <= begins)
    return (BranchResult(trial.number, half, (*inherited, *measured)),)
