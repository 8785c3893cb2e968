"""What a tracker is, and the ledger of what each has been sent."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

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
    """The study's `checkpoints.directory`, absolute: what tools keep here lies in it."""

    def name(self, trial: Trial) -> str:
        """What its run is called."""
        return f"{self.round}/{trial.number}"

    def settings(self, trial: Trial) -> dict[str, bool | int | float | str]:
        """Hyperparameters and what else the trial was run with, in words that every tool takes."""
        values = {
            name: ",".join(map(str, value)) if isinstance(value, tuple) else value
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
        tool: Tool = import_module(f"tuner.report.trackers.{name}_runs").open_tool(followed)
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
        **evaluation.metrics,
    }
    return {name: value for name, value in values.items() if value is not None}


def outcome(trial: Trial) -> dict[str, int | float]:
    """The best step, its loss and the score of its answers, as far as a trial has them."""
    best, answers = best_evaluation(trial.evaluations), trial.answer_score
    if best is None:
        return {}
    scored = {} if answers is None else {"answer_score": answers.mean}
    chosen = {} if best.objective is None else {f"best_{best.objective.metric}": best.value}
    return {"best_step": best.step, "best_eval_loss": best.eval_loss, **chosen, **scored}


@dataclass(frozen=True, slots=True)
class Given:
    """Of one trial."""

    run: str
    """The id of its run in the tool."""
    steps: tuple[int, ...] = ()
    """Steps whose points it has."""
    has_ended: bool = False
    """Whether it has the trial's end too."""


class Ledger:
    """Given by trial, on disk after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        written = json.loads(path.read_text()) if path.exists() else {}
        self._given = {
            int(number): Given(given["run"], tuple(given["steps"]), given["has_ended"])
            for number, given in written.items()
        }

    def find(self, trial: int) -> Given | None:
        """What is known of a trial."""
        return self._given.get(trial)

    def begin(self, trial: int, run: str) -> Given:
        """A trial's run is open."""
        return self._keep(trial, Given(run))

    def add(self, trial: int, step: int) -> None:
        """A point was given."""
        given = self._given[trial]
        self._keep(trial, replace(given, steps=(*given.steps, step)))

    def end(self, trial: int) -> None:
        """The trial's end was given."""
        self._keep(trial, replace(self._given[trial], has_ended=True))

    def _keep(self, trial: int, given: Given) -> Given:
        self._given[trial] = given
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self._path) as unfinished:
            unfinished.write_text(json.dumps({number: asdict(each) for number, each in self._given.items()}))
        return given
