"""What the last doubling of the horizon was worth, and how each way of knowing it compares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from tuner.methods.schedules import warmup_length
from tuner.methods.table import counting
from tuner.playbook.noise import MAX_LOSS, difference_error, is_number, measured, smoothed
from tuner.playbook.results import RoundResults
from tuner.playbook.schedule import decay_length, trunk_end
from tuner.playbook.selection import LeadingTrial, best_evaluation, ranked_by_loss
from tuner.records import Evaluation, Trial

DEFAULT_RATIO = 0.7
"""Gain of a doubling over that of the one before, where a single gain is known."""
MAX_RATIO = 0.9
"""No series of gains is taken to fall more slowly than this."""

WITHIN = 1.7
"""A horizon this factor away from half of another still stands for the half."""
MAX_TELLING_DECAY_SHARE = 0.4
"""Of 42 Llama runs with decays up to this share the stable phase predicted the gain within a factor 1.5 in
35, of 12 runs with decays of 60 to 90% in 8."""
CLOSE_TO_HALF = 1.25
"""An earlier round this factor away from half the horizon makes a comparison run unnecessary."""

_ALMOST_ALL = 1 - 1e-9
"""A loss that fell to nothing has a logarithm all the same."""
_MIN_LOSS = 1 / MAX_LOSS
"""Nats per token below which nothing is relative to a loss."""
_SCHEDULED = frozenset({"decay_steps"})
"""Hyperparameters that change with the horizon and do not make two trials different ones."""


class GainSource(StrEnum):
    """How the gain was measured, the most reliable way first."""

    COMPARISON = "comparison_run"
    """A run to a shorter horizon on the same schedule."""
    STABLE_PHASE = "stable_phase"
    """The trial's own evaluations, at a rate that is constant to the end."""
    EARLIER_ROUND = "earlier_round"
    """The same hyperparameters in a round with another horizon and the same share of decay."""
    BEFORE_DECAY = "before_decay"
    """The evaluations before the decay begins, from half of these steps to all of them."""


@dataclass(frozen=True, slots=True)
class Gain:
    """Relative loss reduction of a trial from half its horizon to the whole, each decayed alike."""

    relative: float
    """(loss at half - loss at the whole) / loss at half; negative where longer was worse."""
    standard_error: float | None
    """Of `relative`, over the evaluation examples; None where it cannot be had."""
    source: GainSource
    trial: int
    from_steps: int
    """The shorter horizon it was measured at; not always exactly the half."""
    to_steps: int
    ratio: float = DEFAULT_RATIO
    """Drop of log loss over the next doubling, relative to that over this one; in [0, 0.9]."""

    @property
    def is_of_a_doubling(self) -> bool:
        """Whether it was measured over about one doubling, and not rescaled from another factor."""
        return abs(self.to_steps / self.from_steps - 2.0) <= 0.1

    def at(self, multiple: float) -> float:
        """Predict the gain over the last doubling of a horizon `multiple` times as long."""
        return -math.expm1(-self._log_drop * math.pow(self.ratio, math.log2(multiple)))

    def to(self, multiple: float) -> float:
        """Predict the relative drop of the loss from this horizon to one `multiple` times as long.

        The next doublings are a geometric series of drops of log loss. Rule: this project's decision,
        "too_short".
        """
        doublings = math.log2(multiple)
        series = self.ratio * (1 - math.pow(self.ratio, doublings)) / (1 - self.ratio)
        return -math.expm1(-self._log_drop * series)

    @property
    def _log_drop(self) -> float:
        """Drop of log loss over the last doubling."""
        return -math.log1p(-min(self.relative, _ALMOST_ALL))


@dataclass(frozen=True, slots=True)
class _Point:
    horizon: int
    evaluation: Evaluation
    source: GainSource

    @property
    def loss(self) -> float:
        return self.evaluation.eval_loss


def measured_gain(
    results: RoundResults, leading: Sequence[LeadingTrial], earlier: Sequence[RoundResults] = ()
) -> Gain | None:
    """Return the gain of the last doubling from the best source that there is; None where nothing shows it.

    In this order: a comparison run; the stable phase of a rate that is constant to the end; an earlier round
    at another horizon with the same share of decay; the stable phase before a decay of at most 40%. The best
    of the leading trials that has the source speaks. Evaluations within a decay are no source: the falling
    rate lowers the later loss as well. Rule: this project's decision, "gain"; measured on 131 Llama-124M
    runs, it predicts what a doubling brings (AUC 0.90) where the share of late best steps does not (0.67).
    """
    if not leading:
        return None
    found = [_from_horizons(results, lead, earlier) for lead in leading]
    by_comparison = next((gain for gain in found if gain and gain.source == GainSource.COMPARISON), None)
    by_round = next((gain for gain in found if gain and gain.source == GainSource.EARLIER_ROUND), None)
    stable = _from_stable_phase(leading[0].trial, results.max_train_steps)
    at_constant_rate = stable if stable and stable.source == GainSource.STABLE_PHASE else None
    return by_comparison or at_constant_rate or by_round or stable


