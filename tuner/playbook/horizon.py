"""Whether a round's horizon was right, and how long the next round should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from tuner.methods.schedules import warmup_length
from tuner.playbook.curves import LateDrop, Rise, late_drop, plateau_step, rise_after_best
from tuner.playbook.edges import MAX_WIDENINGS, has_few_rates, num_widenings, rates_may_be_too_small
from tuner.playbook.gain import Gain, GainSource, measured_gain, seed_spread
from tuner.playbook.noise import BY_VALUE, Scale, majority_probability
from tuner.playbook.results import RoundResults
from tuner.playbook.schedule import (
    decay_length,
    has_built_in_schedule,
    step_at_rate_share,
    step_at_recorded_share,
    trunk_end,
)
from tuner.playbook.selection import LeadingTrial
from tuner.records import LOSS, Objective, Trial

TOO_LONG_FRACTION = 0.10
LATE_FRACTION = 0.75
CONSISTENT = 0.9
"""Posterior probability at which more than half of the trials count as late."""
MAX_UNDETERMINED_NOISE = 0.01
"""If twice the noise is at most this share of the loss, any gain can be judged."""
LATE_SHARE_OF_GAIN = 0.2
"""A horizon is right if its last quarter brought at most this share of the gain."""
EVEN_SHARE_OF_GAIN = 0.4
"""Share of the gain that the last quarter of an even fall brings: -log2(0.75) of its last doubling."""
MULTIPLES = (1.5, 2.0, 3.0)
"""Allowed multiples of the horizon. Rankings of short and long runs agree at 2x (0.95) and no longer at 6x
(0.5; 3,819 AlgoPerf runs), so three is the most for one round."""
SETTLED_MARGIN = 1.25


class Diagnosis(StrEnum):
    """What a round says about its horizon; the first that holds, in this order."""

    NO_LEARNING = "no_learning"
    TOO_LONG = "too_long"
    OVERFITTING = "overfitting"
    UNDETERMINED = "undetermined"
    SATURATED = "saturated"
    TOO_SHORT = "too_short"
    RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Signs:
    """All inputs of a diagnosis and a suggestion."""

    max_train_steps: int
    evaluate_every: int
    production_steps: int | None
    leading: tuple[LeadingTrial, ...]
    gain: Gain | None
    noise: float | None
    """Relative to the loss: the gain's standard error and the spread between seeds, in quadrature, whichever
    are known; None if neither is."""
    rise: Rise | None
    """The best trial's, if its evaluation loss turned up."""
    max_examples: int | None = None
    """`evaluation.max_examples`, the upper limit of the evaluation set; None if there is no limit."""
    worthwhile_gain: float = 0.005
    """`run.worthwhile_gain`: the smallest gain that a doubling has to bring."""
    late: LateDrop | None = None
    """How much the best trial's loss fell in the last quarter; None if unknown or not finite at the end."""
    late_by_rate: LateDrop | None = None
    """The same for the last quarter of its summed learning rate: the same steps at a constant rate, more of
    them at a falling one."""
    foremost: Trial | None = None
    """The best complete trial, if none beat the base model."""
    num_complete: int = 0
    """Complete trials, including those that did not beat the base model."""
    has_small_rates: bool = False
    """Whether the best learning rate is so high among those tried that all may be too small."""
    num_widenings: int = 0
    """How often the study has already raised its learning rates for that reason."""
    has_few_rates: bool = False
    """Whether rates are searched, but too few were tried to show where the best ones lie."""
    objective: Objective = LOSS
    """What chose the best steps: the loss, or another metric that each evaluation has."""
    scale: Scale | None = BY_VALUE
    """What gains are relative to; None where it is not known."""

    @property
    def worthwhile(self) -> float:
        """Return the gain that a doubling has to exceed. Rule: this project's, "worthwhile"."""
        return max(2 * (self.noise or 0.0), self.worthwhile_gain)

    @property
    def is_unknown(self) -> bool:
        """Return whether the gain of a doubling or its noise is unknown."""
        return self.gain is None or self.noise is None

    @property
    def is_hidden(self) -> bool:
        """Return whether the noise is too large for a verdict and hides the gain.

        A gain beyond twice its noise, up or down, shows the direction however large the noise is. Rule: this
        project's decision, "undetermined".
        """
        if self.gain is None or self.noise is None:
            return False
        return 2 * self.noise > max(MAX_UNDETERMINED_NOISE, abs(self.gain.relative))

    @property
    def num_late(self) -> int:
        """Return how many leading trials are best in the last quarter. Rule: the playbook's last 25%."""
        return sum(lead.fraction >= LATE_FRACTION for lead in self.leading)

    @property
    def is_consistently_late(self) -> bool:
        """Return whether most leading trials are late, beyond doubt. Rule: the playbook's "consistently"."""
        return majority_probability(self.num_late, len(self.leading)) >= CONSISTENT

    @property
    def still_falls(self) -> bool:
        """Return whether the best trial's smoothed loss fell significantly in the last quarter."""
        return self.late is not None and self.late.is_significant

    @property
    def is_done_early(self) -> bool:
        """Return whether the best trial's last quarter brought almost nothing of the last doubling's gain."""
        if self.gain is None or self.late is None:
            return False
        return self.late.at_most <= LATE_SHARE_OF_GAIN * self.gain.relative

    @property
    def is_slowed(self) -> bool:
        """Return whether a small learning rate alone may explain that, so that the trial need not be done.

        The last quarter of a cosine has 2.5% of the summed learning rate, so it brings little whether the
        model could learn more or not. In that case the last quarter by summed rate may still have brought as
        much as that of an even fall.
        """
        if self.gain is None or self.late_by_rate is None:
            return True
        return self.late_by_rate.at_most > EVEN_SHARE_OF_GAIN * self.gain.relative

    @property
    def floor(self) -> int:
        """Return the shortest horizon with the warmup and one evaluation interval before the decay.

        It is the longest among the leading trials, and never above the current horizon. Rule: this project's
        decision, "Floor".
        """
        needed = (self._floor_of(lead.trial) for lead in self.leading)
        return min(max(needed, default=0), self.max_train_steps)

    def _floor_of(self, trial: Trial) -> int:
        share = decay_length(trial.hyperparameters) / self.max_train_steps
        before_decay = warmup_length(trial.hyperparameters) + self.evaluate_every
        return math.ceil(before_decay / (1 - share) - 1e-9) if share < 1 else self.max_train_steps


