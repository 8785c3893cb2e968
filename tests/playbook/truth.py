"""The diagnosis and the horizon that noise-free curves deserve, by the playbook's definitions.

Nothing here uses the product's rules. Every condition is three-valued: yes, no, or too close to its
threshold to say (None).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tests.playbook.loss_curves import Runs
from tuner.playbook import Diagnosis

MARGIN = 2.0
"""A value within this factor of a threshold has no clear answer."""
EVEN_FALL_MARGIN = 1.5
"""The same for the last quarter's part of the gain: an even fall has twice the threshold."""

WORTHWHILE = 0.005
HIDING = 0.01
TOO_LONG, LATE = 0.10, 0.75
NUM_LEADING = 5
MOST = 3.0
SETTLED_MARGIN = 1.25

Truth = bool | None


@dataclass(frozen=True)
class TrueTrial:
    """A complete trial, copies of it left out."""

    runs: Runs
    learning_rate: float


@dataclass(frozen=True)
class Case:
    """A round as its maker knows it."""

    trials: tuple[TrueTrial, ...]
    steps: tuple[int, ...]
    """Where trials are evaluated, the first and the last step included."""
    every: int
    noise: float
    """Standard error of the difference of two evaluations, relative to the loss."""
    highest_rate: float
    """Upper bound of the learning rate's range."""
    lowest_rate: float
    diverged_rates: tuple[float, ...] = ()
    has_examples: bool = True
    has_comparison: bool = False
    """Whether a run to T/2 on the same schedule stands beside the best trial."""
    production_steps: int | None = None

    @property
    def horizon(self) -> int:
        return self.steps[-1]


@dataclass(frozen=True)
class Answer:
    diagnosis: Diagnosis
    possible: frozenset[Diagnosis]
    """What it may be as well, where conditions on the way are within `MARGIN` of their thresholds."""
    horizon: float | None
    """Where more steps stop paying; None where there is no such horizon or it is not clear."""
    is_edge: bool
    """Whether the learning rates may all be too small, so that the horizon stays."""

    @property
    def is_clear(self) -> bool:
        """Whether it can be nothing else."""
        return self.possible == {self.diagnosis}


def answer(case: Case) -> Answer:
    seen = _Seen.of(case)
    (diagnosis, best), *_ = _outcomes(seen, 1.0)
    possible = frozenset(found for found, _ in _outcomes(seen, MARGIN))
    edge = _is_edge(seen, best) if best is not None and diagnosis in _QUALIFIED_BY_EDGE else False
    horizon = None if edge is None or best is None else _true_horizon(seen, best, diagnosis, edge)
    return Answer(diagnosis, possible, horizon, edge is True)


_QUALIFIED_BY_EDGE = (Diagnosis.TOO_SHORT, Diagnosis.SATURATED, Diagnosis.UNDETERMINED)


# --- three-valued conditions ------------------------------------------------------------------------------


def over(value: float, threshold: float, margin: float) -> Truth:
    """Whether a value is above a threshold; None within the margin, by factor."""
    if value > threshold * margin:
        return True
    return False if value <= threshold / margin else None


def negated(one: Truth) -> Truth:
    return None if one is None else not one


def both(one: Truth, other: Truth) -> Truth:
    if one is False or other is False:
        return False
    return True if one and other else None


def either(one: Truth, other: Truth) -> Truth:
    return negated(both(negated(one), negated(other)))


def _agreed(hold: Sequence[Truth]) -> Truth:
    return hold[0] if len(set(hold)) == 1 else None


# --- what a round shows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """A complete trial's noise-free evaluations."""

    trial: TrueTrial
    steps: np.ndarray
    losses: np.ndarray

    @property
    def lowest(self) -> float:
        return float(self.losses.min())

    @property
    def best_fraction(self) -> float:
        return float(self.steps[int(np.argmin(self.losses))] / self.steps[-1])

    def plateau(self, noise: float) -> tuple[float, float]:
        """First and last fraction where the best may be found: within two standard errors of it."""
        close = self.steps[self.losses <= self.lowest * (1 + 2 * noise)] / self.steps[-1]
        return float(close[0]), float(close[-1])

    def learned(self, noise: float, margin: float) -> Truth:
        return over((self.losses[0] - self.lowest) / self.losses[0], 2 * noise, margin)