def wants_comparison(
    results: RoundResults, leading: Sequence[LeadingTrial], earlier: Sequence[RoundResults] = ()
) -> bool:
    """Return whether only a comparison run would show well what the best trial's last doubling was worth.

    So it is where its rate decays, no earlier round ran it, with the same share of decay, within a factor
    1.25 of half the horizon, and none of the same horizon compared it already. Rule: this project's decision,
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


def seed_spread(trials: Sequence[Trial]) -> float | None:
    """Return the standard deviation of the best loss between seeds, relative to it; None without repeats.

    Pooled over the groups of complete trials that differ in `training_seed` alone. Rule: Deep Learning
    Tuning Playbook, "Understanding noise between runs" (trial variance).
    """
    groups: dict[tuple[object, ...], dict[object, float]] = {}
    for trial, best in ranked_by_loss(trials):
        # Copies of one seed measure nothing.
        seeds = groups.setdefault(_identity(trial, without={"training_seed"}), {})
        seeds.setdefault(trial.hyperparameters.get("training_seed"), best.eval_loss)
    repeated = [
        np.array(list(losses.values())) / np.mean(list(losses.values()))
        for losses in groups.values()
        if len(losses) > 1 and np.mean(list(losses.values())) >= _MIN_LOSS
    ]
    freedom = sum(len(losses) - 1 for losses in repeated)
    squares = sum(float(((losses - 1.0) ** 2).sum()) for losses in repeated)
    return math.sqrt(squares / freedom) if freedom else None


def same_configuration(one: Trial, other: Trial) -> bool:
    """Whether two trials of different rounds are one configuration, seed included, re-cut at most.

    Rule: this project's decision: `decay_steps` follows the horizon and does not count.
    """
    return configuration(one) == configuration(other)


def configuration(trial: Trial) -> tuple[object, ...]:
    """What two trials of different rounds have in common when they are one configuration; hashable.

    Rule: this project's decision, as for `same_configuration`.
    """
    return _identity(trial, without=_SCHEDULED)


def _identity(trial: Trial, *, without: frozenset[str] | set[str]) -> tuple[object, ...]:
    return tuple(sorted((k, v) for k, v in counting(trial.hyperparameters).items() if k not in without))


def _from_horizons(results: RoundResults, lead: LeadingTrial, earlier: Sequence[RoundResults]) -> Gain | None:
    """The gain of a trial from its runs to several horizons; comparison runs first for the half."""
    whole = _Point(results.max_train_steps, lead.best, GainSource.COMPARISON)
    compared = _comparisons(results, lead.trial) or _inherited_comparisons(results, lead, earlier)
    twins = list(_twins_at_other_horizons(results, lead, earlier))
    points = [*compared, *twins]
    return _from_points(whole, points, lead.trial, halves=compared) or _from_points(whole, points, lead.trial)


def _comparisons(results: RoundResults, trial: Trial) -> list[_Point]:
    """What a trial's comparison runs in its own round ended at."""
    return [
        _Point(run.max_train_steps, best, GainSource.COMPARISON)
        for run in results.branches
        if run.trial == trial.number and (best := best_evaluation(run.evaluations)) is not None
    ]


def _inherited_comparisons(
    results: RoundResults, lead: LeadingTrial, earlier: Sequence[RoundResults]
) -> list[_Point]:
    """The same of earlier rounds of the workload and horizon, in which the trial ran just so.

    A round whose learning rates were widened at the same horizon takes such trials over.
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
    """The trial's runs in earlier rounds of the workload, to other horizons with the same share of decay."""
    for other in earlier:
        if other.workload != results.workload or other.max_train_steps == results.max_train_steps:
            continue
        twins = (
            best
            for trial, best in ranked_by_loss(other.trials)
            if same_configuration(trial, lead.trial)
            and _have_equal_shares(trial, other.max_train_steps, lead.trial, results.max_train_steps)
        )
        if (twin := next(twins, None)) is not None:
            yield _Point(other.max_train_steps, twin, GainSource.EARLIER_ROUND)


