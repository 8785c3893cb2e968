"""What each hyperparameter's dimension becomes in the next round, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tuner.playbook.edges import number
from tuner.playbook.findings import percent
from tuner.playbook.results import RoundResults
from tuner.playbook.schedule import DecayRule, recut_decay
from tuner.playbook.spaces import as_listed, moved_rate, narrowed, rate_range, widened
from tuner.playbook.tiers import Tier, tier_of
from tuner.records import Choices, Dimension, Fixed, Range, TimesSqrtRank, Trial, TrialState, Value


@dataclass(frozen=True, slots=True)
class HyperparameterChange:
    """One hyperparameter from a round to the next; often it stays as it is."""

    from_dimension: Dimension
    to_dimension: Dimension
    tier: Tier
    reason: str
    """In words, for the comment beside it in the next round's file."""


@dataclass(frozen=True, slots=True)
class Carrying:
    """The passage of a search space from one horizon to another."""

    results: RoundResults
    incumbents: Sequence[Trial]
    """Trials that will be enqueued, best first: every space must hold them."""
    leading: Sequence[Trial]
    """Trials around whose values spaces are narrowed, the incumbents among them, best first."""
    new_horizon: int
    decay: DecayRule

    def changes(self) -> dict[str, HyperparameterChange]:
        """What every hyperparameter becomes, in the old space's order.

        Rule: Deep Learning Tuning Playbook, "Round 1: Many short training runs" (what is likely to
        transfer); what is done with each tier is this project's decision.
        """
        return {name: self._change(name, dimension) for name, dimension in self.results.space.items()}

    def point(self, incumbent: Trial) -> dict[str, Value]:
        """All hyperparameters of an incumbent in the next round: its own, the decay re-cut."""
        values = dict(incumbent.hyperparameters)
        if "decay_steps" in values:
            values["decay_steps"] = self._recut(values["decay_steps"])
        return values

    def _change(self, name: str, old: Dimension) -> HyperparameterChange:
        tier = tier_of(name)
        new, reason = self._dimension(name, old, tier)
        held = widened(new, [self.point(t)[name] for t in self.incumbents if name in t.hyperparameters])
        if held != new:
            reason += "; widened to hold the enqueued trials"
        return HyperparameterChange(old, held, tier, reason)

    def _dimension(self, name: str, old: Dimension, tier: Tier) -> tuple[Dimension, str]:
        if name == "decay_steps":
            return self._decay(old)
        if isinstance(old, TimesSqrtRank):
            return old, "follows lora_r"
        if isinstance(old, Fixed):
            return old, self._reason_to_stay(name)
        values = [t.hyperparameters[name] for t in self.leading if name in t.hyperparameters]
        if not values:
            return old, "searched as before: no trial is complete"
        match tier:
            case Tier.VERY_LIKELY:
                return Fixed(values[0]), "the best trial's value, very likely to hold in longer runs"
            case Tier.KEPT:
                return Fixed(values[0]), "the best trial's value; changing it would start the tuning anew"
            case Tier.LIKELY:
                new = as_listed(old, values)
                agree = "agree on it" if isinstance(new, Fixed) else "used these"
                return new, f"the leading trials {agree}; likely to hold in longer runs"
            case Tier.UNLIKELY:
                return old, "searched as before: what was best is unlikely to hold in longer runs"
            case Tier.MIGHT:
                return self._might(name, old, values)

    def _reason_to_stay(self, name: str) -> str:
        if name == "learning_rate" and self.new_horizon != self.results.max_train_steps:
            factor = moved_rate(1.0, old_horizon=self.results.max_train_steps, new_horizon=self.new_horizon)
            return f"fixed, as before; other horizons often want another rate, here about {factor:.2f} times"
        return "fixed, as before"

    def _might(self, name: str, old: Choices | Range, values: Sequence[Value]) -> tuple[Dimension, str]:
        rate = number(values[0])
        if name != "learning_rate" or not isinstance(old, Range) or rate is None:
            return narrowed(old, values), "around the leading trials; might hold in longer runs"
        centre = moved_rate(rate, old_horizon=self.results.max_train_steps, new_horizon=self.new_horizon)
        space = rate_range(old, centre, ceiling=self._unstable_rate())
        moved = f" moved by {centre / rate:.2f} for the new horizon" if centre != rate else ""
        return space, f"a third to three times the best trial's {rate:.2g}{moved}"

    def _unstable_rate(self) -> float:
        """The lowest rate above every one that trained, at which a trial was infeasible."""
        rates = [
            (rate, trial.state == TrialState.INFEASIBLE)
            for trial in self.results.results
            if (rate := number(trial.hyperparameters.get("learning_rate"))) is not None
        ]
        edge = max((rate for rate, infeasible in rates if not infeasible), default=math.inf)
        return min((rate for rate, infeasible in rates if infeasible and rate > edge), default=math.inf)

    def _decay(self, old: Dimension) -> tuple[Dimension, str]:
        new = _mapped(old, self._recut)
        if not self._can_be_linear():
            return new, "means nothing to this schedule"
        if self.results.max_train_steps == self.new_horizon:
            return new, "as before, and so is the horizon"
        if self.decay == "share":
            return new, "re-cut: the same share of the run as before"
        now = ""
        if isinstance(old, Fixed) and isinstance(new, Fixed):
            before, after = (int(number(d.value) or 0) for d in (old, new))
            if after < before:
                return new, f"re-cut: all that the warmup leaves of {self.new_horizon} steps"
            now = f", {percent(after / self.new_horizon)} now"
        return new, f"re-cut: as long as before, and at least 20% of the run{now}"

    def _can_be_linear(self) -> bool:
        match self.results.space.get("schedule"):
            case Fixed(value=value):
                return value == "linear"
            case Choices(values=values):
                return "linear" in values
            case _:
                return False

    def _recut(self, decay_steps: Value) -> int:
        warmups = [number(trial.hyperparameters.get("warmup_steps")) for trial in self.incumbents]
        return recut_decay(
            int(number(decay_steps) or 0),
            old_horizon=self.results.max_train_steps,
            new_horizon=self.new_horizon,
            warmup_steps=int(max((w or 0 for w in warmups), default=self._longest_old_warmup())),
            keep=self.decay,
        )

    def _longest_old_warmup(self) -> float:
        old = self.results.space.get("warmup_steps")
        return longest(old) if old is not None else 0


def longest(dimension: Dimension) -> float:
    """The largest number that a dimension holds; 0 where it holds none.

    Rule: this project's decision: the longest warmup must fit into the horizon.
    """
    match dimension:
        case Fixed(value=value):
            return number(value) or 0
        case Choices(values=values):
            return max(number(value) or 0 for value in values)
        case Range(high=high):
            return high
        case _:
            return 0


def _mapped(old: Dimension, recut: Callable[[Value], int]) -> Dimension:
    match old:
        case Fixed(value=value):
            return Fixed(recut(value))
        case Choices(values=values):
            return as_listed(old, [recut(value) for value in values])
        case Range(low=low, high=high):
            shortest, latest = recut(math.ceil(low)), recut(math.floor(high))
            if shortest >= latest:
                return Fixed(latest)
            return Range(shortest, latest, log=old.log and shortest > 0, integer=True)
        case _:
            return old
