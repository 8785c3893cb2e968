"""Narrow, move and widen the dimensions of a search space."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Literal, TypeAlias

from tuner.playbook.edges import WIDENING, Edge, listed_numbers, number
from tuner.records import Choices, Dimension, Fixed, Range, TimesSqrtRank, Value

Limits: TypeAlias = tuple[float | None, float | None]
"""Lowest and highest allowed value of a hyperparameter; None if there is none."""

RATE_EXPONENT = -0.25
"""The best learning rate scales with this power of the horizon; published exponents are 0 to -0.32."""
RATE_FACTOR = 3.0
MARGIN = 0.25
"""Margin of a narrowed range on both sides, as a share of the leading trials' spread."""
MIN_MARGIN = 0.05
"""The smallest such margin, as a share of the old range."""
MAX_NEW_VALUES = 5
"""The most values added to a list of learning rates at once."""
MAX_LISTED = 8
"""The most steps into which a logarithmic range is divided as a list."""
DIGITS = 2
"""Significant digits of written bounds."""


def rounded(number: float, rounding: str = ROUND_HALF_EVEN) -> float:
    """Return the number with two significant digits, rounded to nearest, down or up.

    Rule: this project's decision: a written round file is there to be read.
    """
    exact = Decimal(repr(float(number)))
    if not exact:
        return 0.0
    return float(exact.quantize(Decimal((0, (1,), exact.adjusted() - DIGITS + 1)), rounding=rounding))


def moved_rate(rate: float, *, old_horizon: int, new_horizon: int) -> float:
    """Return the learning rate for another horizon: times (T2/T1)^-0.25.

    Rule: this project's decision, a proposal: the literature disagrees on the exponent (0 to -0.32).
    """
    return rate * math.pow(new_horizon / old_horizon, RATE_EXPONENT)


def rate_range(old: Range, centre: float, *, ceiling: float = math.inf) -> Range:
    """Return a third to three times the centre, but below a rate at which everything diverged.

    Rule: this project's decision, tier `might`.
    """
    high = min(centre * RATE_FACTOR, max(ceiling, centre))
    return Range(rounded(centre / RATE_FACTOR), rounded(high), log=old.log)


def narrowed(old: Dimension, values: Sequence[Value]) -> Dimension:
    """Narrow a dimension to the leading trials: a subrange, or the choices they used.

    Rule: Deep Learning Tuning Playbook, "Round 1: Many short training runs" (possibly transfers); the margins
    are this project's decision.
    """
    match old:
        case Choices():
            return as_listed(old, values)
        case Range():
            numbers = [float(v) for v in values if isinstance(v, (int, float)) and old.contains(v)]
            return _narrowed_range(old, numbers) if numbers else old
        case _:
            return old


def as_listed(old: Dimension, values: Iterable[Value]) -> Fixed | Choices:
    """Return the distinct values as one fixed value or as choices, in the old order or else sorted.

    Rule: this project's decision: a hyperparameter to be fixed on which trials disagree is a list.
    """
    distinct = list(dict.fromkeys(values))
    if len(distinct) == 1:
        return Fixed(distinct[0])
    known = list(old.values) if isinstance(old, Choices) else []
    numeric = all(isinstance(value, (int, float)) for value in distinct)
    rest = [value for value in distinct if value not in known]
    ordered = sorted(rest, key=float) if numeric else rest  # type: ignore[arg-type]
    return Choices((*(value for value in known if value in distinct), *ordered))


def widened(dimension: Dimension, values: Iterable[Value]) -> Dimension:
    """Widen a dimension to contain all the values; a fixed one on which they disagree becomes a list.

    Rule: this project's decision: every space contains all that is enqueued.
    """
    missing = [value for value in dict.fromkeys(values) if not dimension.contains(value)]
    if not missing or isinstance(dimension, TimesSqrtRank):
        return dimension
    match dimension:
        case Fixed(value=value):
            return as_listed(dimension, (value, *missing))
        case Choices(values=known):
            return _in_order(dimension, (*known, *missing))
        case Range():
            return _widened_range(dimension, missing)


def beyond_edge(old: Dimension, edge: Edge, limits: Limits) -> Dimension:
    """Widen a dimension at the bound where the best trial lies.

    A logarithmic range grows by a factor of ten, another range by its own width, a list of numbers by its
    next value; never beyond a limit of the hyperparameter. Rule: Deep Learning Tuning Playbook, "Identifying
    bad search space boundaries"; the amounts are this project's decision.
    """
    match old:
        case Range():
            return _range_beyond(old, edge.side, limits)
        case Choices():
            values = listed_numbers(old)
            following = _next_value(values if edge.side == "upper" else values[::-1])
            if not _within(following, limits) or following in values:
                return old
            return _in_order(old, (*old.values, _like(old.values[0], following)))
        case _:
            return old


def reaching(narrow: Dimension, wide: Dimension, side: Literal["lower", "upper"]) -> Dimension:
    """Extend a narrowed dimension as far as a wider one on one side.

    Rule: this project's decision, "An edge comes first": the other side stays narrow.
    """
    match narrow, wide:
        case Range(), Range():
            low = narrow.low if side == "upper" else min(narrow.low, wide.low)
            high = narrow.high if side == "lower" else max(narrow.high, wide.high)
            return Range(low, high, log=wide.log and low > 0, integer=narrow.integer and wide.integer)
        case ((Fixed() | Choices()), Choices(values=values)):
            used = (narrow.value,) if isinstance(narrow, Fixed) else narrow.values
            outermost = (max if side == "upper" else min)(listed_numbers(wide))
            return as_listed(wide, (*used, *(value for value in values if value == outermost)))
        case _:
            return narrow


