"""Recorded runs: which belong together, and where a branched one began."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RATIOS = (1.3, 3.4)
"""Horizons of a round and its answer stand between these factors."""
NUM_CUTS = 7
"""A constant run is read at so many horizons, its end and others a factor sqrt(2) apart."""
MIN_EVALUATIONS = 8
"""A constant run is not cut shorter than this."""


class UnreadableRuns(Exception):
    """The file of runs is not what its page says; the text says where."""


class Family(NamedTuple):
    """What runs have in common that differ in schedule and horizon alone."""

    data: str
    layers: int
    width: int
    learning_rate: float
    warmup_steps: int
    batch_size: int
    weight_decay: float
    seed: int
    data_seed: str

    @property
    def size(self) -> tuple[object, ...]:
        """Runs of one size could be trials of one round."""
        return self.data, self.layers, self.width, self.batch_size


@dataclass(frozen=True)
class Run:
    """A run from step 0 to its horizon."""

    family: Family
    schedule: str
    max_train_steps: int
    decay_steps: int
    curve: tuple[tuple[int, float], ...]
    """(step, loss), by step, each step once; the last may lie before the horizon."""
    origin: int = 0
    """Place in the file; the cuts of a constant run share it."""

    @property
    def share(self) -> float:
        """Part of the run that decays linearly."""
        return self.decay_steps / self.max_train_steps

    @property
    def shape(self) -> str:
        """The class of schedules that its figures are counted in."""
        if self.schedule != "linear":
            return self.schedule
        return "linear, up to 40%" if self.share <= 0.4 + 0.5 / self.max_train_steps else "linear, above 40%"

    @cached_property
    def best_loss(self) -> float:
        """The lowest loss of its evaluations."""
        return min(loss for _, loss in self.curve)

    @cached_property
    def noise(self) -> float:
        """Spread of the last quarter's losses around a line, relative to the loss."""
        last = self.curve[-max(6, math.ceil(len(self.curve) / 4)) :]
        steps, losses = np.array(last, dtype=np.float64).T
        residuals = losses - np.polyval(np.polyfit(steps - steps[-1], losses, 1), steps - steps[-1])
        return math.sqrt(float(residuals @ residuals) / max(1, len(last) - 2)) / self.best_loss

    def cut(self, step: int) -> Run:
        """A constant run as it would have been with a shorter horizon."""
        assert self.schedule == "constant"
        return replace(self, max_train_steps=step, curve=tuple(p for p in self.curve if p[0] <= step))


@dataclass(frozen=True)
class Runs:
    """The runs of a file."""

    runs: tuple[Run, ...]
    left_out: tuple[str, ...]
    """One line for each run that no round can be made of."""


def load_runs(path: Path) -> Runs:
    """Read the runs of a file, decayed ones with the stable phase that they left. Raises UnreadableRuns."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return assemble_runs(json.load(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreadableRuns(f"{path}: {type(error).__name__}: {error}") from error


def assemble_runs(entries: Sequence[dict[str, Any]]) -> Runs:
    """The runs of the file's objects; a branched one begins with the constant run of its family."""
    constant = [entry for entry in entries if entry["schedule"] == "constant"]
    runs, left_out = [], []
    for origin, entry in enumerate(entries):
        curve, first = _once(entry["curve"]), entry["first_step"]
        if first > 0:
            stable = _stable_phase(entry, curve, constant)
            if stable is None:
                left_out.append(f"{_family(entry)}: no constant run up to step {first} to begin with")
                continue
            curve = {step: loss for step, loss in stable.items() if step < first} | curve
        horizon = entry["max_train_steps"]
        decay = horizon - entry["decay_begins"] if entry["schedule"] == "linear" else 0
        points = tuple(sorted(curve.items()))
        runs.append(Run(_family(entry), entry["schedule"], horizon, decay, points, origin))
    return Runs(tuple(runs), tuple(left_out))


def _family(entry: dict[str, Any]) -> Family:
    return Family(**{name: entry[name] for name in Family._fields})


def _once(curve: Iterable[Sequence[float]]) -> dict[int, float]:
    """Loss by step. A run that was interrupted has steps twice; the last one is what it went on with."""
    return {int(step): float(loss) for step, loss in curve}


def _stable_phase(
    entry: dict[str, Any], curve: dict[int, float], constant: Sequence[dict[str, Any]]
) -> dict[int, float] | None:
    """Of the family's constant runs that reach the branch, the one that agrees with its first loss."""
    first = min(curve)
    candidates = [_once(other["curve"]) for other in constant if _family(other) == _family(entry)]
    reaching = [losses for losses in candidates if first in losses]
    return min(reaching, key=lambda losses: abs(losses[first] - curve[first]), default=None)


def pieces(run: Run) -> tuple[Run, ...]:
    """A run at the horizons it can be read at: its own, and for a constant one shorter ones too."""
    if run.schedule != "constant":
        return (run,)
    steps = [step for step, _ in run.curve]
    wanted = [steps[-1] * 2 ** (-k / 2) for k in range(NUM_CUTS)]
    nearest = {min(steps, key=lambda step: abs(step - horizon)) for horizon in wanted}
    return tuple(run.cut(step) for step in sorted(nearest) if steps.index(step) >= MIN_EVALUATIONS)


def is_longer_partner(longer: Run, run: Run) -> bool:
    """Whether one run is the other with a longer horizon, and not too far away to be its answer."""
    if (longer.family, longer.schedule) != (run.family, run.schedule):
        return False
    if run.schedule == "constant" and longer.origin != run.origin:
        return False
    low, high = RATIOS
    return low <= longer.max_train_steps / run.max_train_steps <= high and _is_of_equal_share(longer, run)


def _is_of_equal_share(one: Run, other: Run) -> bool:
    rounding = 0.5 / one.max_train_steps + 0.5 / other.max_train_steps
    return abs(one.share - other.share) <= rounding
