"""Which trials a later round took over from an earlier one, and whether their order held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.playbook.gain import same_configuration
from tuner.playbook.results import RoundResults
from tuner.playbook.selection import best_evaluation
from tuner.records import Trial, TrialState

MIN_RANKED = 3
"""Of two trials any order agrees with one of the two that there are."""


@dataclass(frozen=True, slots=True)
class CarriedOver:
    """Trials of a round that are configurations of an earlier one, whether they went on or began afresh."""

    from_round: str
    trials: tuple[tuple[int, int], ...]
    """Number in the earlier round and number in the later one, by the latter."""
    compared: tuple[tuple[int, int], ...]
    """Those complete in both rounds, the earlier round's best first.

    None where horizon and workload are the same: the later loss is then the earlier one.
    """
    rank_correlation: float | None
    """Spearman's, of the best losses of `compared`; None for fewer than `MIN_RANKED`, or where all tie."""
    place_of_the_best: int | None
    """Where the earlier round's best of `compared` stands among them in the later one, from 1."""


def carried_over(results: RoundResults, earlier: Sequence[RoundResults]) -> CarriedOver | None:
    """What a round took over from the latest of the earlier rounds that it took anything from.

    `earlier` are oldest first. Losses of different horizons are not compared, only their order is: a
    short round's conclusions hold as far as it does. Rule: Deep Learning Tuning Playbook, "Deciding
    how long to train when training is compute-bound" (what transfers to longer runs).
    """
    for other in reversed(earlier):
        pairs = [(twin, trial) for trial in results.trials if (twin := _twin(trial, other)) is not None]
        if pairs:
            return _compared(results, other, sorted(pairs, key=lambda pair: pair[1].number))
    return None


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, in [-1, 1]; equal values share the mean of their ranks.

    None for fewer than `MIN_RANKED` values, or where all of one side are equal. Rule: this project's
    decision.
    """
    if len(one) < MIN_RANKED or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(np.clip(np.corrcoef(_ranks(one), _ranks(other))[0, 1], -1.0, 1.0))


def _compared(
    results: RoundResults, other: RoundResults, pairs: Sequence[tuple[Trial, Trial]]
) -> CarriedOver:
    is_new = (results.max_train_steps, results.workload) != (other.max_train_steps, other.workload)
    losses = {
        (twin.number, trial.number): (before, after)
        for twin, trial in pairs
        if is_new and (before := _loss(twin)) is not None and (after := _loss(trial)) is not None
    }
    order = tuple(sorted(losses, key=lambda pair: (losses[pair][0], pair)))
    now = [losses[pair][1] for pair in order]
    return CarriedOver(
        from_round=other.name,
        trials=tuple((twin.number, trial.number) for twin, trial in pairs),
        compared=order,
        rank_correlation=rank_correlation([losses[pair][0] for pair in order], now),
        place_of_the_best=1 + sum(loss < now[0] for loss in now) if now else None,
    )


def _twin(trial: Trial, other: RoundResults) -> Trial | None:
    """The trial of another round that this one is: the one it went on from, or one that is the same."""
    if trial.state == TrialState.FAILED:
        return None
    if trial.continues is not None and trial.continues.round == other.name:
        return other.trial(trial.continues.trial)
    same = [t for t in other.trials if t.state != TrialState.FAILED and same_configuration(t, trial)]
    return min(same, key=lambda t: (_loss(t) is None, t.number), default=None)


def _loss(trial: Trial) -> float | None:
    best = best_evaluation(trial.evaluations) if trial.state == TrialState.COMPLETE else None
    return None if best is None else best.eval_loss


def _ranks(values: Sequence[float]) -> np.ndarray:
    numbers = np.array(values)
    below = (numbers[:, None] > numbers[None, :]).sum(axis=1)
    equal = (numbers[:, None] == numbers[None, :]).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2)