def _have_equal_shares(one: Trial, one_horizon: int, other: Trial, other_horizon: int) -> bool:
    """Whether two runs decay over the same share of their steps, to the rounding of whole steps."""
    decay, other_decay = decay_length(one.hyperparameters), decay_length(other.hyperparameters)
    rescaled = decay * other_horizon / one_horizon
    return abs(rescaled - other_decay) <= max(1.0, other_horizon / one_horizon)


def _from_stable_phase(trial: Trial, max_train_steps: int) -> Gain | None:
    """The gain from half the stable phase to its end, taken for that of the whole run.

    It is not carried on to the horizon: on 42 Llama runs the gain of the stable phase was too small as it
    is (median predicted over real 0.77).
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
    return _from_points(last, before, trial)


def _from_points(
    whole: _Point, points: Sequence[_Point], trial: Trial, *, halves: Sequence[_Point] | None = None
) -> Gain | None:
    """The gain up to `whole` from the losses at other horizons; `halves` may stand for half of it."""
    finite = [p for p in points if is_number(p.loss) and p.horizon < whole.horizon]
    half = _nearest([p for p in halves if p in finite] if halves is not None else finite, whole.horizon / 2)
    if half is None or not is_number(whole.loss) or min(half.loss, whole.loss) < _MIN_LOSS:
        return None
    error = _error(trial, half, whole)
    scale = _last_doubling_share(math.log2(whole.horizon / half.horizon))
    return Gain(
        relative=-math.expm1(-scale * math.log(half.loss / whole.loss)),
        standard_error=None if error is None else scale * error / half.loss,
        source=half.source,
        trial=trial.number,
        from_steps=half.horizon,
        to_steps=whole.horizon,
        ratio=_ratio_of_doublings(finite, half, whole),
    )


def _error(trial: Trial, half: _Point, whole: _Point) -> float | None:
    """The standard error of the loss difference between two horizons.

    Where both have one best evaluation, which the shorter run handed on, the later steps brought nothing
    better. How certain that is, the difference between that evaluation and the last one tells.
    """
    if (half.evaluation.step, half.loss) != (whole.evaluation.step, whole.loss):
        return difference_error(trial.evaluations, half.evaluation, whole.evaluation)
    last = max(measured(trial.evaluations), key=lambda evaluation: evaluation.step)
    return difference_error(trial.evaluations, last, whole.evaluation) or None


def _nearest(points: Sequence[_Point], horizon: float, *, within: float = WITHIN) -> _Point | None:
    """The point closest to a horizon by factor, unless that factor is larger than `within`."""

    def distance(point: _Point) -> float:
        return abs(math.log(point.horizon / horizon))

    close = [point for point in points if distance(point) <= math.log(within) + 1e-12]
    return min(close, key=distance, default=None)


def _last_doubling_share(doublings: float) -> float:
    """The drop of the last doubling relative to that of the last `doublings`.

    By a series of the usual ratio: between 0.5 and 0.9 it hardly matters, and a measured one is noisy.
    """
    lost = 1 - math.pow(DEFAULT_RATIO, doublings)
    return math.pow(DEFAULT_RATIO, doublings - 1) * (1 - DEFAULT_RATIO) / lost


def _ratio_of_doublings(points: Sequence[_Point], half: _Point, whole: _Point) -> float:
    """The ratio of a doubling's drop to the one before, from a point before the half or between."""
    quarter = _nearest([p for p in points if p.horizon < half.horizon], half.horizon / 2)
    if quarter is not None:
        return _solved_ratio(quarter, half, whole)
    between = [p for p in points if half.horizon < p.horizon < whole.horizon]
    middle = _nearest(between, math.sqrt(half.horizon * whole.horizon), within=1.1)
    return DEFAULT_RATIO if middle is None else _solved_ratio(half, middle, whole)


def _solved_ratio(first: _Point, second: _Point, third: _Point) -> float:
    """The ratio of a geometric series of drops of log loss through three horizons, in [0, 0.9].

    With drops d1 and d2 over a and b doublings it solves d2 / d1 = r^a (1 - r^b) / (1 - r^a), whose right
    side rises with r; the usual ratio where the first drop is none.
    """
    if min(first.loss, second.loss, third.loss) < _MIN_LOSS or first.loss <= second.loss:
        return DEFAULT_RATIO
    wanted = math.log(second.loss / third.loss) / math.log(first.loss / second.loss)
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
