"""What a sampler may learn from: trials of this round and of earlier ones, made comparable over lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal, TypeAlias

from tuner.playbook.gain import configuration
from tuner.playbook.selection import best_evaluation
from tuner.records import Evaluation, Hyperparameters, Trial, TrialState

Objective: TypeAlias = Literal["loss", "answers"]
"""What a round's trials are ranked by: the best evaluation loss, or the answers of that step."""

_Values: TypeAlias = Mapping[tuple[object, ...], float]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a trial of some horizon came out."""

    hyperparameters: Hyperparameters
    configuration: tuple[object, ...]
    horizon: int
    loss: float
    """Expected at the horizon where the trial was pruned; infinite where it is infeasible."""
    is_measured: bool
    """Whether the loss was measured at the horizon."""
    answers: float | None = None
    """The mean score of the best step's answers; None where none were scored."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What all rounds so far say of one configuration."""

    hyperparameters: Hyperparameters
    merit: float
    """What is to be expected at the longest horizon, lower is better: the loss, or the answer score with its
    sign changed; infinite where it is infeasible."""
    loss: float
    """The loss to be expected there, which parts equal merits."""


def outcomes(trials: Sequence[Trial], *, max_train_steps: int) -> tuple[Outcome, ...]:
    """The results of a round. Waiting, running and failed trials have none.

    A pruned trial is expected to gain what the round's complete trials gained after the step where it
    ended, in the median. Rule: this project's decision, "Search".
    """
    complete = [trial.evaluations for trial in trials if trial.state == TrialState.COMPLETE]
    found = []
    for trial in trials:
        best = best_evaluation(trial.evaluations)
        match trial.state:
            case TrialState.COMPLETE if best is not None:
                loss = best.eval_loss
            case TrialState.PRUNED if best is not None:
                loss = best.eval_loss - _gain_after(trial.evaluations[-1].step, complete)
            case TrialState.INFEASIBLE:
                loss = math.inf
            case _:
                continue
        is_measured = trial.state == TrialState.COMPLETE
        answers = trial.answer_score.mean if trial.answer_score is not None else None
        found.append(
            Outcome(trial.hyperparameters, configuration(trial), max_train_steps, loss, is_measured, answers)
        )
    return tuple(found)


def lessons(found: Sequence[Outcome], *, objective: Objective = "loss") -> tuple[Lesson, ...]:
    """One lesson for each configuration, in the order in which they were first tried.

    `found` are the outcomes of one workload's rounds, oldest first. A configuration speaks by its longest
    run. Values of different horizons are not compared as they are: each is lowered by what the
    configurations known at both horizons gained, in the median. Where answers are the objective, what has
    answered nothing teaches nothing, unless it is infeasible. Rule: this project's decision, "Search".
    """
    if objective == "answers":
        found = [outcome for outcome in found if outcome.answers is not None or math.isinf(outcome.loss)]
    speaking: dict[tuple[object, ...], Outcome] = {}
    for outcome in found:
        known = speaking.get(outcome.configuration)
        if known is None or outcome.horizon >= known.horizon:
            speaking[outcome.configuration] = outcome
    value = _loss if objective == "loss" else _answers_to_minimise
    gains, gains_of_loss = _gains_to_the_longest(found, value), _gains_to_the_longest(found, _loss)
    return tuple(
        Lesson(o.hyperparameters, value(o) - gains[o.horizon], o.loss - gains_of_loss[o.horizon])
        for o in speaking.values()
    )


def _loss(outcome: Outcome) -> float:
    return outcome.loss


def _answers_to_minimise(outcome: Outcome) -> float:
    return math.inf if outcome.answers is None else -outcome.answers


def _gain_after(step: int, curves: Sequence[Sequence[Evaluation]]) -> float:
    gains = []
    for curve in curves:
        until = best_evaluation(evaluation for evaluation in curve if evaluation.step <= step)
        best = best_evaluation(curve)
        if until is not None and best is not None:
            gains.append(until.eval_loss - best.eval_loss)
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
    """The median of what is known at both horizons; without any, from the one's best to the other's."""
    both = [shorter[name] - longer[name] for name in shorter if name in longer]
    if both:
        return median(both)
    return min(shorter.values()) - min(longer.values()) if shorter and longer else 0.0
