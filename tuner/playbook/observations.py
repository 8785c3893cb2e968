"""What a sampler learns from: results of this round and of earlier ones, by their ranking."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import TypeAlias

from tuner.playbook.gain import configuration
from tuner.playbook.results import Finding, Sampler, Severity
from tuner.playbook.selection import best_evaluation
from tuner.records import LOSS, Evaluation, Hyperparameters, Objective, Space, Trial, TrialState, searched

_OWN = frozenset({"quasi-random", "tpe", "gp", "random", "grid"})

MAX_STARTUP_TRIALS = 10
"""Optuna's default; a model needs no more before it is fitted."""

_TRIALS_NEEDED = (("adam_beta1", 10), ("adam_epsilon", 25), ("adam_beta2", 100))
"""Trials from which on one of Adam's hyperparameters is worth searching; "far more than 25" is taken as 100.
"""


def default_sampler(
    *, knows_good_trials: bool, before: Sampler = "quasi-random", is_narrowed: bool = True
) -> tuple[Sampler, str]:
    """Return the sampler of a round and the reason for it; `before` is that of the preceding round.

    A first round knows no good trials, nor does one that follows a round without a complete trial. Rule: Deep
    Learning Tuning Playbook, "Exploration vs exploitation" and "Why use quasi-random search instead of more
    sophisticated black box optimization algorithms during the exploration phase": by default the second round
    exploits.
    """
    if before not in _OWN:
        return before, "as before"
    if not knows_good_trials:
        return "quasi-random", "no good trials are known yet, so the points cover the space evenly"
    if not is_narrowed:
        return with_a_model(before), "learns from the trials of all rounds"
    return with_a_model(before), "the space is narrowed around good trials, so a model of them chooses"


def with_a_model(sampler: Sampler) -> Sampler:
    """Return a model-based sampler: `gp` or the user's own if the file names one already, else tpe.

    Rule: this project's decision, "Search".
    """
    return sampler if sampler == "gp" or sampler not in _OWN else "tpe"


