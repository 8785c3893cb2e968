"""How much the last doubling of the horizon reduced the loss, from the most reliable source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from tuner.methods.schedules import rescaled_names, warmup_length
from tuner.methods.table import counting
from tuner.playbook.noise import Scale, difference_error, is_number, measured, smoothed
from tuner.playbook.results import RoundResults
from tuner.playbook.schedule import decay_length, trunk_end
from tuner.playbook.selection import ByCurve, LeadingTrial, best_evaluation, ranked_by_curve, scale_of
from tuner.records import Evaluation, Trial

DEFAULT_RATIO = 0.7
"""Gain of a doubling divided by the gain of the one before, used if only one gain is known."""
MAX_RATIO = 0.9
"""Upper limit of that ratio: no series of gains is assumed to fall more slowly."""

WITHIN = 1.7
"""A horizon within this factor of half of another still counts as the half."""
MAX_TELLING_DECAY_SHARE = 0.4
"""On 42 Llama runs with decays up to this share, the stable phase predicted the gain within a factor 1.5 in
35; on 12 runs with decays of 60 to 90%, in 8."""
CLOSE_TO_HALF = 1.25
"""An earlier round within this factor of half the horizon makes a comparison run unnecessary."""

_ALMOST_ALL = 1 - 1e-9
"""Keeps the logarithm finite if a loss falls to nothing."""
_MOST_RISE = 700.0
"""Keeps the exponential finite if a loss explodes; a float ends at exp(709)."""


class GainSource(StrEnum):
    """How the gain was measured, the most reliable way first."""

    COMPARISON = "comparison_run"
    """A run to a shorter horizon on the same schedule."""
    STABLE_PHASE = "stable_phase"
    """The trial's own evaluations, at a rate that never depends on the horizon."""
    EARLIER_ROUND = "earlier_round"
    """The same hyperparameters in a round with another horizon and the same share of decay."""
    BEFORE_DECAY = "before_decay"
    """The evaluations before the decay begins, from half of its first step on."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Relative gain of a trial from half its horizon to the whole, with the same share of decay."""

    relative: float
    """(loss at half - loss at the whole) / loss at half; negative if the longer run was worse. If the
    objective is relative to what was gained over the base model, the difference divided by that."""
    standard_error: float | None
    """Of `relative`, over the evaluation examples; None if unknown."""
    source: GainSource
    trial: int
    from_steps: int
    """The shorter horizon it was measured at; not always exactly half."""
    to_steps: int
    ratio: float = DEFAULT_RATIO
    """Drop of log loss over the next doubling, divided by the drop over this one; in [0, 0.9]."""
    is_linear: bool = False
    """Whether the doublings are a series of differences, not of drops of a logarithm."""

    @property
    def is_of_a_doubling(self) -> bool:
        """Return whether it was measured over about one doubling, and not rescaled from another factor."""
        return abs(self.to_steps / self.from_steps - 2.0) <= 0.1

    def at(self, multiple: float) -> float:
        """Predict the gain over the last doubling of a horizon `multiple` times as long."""
        return self._relative(self._drop * math.pow(self.ratio, math.log2(multiple)))

    def to(self, multiple: float) -> float:
        """Predict the relative drop of the loss from this horizon to one `multiple` times as long.

        The next doublings are a geometric series of drops of log loss. Rule: this project's decision,
        "too_short".
        """
        doublings = math.log2(multiple)
        series = self.ratio * (1 - math.pow(self.ratio, doublings)) / (1 - self.ratio)
        return self._relative(self._drop * series)

    @property
    def _drop(self) -> float:
        """Drop over the last doubling: of the log loss, or of the objective."""
        return self.relative if self.is_linear else -math.log1p(-min(self.relative, _ALMOST_ALL))

    def _relative(self, drop: float) -> float:
        return drop if self.is_linear else _share_lost(drop)


@dataclass(frozen=True, slots=True)
class _Point:
    horizon: int
    evaluation: Evaluation
    source: GainSource

    @property
    def cost(self) -> float:
        return self.evaluation.cost


