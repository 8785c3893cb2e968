"""A task's table, and the ledger of one replay on it: what was tried, what it cost, what was found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tuner.records import Range

BUDGET = 600
"""Full-length runs after which a replay that has not got there counts as this many."""
CLOSE = (0.05, 0.01)
"""How near to the best loss of the table a replay has to come; it ends at the nearest."""


class ReplayOver(Exception):
    """The best is found, the budget is spent, or every configuration was tried."""


class UnreadableTask(Exception):
    """A file that is no table of learning curves."""


@dataclass(frozen=True)
class Task:
    """One file: configurations, their curves, and the space that all methods search."""

    name: str
    space: dict[str, Range]
    """By coordinate: the table's own bounds, on a log scale; `beta` is searched as 1 - beta."""
    values: np.ndarray
    """[configurations, coordinates]."""
    unit: np.ndarray
    """The same in the unit cube: where distances are measured."""
    curves: np.ndarray
    """[configurations, evaluations] of validation loss; NaN where a run diverged."""
    train_curves: np.ndarray
    steps: tuple[int, ...]

    @property
    def full(self) -> int:
        """Evaluation intervals of a full-length run."""
        return len(self.steps) - 1

    @property
    def best(self) -> float:
        """The lowest loss of any configuration at any step."""
        return float(np.nanmin(self.curves))

    @property
    def start(self) -> float:
        """The median loss before training."""
        return float(np.nanmedian(self.curves[:, 0]))

    def to_unit(self, point: dict[str, float]) -> np.ndarray:
        """A point of the space in the unit cube."""
        low = np.log([dimension.low for dimension in self.space.values()])
        high = np.log([dimension.high for dimension in self.space.values()])
        return (np.log([point[name] for name in self.space]) - low) / (high - low)

    def point(self, row: int) -> dict[str, float]:
        """A configuration by coordinate."""
        return dict(zip(self.space, self.values[row].tolist(), strict=True))


def read_task(path: Path, *, every_steps: int = 200) -> Task:
    """Read one `.npz` file. Raises UnreadableTask."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values = np.array(file["hyperparameters"], dtype=np.float64)
            names = [str(name) for name in file["names"]]
            curves = np.array(file["valid_loss"], dtype=np.float64)
            train = np.array(file["train_loss"], dtype=np.float64)
    except (OSError, ValueError, KeyError) as error:
        raise UnreadableTask(
            f"{path}: expects hyperparameters, names, valid_loss, train_loss: {error}"
        ) from error
    if len(names) != values.shape[1] or len(curves) != len(values) or (values <= 0).any():
        raise UnreadableTask(
            f"{path}: hyperparameters must be positive, a row for each curve, a name for each column"
        )
    curves[~np.isfinite(curves)] = np.nan
    train[~np.isfinite(train)] = np.nan
    if not np.isfinite(curves).any() or (curves.min(initial=1.0, where=np.isfinite(curves)) <= 0):
        raise UnreadableTask(f"{path}: losses must be positive")
    for column, name in enumerate(names):
        if name.startswith("beta"):
            values[:, column] = 1.0 - values[:, column]
            names[column] = f"one_minus_{name}"
    space = {
        name: Range(float(values[:, column].min()), float(values[:, column].max()), log=True)
        for column, name in enumerate(names)
    }
    logs = np.log(values)
    unit = (logs - logs.min(axis=0)) / (logs.max(axis=0) - logs.min(axis=0))
    steps = tuple(range(0, every_steps * curves.shape[1], every_steps))
    return Task(path.stem, space, values, unit, curves, train, steps)


@dataclass
class Ledger:
    """One replay: costs are in evaluation intervals, of which a full-length run has `task.full`."""

    task: Task
    seed: int
    budget: int = BUDGET
    spent: int = 0
    best: float = float("inf")
    trace: list[tuple[int, float]] = field(default_factory=list)
    """(spent, loss) at each improvement."""

    def __post_init__(self) -> None:
        self._free = np.ones(len(self.task.values), dtype=bool)

    def snap(self, point: dict[str, float]) -> int:
        """Take the nearest configuration that no trial of this replay had yet."""
        return self.snap_unit(self.task.to_unit(point))

    def snap_unit(self, unit: np.ndarray) -> int:
        """The same for a point of the unit cube."""
        if not self._free.any():
            raise ReplayOver
        distances = ((self.task.unit - unit) ** 2).sum(axis=1)
        distances[~self._free] = np.inf
        row = int(distances.argmin())
        self._free[row] = False
        return row

    def run(self, row: int, start: int, end: int) -> float:
        """Train a configuration from one interval to another; the best loss up to there.

        Infinite when it diverges on the way: what is left is then not run and not charged.
        """
        curve = self.task.curves[row]
        for at in range(start, end + 1):
            if at > start:
                self.charge(1)
            if not np.isfinite(curve[at]):
                return float("inf")
            self.see(float(curve[at]))
        return float(curve[: end + 1].min())

    def charge(self, intervals: int) -> None:
        """Count work. Raises ReplayOver when the budget is spent."""
        self.spent += intervals
        if self.spent >= self.budget * self.task.full:
            raise ReplayOver

    def see(self, loss: float) -> None:
        """Take note of an evaluation. Raises ReplayOver when it is as near to the best as asked."""
        if not loss < self.best:
            return
        self.best = loss
        self.trace.append((self.spent, loss))
        if loss <= self.task.best * (1 + min(CLOSE)):
            raise ReplayOver

    def cost(self, closeness: float) -> float:
        """Full-length runs until the best was that near; the budget if it never was."""
        limit = self.task.best * (1 + closeness)
        reached = next((spent for spent, loss in self.trace if loss <= limit), None)
        return float(self.budget) if reached is None else reached / self.task.full