def startup_trials(*, enqueued: int, total: int) -> int:
    """Return the number of trials before a model-based sampler starts to model, enqueued ones included.

    At most half of the round, so that a small one is modelled at all, and at least as many as are enqueued,
    up to Optuna's ten. Rule: this project's decision, "Search".
    """
    return max(1, min(MAX_STARTUP_TRIALS, max(enqueued, total // 2)))


def search_findings(space: Space, trials: int) -> Iterator[Finding]:
    """Yield a finding if too few trials search some of Adam's hyperparameters.

    Rule: Deep Learning Tuning Playbook, "How should Adam's hyperparameters be tuned?": under 10 trials the
    learning rate alone; 10 to 25, and beta1; more, and epsilon; far more, beta2.
    """
    early = [(name, needed) for name, needed in _TRIALS_NEEDED if name in searched(space) and trials < needed]
    if early:
        names = ", ".join(f"{name} (from about {needed} trials)" for name, needed in early)
        yield Finding(
            "too_many_names",
            Severity.WARNING,
            f"{trials} trials are few for this search space: fix {names}.",
            {"trials": float(trials), "needed": float(max(needed for _, needed in early))},
        )


_Values: TypeAlias = Mapping[tuple[object, ...], float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a trial at some horizon."""

    hyperparameters: Hyperparameters
    configuration: tuple[object, ...]
    horizon: int
    loss: float
    """The best evaluation's cost, lower is better. Expected at the horizon if the trial was pruned; infinite
    if it is infeasible."""
    is_measured: bool
    """Whether the loss was measured at the horizon."""
    score: float | None = None
    """The value of the per-trial metric; None if there is none."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What all rounds so far say of one configuration."""

    hyperparameters: Hyperparameters
    objective: float
    """Expected objective at the longest horizon, with the sign that makes lower better; infinite where it is
    infeasible."""
    loss: float
    """The same of the best evaluations, which parts equal objectives."""


def outcomes(trials: Sequence[Trial], *, max_train_steps: int) -> tuple[Outcome, ...]:
    """Return the results of a round; waiting, running and failed trials have none.

    A pruned trial is expected to gain as much as the round's complete trials gained, in the median, after the
    step where it ended. Rule: this project's decision, "Search".
    """
    complete = [trial.evaluations for trial in trials if trial.state == TrialState.COMPLETE]
    found = []
    for trial in trials:
        best = best_evaluation(trial.evaluations)
        match trial.state:
            case TrialState.COMPLETE if best is not None:
                loss = best.cost
            case TrialState.PRUNED if best is not None:
                loss = best.cost - _gain_after(trial.evaluations[-1].step, complete)
            case TrialState.INFEASIBLE:
                loss = math.inf
            case _:
                continue
        is_measured = trial.state == TrialState.COMPLETE
        score = trial.answer_score.mean if trial.answer_score is not None else None
        found.append(
            Outcome(trial.hyperparameters, configuration(trial), max_train_steps, loss, is_measured, score)
        )
    return tuple(found)


def observations(found: Sequence[Outcome], *, objective: Objective = LOSS) -> tuple[Observation, ...]:
    """One observation for each configuration, in the order in which they were first tried.

    `found` are the outcomes of one workload's rounds, oldest first. A configuration speaks by its longest
    run. Values of different horizons are not compared as they are: each is lowered by what the
    configurations known at both horizons gained, in the median. Of a per-trial objective, what has no value
    teaches nothing, unless it is infeasible. Rule: this project's decision, "Search".
    """
    is_per_trial = objective.per == "trial"
    if is_per_trial:
        found = [outcome for outcome in found if outcome.score is not None or math.isinf(outcome.loss)]
    speaking: dict[tuple[object, ...], Outcome] = {}
    for outcome in found:
        known = speaking.get(outcome.configuration)
        if known is None or outcome.horizon >= known.horizon:
            speaking[outcome.configuration] = outcome
    value = partial(_score_to_minimise, objective) if is_per_trial else _loss
    gains, gains_of_loss = _gains_to_the_longest(found, value), _gains_to_the_longest(found, _loss)
    return tuple(
        Observation(o.hyperparameters, value(o) - gains[o.horizon], o.loss - gains_of_loss[o.horizon])
        for o in speaking.values()
    )


def _loss(outcome: Outcome) -> float:
    return outcome.loss


def _score_to_minimise(objective: Objective, outcome: Outcome) -> float:
    return math.inf if outcome.score is None else objective.cost(outcome.score)


def _gain_after(step: int, curves: Sequence[Sequence[Evaluation]]) -> float:
    gains = []
    for curve in curves:
        until = best_evaluation(evaluation for evaluation in curve if evaluation.step <= step)
        best = best_evaluation(curve)
        if until is not None and best is not None:
            gains.append(until.cost - best.cost)
    return median(gains) if gains else 0.0


def _gains_to_the_longest(found: Sequence[Outcome], value: Callable[[Outcome], float]) -> dict[int, float]:
    values: dict[int, dict[tuple[object, ...], float]] = {outcome.horizon: {} for outcome in found}
    for outcome in found:
        if outcome.is_measured:
            values[outcome.horizon][outcome.configuration] = value(outcome)
    horizons = sorted(values)
    gains = dict.fromkeys(horizons, 0.0)
    for shorter, longer in reversed(list(pairwise(horizons))):
        gains[shorter] = gains[longer] + _gain_between(values[shorter], values[longer])
    return gains


def _gain_between(shorter: _Values, longer: _Values) -> float:
    """Return the median gain of configurations known at both horizons, or else that of the best ones."""
    both = [shorter[name] - longer[name] for name in shorter if name in longer]
    if both:
        return median(both)
    return min(shorter.values()) - min(longer.values()) if shorter and longer else 0.0