def measured_gain(
    results: RoundResults, leading: Sequence[LeadingTrial], earlier: Sequence[RoundResults] = ()
) -> Gain | None:
    """Return the gain of the last doubling from the best available source; None if there is none.

    The sources, in order: a comparison run; the stable phase of a rate that never depends on the horizon; an
    earlier round at another horizon with the same share of decay; the stable phase before a decay of at most
    40%. The best leading trial that has the source is used. Evaluations within a decay are not a source,
    because the falling rate lowers the later loss as well. Rule: this project's decision, "gain"; measured on
    131 Llama-124M runs, it predicts what a doubling brings (AUC 0.90) where the share of late best steps does
    not (0.67).
    """
    scale = results.scale
    if not leading or scale is None:
        return None
    found = [_from_horizons(results, lead, earlier, scale) for lead in leading]
    by_comparison = next((gain for gain in found if gain and gain.source == GainSource.COMPARISON), None)
    by_round = next((gain for gain in found if gain and gain.source == GainSource.EARLIER_ROUND), None)
    stable = _from_stable_phase(leading[0].trial, results.max_train_steps, scale)
    at_constant_rate = stable if stable and stable.source == GainSource.STABLE_PHASE else None
    return by_comparison or at_constant_rate or by_round or stable


def wants_comparison(
    results: RoundResults, leading: Sequence[LeadingTrial], earlier: Sequence[RoundResults] = ()
) -> bool:
    """Return whether only a comparison run would measure the best trial's last doubling well.

    This is so if its rate decays, no earlier round with the same share of decay ran it within a factor 1.25
    of half the horizon, and none of the same horizon has compared it already. Rule: this project's decision,
    "gain".
    """
    if not leading:
        return False
    best, horizon = leading[0], results.max_train_steps
    if trunk_end(best.trial.hyperparameters, horizon) == horizon or _inherited_comparisons(
        results, best, earlier
    ):
        return False
    twins = _twins_at_other_horizons(results, best, earlier)
    return not any(abs(math.log(2 * twin.horizon / horizon)) <= math.log(CLOSE_TO_HALF) for twin in twins)


def seed_spread(trials: Sequence[Trial], *, by_curve: ByCurve | None = None) -> float | None:
    """Return the standard deviation of the best value between seeds, relative to it; None without repeats.

    Relative as a gain is. Pooled over the groups of complete trials that differ only in `training_seed`.
    Rule: Deep Learning Tuning Playbook, "Understanding noise between runs" (trial variance).
    """
    order = ranked_by_curve(trials) if by_curve is None else by_curve
    is_repeated = len({trial.hyperparameters.get("training_seed") for trial, _ in order}) > 1
    if (scale := scale_of(trials, by_curve=order)) is None or not is_repeated:
        return None
    groups: dict[tuple[object, ...], dict[object, float]] = {}
    for trial, best in order:
        # Repeats of one seed say nothing about the spread.
        seeds = groups.setdefault(_identity(trial, without={"training_seed"}), {})
        seeds.setdefault(trial.hyperparameters.get("training_seed"), best.cost)
    repeated = [
        _relative_to_the_mean(np.array(list(costs.values())), scale)
        for costs in groups.values()
        if len(costs) > 1 and scale.can_compare(float(np.mean(list(costs.values()))))
    ]
    freedom = sum(len(deviations) - 1 for deviations in repeated)
    squares = sum(float((deviations**2).sum()) for deviations in repeated)
    return math.sqrt(squares / freedom) if freedom else None


def _relative_to_the_mean(costs: np.ndarray, scale: Scale) -> np.ndarray:
    mean = float(np.mean(costs))
    return costs / mean - 1.0 if scale.gained is None else (costs - mean) / scale.gained


def same_configuration(one: Trial, other: Trial) -> bool:
    """Return whether two trials of different rounds are the same configuration and seed, decay aside.

    Rule: this project's decision: the length of a decay follows the horizon and does not count.
    """
    return configuration(one) == configuration(other)


def configuration(trial: Trial) -> tuple[object, ...]:
    """Return a hashable key that trials of one configuration share across rounds.

    Rule: this project's decision, as for `same_configuration`.
    """
    return _identity(trial, without=frozenset(rescaled_names(trial.hyperparameters)))


