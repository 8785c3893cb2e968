"""Which step of a trial, and which trials of a round, count."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from operator import attrgetter
from typing import TypeAlias

from tuner.methods.table import counting
from tuner.playbook.noise import (
    BY_VALUE,
    MAX_LOSS,
    SIGNIFICANT,
    Scale,
    difference_error,
    largest_differences,
    measured,
    significant_among,
    smoothed_cost,
)
from tuner.records import Evaluation, Trial, TrialState, Value

ByCurve: TypeAlias = Sequence[tuple[Trial, Evaluation]]
"""Complete trials with their best evaluations, as `ranked_by_curve` orders them."""
MIN_LEADING = 5
"""The smallest number of leading trials, if there are as many."""


def best_evaluation(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """Return the best evaluation by the objective; the earlier of equals; None if none is finite.

    Rule: Deep Learning Tuning Playbook, "Saving checkpoints and retrospectively selecting the best
    checkpoint": run to the fixed horizon, then choose among all.
    """
    best, lowest = None, math.inf
    for evaluation in evaluations:
        cost = evaluation.cost
        if cost > lowest or not abs(cost) <= MAX_LOSS:
            continue
        if best is None or cost < lowest or evaluation.step < best.step:
            best, lowest = evaluation, cost
    return best


def settled_step(evaluations: Sequence[Evaluation]) -> int | None:
    """Return the earliest step within one standard error of the best; None without a finite loss.

    The standard error is that of the paired difference to the best; if it is unknown, the best step itself is
    returned. Rule: this project's decision, "settled_step": when the trial was done, judging by the
    evaluation.
    """
    return settled_steps([evaluations])[0]


_CURVES_AT_ONCE = 32
"""Fewer, or more than a processor's cache holds, take longer."""


def settled_steps(curves: Sequence[Sequence[Evaluation]]) -> list[int | None]:
    """Return the `settled_step` of each curve, in half the time that one by one takes.

    Rule: as for `settled_step`.
    """
    found: list[int | None] = []
    for first in range(0, len(curves), _CURVES_AT_ONCE):
        part = [sorted(measured(c), key=attrgetter("step")) for c in curves[first : first + _CURVES_AT_ONCE]]
        bests = [best_evaluation(by_step) for by_step in part]
        pairs = [(by_step, best) for by_step, best in zip(part, bests, strict=True) if best is not None]
        bounds = iter(largest_differences(pairs))
        found += [
            None if best is None else _settled(by_step, best, list(islice(bounds, len(by_step))))
            for by_step, best in zip(part, bests, strict=True)
        ]
    return found


def _settled(by_step: Sequence[Evaluation], best: Evaluation, bounds: Sequence[float]) -> int:
    lowest = best.cost
    return next(
        evaluation.step
        for evaluation, bound in zip(by_step, bounds, strict=True)
        if evaluation is best
        or (
            (worse := evaluation.cost - lowest) <= bound
            and worse <= (difference_error(by_step, evaluation, best) or 0.0)
        )
    )


@dataclass(frozen=True, slots=True)
class LeadingTrial:
    """A leading trial and the position of its best step."""

    trial: Trial
    best: Evaluation
    fraction: float
    """best.step / max_train_steps."""

    @property
    def settled_step(self) -> int:
        """Return the trial's `settled_step`."""
        return settled_step(self.trial.evaluations) or 0


def ranked(trials: Iterable[Trial]) -> tuple[tuple[Trial, Evaluation], ...]:
    """Return the complete trials with a finite best evaluation, by the round's objective, best first.

    The objective is the trial's own value if it has one per trial, ties by the curve; otherwise the best
    evaluation's; ties by number. Infeasible, pruned and failed trials are never among them, whatever they
    reached before. Rule: this project's decision, "Infeasible".
    """
    return tuple(sorted(ranked_by_curve(trials), key=lambda pair: -(trial_score(pair[0]) or 0.0)))


def ranked_by_curve(trials: Iterable[Trial]) -> tuple[tuple[Trial, Evaluation], ...]:
    """Rank by the best evaluations, whatever the objective: readings of the horizon rest on curves.

    Of an objective that has one value for each trial these are the losses.
    Rule: this project's decision, "The best step of a trial".
    """
    found = [
        (trial, best)
        for trial in trials
        if trial.state == TrialState.COMPLETE and (best := best_evaluation(trial.evaluations)) is not None
    ]
    return tuple(sorted(found, key=lambda pair: (pair[1].cost, pair[0].number)))


def trial_score(trial: Trial) -> float | None:
    """Return the value of a per-trial objective, higher is better; None if evaluations rank the trial.

    Rule: this project's decision, "The best step of a trial".
    """
    score = trial.answer_score
    return score.mean if score is not None and score.is_objective else None


def objective_value(trial: Trial) -> float | None:
    """Return what a trial came to by its round's objective, as Optuna is told; None unless it is complete.

    Rule: this project's decision, "The best step of a trial".
    """
    if trial.state != TrialState.COMPLETE:
        return None
    score, best = trial_score(trial), best_evaluation(trial.evaluations)
    return best.value if score is None and best is not None else score