def signs(results: RoundResults, earlier: Sequence[RoundResults] = ()) -> Signs:
    """Return the signs of a round, with the gain from the best available source.

    Rule: this project's decision, "Reading a round".
    """
    leading = results.leading
    best = leading[0].trial if leading else None
    gain = measured_gain(results, leading, earlier)
    scale = results.scale
    foremost = None if leading else next((lead.trial for lead in results.foremost), None)
    spoken_for = best or foremost
    return Signs(
        max_train_steps=results.max_train_steps,
        evaluate_every=results.evaluate_every,
        production_steps=results.production_steps,
        leading=leading,
        gain=gain,
        noise=_noise(gain, results),
        rise=rise_after_best(best.evaluations) if best else None,
        max_examples=results.max_examples,
        worthwhile_gain=results.worthwhile_gain,
        late=_late(best, LATE_FRACTION * results.max_train_steps, scale),
        late_by_rate=_late_by_rate(best, results.max_train_steps, scale),
        foremost=foremost,
        num_complete=len(results.complete),
        has_small_rates=rates_may_be_too_small(results, best) if best else False,
        num_widenings=num_widenings(results, earlier),
        has_few_rates=has_few_rates(results),
        objective=_objective(spoken_for),
        scale=scale,
    )


def _objective(trial: Trial | None) -> Objective:
    """What chose its best step."""
    return (trial.evaluations[0].objective if trial and trial.evaluations else None) or LOSS


def _late(trial: Trial | None, at: float, scale: Scale | None) -> LateDrop | None:
    return late_drop(trial.evaluations, at, scale) if trial and scale else None


def _late_by_rate(trial: Trial | None, max_train_steps: int, scale: Scale | None) -> LateDrop | None:
    if trial is None:
        return None
    if has_built_in_schedule(trial.hyperparameters):
        at = step_at_rate_share(trial.hyperparameters, max_train_steps, LATE_FRACTION)
    else:
        at = step_at_recorded_share(trial.evaluations, LATE_FRACTION)
    return _late(trial, at, scale)


def _noise(gain: Gain | None, results: RoundResults) -> float | None:
    known = [gain.standard_error if gain else None, seed_spread(results.trials, by_curve=results.by_curve)]
    parts = [part for part in known if part is not None]
    return math.hypot(*parts) if parts else None


def diagnose(seen: Signs) -> Diagnosis:
    """Return the first diagnosis that holds.

    The gain of a doubling decides; the share of late best steps is additional evidence, never a veto. Rule:
    Deep Learning Tuning Playbook, "Deciding how long to train when training is not compute-bound" (best steps
    in the first 10%, in the last 25%); the others and the meaning of "consistently" are this project's
    decisions.
    """
    if not seen.leading:
        return Diagnosis.NO_LEARNING if seen.num_complete else Diagnosis.UNDETERMINED
    if all(lead.fraction <= TOO_LONG_FRACTION for lead in seen.leading):
        return Diagnosis.TOO_LONG
    if seen.rise is not None and seen.rise.is_overfitting:
        return Diagnosis.OVERFITTING
    if seen.gain is None or seen.is_unknown or seen.is_hidden:
        return Diagnosis.UNDETERMINED
    if seen.gain.relative <= seen.worthwhile:
        return Diagnosis.SATURATED
    if seen.is_done_early and not seen.is_slowed:
        return Diagnosis.RIGHT
    if seen.still_falls or seen.is_consistently_late:
        return Diagnosis.TOO_SHORT
    return Diagnosis.UNDETERMINED