def _identity(trial: Trial, *, without: frozenset[str] | set[str]) -> tuple[object, ...]:
    return tuple(sorted((k, v) for k, v in counting(trial.hyperparameters).items() if k not in without))


def _from_horizons(
    results: RoundResults, lead: LeadingTrial, earlier: Sequence[RoundResults], scale: Scale
) -> Gain | None:
    """Return the gain of a trial from its runs to several horizons, preferring comparison runs."""
    whole = _Point(results.max_train_steps, lead.best, GainSource.COMPARISON)
    compared = _comparisons(results, lead.trial) or _inherited_comparisons(results, lead, earlier)
    twins = list(_twins_at_other_horizons(results, lead, earlier))
    points = [*compared, *twins]
    by_comparison = _from_points(whole, points, lead.trial, scale, halves=compared)
    return by_comparison or _from_points(whole, points, lead.trial, scale)


def _comparisons(results: RoundResults, trial: Trial) -> list[_Point]:
    """Return the best evaluations of a trial's comparison runs in its own round."""
    return [
        _Point(run.max_train_steps, best, GainSource.COMPARISON)
        for run in results.branches
        if run.trial == trial.number and (best := best_evaluation(run.evaluations)) is not None
    ]


def _inherited_comparisons(
    results: RoundResults, lead: LeadingTrial, earlier: Sequence[RoundResults]
) -> list[_Point]:
    """Return those of earlier rounds of the same workload and horizon in which the trial ran unchanged.

    A round that raised its learning rates at the same horizon takes such trials over.
    """
    return [
        point
        for other in earlier
        if other.workload == results.workload and other.max_train_steps == results.max_train_steps
        for trial in other.complete
        if trial.hyperparameters == lead.trial.hyperparameters
        for point in _comparisons(other, trial)
    ]


def _twins_at_other_horizons(
    results: RoundResults, lead: LeadingTrial, earlier: Sequence[RoundResults]
) -> Iterator[_Point]:
    """Yield the trial's runs in earlier rounds to other horizons with the same share of decay."""
    for other in earlier:
        if other.workload != results.workload or other.max_train_steps == results.max_train_steps:
            continue
        twins = (
            best
            for trial, best in other.by_curve
            if same_configuration(trial, lead.trial)
            and _have_equal_shares(trial, other.max_train_steps, lead.trial, results.max_train_steps)
        )
        if (twin := next(twins, None)) is not None:
            yield _Point(other.max_train_steps, twin, GainSource.EARLIER_ROUND)


def _have_equal_shares(one: Trial, one_horizon: int, other: Trial, other_horizon: int) -> bool:
    """Return whether two runs decay over the same share of their steps, up to rounding."""
    decay, other_decay = decay_length(one.hyperparameters), decay_length(other.hyperparameters)
    rescaled = decay * other_horizon / one_horizon
    return abs(rescaled - other_decay) <= max(1.0, other_horizon / one_horizon)


def _from_stable_phase(trial: Trial, max_train_steps: int, scale: Scale) -> Gain | None:
    """Return the gain from half the stable phase to its end, as the gain of the whole run.

    It is not extrapolated to the horizon: on 42 Llama runs the gain of the stable phase was already too small
    (median predicted over real 0.77).
    """
    end = trunk_end(trial.hyperparameters, max_train_steps)
    longest_decay = MAX_TELLING_DECAY_SHARE * max_train_steps + 0.5
    if end is None or max_train_steps - end > longest_decay:
        return None
    source = GainSource.STABLE_PHASE if end == max_train_steps else GainSource.BEFORE_DECAY
    first = max(1, warmup_length(trial.hyperparameters))
    curve = smoothed([e for e in trial.evaluations if first <= e.step <= end])
    if not curve:
        return None
    *before, last = (_Point(evaluation.step, evaluation, source) for evaluation in curve)
    return _from_points(last, before, trial, scale)


