"""At which bounds of the search space the best values lie, and when a bound makes the horizon unreadable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tuner.methods.hyperparameters import Tier
from tuner.playbook.results import RoundResults
from tuner.playbook.selection import distinct, ranked_by_loss
from tuner.records import Choices, Dimension, Range, Space, Trial, TrialState, Value, searched

BOUNDARY_SHARE = 0.05
"""Share of a range that counts as its bound."""
MIN_LISTED = 3
"""A list of fewer values has no inside that could have been better."""
MIN_RATES_IN_ORDER = 3
"""Learning rates in order, the highest the best, from which on a higher one may be better still."""
MAX_WIDENINGS = 2
"""How often a study keeps its horizon for higher learning rates."""
WIDENING = 10.0
"""Factor by which a logarithmic range is widened at an edge."""
_RATE = "learning_rate"


@dataclass(frozen=True, slots=True)
class Edge:
    """A bound of a searched hyperparameter at which the best trial lies."""

    name: str
    side: Literal["lower", "upper"]
    value: float
    """The best trial's."""
    bound: float


def edges(results: RoundResults, best: Trial) -> tuple[Edge, ...]:
    """Return the bounds at which the best trial lies, in the order of the search space.

    Of a range its outer 5%, of a list of three numbers or more its first or last. Not at 0, nor at a limit of
    the hyperparameter; not the upper bound of a learning rate above which trials diverged; not of what
    promotion keeps (batch size, seed). Rule: Deep Learning Tuning Playbook, "Identifying bad search space
    boundaries".
    """
    found = (_edge(name, d, best.hyperparameters.get(name)) for name, d in searched(results.space).items())
    return tuple(
        edge
        for edge in found
        if edge is not None
        and results.tier_of(edge.name) != Tier.KEPT
        and edge.bound != 0
        and not _is_limit(results, edge)
        and not (edge.name == _RATE and edge.side == "upper" and diverged_above(results, edge.value))
    )


def rates_may_be_too_small(results: RoundResults, best: Trial) -> bool:
    """Return whether a learning rate above all that were tried may be better.

    So it may where the best lies at the upper bound, or is the highest of at least three tried, the next two
    in order behind it, unless a trial with a higher rate diverged. Every run then looks too short or flat.
    Rule: Deep Learning Tuning Playbook, "Algorithm for picking an initial candidate for max_train_steps":
    misleading search spaces may cause an incorrect conclusion; the test is this project's decision.
    """
    rate = number(best.hyperparameters.get(_RATE))
    if rate is None or _RATE not in searched(results.space) or diverged_above(results, rate):
        return False
    at_bound = any(edge.name == _RATE and edge.side == "upper" for edge in edges(results, best))
    return at_bound or _highest_rates_are_in_order(results, rate)


def has_few_rates(results: RoundResults) -> bool:
    """Return whether learning rates are searched and too few were tried to be in an order.

    Rule: this project's decision, "An edge comes first".
    """
    tried = {number(trial.hyperparameters.get(_RATE)) for trial in results.results}
    return _RATE in searched(results.space) and len(tried) < MIN_RATES_IN_ORDER


def num_widenings(results: RoundResults, earlier: Sequence[RoundResults]) -> int:
    """Return how often the study kept its horizon and raised its highest learning rate, up to this round.

    `earlier` are oldest first; those of another workload do not count. Rule: this project's decision, "An
    edge comes first".
    """
    rounds = [*(other for other in earlier if other.workload == results.workload), results]
    highest = [(r.max_train_steps, _highest(r.space)) for r in rounds]
    return sum(
        before[0] == after[0]
        and before[1] is not None
        and after[1] is not None
        # What is written has two digits.
        and after[1] >= 0.9 * WIDENING * before[1]
        for before, after in pairwise(highest)
    )


def diverged_above(results: RoundResults, rate: float) -> int:
    """Return how many trials with a higher learning rate were infeasible.

    Rule: this project's decision, "unstable_edge".
    """
    infeasible = (t for t in results.results if t.state == TrialState.INFEASIBLE)
    rates = (number(trial.hyperparameters.get(_RATE)) for trial in infeasible)
    return sum(other > rate for other in rates if other is not None)


def position(dimension: Range, value: float) -> float:
    """Where a value lies in a range: 0 at the low bound, 1 at the high one, in logarithms where log.

    Rule: Deep Learning Tuning Playbook, "Identifying bad search space boundaries".
    """
    if not dimension.log:
        return (value - dimension.low) / (dimension.high - dimension.low)
    if value <= 0:
        return 0.0
    return math.log(value / dimension.low) / math.log(dimension.high / dimension.low)


def number(value: Value | None) -> float | None:
    """The value as a number, None for what is not one. Rule: this project's decision: true is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def listed_numbers(dimension: Dimension) -> list[float]:
    """Return the values of a list of numbers in rising order; nothing for other dimensions.

    Rule: this project's decision: the order of the file has no meaning.
    """
    if not isinstance(dimension, Choices):
        return []
    known = [known for value in dimension.values if (known := number(value)) is not None]
    return sorted(known) if len(known) == len(dimension.values) else []


def _edge(name: str, dimension: Choices | Range, raw: Value | None) -> Edge | None:
    value = number(raw)
    if value is None:
        return None
    if isinstance(dimension, Range):
        at = position(dimension, value)
        if at <= BOUNDARY_SHARE:
            return Edge(name, "lower", value, dimension.low)
        return Edge(name, "upper", value, dimension.high) if at >= 1 - BOUNDARY_SHARE else None
    values = listed_numbers(dimension)
    if len(values) < MIN_LISTED:
        return None
    if value <= values[0]:
        return Edge(name, "lower", value, values[0])
    return Edge(name, "upper", value, values[-1]) if value >= values[-1] else None


def _is_limit(results: RoundResults, edge: Edge) -> bool:
    lowest, highest = results.limits.get(edge.name, (None, None))
    if edge.side == "lower":
        return lowest is not None and edge.bound <= lowest
    return highest is not None and edge.bound >= highest


def _highest_rates_are_in_order(results: RoundResults, best_rate: float) -> bool:
    """Whether the highest rates tried are, from the highest down, the best ones in order."""
    lowest_loss: dict[float, float] = {}
    for trial, best in ranked_by_loss(distinct(results.complete)):
        if (rate := number(trial.hyperparameters.get(_RATE))) is not None:
            lowest_loss.setdefault(rate, best.eval_loss)
    rates = sorted(lowest_loss, reverse=True)[:MIN_RATES_IN_ORDER]
    if len(rates) < MIN_RATES_IN_ORDER or rates[0] != best_rate:
        return False
    by_loss = sorted(lowest_loss, key=lambda rate: lowest_loss[rate])[:MIN_RATES_IN_ORDER]
    return by_loss == rates


def _highest(space: Space) -> float | None:
    dimension = space.get(_RATE)
    match dimension:
        case Range(high=high):
            return high
        case Choices():
            return max(listed_numbers(dimension), default=None)
        case _:
            return None