@dataclass(frozen=True)
class _Seen:
    case: Case
    curves: tuple[_Curve, ...]
    """Best first."""

    @classmethod
    def of(cls, case: Case) -> _Seen:
        steps = np.array(case.steps, dtype=np.float64)
        curves = [_Curve(trial, steps, trial.runs.loss(steps, case.horizon)) for trial in case.trials]
        return cls(case, tuple(sorted(curves, key=lambda curve: curve.lowest)))

    def noise(self, curve: _Curve) -> float:
        """Without per-example losses, noise is what a line through the end of the curve leaves over."""
        if self.case.has_examples:
            return self.case.noise
        last = max(6, math.ceil(len(curve.steps) / 4)) if len(curve.steps) >= 6 else len(curve.steps)
        if last < 4:
            return self.case.noise
        steps, losses = curve.steps[-last:], curve.losses[-last:]
        left = losses - np.polyval(np.polyfit(steps, losses, 1), steps)
        bend = math.sqrt(float(left @ left) / (last - 2)) / float(losses[-1])
        return math.hypot(self.case.noise, bend)


def _outcomes(seen: _Seen, margin: float) -> list[tuple[Diagnosis, _Curve | None]]:
    """Every diagnosis that may hold, the trial that may be the best with each."""
    if not seen.curves:
        return [(Diagnosis.UNDETERMINED, None)]
    noise = seen.case.noise
    learned = [curve.learned(seen.noise(curve), margin) for curve in seen.curves]
    pool = [curve for curve, has in zip(seen.curves, learned, strict=True) if has is not False]
    doubtful = [has is None for has in learned if has is not False]
    found: list[tuple[Diagnosis, _Curve | None]] = []
    if not any(learned):
        found.append((Diagnosis.NO_LEARNING, None))
    if not pool:
        return found
    within = 2 * noise if margin > 1 else 0.0
    for best in (curve for curve in pool if curve.lowest <= pool[0].lowest * (1 + within)):
        last = pool[min(NUM_LEADING, len(pool)) - 1].lowest * (1 + within)
        leading = [curve for curve in pool if curve.lowest <= last]
        if margin == 1:
            leading = leading[:NUM_LEADING]
        certain = [curve for curve in leading if curve is best or not doubtful[pool.index(curve)]]
        found += [(diagnosis, best) for diagnosis in _walk(seen, best, (leading, certain), margin)]
    return found


def _walk(
    seen: _Seen, best: _Curve, leading: Sequence[Sequence[_Curve]], margin: float
) -> Iterator[Diagnosis]:
    """The diagnoses that may hold, in the playbook's order, up to the first that holds for certain."""
    for holds, diagnosis in _conditions(seen, best, leading, margin):
        if holds is not False and not (holds is None and margin == 1):
            yield diagnosis
        if holds:
            return
    yield Diagnosis.UNDETERMINED


