"""Choose each hyperparameter's dimension in the next round, and give the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from tuner.methods.hyperparameters import Tier
from tuner.methods.schedules import WARMUP_STEPS, DecayRule, warmup_length
from tuner.methods.table import counting
from tuner.methods.variants.initialisations import needs_even_ranks
from tuner.methods.variants.lora import LORA_INIT, LORA_R
from tuner.playbook.edges import Edge, number
from tuner.playbook.results import RoundResults, percent
from tuner.playbook.schedule import decay_lengths, schedules_of
from tuner.playbook.spaces import (
    as_listed,
    beyond_edge,
    capped,
    even,
    higher_rates,
    log_spaced,
    moved_rate,
    narrowed,
    rate_range,
    reaching,
    widened,
)
from tuner.records import (
    Choices,
    Dimension,
    Fixed,
    Hyperparameters,
    Range,
    TimesSqrtRank,
    Trial,
    TrialState,
    Value,
)

_RATE = "learning_rate"


@dataclass(frozen=True, slots=True)
class HyperparameterChange:
    """How one hyperparameter changes from a round to the next, if at all."""

    from_dimension: Dimension | None
    """None if the round did not have it, since no trial used the method that it belongs to."""
    to_dimension: Dimension
    tier: Tier
    reason: str
    """Written as the comment beside it in the next round's file."""


