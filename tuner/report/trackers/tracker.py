"""The interface of trackers, and the ledger of what each has been sent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from tuner.errors import InputError
from tuner.methods.registry import is_built_in, load
from tuner.playbook.selection import best_evaluation
from tuner.records import Evaluation, Trial
from tuner.whole import written_whole


@dataclass(frozen=True, slots=True)
class FollowedRound:
    """The round whose trials are shown."""

    study: str
    round: str
    goal: str
    max_train_steps: int
    checkpoints: Path
    """The study's `checkpoints.directory`, absolute; local files of trackers go here."""

    def name(self, trial: Trial) -> str:
        """Name of its run."""
        return f"{self.round}/{trial.number}"

    def settings(self, trial: Trial) -> dict[str, bool | int | float | str]:
        """Hyperparameters and other settings of the trial, as values that every tracker accepts."""
        values = {
            name: ",".join(map(str, value)) if isinstance(value, tuple) else value
            for name, value in trial.hyperparameters.items()
        }
        values["max_train_steps"] = self.max_train_steps
        return values if trial.continues is None else {**values, "continues": str(trial.continues)}


class Tool(Protocol):
    """A tracker with a run for each trial. Every method may be slow and may raise anything."""

    def begin(self, trial: Trial) -> frozenset[int]:
        """Open or resume the trial's run; return the steps whose points it already has."""
        ...

    def point(self, trial: Trial, evaluation: Evaluation) -> None:
        """Add a point of the curve."""
        ...

    def end(self, trial: Trial) -> None:
        """Mark the trial as ended. Called again when the round resumes."""
        ...

    def close(self) -> None:
        """Flush what is waiting; trials that have not ended resume another time."""
        ...


def open_tool(name: str, followed: FollowedRound) -> Tool:
    """Return the tracker with this name in `run.report_to`. Raises what importing its library raises.

    A custom tracker is called with the round and returns a `Tool`.
    """
    if is_built_in("tracker", name):
        tool: Tool = import_module(f"tuner.report.trackers.{name}_runs").open_tool(followed)
        return tool
    opened: Tool = load("tracker", name)(followed)
    return opened


def not_installed(names: Iterable[str]) -> list[str]:
    """Return the trackers whose library cannot be imported here."""
    return [name for name in names if is_built_in("tracker", name) and find_spec(name) is None]


def refuse_unusable(name: str) -> None:
    """Import a custom tracker. Raises InputError if it cannot be imported or called."""
    if not is_built_in("tracker", name) and not callable(found := load("tracker", name)):
        raise InputError(f"tracker {name}: expects a class or a function, got a {type(found).__name__}")


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """A point of the curve."""
    values = {
        "train_loss": evaluation.train_loss,
        "eval_loss": evaluation.eval_loss,
        "learning_rate": evaluation.learning_rate,
        **evaluation.metrics,
    }
    return {name: value for name, value in values.items() if value is not None}


def outcome(trial: Trial) -> dict[str, int | float]:
    """Return the best step, its loss and its answer score, as far as a trial has them."""
    best, answers = best_evaluation(trial.evaluations), trial.answer_score
    if best is None:
        return {}
    scored = {} if answers is None else {"answer_score": answers.mean}
    chosen = {} if best.objective is None else {f"best_{best.objective.metric}": best.value}
    return {"best_step": best.step, "best_eval_loss": best.eval_loss, **chosen, **scored}


@dataclass(frozen=True, slots=True)
class Given:
    """What a tracker has of one trial."""

    run: str
    """Id of its run in the tracker."""
    steps: tuple[int, ...] = ()
    """Steps whose points were sent."""
    has_ended: bool = False
    """Whether the trial's end was sent."""


class Ledger:
    """What was sent by trial, saved to disk after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        written = json.loads(path.read_text()) if path.exists() else {}
        self._given = {
            int(number): Given(given["run"], tuple(given["steps"]), given["has_ended"])
            for number, given in written.items()
        }

    def find(self, trial: int) -> Given | None:
        """Return what was sent of a trial."""
        return self._given.get(trial)

    def begin(self, trial: int, run: str) -> Given:
        """Record a trial's open run."""
        return self._keep(trial, Given(run))

    def add(self, trial: int, step: int) -> None:
        """Record a sent point."""
        given = self._given[trial]
        self._keep(trial, replace(given, steps=(*given.steps, step)))

    def end(self, trial: int) -> None:
        """Record that the trial's end was sent."""
        self._keep(trial, replace(self._given[trial], has_ended=True))

    def _keep(self, trial: int, given: Given) -> Given:
        self._given[trial] = given
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path) as unfinished:
            unfinished.write_text(json.dumps({number: asdict(each) for number, each in self._given.items()}))
        return given