def scale_of(trials: Iterable[Trial], *, by_curve: ByCurve | None = None) -> Scale | None:
    """Return what differences of the objective are relative to, in a round of these trials.

    That is the value itself, as of a loss; of a metric that is maximised or has an upper bound it is what the
    best trial gained over the base model. None where nothing was gained, or the base model's value is not
    known. Rule: this project's decision, "gain".
    """
    order = ranked_by_curve(trials) if by_curve is None else by_curve
    trial, best = next(iter(order), (None, None))
    if trial is None or best is None or best.objective is None:
        return BY_VALUE
    if not best.objective.is_relative_to_gained:
        return BY_VALUE
    base = base_or_first(trial.evaluations)
    return Scale(base.cost - best.cost) if base is not None and base.cost > best.cost else None


def base_or_first(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the base model's evaluation; where there is none, the first finite one, which stands for it.

    Rule: this project's decision, "Leading trials".
    """
    return next(iter(measured(evaluations)), None)


def beats_the_base(trial: Trial) -> bool:
    """Return whether a trial became better than the base model by more than two standard errors.

    It must do so at its best step, and on the smoothed curve there. The best of many evaluations is low
    partly by luck, which it must exceed too; the changes from one evaluation to the next estimate that luck,
    since the choice of examples is the same for all. Where the base model was not evaluated, the first
    evaluation stands for it; if no standard error is known, any better step counts. Rule: this project's
    decision, "Leading trials".
    """
    finite = measured(trial.evaluations)
    base, best = base_or_first(finite), best_evaluation(finite)
    if base is None or best is None:
        return False
    if len(finite) == 1 and best.step > 0:
        return True
    error = difference_error(finite, base, best) or 0.0
    later = [e.cost for e in finite if e.step > 0]
    luck = significant_among(len(later)) * min(error, _mean_change(later, default=error))
    if best.step == base.step or base.cost - best.cost <= max(SIGNIFICANT * error, luck):
        return False
    return base.cost - smoothed_cost(finite, best.step) > SIGNIFICANT * error


def _mean_change(losses: Sequence[float], *, default: float) -> float:
    """Return the root mean square of the changes from one loss to the next, of at least three."""
    changes = [later - sooner for sooner, later in pairwise(losses)]
    return math.sqrt(math.fsum(c * c for c in changes) / len(changes)) if len(changes) > 1 else default


def may_be_carried_over(trial: Trial) -> bool:
    """Return whether a complete trial is worth continuing because it beat the base model.

    A per-trial objective decides alone, since the base model has no value of it. Rule: this project's
    decision, "The next round".
    """
    return trial_score(trial) is not None or beats_the_base(trial)


def distinct(trials: Iterable[Trial]) -> Iterator[Trial]:
    """Yield the first trial of each configuration and seed: copies are no further evidence.

    Rule: this project's decision, "Leading trials".
    """
    seen: set[tuple[tuple[str, ...], tuple[Value, ...]]] = set()
    for trial in trials:
        own, known = counting(trial.hyperparameters), len(seen)
        names = _in_order(tuple(own))
        seen.add((names, tuple([own[name] for name in names])))
        if len(seen) > known:
            yield trial


@lru_cache(maxsize=256)
def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """Sort names; nearly all trials of a round have the same."""
    return tuple(sorted(names))


def leading_trials(
    trials: Iterable[Trial], max_train_steps: int, *, by_curve: ByCurve | None = None
) -> tuple[LeadingTrial, ...]:
    """Return the best five, or a quarter if that is more, of the trials that beat the base model, best first.

    By their curves, without duplicates; `by_curve` is `ranked_by_curve(trials)` where it is known. Rule: Deep
    Learning Tuning Playbook, "Deciding how long to train when training is not compute-bound", reads the best
    steps of a round's trials; reading only the leading ones is this project's decision.
    """
    order = ranked_by_curve(trials) if by_curve is None else by_curve
    complete = tuple(distinct(trial for trial, _ in order))
    learned = (trial for trial in complete if beats_the_base(trial))
    # Trials ranked after the leading ones need not be judged.
    return _leading(islice(learned, num_leading(len(complete))), order, max_train_steps)


def best_whether_or_not_they_learned(by_curve: ByCurve, max_train_steps: int) -> tuple[LeadingTrial, ...]:
    """Return as many of the best trials as could lead: curves of trials that learned nothing reveal bugs too.

    Rule: this project's decision, "Leading trials".
    """
    complete = tuple(distinct(trial for trial, _ in by_curve))
    return _leading(complete[: num_leading(len(complete))], by_curve, max_train_steps)


def _leading(trials: Iterable[Trial], by_curve: ByCurve, max_train_steps: int) -> tuple[LeadingTrial, ...]:
    best_of = {trial.number: best for trial, best in by_curve}
    return tuple(
        LeadingTrial(trial, best, best.step / max_train_steps)
        for trial in trials
        for best in [best_of[trial.number]]
    )


def num_leading(num_complete: int) -> int:
    """Return how many of `num_complete` trials are leading.

    Rule: this project's decision, "Leading trials": max(5, a quarter).
    """
    return min(num_complete, max(MIN_LEADING, math.ceil(num_complete / 4)))