def capped(dimension: Dimension, highest: float) -> Dimension:
    """Remove the values above a number; return the dimension unchanged if nothing else would be left.

    Rule: this project's decision: warmup and decay fit into the horizon.
    """
    match dimension:
        case Range(low=low, high=high) if low < highest < high:
            return replace(dimension, high=highest)
        case Choices(values=values):
            kept = [v for v in values if not isinstance(v, (int, float)) or v <= highest]
            return as_listed(dimension, kept) if kept else dimension
        case _:
            return dimension


def even(dimension: Dimension) -> Dimension:
    """Remove the odd numbers of a list; return it unchanged if nothing else would be left.

    Rule: PEFT's orthogonal initialisation is defined for even ranks only.
    """
    if not isinstance(dimension, Choices):
        return dimension
    kept = [value for value in dimension.values if not (isinstance(value, int) and value % 2)]
    return as_listed(dimension, kept) if kept else dimension


def higher_rates(old: Dimension, limits: Limits) -> Dimension:
    """Return the learning rates with ten times the upper bound and the same lower one.

    A list continues by the factor of its last two values, up to ten times the last. Rule: this project's
    decision, "An edge comes first".
    """
    _, limit = limits
    match old:
        case Range(high=high):
            wanted = rounded(high * WIDENING)
            return replace(old, high=wanted if limit is None or wanted < limit else (high + limit) / 2)
        case Choices() if values := listed_numbers(old):
            factor = values[-1] / values[-2] if len(values) > 1 and values[-2] > 0 else WIDENING
            count = round(math.log(WIDENING) / math.log(factor)) if factor < WIDENING else 1
            count = max(1, min(MAX_NEW_VALUES, count))
            following = [rounded(values[-1] * math.pow(WIDENING, (i + 1) / count)) for i in range(count)]
            return as_listed(old, (*old.values, *(value for value in following if _within(value, limits))))
        case _:
            return old


def log_spaced(old: Range) -> tuple[Value, ...]:
    """Return values of a logarithmic range about a factor of three apart, including both bounds.

    Rule: this project's decision: a range with 0 in it is searched as a list.
    """
    count = max(1, min(MAX_LISTED, round(2 * math.log10(old.high / old.low))))
    inner = (old.low * math.pow(old.high / old.low, i / count) for i in range(1, count))
    written = [old.low, *(round(v) if old.integer else rounded(v) for v in inner), old.high]
    return tuple(dict.fromkeys(int(v) if old.integer else v for v in written))


def _in_order(old: Choices, values: Sequence[Value]) -> Choices:
    """Return the values in rising order if the old ones were."""
    rose = list(old.values) == listed_numbers(old)
    return Choices(tuple(sorted(values, key=lambda value: number(value) or 0.0) if rose else values))


def _range_beyond(
    old: Range, side: Literal["lower", "upper"], limits: tuple[float | None, float | None]
) -> Range:
    lowest, highest = limits
    low, high = old.low, old.high
    if side == "upper":
        wanted = high * WIDENING if old.log else high + (high - low)
        high = wanted if highest is None or wanted < highest else (high + highest) / 2
    else:
        wanted = low - (high - low)
        low = low / WIDENING if old.log or wanted <= 0 < low else wanted
        low = low if lowest is None else max(low, lowest)
    if old.integer:
        return Range(math.floor(low), math.ceil(high), log=old.log and math.floor(low) > 0, integer=True)
    return Range(rounded(low), rounded(high) if highest is None else high, log=old.log)


def _next_value(values: Sequence[float]) -> float:
    """Return the next value of a list, by the factor of the last two if both are above 0."""
    before, last = values[-2:]
    return last * last / before if min(before, last) > 0 else last + (last - before)


def _within(value: float, limits: Limits) -> bool:
    lowest, highest = limits
    return (lowest is None or value >= lowest) and (highest is None or value < highest)


def _like(value: Value, following: float) -> Value:
    """Return the number as an int if the list has ints, else with two digits."""
    return round(following) if isinstance(value, int) else rounded(following)


def _widened_range(old: Range, missing: Sequence[Value]) -> Dimension:
    numbers = [float(v) for v in missing if isinstance(v, (int, float)) and not isinstance(v, bool)]
    is_log = old.log and min(numbers, default=old.low) > 0
    if len(numbers) < len(missing):
        raise ValueError(f"a range cannot hold {missing}")
    return Range(
        low=min(old.low, *(_bound(number, ROUND_FLOOR, integer=old.integer) for number in numbers)),
        high=max(old.high, *(_bound(number, ROUND_CEILING, integer=old.integer) for number in numbers)),
        log=is_log,
        integer=old.integer and all(number.is_integer() for number in numbers),
    )


def _narrowed_range(old: Range, numbers: Sequence[float]) -> Range:
    to, back = (math.log, math.exp) if old.log else (float, float)
    low, high = to(min(numbers)), to(max(numbers))
    margin = max(MARGIN * (high - low), MIN_MARGIN * (to(old.high) - to(old.low)))
    new_low = max(old.low, _bound(back(low - margin), ROUND_FLOOR, integer=old.integer))
    new_high = min(old.high, _bound(back(high + margin), ROUND_CEILING, integer=old.integer))
    if new_low >= new_high:
        return old
    return Range(new_low, new_high, log=old.log, integer=old.integer)


def _bound(number: float, rounding: str, *, integer: bool) -> float:
    if integer:
        return float(math.floor(number) if rounding == ROUND_FLOOR else math.ceil(number))
    return rounded(number, rounding)