@dataclass(frozen=True)
class Carrying:
    """The search space of one horizon, to be carried over to another."""

    results: RoundResults
    incumbents: Sequence[Trial]
    """Trials that will be enqueued, best first; every dimension must contain their values."""
    leading: Sequence[Trial]
    """Trials around whose values dimensions are narrowed, incumbents included, best first."""
    new_horizon: int
    decay: DecayRule
    edges: Sequence[Edge] = ()
    """Bounds at which the best trial lies; each is widened."""
    widens_rates: bool = False
    """Whether only the learning rates are raised and everything else stays the same."""
    has_small_rates: bool = False
    """Whether the best trials had the highest learning rates, so that no rate is lowered for a longer run."""
    reopened: Mapping[str, Dimension] = field(default_factory=dict)
    """Dimensions restored from an earlier round."""
    added: Mapping[str, Dimension] = field(default_factory=dict)
    """Dimensions that the user adds to the search."""

    def changes(self) -> dict[str, HyperparameterChange]:
        """Return the change of every hyperparameter, in the order of the old space.

        Rule: Deep Learning Tuning Playbook, "Round 1: Many short training runs" (what is likely to transfer);
        what is done with each tier is this project's decision.
        """
        changes = {name: self._change(name, dimension) for name, dimension in self.results.space.items()}
        return changes | {
            name: HyperparameterChange(
                None, dimension, self.results.tier_of(name), f"searched again with {chooser}"
            )
            for name, dimension in self.reopened.items()
            if name not in changes
            and (chooser := dimension.only_with.chosen_by if dimension.only_with else "")
        }

    def point(self, incumbent: Trial) -> dict[str, Value]:
        """Return all hyperparameters of an incumbent in the next round, with its decay rescaled."""
        values = counting(incumbent.hyperparameters)
        for name in self.added:
            old = self.results.space.get(name)
            if name not in values and isinstance(old, Fixed):
                values[name] = old.value
        for name in self._lengths:
            if name in values:
                values[name] = self._rescaled(name, values[name], of=values)
        return values

    def _change(self, name: str, old: Dimension) -> HyperparameterChange:
        tier = self.results.tier_of(name)
        points = [self.point(trial) for trial in self.incumbents]
        held = [point[name] for point in points if name in point]
        if name in self.added:
            new, reason = _added(self.added[name], held)
            return HyperparameterChange(old, replace(new, only_with=old.only_with), tier, reason)
        new, reason = self._dimension(name, old, tier)
        if (edge := self._edge(name)) is not None:
            further = self._beyond(name, old, new, edge)
            if further != new:
                reason += f"; widened because the best trial is at the {edge.side} bound, {edge.bound:g}"
            new = further
        wide = widened(new, held)
        if wide != new:
            reason += "; widened to include the enqueued trials"
        return HyperparameterChange(old, replace(wide, only_with=old.only_with), tier, reason)

    def _dimension(self, name: str, old: Dimension, tier: Tier) -> tuple[Dimension, str]:
        if name in self._lengths:
            return self._decay(name, old)
        if self.widens_rates:
            return self._with_higher_rates(name, old)
        if name in self.reopened:
            return self.reopened[name], "searched again: the earlier ranking of trials did not hold"
        if isinstance(old, TimesSqrtRank):
            return old, "follows lora_r"
        if isinstance(old, Fixed):
            return old, self._reason_to_stay(name)
        values = self._values(name)
        if not values:
            lacks = (
                "none of the leading trials has it"
                if self.leading
                else "no complete trial beat the base model"
            )
            return old, f"searched as before: {lacks}"
        match tier:
            case Tier.VERY_LIKELY:
                return Fixed(values[0]), "the best trial's value, very likely to hold in longer runs"
            case Tier.KEPT:
                return Fixed(
                    values[0]
                ), "the best trial's value; changing it would mean tuning everything again"
            case Tier.LIKELY:
                new = as_listed(old, values)
                agree = "agree on it" if isinstance(new, Fixed) else "used these"
                return new, f"the leading trials {agree}; likely to hold in longer runs"
            case Tier.UNLIKELY:
                return old, "searched as before: the best value is unlikely to hold in longer runs"
            case Tier.MIGHT:
                return self._might(name, old, values)

    def _values(self, name: str) -> list[Value]:
        """Return the leading trials' values, the best trial's first."""
        return [t.hyperparameters[name] for t in self.leading if name in t.hyperparameters]

    def _with_higher_rates(self, name: str, old: Dimension) -> tuple[Dimension, str]:
        if name != _RATE:
            return old, "as before: higher learning rates are tried first"
        limits = self.results.limits.get(name, (None, None))
        return higher_rates(old, limits), (
            "up to 10 times higher: the best trials had the highest rates, so all of them may be too small"
        )

    def _edge(self, name: str) -> Edge | None:
        if self.widens_rates:
            return None
        return next((edge for edge in self.edges if edge.name == name), None)

    def _beyond(self, name: str, old: Dimension, new: Dimension, edge: Edge) -> Dimension:
        """Extend the new dimension beyond the bound of the old one at which the best trial lies."""
        is_decay = name in self._lengths
        before = new if is_decay else old
        # A dimension that the tier would fix stays searched, around the leading trials.
        base = new if is_decay or isinstance(new, type(old)) else narrowed(old, self._values(name))
        wide = beyond_edge(before, edge, self.results.limits.get(name, (None, None)))
        if is_decay or name == WARMUP_STEPS.name:
            room = self._room(name)
            if room <= longest(base):
                return new
            wide = capped(wide, room)
        if name == LORA_R.name and self._needs_even_ranks:
            wide = even(wide)
        return new if wide == before else reaching(base, wide, edge.side)

    @cached_property
    def _needs_even_ranks(self) -> bool:
        """Return whether an initialisation of the next round refuses odd ranks."""
        old = self.results.space.get(LORA_INIT.name)
        return old is not None and needs_even_ranks(self._change(LORA_INIT.name, old).to_dimension)

    def _room(self, name: str) -> float:
        """Return the steps that warmup and decay leave for one of them at its longest."""
        space = self.results.space
        others = [other for other in (WARMUP_STEPS.name, *self._lengths) if other != name and other in space]
        return self.new_horizon - sum(longest(self._beside(other, space[other])) for other in others)

    def _beside(self, name: str, old: Dimension) -> Dimension:
        if name in self._lengths:
            return self._decay(name, old)[0]
        return self._change(name, old).to_dimension

    def _reason_to_stay(self, name: str) -> str:
        if name == _RATE and self.new_horizon != self.results.max_train_steps:
            factor = moved_rate(1.0, old_horizon=self.results.max_train_steps, new_horizon=self.new_horizon)
            return (
                f"fixed, as before; the best rate often changes with the horizon, here about {factor:.2f} "
                "times"
            )
        return "fixed, as before"

    def _might(self, name: str, old: Choices | Range, values: Sequence[Value]) -> tuple[Dimension, str]:
        rate = number(values[0])
        if name != _RATE or not isinstance(old, Range) or rate is None:
            return narrowed(old, values), "around the leading trials; might hold in longer runs"
        centre = moved_rate(rate, old_horizon=self.results.max_train_steps, new_horizon=self.new_horizon)
        edge = self._edge(name)
        if self.has_small_rates or (edge is not None and edge.side == "upper"):
            centre = max(centre, rate)
        space = rate_range(old, centre, ceiling=self._unstable_rate())
        moved = f" moved by {centre / rate:.2f} for the new horizon" if centre != rate else ""
        return space, f"a third to three times the best trial's {rate:.2g}{moved}"

    def _unstable_rate(self) -> float:
        """Return the lowest infeasible learning rate above all rates that trained."""
        rates = [
            (rate, trial.state == TrialState.INFEASIBLE)
            for trial in self.results.results
            if (rate := number(trial.hyperparameters.get(_RATE))) is not None
        ]
        edge = max((rate for rate, infeasible in rates if not infeasible), default=math.inf)
        return min((rate for rate, infeasible in rates if infeasible and rate > edge), default=math.inf)

    @cached_property
    def _lengths(self) -> tuple[str, ...]:
        """Return the names of the space that are the length of a decay."""
        return decay_lengths(self.results.space)

    def _decay(self, name: str, old: Dimension) -> tuple[Dimension, str]:
        if self.results.max_train_steps == self.new_horizon:
            return old, "as before, at the same horizon"
        new = _mapped(old, lambda value: self._rescaled(name, value))
        if isinstance(old, Fixed) and isinstance(new, Fixed):
            now = f", {percent((number(new.value) or 0) / self.new_horizon)}"
            if new.value != self._rescaled(name, old.value, warmup_steps=0):
                return new, f"rescaled: all steps that the warmup leaves of {self.new_horizon}"
        else:
            now = ""
        if self.decay == "share":
            return new, f"rescaled: the same share of the run as before{now}"
        return new, f"rescaled: as long as before, and at least 20% of the run{now and now + ' now'}"

    def _rescaled(
        self, name: str, value: Value, *, of: Hyperparameters | None = None, warmup_steps: int | None = None
    ) -> int:
        """Return the length of a decay in the next round, of a trial or of any."""
        old_horizon, horizon = self.results.max_train_steps, self.new_horizon
        known = of or {n: d.value for n, d in self.results.space.items() if isinstance(d, Fixed)}
        if warmup_steps is None:
            warmup_steps = warmup_length(of or {}) if old_horizon == horizon else self._longest_warmup()
        values = {**known, name: value, WARMUP_STEPS.name: warmup_steps}
        own = next(s for s in schedules_of(self.results.space) if name in {r.name for r in s.decay_lengths})
        return int(number(own.rescale(values, old_horizon, horizon, self.decay)[name]) or 0)

    def _longest_warmup(self) -> int:
        """Return the longest warmup of the incumbents, or of the space if there are none."""
        warmups = [number(trial.hyperparameters.get("warmup_steps")) for trial in self.incumbents]
        return int(max((w or 0 for w in warmups), default=self._longest_old_warmup()))

    def _longest_old_warmup(self) -> float:
        old = self.results.space.get("warmup_steps")
        return longest(old) if old is not None else 0


