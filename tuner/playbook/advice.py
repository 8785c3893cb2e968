"""What a sampler may learn from: trials of this round and of earlier ones, made comparable over lengths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TypeAlias

from tuner.playbook.gain import configuration
from tuner.playbook.selection import best_evaluation
from tuner.records import Evaluation, Hyperparameters, Trial, TrialState

_Losses: TypeAlias = Mapping[tuple[object, ...], float]


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


@dataclass(frozen=True, slots=True)
class Lesson:
    """What all rounds so far say of one configuration."""

    hyperparameters: Hyperparameters
    merit: float
    """The loss to be expected at the longest horizon; infinite where it is infeasible."""


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
        found.append(Outcome(trial.hyperparameters, configuration(trial), max_train_steps, loss, is_measured))
    return tuple(found)


def lessons(found: Sequence[Outcome]) -> tuple[Lesson, ...]:
    """One lesson for each configuration, in the order in which they were first tried.

    `found` are the outcomes of one workload's rounds, oldest first. A configuration speaks by its longest
    run. Losses of different horizons are not compared as they are: each is lowered by what the
    configurations known at both horizons gained, in the median. Rule: this project's decision, "Search".
    """
    speaking: dict[tuple[object, ...], Outcome] = {}
    for outcome in found:
        known = speaking.get(outcome.configuration)
        if known is None or outcome.horizon >= known.horizon:
            speaking[outcome.configuration] = outcome
    gains = _gains_to_the_longest(found)
    return tuple(Lesson(o.hyperparameters, o.loss - gains[o.horizon]) for o in speaking.values())


def _gain_after(step: int, curves: Sequence[Sequence[Evaluation]]) -> float:
    gains = []
    for curve in curves:
        until = best_evaluation(evaluation for evaluation in curve if evaluation.step <= step)
        best = best_evaluation(curve)
        if until is not None and best is not None:
            gains.append(until.eval_loss - best.eval_loss)
    return median(gains) if gains else 0.0


def _gains_to_the_longest(found: Sequence[Outcome]) -> dict[int, float]:
    losses: dict[int, dict[tuple[object, ...], float]] = {outcome.horizon: {} for outcome in found}
    for outcome in found:
        if outcome.is_measured:
            losses[outcome.horizon][outcome.configuration] = outcome.loss
    horizons = sorted(losses)
    gains = dict.fromkeys(horizons, 0.0)
    for shorter, longer in reversed(list(pairwise(horizons))):
        gains[shorter] = gains[longer] + _gain_between(losses[shorter], losses[longer])
    return gains


def _gain_between(shorter: _Losses, longer: _Losses) -> float:
    """The median of what is known at both horizons; without any, from the one's best to the other's."""
    both = [shorter[name] - longer[name] for name in shorter if name in longer]
    if both:
        return median(both)
    return min(shorter.values()) - min(longer.values()) if shorter and longer else 0.0
