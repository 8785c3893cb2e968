"""The description of a hyperparameter: default, kind, meaning, likelihood of transfer, when it applies."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from tuner.methods.kinds import Kind
from tuner.records import Condition, Dimension, Fixed, Hyperparameters, Space, Value


class Tier(StrEnum):
    """How likely the best value in short runs is also the best in long runs."""

    VERY_LIKELY = "very_likely"
    LIKELY = "likely"
    MIGHT = "might"
    UNLIKELY = "unlikely"
    KEPT = "kept"
    """Never changed between rounds, since changing it requires tuning to start over."""


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """One row of the table in docs/reference/hyperparameters.md."""

    name: str
    default: Value | None
    """None where the default depends on the horizon; see `default_note`."""
    kind: Kind
    meaning: str
    default_note: str = ""
    """What the default depends on, in words, for the reference page."""
    only_if_written: bool = False
    """Whether trials have it only if the round file names it; otherwise its default is used."""
    may_follow_rank: bool = False
    """Whether `{times_sqrt_r: FACTOR}` is allowed."""
    tier: Tier = Tier.MIGHT
    only_with: Condition | None = None
    """Another hyperparameter and the values of it to which this one applies; None if it always applies.

    The table sets this for hyperparameters of optimizers and schedules: the methods that declare them.
    """
    in_decay: Literal["length", "shape"] | None = None
    """Set if it affects only the decay at the end of a run: `length` in steps, which is rescaled with the
    horizon, or `shape`. None if the steps before the decay depend on it too."""

    @property
    def allowed(self) -> str:
        """Return the allowed values in words."""
        return self.kind.allowed + (" or {times_sqrt_r: FACTOR}" if self.may_follow_rank else "")

    def number(self, values: Hyperparameters) -> float:
        """Return its value in a trial, or its default; 0 if the default depends on the horizon."""
        value = self.value(values)
        if value is None:
            return 0.0
        assert isinstance(value, (int, float)), f"{self.name}: {value!r}"
        return float(value)

    def value(self, values: Hyperparameters) -> Value | None:
        """Return its value in a trial, or its default; None if the default depends on the horizon."""
        return values.get(self.name, self.default)

    def dimension(self, space: Space) -> Dimension:
        """Return its dimension in a space, or its default as one."""
        assert self.default is not None
        return space.get(self.name, Fixed(self.default))