def _conditions(
    seen: _Seen, best: _Curve, leading: Sequence[Sequence[_Curve]], margin: float
) -> Iterator[tuple[Truth, Diagnosis]]:
    """Each condition; `leading` with the trials that may have learned something, and without them."""
    noise = seen.noise(best)
    early = [_all_leading([_is_early(curve, noise, margin) for curve in curves]) for curves in leading]
    yield _agreed(early), Diagnosis.TOO_LONG

    rise = (best.losses[-1] - best.lowest) / best.lowest
    yield over(rise, 2 * noise, margin), Diagnosis.OVERFITTING

    gain = float(best.trial.runs.gain(seen.case.horizon))
    yield negated(_gain_is_known(seen.case, best.trial)), Diagnosis.UNDETERMINED
    hidden = both(over(2 * noise, HIDING, margin), negated(over(abs(gain), 2 * noise, margin)))
    yield hidden, Diagnosis.UNDETERMINED
    yield negated(over(gain, max(2 * noise, WORTHWHILE), margin)), Diagnosis.SATURATED

    drops = [max(0.0, drop) for drop in _drops_from(best, LATE)]
    even = min(margin, EVEN_FALL_MARGIN)
    is_flat = _agreed([negated(over(drop + 2 * noise, gain / 5, even)) for drop in drops])
    learned_late = _drops_from(best, best.trial.runs.when_spent(LATE))
    is_uneven = _agreed([negated(over(max(0.0, drop), 0.4 * gain, even)) for drop in learned_late])
    yield both(is_flat, is_uneven), Diagnosis.RIGHT
    falls = _agreed([over(drop, 2 * noise, margin) for drop in drops])
    late = [_consistently([_is_late(curve, noise, margin) for curve in curves]) for curves in leading]
    yield either(falls, _agreed(late)), Diagnosis.TOO_SHORT


def _is_early(curve: _Curve, noise: float, margin: float) -> Truth:
    early = negated(over(curve.best_fraction, TOO_LONG, margin))
    first, last = curve.plateau(noise) if margin > 1 else (curve.best_fraction, curve.best_fraction)
    if early is None or (first <= TOO_LONG) != (last <= TOO_LONG):
        return None
    return early


def _is_late(curve: _Curve, noise: float, margin: float) -> Truth:
    late = negated(over(1 - curve.best_fraction, 1 - LATE, margin))
    first, last = curve.plateau(noise) if margin > 1 else (curve.best_fraction, curve.best_fraction)
    if late is None or (first >= LATE) != (last >= LATE):
        return None
    return late


def _all_leading(hold: Sequence[Truth]) -> Truth:
    """Whether it holds for all of five of these trials, whichever five lead."""
    num_others = len(hold) - min(NUM_LEADING, len(hold))
    if all(hold):
        return True
    return False if sum(one is False for one in hold) > num_others else None


def _consistently(late: Sequence[Truth]) -> Truth:
    """Whether more than half of what five of these trials stand for is late, whichever five lead."""
    count = min(NUM_LEADING, len(late))
    fewest = count - min(count, sum(not one for one in late))
    most = min(count, sum(one is not False for one in late))
    if majority_probability(fewest, count) >= 0.9:
        return True
    return False if majority_probability(most, count) < 0.9 else None


def majority_probability(hits: int, count: int) -> float:
    """Posterior probability of a share above a half under Jeffreys' prior, by the angle's sine."""
    angle = np.linspace(0, np.pi / 2, 4001)
    density = np.sin(angle) ** (2 * hits) * np.cos(angle) ** (2 * (count - hits))
    return float(density[angle > np.pi / 4].sum() / density.sum())


def _drops_from(curve: _Curve, fraction: float) -> tuple[float, float]:
    """Relative drop from a share of T to T: from the evaluation before that step, and from the one after."""
    steps, losses = curve.steps, curve.losses
    at = fraction * steps[-1]
    before, after = losses[steps <= at][-1], losses[steps >= at][0]
    return float((before - losses[-1]) / losses[-1]), float((after - losses[-1]) / losses[-1])


def _gain_is_known(case: Case, trial: TrueTrial) -> Truth:
    """Whether the round has a source of the last doubling's gain whose error is known."""
    with_error: Truth = True
    if not case.has_examples:
        with_error = len(case.steps) >= 4
    if case.has_comparison:
        return with_error
    runs = trial.runs
    if runs.schedule == "cosine" or (runs.schedule == "linear" and runs.share > 0.4 + 0.5 / case.horizon):
        return False
    end = case.horizon * (1 - runs.share) if runs.schedule == "linear" else case.horizon
    stable = [step for step in case.steps if 0 < step <= end + 0.5]
    if len(stable) < 2:
        return False
    if not case.has_examples and len(stable) < 4 <= len(case.steps):
        return None
    has_half = any(1.5 <= stable[-1] / step <= 3 for step in stable)
    return both(with_error, True if has_half else None)


