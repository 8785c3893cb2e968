"""Which trials end before their horizon: those that diverge and those that a pruner stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal, TypeAlias

from tuner.methods.schedules import warmup_length
from tuner.playbook.schedule import evaluation_steps
from tuner.playbook.selection import best_evaluation
from tuner.records import LOSS, Direction, Evaluation, Objective, Trial, TrialState

PATIENCE = 3
"""Consecutive evaluations above the limit that make a trial infeasible."""


def divergence_limit(base_loss: float, vocabulary_size: int) -> float:
    """Return the loss above which a trial has diverged, in nats per token.

    min(2 L0, max((L0 + ln V) / 2, 1.1 L0)), with L0 the base model's loss and ln V that of a uniform guess
    among V tokens: half-way between the two, limited to 1.1 to 2 times L0. Rule: this project's decision,
    "Infeasible".
    """
    half_way = (base_loss + math.log(vocabulary_size)) / 2
    return min(2 * base_loss, max(half_way, 1.1 * base_loss))


def is_diverged(evaluations: Sequence[Evaluation], vocabulary_size: int) -> str | None:
    """Return why a trial with these evaluations is infeasible; None if it is not.

    `evaluations` are by step, the first one at step 0. A trial is infeasible if an evaluation loss is not
    finite, or three in a row are above `divergence_limit`, whatever comes later. Rule: this project's
    decision, "Infeasible".
    """
    for evaluation in evaluations:
        if not math.isfinite(evaluation.eval_loss):
            return f"evaluation loss is {evaluation.eval_loss} at step {evaluation.step}"
    if not evaluations:
        return None
    base_loss = evaluations[0].eval_loss
    limit = divergence_limit(base_loss, vocabulary_size)
    in_a_row = 0
    for evaluation in evaluations:
        in_a_row = in_a_row + 1 if evaluation.eval_loss > limit else 0
        if in_a_row == PATIENCE:
            return (
                f"diverged: evaluation loss {evaluation.eval_loss:.3f} at step {evaluation.step}, above "
                f"{limit:.3f} for {PATIENCE} evaluations in a row (the base model has {base_loss:.3f})"
            )
    return None


Pruner: TypeAlias = Literal["none", "median", "halving"]

REDUCTION = 3
"""One in this many of the trials that reached a rung continues; each rung is this many times the last."""
NUM_RUNGS = 2
"""Number of rungs before the horizon: at a ninth and at a third of it."""
MIN_COMPLETE = 5
"""Complete trials needed before there is a median to compare with."""


def reason_to_prune(
    trial: Trial,
    others: Sequence[Trial],
    *,
    pruner: Pruner,
    max_train_steps: int,
    evaluate_every: int,
) -> str | None:
    """Return why a trial is to end at its latest evaluation; None if it continues.

    A function of facts, so the decision is the same when asked again. Schedule and horizon stay unchanged.
    Nothing is decided before the warmup has ended, at the horizon, at inherited steps, or if a loss that is
    not finite makes the trial infeasible. `median`: the best evaluation so far, by the objective, is worse
    than the median of what the complete trials had up to that step (Golovin et al., "Google Vizier", 2017).
    `halving`: it is not among the best third of the trials that reached the rung (Li et al., "A System for
    Massively Parallel Hyperparameter Tuning", 2020). Rule: this project's decision, "run.pruner".
    """
    if pruner == "none" or not trial.evaluations or not math.isfinite(trial.evaluations[-1].eval_loss):
        return None
    step = trial.evaluations[-1].step
    inherited = trial.continues.step if trial.continues else 0
    if step <= max(inherited, warmup_length(trial.hyperparameters)) or step >= max_train_steps:
        return None
    own, objective = _best_until(trial, step), trial.evaluations[-1].objective or LOSS
    peers = [other for other in others if other.number != trial.number]
    match pruner:
        case "median":
            return _behind_the_median(own, peers, step, objective)
        case "halving" if step in rungs(max_train_steps, evaluate_every=evaluate_every):
            return _behind_on_the_rung(own, peers, step, objective)
        case _:
            return None


def rungs(max_train_steps: int, *, evaluate_every: int) -> tuple[int, ...]:
    """Return the evaluation steps at which `halving` compares: the first ones at or after T/9 and T/3.

    Rule: this project's decision, "run.pruner": successive halving by rungs within the fixed horizon.
    """
    planned = [s for s in evaluation_steps(max_train_steps, evaluate_every) if 0 < s < max_train_steps]
    wanted = [max_train_steps / REDUCTION**place for place in range(NUM_RUNGS, 0, -1)]
    found = (next((step for step in planned if step >= at), None) for at in wanted)
    return tuple(dict.fromkeys(step for step in found if step is not None))


def _behind_the_median(own: float, peers: Sequence[Trial], step: int, objective: Objective) -> str | None:
    complete = [_best_until(peer, step) for peer in peers if peer.state == TrialState.COMPLETE]
    if len(complete) < MIN_COMPLETE or not own > (middle := median(complete)):
        return None
    side = "above" if objective.direction == Direction.MINIMIZE else "below"
    best, typical = _apart(objective.cost(own), objective.cost(middle))
    return (
        f"its best {objective.noun} up to step {step}, {best}, is {side} the median of {len(complete)} "
        f"trials, {typical}"
    )


def _behind_on_the_rung(own: float, peers: Sequence[Trial], step: int, objective: Objective) -> str | None:
    there = [_best_until(peer, step) for peer in peers if any(e.step == step for e in peer.evaluations)]
    places = max(1, (len(there) + 1) // REDUCTION)
    if sum(cost < own for cost in there) < places:
        return None
    best = f"its best {objective.noun} up to step {step}, {objective.cost(own):.4f}"
    return f"{best}, is not among the best {places} of {len(there) + 1} trials"


def _apart(one: float, other: float) -> tuple[str, str]:
    """Return two different numbers with four decimals, or as many more as tell them apart."""
    for decimals in range(4, 17):
        if (shown := f"{one:.{decimals}f}") != (beside := f"{other:.{decimals}f}"):
            return shown, beside
    return repr(one), repr(other)


def _best_until(trial: Trial, step: int) -> float:
    best = best_evaluation(evaluation for evaluation in trial.evaluations if evaluation.step <= step)
    return math.inf if best is None else best.cost
