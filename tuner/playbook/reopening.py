"""What a longer round searches again: hyperparameters on which rounds disagree or that steps affect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tuner.methods.hyperparameters import Tier
from tuner.methods.table import HYPERPARAMETERS
from tuner.playbook.carrying import longest
from tuner.playbook.curves import FITTED_TRAIN_LOSS, train_losses
from tuner.playbook.edges import number
from tuner.playbook.gain import same_configuration
from tuner.playbook.horizon import Diagnosis
from tuner.playbook.noise import BY_VALUE, SIGNIFICANT, Scale, paired_standard_error
from tuner.playbook.reading import Reading
from tuner.playbook.results import Finding, RoundResults, Severity
from tuner.playbook.selection import best_evaluation
from tuner.records import Choices, Dimension, Fixed, Range, Space, Trial, TrialState, searched

MIN_RANKED = 3
"""Two trials are in the same order or the reverse, so their correlation means nothing."""


@dataclass(frozen=True, slots=True)
class CarriedOver:
    """Trials of a round that are configurations of an earlier one, continued or started over."""

    from_round: str
    trials: tuple[tuple[int, int], ...]
    """Pairs of the number in the earlier round and the number in the later one, by the latter."""
    compared: tuple[tuple[int, int], ...]
    """Trials complete in both rounds, the earlier round's best first.

    Empty if horizon and workload are the same: the later loss is then the earlier one."""
    rank_correlation: float | None
    """Spearman's, of the best losses of `compared`; None for fewer than `MIN_RANKED` or if all are equal."""
    place_of_the_best: int | None
    """Rank in the later round of the earlier round's best of `compared`, from 1."""


def carried_over(results: RoundResults, earlier: Sequence[RoundResults]) -> CarriedOver | None:
    """Return the trials that a round took over from the latest earlier round that it took any from.

    `earlier` is oldest first. Only rankings are compared across horizons, not losses: a short round's
    conclusions hold as far as its ranking does. Rule: Deep Learning Tuning Playbook, "Deciding how long to
    train when training is compute-bound" (what transfers to longer runs).
    """
    for other in reversed(earlier):
        pairs = [(twin, trial) for trial in results.trials if (twin := _twin(trial, other)) is not None]
        if pairs:
            return _compared(results, other, sorted(pairs, key=lambda pair: pair[1].number))
    return None


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, in [-1, 1]; equal values share the mean of their ranks.

    None for fewer than `MIN_RANKED` values, or if all of one side are equal. Rule: this project's decision.
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
    """Return the trial of another round that this one continues or repeats."""
    if trial.state == TrialState.FAILED:
        return None
    if trial.continues is not None and trial.continues.round == other.name:
        return other.trial(trial.continues.trial)
    same = [t for t in other.trials if t.state != TrialState.FAILED and same_configuration(t, trial)]
    return min(same, key=lambda t: (_loss(t) is None, t.number), default=None)


def _loss(trial: Trial) -> float | None:
    best = best_evaluation(trial.evaluations) if trial.state == TrialState.COMPLETE else None
    return None if best is None else best.cost


def _ranks(values: Sequence[float]) -> np.ndarray:
    numbers = np.array(values)
    below = (numbers[:, None] > numbers[None, :]).sum(axis=1)
    equal = (numbers[:, None] == numbers[None, :]).sum(axis=1)
    return np.asarray(below + (equal + 1) / 2)


FAR_FROM_FITTED = 4 * FITTED_TRAIN_LOSS
"""Nats per token above which the training set counts as not fitted yet."""


def remarks(
    results: RoundResults,
    reading: Reading,
    space: Space,
    incumbents: Sequence[Trial],
    earlier: Sequence[RoundResults],
) -> Iterator[str]:
    """Yield remarks on how the next round's space affects its number of steps.

    Rule: Deep Learning Tuning Playbook, "Deciding how long to train when training is not compute-bound" and
    "Deciding how long to train when training is compute-bound": more gradient noise needs more steps, a
    better tuned optimizer fewer, and regularisation helps if the training set can be fitted.
    """
    if incumbents:
        yield from _noisier_gradients(results, space, incumbents, earlier)
        yield from _other_optimizer(results, space)
        yield from _early_regularisation(reading, space, incumbents[0])


def _noisier_gradients(
    results: RoundResults, space: Space, incumbents: Sequence[Trial], earlier: Sequence[RoundResults]
) -> Iterator[str]:
    dropouts = [number(trial.hyperparameters.get("lora_dropout")) for trial in incumbents]
    known = max([_largest(results.space, "lora_dropout"), *filter(None, dropouts)])
    if (dropout := _largest(space, "lora_dropout")) > known:
        yield (
            f"lora_dropout goes up to {dropout:g}, above the {known:g} so far: gradients are noisier, so "
            "more steps may be needed."
        )
    before = _largest(earlier[-1].space, "batch_size") if earlier else 0.0
    now = _largest(space, "batch_size")
    if now < before:
        yield (
            f"The batch size went down from {before:g} to {now:g}: gradients are noisier, so more steps may "
            "be needed."
        )


