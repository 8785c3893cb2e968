"""Whether a run reproduces another, evaluation by evaluation, up to rounding."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tuner.records import Evaluation, Trial, TrialState

TOLERANCE = 1e-4
"""Relative, for losses in float32 with `adamw`, where kernels change with the shape of a pass."""
TOLERANCE_8BIT_OPTIMIZER = 1e-3
"""The same with `adamw_8bit`, which amplifies rounding."""
TOLERANCE_ROUNDED = {"none": 2e-3, "nf4": 1e-2, "int8": 1e-2}
"""By quantization, for a base model in less than float32 or one with rounded activations. Measured on a tiny
model: 1e-3 in bfloat16, up to 1e-2 in bfloat16 over NF4; int8 is assumed to be as wide."""


class Agreement(StrEnum):
    """The result of comparing two runs."""

    EQUAL = "equal"
    """Digit for digit."""
    WITHIN_TOLERANCE = "within_tolerance"
    DIFFERS = "differs"


@dataclass(frozen=True, slots=True)
class Pair:
    """The evaluation losses of both runs at a step; None if a run was not evaluated there."""

    step: int
    recorded: float | None
    again: float | None

    @property
    def difference(self) -> float:
        """Relative; infinite if only one of them is a number."""
        one, other = self.recorded, self.again
        if one is None or other is None:
            return math.inf
        if one == other or (math.isnan(one) and math.isnan(other)):
            return 0.0
        if not (math.isfinite(one) and math.isfinite(other)):
            return math.inf
        return abs(other - one) / max(abs(one), abs(other))


@dataclass(frozen=True, slots=True)
class Changed:
    """One property of the environment that changed; None if it was not recorded."""

    name: str
    recorded: str | None
    again: str


@dataclass(frozen=True, slots=True)
class Reproduction:
    """A recorded trial and its second run."""

    trial: Trial
    from_step: int
    """Nothing was run again up to this step: it is a checkpoint of another trial, which this one continues.
    """
    to_step: int
    """The last step that was to be run."""
    pairs: tuple[Pair, ...]
    """By step, those after `from_step`; from step 0, the base model's too."""
    tolerance: float
    """Relative difference up to which losses count as the same."""
    ended_as: TrialState | None
    """How the run ended; running if it outlived a recorded end; None if it was not run to its end."""
    reason: str | None
    changed: tuple[Changed, ...]
    remarks: tuple[str, ...] = ()

    @property
    def agreement(self) -> Agreement:
        """Return the agreement of the losses and of how the run ended."""
        if not self.ends_alike or self.first_beyond is not None:
            return Agreement.DIFFERS
        return Agreement.EQUAL if self.largest is None else Agreement.WITHIN_TOLERANCE

    @property
    def ends_alike(self) -> bool:
        """Return whether the run ended as recorded; one stopped early must not have been infeasible."""
        if self.ended_as is None:
            return True
        if self.trial.state != TrialState.INFEASIBLE or self.ended_as != TrialState.INFEASIBLE:
            return self.ended_as == self.trial.state
        return _without_decimals(self.reason) == _without_decimals(self.trial.reason)

    @property
    def first_beyond(self) -> Pair | None:
        """Return the first evaluation that differs by more than the tolerance."""
        return next((pair for pair in self.pairs if pair.difference > self.tolerance), None)

    @property
    def largest(self) -> Pair | None:
        """Return the evaluation that differs most, the first of several; None if none differs."""
        differing = [pair for pair in self.pairs if pair.difference > 0]
        return max(differing, key=lambda pair: pair.difference, default=None)


def pairs(
    recorded: Iterable[Evaluation], again: Iterable[Evaluation], *, from_step: int, to_step: int
) -> tuple[Pair, ...]:
    """Return both runs' losses by step: after `from_step`, or from 0 if that is 0, up to `to_step`.

    Rule: this project's decision: inherited evaluations prove nothing.
    """
    one, other = ({e.step: e.eval_loss for e in evaluations} for evaluations in (recorded, again))
    steps = (s for s in sorted({*one, *other}) if s <= to_step and (s > from_step or from_step == 0))
    return tuple(Pair(step, one.get(step), other.get(step)) for step in steps)


def tolerance(*, dtype: str, quantization: str, amplifies_rounding: bool) -> float:
    """Return the relative difference of losses that rounding explains if not all digits are equal.

    Rule: this project's decision; packed or on another device than before, kernels sum in another order.
    """
    if dtype != "float32" or quantization == "int8":
        return TOLERANCE_ROUNDED[quantization]
    return TOLERANCE_8BIT_OPTIMIZER if amplifies_rounding else TOLERANCE


PLACE = frozenset({"node", "gpu", "worker"})
"""Of an environment: where the attempt ran, which is no part of what it computed with."""


def changed(recorded: Sequence[Mapping[str, str]], again: Mapping[str, str]) -> tuple[Changed, ...]:
    """Return what differs between the environments of a trial's attempts and that of the second run.

    Rule: this project's decision: a difference in any attempt is reported, but not another machine, GPU or
    process of the same kind.
    """
    again = {name: value for name, value in again.items() if name not in PLACE}
    if not recorded:
        return tuple(Changed(name, None, value) for name, value in again.items())
    then = {name: dict.fromkeys(env.get(name, "-") for env in recorded) for name in again}
    return tuple(
        Changed(name, ", ".join(then[name]), value)
        for name, value in again.items()
        if set(then[name]) != {value}
    )


def _without_decimals(reason: str | None) -> str:
    """Remove the decimal numbers from a reason, since they are rounded as losses are; its steps stay."""
    return re.sub(r"\d+\.\d+", "#", reason or "")