def _from_points(
    whole: _Point,
    points: Sequence[_Point],
    trial: Trial,
    scale: Scale,
    *,
    halves: Sequence[_Point] | None = None,
) -> Gain | None:
    """Return the gain up to `whole` from other horizons; `halves` are preferred as its half."""
    finite = [p for p in points if is_number(p.cost) and p.horizon < whole.horizon]
    half = _nearest([p for p in halves if p in finite] if halves is not None else finite, whole.horizon / 2)
    if half is None or not is_number(whole.cost) or not scale.can_compare(half.cost, whole.cost):
        return None
    error = _error(trial, half, whole)
    last = _last_doubling_share(math.log2(whole.horizon / half.horizon))
    drop, is_linear = last * scale.drop(half.cost, whole.cost), scale.gained is not None
    return Gain(
        relative=drop if is_linear else _share_lost(drop),
        standard_error=None if error is None else scale.share(last * error, of=half.cost),
        source=half.source,
        trial=trial.number,
        from_steps=half.horizon,
        to_steps=whole.horizon,
        ratio=_ratio_of_doublings(finite, half, whole, scale),
        is_linear=is_linear,
    )


def _share_lost(drop: float) -> float:
    """Return the share of a loss that a fall of its logarithm takes away; negative for a rise."""
    return -math.expm1(min(-drop, _MOST_RISE))


def _error(trial: Trial, half: _Point, whole: _Point) -> float | None:
    """Return the standard error of the difference between two horizons.

    If both share one best evaluation, which the shorter run passed on, the later steps did not improve it.
    The uncertainty is then that of the difference between it and the last evaluation.
    """
    if (half.evaluation.step, half.cost) != (whole.evaluation.step, whole.cost):
        return difference_error(trial.evaluations, half.evaluation, whole.evaluation)
    last = max(measured(trial.evaluations), key=lambda evaluation: evaluation.step)
    return difference_error(trial.evaluations, last, whole.evaluation) or None


def _nearest(points: Sequence[_Point], horizon: float, *, within: float = WITHIN) -> _Point | None:
    """Return the point closest to a horizon by factor; None if that factor exceeds `within`."""

    def distance(point: _Point) -> float:
        return abs(math.log(point.horizon / horizon))

    close = [point for point in points if distance(point) <= math.log(within) + 1e-12]
    return min(close, key=distance, default=None)


def _last_doubling_share(doublings: float) -> float:
    """Return the drop of the last doubling relative to that of the last `doublings`.

    By a series with the default ratio: between 0.5 and 0.9 it hardly matters, and a measured one is noisy.
    """
    lost = 1 - math.pow(DEFAULT_RATIO, doublings)
    return math.pow(DEFAULT_RATIO, doublings - 1) * (1 - DEFAULT_RATIO) / lost


def _ratio_of_doublings(points: Sequence[_Point], half: _Point, whole: _Point, scale: Scale) -> float:
    """Return the ratio of a doubling's drop to the one before, from a point before the half or after it."""
    quarter = _nearest([p for p in points if p.horizon < half.horizon], half.horizon / 2)
    if quarter is not None:
        return _solved_ratio(quarter, half, whole, scale)
    between = [p for p in points if half.horizon < p.horizon < whole.horizon]
    middle = _nearest(between, math.sqrt(half.horizon * whole.horizon), within=1.1)
    return DEFAULT_RATIO if middle is None else _solved_ratio(half, middle, whole, scale)


def _solved_ratio(first: _Point, second: _Point, third: _Point, scale: Scale) -> float:
    """Return the ratio of a geometric series of drops of log loss through three horizons, in [0, 0.9].

    With drops d1 and d2 over a and b doublings it solves d2 / d1 = r^a (1 - r^b) / (1 - r^a), whose right
    side rises with r; the default ratio if the first drop is not positive.
    """
    if not scale.can_compare(first.cost, second.cost, third.cost) or first.cost <= second.cost:
        return DEFAULT_RATIO
    wanted = scale.drop(second.cost, third.cost) / scale.drop(first.cost, second.cost)
    a, b = math.log2(second.horizon / first.horizon), math.log2(third.horizon / second.horizon)
    low, high = 0.0, MAX_RATIO
    if wanted <= 0:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        if math.pow(middle, a) * (1 - math.pow(middle, b)) / (1 - math.pow(middle, a)) < wanted:
            low = middle
        else:
            high = middle
    return high
