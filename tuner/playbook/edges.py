"""Which bounds of the search space the best values lie at, and when a bound hides the right horizon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from tuner.methods.hyperparameters import Tier
from tuner.playbook.results import RoundResults
from tuner.playbook.selection import best_evaluation, distinct, ranked_by_curve
from tuner.records import Choices, Dimension, Range, Space, Trial, TrialState, Value, searched

BOUNDARY_SHARE = 0.05
"""Share of a range, at each end, that counts as its bound."""
MIN_LISTED = 3
"""A list of fewer values has no inner value that could have been better."""
MIN_RATES_IN_ORDER = 3
"""Number of highest learning rates, ordered from best to worst, after which a higher one may be better."""
MAX_WIDENINGS = 2
"""How often a study keeps its horizon to try higher learning rates."""
WIDENING = 10.0
"""Factor by which a logarithmic range is widened at a bound."""
_RATE = "learning_rate"


@dataclass(frozen=True, slots=True)
class Edge:
    """A bound of a searched hyperparameter at which the best trial lies."""

    name: str
    side: Literal["lower", "upper"]
    value: float
    """The best trial's value."""
    bound: float


def edges(results: RoundResults, best: Trial) -> tuple[Edge, ...]:
    """Return the bounds at which the best trial lies, in the order of the search space.

    The bound of a range is its outer 5%, that of a list of three numbers or more its first or last value.
    Excluded are 0, a limit of the hyperparameter, the upper bound of a learning rate above which trials
    diverged, and what promotion keeps (batch size, seed). Rule: Deep Learning Tuning Playbook, "Identifying
    bad search space boundaries".
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

    This is so if the best one lies at the upper bound, or is the highest of at least three with the next two
    following in order, unless a trial with a higher rate diverged. Every run then looks too short or flat.
    Rule: Deep Learning Tuning Playbook, "Algorithm for picking an initial candidate for max_train_steps":
    misleading search spaces may cause an incorrect conclusion; the test is this project's decision.
    """
    rate = number(best.hyperparameters.get(_RATE))
    if rate is None or _RATE not in searched(results.space) or diverged_above(results, rate):
        return False
    at_bound = any(edge.name == _RATE and edge.side == "upper" for edge in edges(results, best))
    return at_bound or _highest_rates_are_in_order(results, rate)


def has_few_rates(results: RoundResults) -> bool:
    """Return whether learning rates are searched, but too few were tried to show a trend.

    Rule: this project's decision, "An edge comes first".
    """
    tried = {number(trial.hyperparameters.get(_RATE)) for trial in results.results}
    return _RATE in searched(results.space) and len(tried) < MIN_RATES_IN_ORDER


def num_widenings(results: RoundResults, earlier: Sequence[RoundResults]) -> int:
    """Return how often the study kept its horizon and raised its highest learning rate, up to this round.

    `earlier` is oldest first; rounds of another workload do not count. Rule: this project's decision, "An
    edge comes first".
    """
    rounds = [*(other for other in earlier if other.workload == results.workload), results]
    highest = [(r.max_train_steps, _highest(r.space)) for r in rounds]
    return sum(
        before[0] == after[0]
        and before[1] is not None
        and after[1] is not None
        # Written bounds have two digits.
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
    """Return where a value lies in a range, from 0 at the low bound to 1 at the high one, on its own scale.

    Rule: Deep Learning Tuning Playbook, "Identifying bad search space boundaries".
    """
    if not dimension.log:
        return (value - dimension.low) / (dimension.high - dimension.low)
    if value <= 0:
        return 0.0
    return math.log(value / dimension.low) / math.log(dimension.high / dimension.low)


def number(value: Value | None) -> float | None:
    """Return the value as a number; None if it is not one. Rule: this project's decision: true is not a
    number.
    """
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def listed_numbers(dimension: Dimension) -> list[float]:
    """Return the values of a list of numbers in rising order; empty for other dimensions.

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
    """Return whether the highest rates tried are the best ones, in order from the highest down."""
    higher = (t for t in results.complete if (number(t.hyperparameters.get(_RATE)) or best_rate) > best_rate)
    if any(best_evaluation(trial.evaluations) is not None for trial in distinct(higher)):
        return False
    lowest_loss: dict[float, float] = {}
    for trial, best in ranked_by_curve(distinct(results.complete)):
        if (rate := number(trial.hyperparameters.get(_RATE))) is not None:
            lowest_loss.setdefault(rate, best.cost)
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
