"""Whether a round's horizon was right, and how long the next round should be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from tuner.playbook.curves import Rise, plateau_step, rise_after_best
from tuner.playbook.gain import Gain, measured_gain, seed_spread
from tuner.playbook.precision import majority_probability
from tuner.playbook.results import RoundResults
from tuner.playbook.schedule import decay_length, warmup_length
from tuner.playbook.selection import LeadingTrial, leading_trials

TOO_LONG_FRACTION = 0.10
LATE_FRACTION = 0.75
CONSISTENT = 0.9
"""Posterior probability from which on more than half of the trials are taken to be late."""
MAX_UNDETERMINED_NOISE = 0.01
"""Up to this share of the loss, twice the noise is small enough for any gain to be judged."""
MIN_GAIN = 0.001
"""A doubling that is worth no more than this share of the loss is not worth having."""
MULTIPLES = (1.5, 2.0, 3.0)
"""What a horizon may be multiplied by. Ranks of short and long runs agree at 2x (0.95) and no longer
at 6x (0.5; 3,819 AlgoPerf runs), so three times is the most for one round."""
SETTLED_MARGIN = 1.25


class Diagnosis(StrEnum):
    """What a round says of its horizon; the first that holds, in this order."""

    NO_LEARNING = "no_learning"
    TOO_LONG = "too_long"
    OVERFITTING = "overfitting"
    UNDETERMINED = "undetermined"
    SATURATED = "saturated"
    TOO_SHORT = "too_short"
    RIGHT = "right"


@dataclass(frozen=True, slots=True)
class Signs:
    """All that a diagnosis and a suggestion rest on."""

    max_train_steps: int
    evaluate_every: int
    production_steps: int | None
    leading: tuple[LeadingTrial, ...]
    gain: Gain | None
    noise: float
    """Relative to the loss: the gain's standard error and the spread between seeds, in quadrature."""
    rise: Rise | None
    """The best trial's, where its evaluation loss turned up."""
    max_examples: int | None = None
    """`evaluation.max_examples`, the most that the evaluation set may hold; None where nothing limits it."""

    @property
    def threshold(self) -> float:
        """The gain up to which a doubling counts as worth nothing. Rule: this project's, "saturated"."""
        return max(2 * self.noise, MIN_GAIN)

    @property
    def is_hidden(self) -> bool:
        """Whether the noise is too large for a verdict, and the gain does not stand out of it.

        A gain beyond twice its noise, up or down, says the direction however large the noise is. Rule:
        this project's decision, "undetermined".
        """
        if self.gain is None:
            return True
        return 2 * self.noise > max(MAX_UNDETERMINED_NOISE, abs(self.gain.relative))

    @property
    def num_late(self) -> int:
        """Leading trials whose best step is in the last quarter. Rule: the playbook's last 25%."""
        return sum(lead.fraction >= LATE_FRACTION for lead in self.leading)

    @property
    def floor(self) -> int:
        """The shortest horizon to suggest: warmup, decay and one evaluation interval, of any leading trial.

        Never above the horizon that was run. Rule: this project's decision, "too_long".
        """
        needed = (
            warmup_length(lead.trial.hyperparameters) + decay_length(lead.trial.hyperparameters)
            for lead in self.leading
        )
        return min(max(needed, default=0) + self.evaluate_every, self.max_train_steps)


def signs(results: RoundResults, earlier: Sequence[RoundResults] = ()) -> Signs:
    """The signs of a round, with the gain from the best source that there is.

    Rule: this project's decision, "Reading a round".
    """
    leading = leading_trials(results.trials, results.max_train_steps)
    gain = measured_gain(results, leading, earlier)
    noise = math.hypot(gain.standard_error if gain else 0.0, seed_spread(results.trials))
    rise = rise_after_best(leading[0].trial.evaluations) if leading else None
    return Signs(
        max_train_steps=results.max_train_steps,
        evaluate_every=results.evaluate_every,
        production_steps=results.production_steps,
        leading=leading,
        gain=gain,
        noise=noise,
        rise=rise,
        max_examples=results.max_examples,
    )