def puts_the_edge_first(seen: Signs, diagnosis: Diagnosis) -> bool:
    """Return whether to try higher learning rates at the same horizon before judging it.

    At most twice in a study. Rule: this project's decision, "An edge comes first", after the Deep Learning
    Tuning Playbook's "misleading search spaces may cause an incorrect conclusion".
    """
    is_misleading = diagnosis in (Diagnosis.TOO_SHORT, Diagnosis.SATURATED, Diagnosis.UNDETERMINED)
    return is_misleading and seen.has_small_rates and seen.num_widenings < MAX_WIDENINGS


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A horizon for the next round."""

    steps: int
    low: int
    high: int
    """Horizons that the same evidence supports as well: low <= steps <= high."""
    is_capped: bool
    """Whether `production_steps` keeps it from being longer."""


_MOST = {Diagnosis.TOO_SHORT: MULTIPLES[-1], Diagnosis.UNDETERMINED: MULTIPLES[0]}
"""The largest multiple of the horizon that is suggested; 1 for every other diagnosis."""


def suggest(seen: Signs, diagnosis: Diagnosis) -> Suggestion | None:
    """Return the next horizon; None if nothing was learned or no trial is complete.

    It is rounded up to an evaluation, but not beyond three times the horizon (1.5 times if `undetermined`),
    and never above `production_steps`; it is not below the floor unless that cap is. Rule: Deep Learning
    Tuning Playbook, "Deciding the number of steps for each training run"; the amounts are this project's
    decisions.
    """
    if not seen.leading:
        return None
    if puts_the_edge_first(seen, diagnosis):
        low = wanted = high = seen.max_train_steps
    else:
        most = _MOST.get(diagnosis, 1.0)
        low, wanted, high = (_on_grid(seen, steps, most) for steps in _wanted(seen, diagnosis))
    cap = seen.production_steps
    if cap is None:
        return Suggestion(wanted, low, high, is_capped=False)
    return Suggestion(min(wanted, cap), min(low, cap), min(high, cap), is_capped=cap < wanted)


def _on_grid(seen: Signs, steps: float, most: float) -> int:
    """Return the first evaluation not below these steps or the floor, capped at `most` horizons."""
    up = math.ceil(max(steps, seen.floor) / seen.evaluate_every - 1e-9) * seen.evaluate_every
    return min(up, math.floor(most * seen.max_train_steps))


def _wanted(seen: Signs, diagnosis: Diagnosis) -> tuple[float, float, float]:
    """Return low end, suggestion and high end, before any bound."""
    horizon = float(seen.max_train_steps)
    match diagnosis:
        case Diagnosis.TOO_LONG:
            best_steps = [lead.best.step for lead in seen.leading]
            return 2.0 * min(best_steps), 2.0 * max(best_steps), 2.0 * max(best_steps)
        case Diagnosis.SATURATED | Diagnosis.OVERFITTING:
            settled = [_settled_horizon(seen, lead.trial) for lead in seen.leading]
            low, middle, high = np.percentile(settled, [50, 90, 100])
            return float(low), float(middle), float(high)
        case Diagnosis.TOO_SHORT:
            assert seen.gain is not None
            gain, noise = seen.gain, seen.noise or 0.0
            less = replace(gain, relative=gain.relative - 2 * noise)
            more = replace(gain, relative=gain.relative + 2 * noise)
            low, middle, high = (_multiple(g, seen.worthwhile) for g in (less, gain, more))
            return low * horizon, middle * horizon, high * horizon
        case Diagnosis.UNDETERMINED:
            return horizon, MULTIPLES[0] * horizon, MULTIPLES[0] * horizon
        case _:
            return horizon, horizon, horizon


def _settled_horizon(seen: Signs, trial: Trial) -> float:
    """Return a horizon at which a trial would have been as good, judging by its curve.

    With a stable phase, 1.25 times its settled step, extended by the decay's share; without one, half the
    steps if a comparison run was as good.
    """
    horizon = seen.max_train_steps
    end = trunk_end(trial.hyperparameters, horizon)
    if end is None:
        is_compared = seen.gain is not None and seen.gain.source == GainSource.COMPARISON
        halves = is_compared and seen.gain is not None and seen.gain.relative <= seen.worthwhile
        return horizon / 2 if halves else horizon
    if end == 0:
        return horizon
    settled = plateau_step([e for e in trial.evaluations if e.step <= end]) or 0
    return SETTLED_MARGIN * settled * horizon / end


def _multiple(gain: Gain, threshold: float) -> float:
    """Return the smallest multiple of the horizon whose own last doubling gains at most the threshold."""
    return next((m for m in MULTIPLES if gain.at(m) <= threshold), MULTIPLES[-1])
