"""What is known of a hyperparameter: default, kind, meaning, how likely it transfers, when it counts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from tuner.methods.kinds import Kind
from tuner.records import Condition, Hyperparameters, Value


class Tier(StrEnum):
    """The chance that what was best in short runs is best in long ones."""

    VERY_LIKELY = "very_likely"
    LIKELY = "likely"
    MIGHT = "might"
    UNLIKELY = "unlikely"
    KEPT = "kept"
    """No question of transfer: it stays as it is, since changing it starts the tuning anew."""


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """One row of the table in docs/reference/hyperparameters.md."""

    name: str
    default: Value | None
    """None where the default depends on the horizon; see `default_note`."""
    kind: Kind
    meaning: str
    default_note: str = ""
    """What the default depends on, in words."""
    only_if_written: bool = False
    """Whether a trial has it only in a round whose file names it; elsewhere it counts as its default."""
    may_follow_rank: bool = False
    """Whether `{times_sqrt_r: FACTOR}` is allowed."""
    tier: Tier = Tier.MIGHT
    only_with: Condition | None = None
    """Another hyperparameter and those of its values with which this one counts; None if it always does.

    Of a row that optimizers or schedules declare, the table fills this in: the methods that declare it.
    """
    in_decay: Literal["length", "shape"] | None = None
    """How it changes only the decay at the end of a run: as its length in steps, which is rescaled with the
    horizon, or as its shape. None if the steps before the decay depend on it too."""

    @property
    def allowed(self) -> str:
        """The values it accepts, in words."""
        return self.kind.allowed + (" or {times_sqrt_r: FACTOR}" if self.may_follow_rank else "")

    def number(self, values: Hyperparameters) -> float:
        """Return its value in a trial, or else its default; 0 where the default depends on the horizon."""
        value = self.value(values)
        if value is None:
            return 0.0
        assert isinstance(value, (int, float)), f"{self.name}: {value!r}"
        return float(value)

    def value(self, values: Hyperparameters) -> Value | None:
        """Return its value in a trial, or else its default; None where that depends on the horizon."""
        return values.get(self.name, self.default)