def diagnose(seen: Signs) -> Diagnosis:
    """The first diagnosis that holds; `undetermined` where nothing is complete or the gain is hidden.

    Rule: Deep Learning Tuning Playbook, "Deciding how long to train when training is not
    compute-bound" (best steps in the first 10%, in the last 25%); the others and what "consistently"
    means are this project's decisions.
    """
    leading = seen.leading
    if not leading:
        return Diagnosis.UNDETERMINED
    if all(lead.best.step == 0 for lead in leading):
        return Diagnosis.NO_LEARNING
    if all(lead.fraction <= TOO_LONG_FRACTION for lead in leading):
        return Diagnosis.TOO_LONG
    if seen.rise is not None and seen.rise.is_overfitting:
        return Diagnosis.OVERFITTING
    if seen.gain is None or seen.is_hidden:
        return Diagnosis.UNDETERMINED
    if seen.gain.relative <= seen.threshold:
        return Diagnosis.SATURATED
    if majority_probability(seen.num_late, len(leading)) >= CONSISTENT:
        return Diagnosis.TOO_SHORT
    return Diagnosis.RIGHT


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A horizon for the next round."""

    steps: int
    low: int
    high: int
    """Horizons that the same evidence would support as well: low <= steps <= high."""
    is_capped: bool
    """Whether `production_steps` keeps it from being longer."""


def suggest(seen: Signs, diagnosis: Diagnosis) -> Suggestion | None:
    """The next horizon; None where nothing was learned or nothing is complete.

    A multiple of the evaluation interval, unless it is the last horizon itself or `production_steps`.
    Never above three times the horizon or above `production_steps`, and not below the floor unless that
    cap is. Rule: Deep Learning Tuning Playbook, "Deciding the number of steps for each training run"; the
    amounts are this project's decisions.
    """
    if not seen.leading or diagnosis == Diagnosis.NO_LEARNING:
        return None
    most = MULTIPLES[-1] if diagnosis == Diagnosis.TOO_SHORT else 1.0
    low, wanted, high = (_on_grid(seen, steps, most) for steps in _wanted(seen, diagnosis))
    cap = seen.production_steps
    if cap is None:
        return Suggestion(wanted, low, high, is_capped=False)
    return Suggestion(min(wanted, cap), min(low, cap), min(high, cap), is_capped=cap < wanted)


def _on_grid(seen: Signs, steps: float, most: float) -> int:
    """The first evaluation not below these steps or the floor; the last one within `most` horizons."""
    every, longest = seen.evaluate_every, math.floor(most * seen.max_train_steps)
    up = math.ceil(max(steps, seen.floor) / every - 1e-9) * every
    if up <= longest:
        return up
    return longest if longest == seen.max_train_steps else longest // every * every or longest


def _wanted(seen: Signs, diagnosis: Diagnosis) -> tuple[float, float, float]:
    """Low end, suggestion and high end, before any bound."""
    horizon = float(seen.max_train_steps)
    match diagnosis:
        case Diagnosis.TOO_LONG:
            best_steps = [lead.best.step for lead in seen.leading]
            return 2.0 * min(best_steps), 2.0 * max(best_steps), 2.0 * max(best_steps)
        case Diagnosis.SATURATED | Diagnosis.OVERFITTING:
            settled = [plateau_step(lead.trial.evaluations) or 0 for lead in seen.leading]
            low, middle, high = np.percentile(settled, [50, 90, 100]) * SETTLED_MARGIN
            return float(low), float(middle), float(high)
        case Diagnosis.TOO_SHORT:
            assert seen.gain is not None
            gain, threshold = seen.gain, seen.threshold
            less = replace(gain, relative=gain.relative - 2 * seen.noise)
            more = replace(gain, relative=gain.relative + 2 * seen.noise)
            low, middle, high = (_multiple(g, threshold) for g in (less, gain, more))
            return low * horizon, middle * horizon, high * horizon
        case _:
            return horizon, horizon, horizon


def _multiple(gain: Gain, threshold: float) -> float:
    """The smallest multiple of the horizon whose own last doubling is worth no more than the threshold."""
    return next((m for m in MULTIPLES if gain.at(m) <= threshold), MULTIPLES[-1])