def _other_optimizer(results: RoundResults, space: Space) -> Iterator[str]:
    before = results.space.get("optimizer")
    if "optimizer" in searched(space) and isinstance(before, Fixed):
        yield f"An optimizer other than {before.value} is tried: a better one may need fewer steps."


def _early_regularisation(reading: Reading, space: Space, best: Trial) -> Iterator[str]:
    names = [name for name in ("lora_dropout", "weight_decay") if name in searched(space)]
    lowest = min(train_losses(best.evaluations), default=0.0)
    if names and lowest > FAR_FROM_FITTED and reading.diagnosis != Diagnosis.OVERFITTING:
        yield (
            f"{' and '.join(names)} will probably not help yet: the training set is not fitted (train loss "
            f"{lowest:.2g}) and no trial overfits."
        )


def _largest(space: Space, name: str) -> float:
    dimension = space.get(name)
    return 0.0 if dimension is None else longest(dimension)


MIN_RANK_CORRELATION = 0.5
"""Below it the ranking of an earlier round has not held. Rankings of short and long runs agree this little at
six times the length (3,819 AlgoPerf runs), twice the largest factor between rounds."""


@dataclass(frozen=True, slots=True)
class OverturnedOrder:
    """An earlier round whose ranking of trials did not hold in a later one."""

    earlier: RoundResults
    later: str
    rank_correlation: float
    num_trials: int


def overturned_order(
    results: RoundResults, earlier: Sequence[RoundResults], *, noise: float | None = None
) -> OverturnedOrder | None:
    """Return the earlier round whose ranking of trials did not hold; None if it held or is unknown.

    At least three trials are complete in both, their rank correlation is below 0.5, and one of them is now
    significantly worse than one that ranked below it; `noise` is relative to the loss. Rule: Deep Learning
    Tuning Playbook, "Deciding how long to train when training is compute-bound" (what transfers to longer
    runs); the numbers are this project's decision.
    """
    found = carried_over(results, earlier)
    if found is None or found.rank_correlation is None or found.rank_correlation >= MIN_RANK_CORRELATION:
        return None
    order = [trial for _, number in found.compared if (trial := results.trial(number)) is not None]
    scale = results.scale or BY_VALUE
    if not any(_is_worse(one, other, noise or 0.0, scale) for one, other in combinations(order, 2)):
        return None
    before = next(other for other in reversed(earlier) if other.name == found.from_round)
    return OverturnedOrder(before, results.name, found.rank_correlation, len(found.compared))


def reopened_space(results: RoundResults, overturned: OverturnedOrder) -> dict[str, Dimension]:
    """Return the dimensions that the earlier round searched and promotion then narrowed or fixed.

    Only of tiers that might transfer or are likely to; warmup and initialisation stay. With the optimizers
    that are searched again come their own hyperparameters, as they were. Rule: this project's
    decision, "agreement".
    """
    before = overturned.earlier.space
    reopened = {
        name: before[name]
        for name, now in results.space.items()
        if results.tier_of(name) in (Tier.MIGHT, Tier.LIKELY)
        and isinstance(before.get(name), (Choices, Range))
        and before[name] != now
    }
    return reopened | {
        name: dimension
        for name, dimension in before.items()
        if name not in results.space
        and dimension.only_with is not None
        and dimension.only_with.chosen_by in reopened
        and not _is_default(name, dimension)
    }


def _is_default(name: str, dimension: Dimension) -> bool:
    row = HYPERPARAMETERS.get(name)
    return isinstance(dimension, Fixed) and row is not None and row.default == dimension.value


def reopening_findings(
    overturned: OverturnedOrder | None, reopened: Mapping[str, Dimension], *, widens_rates: bool
) -> Iterator[Finding]:
    """Yield what is searched again because an earlier ranking did not hold, or why nothing is.

    Rule: this project's decision, "agreement".
    """
    if overturned is None:
        return
    name, correlation = overturned.earlier.name, overturned.rank_correlation
    if widens_rates:
        done = "Higher learning rates are tried first, so nothing else is searched again yet."
    elif reopened:
        done = f"Searched again as in {name}: {', '.join(reopened)}. What {name} held fixed stays fixed."
    else:
        done = f"Nothing is searched again: whatever is fixed now was also fixed in {name}."
    yield Finding(
        "agreement",
        Severity.WARNING,
        f"The ranking of the {overturned.num_trials} trials carried over from {name} did not hold in "
        f"{overturned.later} (rank correlation {correlation:.2f}). {done}",
        {"rank_correlation": correlation, "trials": float(overturned.num_trials)},
    )


def _is_worse(one: Trial, other: Trial, noise: float, scale: Scale) -> bool:
    """Return whether a trial is worse than another by more than two standard errors."""
    first, second = best_evaluation(one.evaluations), best_evaluation(other.evaluations)
    if first is None or second is None:
        return False
    error = max(scale.amount(noise, of=second.cost), paired_standard_error(first, second) or 0.0)
    return first.cost - second.cost > SIGNIFICANT * error