def _added(wanted: Dimension, held: Sequence[Value]) -> tuple[Dimension, str]:
    """Return the dimension that the user adds, widened to the incumbents' values."""
    numbers = [n for value in held if (n := number(value)) is not None]
    if isinstance(wanted, Range) and wanted.log and min(numbers, default=1.0) <= 0:
        listed = as_listed(wanted, (*dict.fromkeys(held), *log_spaced(wanted)))
        return (
            listed,
            "added by --add, as a list: a logarithmic range cannot include the 0 of the enqueued trials",
        )
    new = widened(wanted, held)
    return new, "added by --add" + ("; widened to include the enqueued trials" if new != wanted else "")


def longest(dimension: Dimension) -> float:
    """Return the largest number in a dimension; 0 if it has none.

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


def _mapped(old: Dimension, rescale: Callable[[Value], int]) -> Dimension:
    match old:
        case Fixed(value=value):
            return Fixed(rescale(value))
        case Choices(values=values):
            return as_listed(old, [rescale(value) for value in values])
        case Range(low=low, high=high):
            shortest, latest = rescale(math.ceil(low)), rescale(math.floor(high))
            if shortest >= latest:
                return Fixed(latest)
            return Range(shortest, latest, log=old.log and shortest > 0, integer=True)
        case _:
            return old
