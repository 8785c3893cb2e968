"""What a tool outside has to do for a round, which tools there are, and what they are told of a trial."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from tuner.methods.registry import is_built_in, load
from tuner.playbook.selection import best_evaluation
from tuner.records import Evaluation, Trial


@dataclass(frozen=True, slots=True)
class FollowedRound:
    """The round whose trials are shown."""

    study: str
    round: str
    goal: str
    max_train_steps: int
    checkpoints: Path
    """The study's `checkpoints.directory`, absolute: what tools keep here lies in it."""

    def name(self, trial: Trial) -> str:
        """What its run is called."""
        return f"{self.round}/{trial.number}"

    def settings(self, trial: Trial) -> dict[str, bool | int | float | str]:
        """Hyperparameters and what else the trial was run with, in words that every tool takes."""
        values = {
            name: ",".join(value) if isinstance(value, tuple) else value
            for name, value in trial.hyperparameters.items()
        }
        values["max_train_steps"] = self.max_train_steps
        return values if trial.continues is None else {**values, "continues": str(trial.continues)}


class Tool(Protocol):
    """Shows each trial as a run of its own. Every method may take long and may raise anything."""

    def begin(self, trial: Trial) -> frozenset[int]:
        """Open the trial's run, or go on with it; returns the steps whose points it has already."""
        ...

    def point(self, trial: Trial, evaluation: Evaluation) -> None:
        """Add a point of the curve."""
        ...

    def end(self, trial: Trial) -> None:
        """The trial has ended. Said again when the round is gone on with."""
        ...

    def close(self) -> None:
        """Write out what is waiting; trials that have not ended go on another time."""
        ...


def open_tool(name: str, followed: FollowedRound) -> Tool:
    """The tool that `run.report_to` calls so. Raises whatever its library does when it is imported.

    One that is not tuner's is called with the round, and gives a `Tool`.
    """
    if is_built_in("tracker", name):
        tool: Tool = import_module(f"tuner.report.elsewhere.{name}_runs").open_tool(followed)
        return tool
    opened: Tool = load("tracker", name)(followed)
    return opened


def not_installed(names: Iterable[str]) -> list[str]:
    """Those of the tools whose library cannot be imported here."""
    return [name for name in names if is_built_in("tracker", name) and find_spec(name) is None]


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """A point of the curve."""
    values = {
        "train_loss": evaluation.train_loss,
        "eval_loss": evaluation.eval_loss,
        "learning_rate": evaluation.learning_rate,
    }
    return {name: value for name, value in values.items() if value is not None}


def outcome(trial: Trial) -> dict[str, int | float]:
    """The best step, its loss and the score of its answers, as far as a trial has them."""
    best, answers = best_evaluation(trial.evaluations), trial.answer_score
    if best is None:
        return {}
    scored = {} if answers is None else {"answer_score": answers.mean}
    return {"best_step": best.step, "best_eval_loss": best.eval_loss, **scored}