# --- edges and horizons -----------------------------------------------------------------------------------


def _is_edge(seen: _Seen, best: _Curve) -> Truth:
    """Whether the best learning rate is the highest that could be, or that was tried."""
    case, rate = seen.case, best.trial.learning_rate
    if any(diverged > rate for diverged in case.diverged_rates):
        return False
    position = math.log(rate / case.lowest_rate) / math.log(case.highest_rate / case.lowest_rate)
    if sum(curve.lowest <= best.lowest * (1 + 2 * case.noise) for curve in seen.curves) > 1:
        return None
    if position >= 0.95:
        return True
    highest = sorted(seen.curves, key=lambda curve: -curve.trial.learning_rate)[:3]
    if len(highest) < 3 or highest[0] is not best:
        return False
    behind = highest[2].lowest / highest[1].lowest - 1
    return None if abs(behind) <= 2 * case.noise else behind > 0


def _true_horizon(seen: _Seen, best: _Curve, diagnosis: Diagnosis, edge: bool) -> float | None:
    horizon = seen.case.horizon
    if edge:
        return float(horizon)
    match diagnosis:
        case Diagnosis.TOO_SHORT:
            wanted = _where_doubling_stops_paying(best, horizon, seen.noise(best))
        case Diagnosis.SATURATED | Diagnosis.OVERFITTING:
            wanted = _settled(seen, best)
        case _:
            return None
    return None if wanted is None else _bounded(seen.case, best, wanted, diagnosis)


def _where_doubling_stops_paying(best: _Curve, horizon: float, noise: float) -> float:
    longer = horizon * np.linspace(1, MOST, 401)
    enough = longer[best.trial.runs.gain(longer) <= max(2 * noise, WORTHWHILE)]
    return float(enough[0]) if len(enough) else float(longer[-1])


def _settled(seen: _Seen, best: _Curve) -> float | None:
    """A quarter more than the shortest run that is as good as any up to T, for nine in ten leading trials."""
    if best.trial.runs.schedule == "cosine":
        return _cosine_settled(seen, best)
    leading = [c for c in seen.curves if c.learned(seen.noise(c), 1.0)][:NUM_LEADING]
    lengths = []
    for curve in leading:
        horizons = np.arange(1.0, seen.case.horizon + 1)
        finals = curve.trial.runs.final(horizons)
        lengths.append(float(horizons[finals <= finals.min() * (1 + 2 * seen.noise(curve))][0]))
    return SETTLED_MARGIN * float(np.percentile(lengths, 90))


def _cosine_settled(seen: _Seen, best: _Curve) -> float | None:
    """Half the horizon where a comparison run shows that it is as good, else the whole.

    Not clear between a difference that cannot be seen and one that is worthwhile.
    """
    gain, noise = float(best.trial.runs.gain(seen.case.horizon)), seen.noise(best)
    if not seen.case.has_comparison or gain > MARGIN * max(2 * noise, WORTHWHILE):
        return float(seen.case.horizon)
    return seen.case.horizon / 2 if gain <= noise else None


def _bounded(case: Case, best: _Curve, wanted: float, diagnosis: Diagnosis) -> float:
    """At least the floor, on the evaluation grid, at most T or three times T, and the cap wins."""
    share = best.trial.runs.share if best.trial.runs.schedule == "linear" else 0.0
    most = MOST * case.horizon if diagnosis == Diagnosis.TOO_SHORT else case.horizon
    on_grid = math.ceil(max(wanted, case.every / (1 - share)) / case.every - 1e-9) * case.every
    return min(on_grid, most, case.production_steps or math.inf)
