"""What a command reports: JSON lines in the file `TUNER_METRICS`, read as evaluations while it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.errors import InputError, shown
from tuner.records import LOSS, Evaluation, Objective

_LOSS_NAME = "eval_loss"
_NOT_METRICS = frozenset({"step", "checkpoint", "processes", "infeasible", "train_loss", "learning_rate"})
"""Keys of a line with a meaning of their own."""
_OF_THE_CLOCK = ("_runtime", "_per_second", "epoch")
"""Ends of names that a Trainer reports beside its metrics."""


@dataclass(frozen=True, slots=True)
class SavedByCommand:
    """A checkpoint that the command says it has written."""

    step: int
    path: str
    processes: int = 1
    """Number of processes that trained, each of which leaves its random state."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a report."""

    step: int | None
    evaluation: Evaluation | None = None
    checkpoint: SavedByCommand | None = None
    infeasible: str | None = None
    train_loss: float | None = None
    began_at: int | None = None
    """Set by the hook alone: the step at which the Trainer began."""


@dataclass
class Curve:
    """Reads the lines of one run, in their order, as evaluations. `source` names it in messages."""

    source: str
    objective: Objective
    names: set[str] = field(default_factory=set)
    """Metrics seen so far."""
    _number: int = 0
    _evaluated: set[int] = field(default_factory=set)
    _losses: list[float] = field(default_factory=list)
    _rate: float | None = None

    def line(self, said: object) -> Line:
        """Read the next line. Raises InputError if it cannot be read."""
        self._number += 1
        return self._line(said)

    def _line(self, said: object) -> Line:
        if not isinstance(said, dict):
            raise self._wrong('expects a line such as {"step": 6, "eval_loss": 1.2}, got', said)
        if "began_at" in said:
            return Line(None, began_at=self._whole_in("began_at", said["began_at"]))
        step = said.get("step")
        infeasible = said.get("infeasible")
        if step is None and infeasible is not None:
            return Line(None, infeasible=str(infeasible))
        if step is None:
            raise self._wrong('has no step; expects a line such as {"step": 6, "eval_loss": 1.2}, got', said)
        step = self._whole_in("step", step)
        self._count(said)
        return Line(
            step,
            self._evaluation(step, said),
            self._checkpoint(step, said),
            None if infeasible is None else str(infeasible),
            self._losses[-1] if self._losses else None,
        )

    def _count(self, said: Mapping[str, Any]) -> None:
        if (loss := said.get("train_loss")) is not None:
            self._losses.append(self._number_in("train_loss", loss))
        if (rate := said.get("learning_rate")) is not None:
            self._rate = self._number_in("learning_rate", rate)

    def _evaluation(self, step: int, said: Mapping[str, Any]) -> Evaluation | None:
        """Return the evaluation in a line; the first one of a step counts."""
        found = {name: self._number_in(name, raw) for name, raw in said.items() if _is_metric(name)}
        self.names |= found.keys()
        if (self.objective.metric not in found and _LOSS_NAME not in found) or step in self._evaluated:
            return None
        self._evaluated.add(step)
        made = Evaluation(
            step,
            found.pop(_LOSS_NAME, math.nan),
            train_loss=sum(self._losses) / len(self._losses) if step and self._losses else None,
            learning_rate=self._rate if step else None,
            metrics=found,
            objective=None if self.objective == LOSS else self.objective,
        )
        self._losses.clear()
        return made

    def _checkpoint(self, step: int, said: Mapping[str, Any]) -> SavedByCommand | None:
        path = said.get("checkpoint")
        if path is None:
            return None
        if not isinstance(path, str) or not path:
            raise self._wrong("checkpoint: expects a path, got", path)
        return SavedByCommand(step, path, self._whole_in("processes", said.get("processes", 1)))

    def _number_in(self, name: str, raw: object) -> float:
        if isinstance(raw, bool) or not isinstance(raw, (int, float)):
            raise self._wrong(f"{name}: expects a number, got", raw)
        try:
            return float(raw)
        except OverflowError as error:
            raise self._wrong(f"{name}: expects a number that a float can be, got", raw) from error

    def _whole_in(self, name: str, raw: object) -> int:
        if type(raw) is not int or raw < 0:
            raise self._wrong(f"{name}: expects a whole number of at least 0, got", raw)
        return raw

    def _wrong(self, what: str, read: object) -> InputError:
        return InputError(f"{self.source}, line {self._number}: {what} {shown(read)}")


@dataclass
class MetricsFile:
    """The report of one attempt, read as it grows."""

    path: Path
    objective: Objective
    curve: Curve = field(init=False)
    _position: int = 0

    def __post_init__(self) -> None:
        self.curve = Curve(self.path.name, self.objective)

    @property
    def is_empty(self) -> bool:
        """Return whether no line was read yet."""
        return self._position == 0

    def new_lines(self) -> Iterator[Line]:
        """Yield the lines since the last call; an unfinished one is left for the next.

        Raises InputError for a line that cannot be read.
        """
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._position)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._position += len(raw)
                if raw.strip():
                    yield self.curve.line(_parsed(raw))


def _parsed(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw.decode(errors="replace")


def _is_metric(name: str) -> bool:
    return name not in _NOT_METRICS and not name.endswith(_OF_THE_CLOCK)


def not_finite(evaluation: Evaluation) -> str | None:
    """Return why an evaluation makes its trial infeasible; None if its numbers are finite.

    A loss that was not reported is no reason.
    """
    loss, value = evaluation.eval_loss, evaluation.value
    noun = "evaluation loss" if evaluation.objective is None else evaluation.objective.noun
    if not math.isfinite(value):
        return f"{noun} is {value} at step {evaluation.step}"
    if evaluation.objective is not None and math.isinf(loss):
        return f"evaluation loss is {loss} at step {evaluation.step}"
    return None
