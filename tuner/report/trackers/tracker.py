"""The interface of trackers, the threads that send facts to them, and the ledger of what each was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from tuner.errors import InputError, one_of
from tuner.methods.registry import is_built_in, load
from tuner.playbook.selection import best_evaluation
from tuner.records import Evaluation, Event, Trial
from tuner.report.live import View
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
    if missing := _missing(opened):
        raise TypeError(f"{type(opened).__name__} has no method {one_of(missing)}")
    return opened


def _missing(tool: object) -> list[str]:
    """Return the methods of `Tool` that an object, or a class, lacks."""
    return [name for name in _METHODS if not callable(getattr(tool, name, None))]


_METHODS = ("begin", "point", "end", "close")


def not_installed(names: Iterable[str]) -> list[str]:
    """Return the trackers whose library cannot be imported here."""
    return [name for name in names if is_built_in("tracker", name) and find_spec(name) is None]


def refuse_unusable(name: str) -> None:
    """Import a custom tracker. Raises InputError if it cannot be imported or called, or lacks a method.

    What a function returns is known when the round runs.
    """
    if is_built_in("tracker", name):
        return
    found = load("tracker", name)
    if not callable(found):
        raise InputError(f"tracker {name}: expects a class or a function, got a {type(found).__name__}")
    if isinstance(found, type) and (missing := _missing(found)):
        raise InputError(f"tracker {name}: {found.__name__} has no method {one_of(missing)}")


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


_PATIENCE_SECONDS = 60.0
"""Time for a tracker to receive the remaining points at the end of a run."""


def followed(view: View, tools: Sequence[str], round: FollowedRound) -> View:
    """Return a view that also sends facts to these trackers; the view itself if there are none."""
    openers = {name: partial(open_tool, name, round) for name in tools}
    return FollowedView(view, openers) if openers else view


class FollowedView:
    """A View that also sends trials to trackers by name, each opened in its own thread."""

    def __init__(
        self,
        view: View,
        openers: Mapping[str, Callable[[], Tool]],
        *,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        self._view = view
        self._patience_seconds = patience_seconds
        self._senders = [_Sender(name, opener, view.message) for name, opener in openers.items()]

    def event(self, event: Event) -> None:
        """As `View` says."""
        self._view.event(event)

    def trials(self, trials: Sequence[Trial]) -> None:
        """As `View` says."""
        self._view.trials(trials)
        for sender in self._senders:
            sender.take(trials)

    def message(self, text: str) -> None:
        """As `View` says."""
        self._view.message(text)

    def close(self) -> None:
        """See `View`; waits for a limited time until the trackers have received everything."""
        for sender in self._senders:
            sender.close(self._patience_seconds)
        self._view.close()


class _Sender:
    """Sends one tracker what it does not have yet. If facts arrive too fast, sends only the latest."""

    def __init__(self, name: str, opener: Callable[[], Tool], warn: Callable[[str], None]) -> None:
        self._name, self._opener, self._warn = name, opener, warn
        self._news = threading.Condition()
        self._latest: dict[int, Trial] = {}
        self._is_closing = False
        self._had: dict[int, set[int]] = {}
        """Steps that the tracker has, by trial."""
        self._ended: set[int] = set()
        self._thread = threading.Thread(target=self._run, name=f"report to {name}", daemon=True)
        self._thread.start()

    def take(self, trials: Sequence[Trial]) -> None:
        """Queue these facts."""
        with self._news:
            self._latest |= {trial.number: trial for trial in trials}
            self._news.notify()

    def close(self, patience_seconds: float) -> None:
        """Wait until everything is sent or the time is up."""
        with self._news:
            self._is_closing = True
            self._news.notify()
        self._thread.join(patience_seconds)
        if self._thread.is_alive():
            self._warn(
                f"run.report_to: {self._name} did not finish within {patience_seconds:.0f} seconds; "
                "run the round again to send the rest"
            )

    def _run(self) -> None:
        try:
            tool = None
            while (trials := self._wait()) is not None:
                tool = tool or self._opener()
                self._send(tool, trials)
            if tool is not None:
                tool.close()
        except Exception as error:  # noqa: BLE001  no error of a tracker may stop the round
            said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self._warn(
                f"run.report_to: {self._name} failed ({said}). The round continues without it; fix the cause "
                "and run the round again to send the rest"
            )

    def _wait(self) -> Sequence[Trial] | None:
        """Return the latest facts; None if there will be no more."""
        with self._news:
            self._news.wait_for(lambda: bool(self._latest) or self._is_closing)
            latest, self._latest = self._latest, {}
            return list(latest.values()) or None

    def _send(self, tool: Tool, trials: Sequence[Trial]) -> None:
        for trial in trials:
            if trial.number in self._ended or not trial.evaluations:
                continue
            if trial.number not in self._had:
                self._had[trial.number] = set(tool.begin(trial))
            had = self._had[trial.number]
            for evaluation in trial.evaluations:
                if evaluation.step not in had:
                    tool.point(trial, evaluation)
                    had.add(evaluation.step)
            if trial.state.is_final:
                tool.end(trial)
                self._ended.add(trial.number)
