"""Run the user's command when a round has a new best trial, ends or fails."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.playbook.selection import best_evaluation, objective_value
from tuner.records import Direction, Ended, Event, Trial, TrialState
from tuner.report import format
from tuner.report.live import View

PATIENCE_SECONDS = 30.0
"""The longest that a command may run."""
_TO_END_SECONDS = 5.0
"""Time that the end of a hanging command may take."""
_MOST_SAID = 300
"""Characters of a failed command's own message to show."""


@dataclass(frozen=True, slots=True)
class NotifiedRound:
    """The round whose news are told, and the command that is told them."""

    study: str
    round: str
    directory: Path
    """Of the round file; the command runs in it."""
    max_train_steps: int
    command: Sequence[str]
    """A program and its arguments; it is run without a shell."""


class Notifier:
    """A View that also runs a command at each new best trial, and at the end of the round.

    The command gets a JSON document on its standard input. It runs in a thread, one at a time; its failure
    is a message and never touches the round.
    """

    def __init__(
        self, view: View, round: NotifiedRound, *, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self._view, self._round, self._patience_seconds = view, round, patience_seconds
        self._trials: dict[int, Trial] = {}
        self._best: float | None = None
        self._has_run = False
        self._news: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._in_a_hurry = threading.Event()
        self._running: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._tell, name="run.notify", daemon=True)
        self._thread.start()

    def event(self, event: Event) -> None:
        """As `View` says."""
        self._has_run = self._has_run or isinstance(event, Ended)
        self._view.event(event)

    def trials(self, trials: Sequence[Trial]) -> None:
        """As `View` says."""
        self._view.trials(trials)
        is_first = not self._trials
        self._trials |= {trial.number: trial for trial in trials}
        best = self._leader()
        if best is None:
            return
        cost = _cost(best)
        if self._best is None or cost < self._best:
            self._best = cost
            if not is_first:  # what an earlier run of the round has found is no news
                self._queue("best", f"trial {best.number} is the new best: {_in_words(best)}")

    def message(self, text: str) -> None:
        """As `View` says."""
        self._view.message(text)

    def ended(self, event: str, why: str = "") -> None:
        """Tell that the round is `complete`, `stopped` or `failed`; a complete one only if something ran."""
        if event != "complete" or self._has_run:
            best = self._leader()
            said = why or (f"complete; best: trial {best.number}, {_in_words(best)}" if best else "complete")
            self._queue(event, said)

    def close(self) -> None:
        """See `View`; waits until the command has been told everything, or ends it.

        If it is slow, it is told the end of the round and none of the best trials that still wait.
        """
        self._news.put(None)
        try:
            self._thread.join(self._patience_seconds)
            self._in_a_hurry.set()
            self._thread.join(2 * self._patience_seconds + _TO_END_SECONDS)
        finally:
            if self._thread.is_alive() and (process := self._running) is not None:
                _end(process)
        self._view.close()

    def _leader(self) -> Trial | None:
        done = [t for t in self._trials.values() if t.state is TrialState.COMPLETE and _cost(t) < math.inf]
        return min(done, key=lambda trial: (_cost(trial), trial.number), default=None)

    def _queue(self, event: str, said: str) -> None:
        round, best = self._round, self._leader()
        states = [trial.state.value for trial in self._trials.values()]
        self._news.put(
            {
                "event": event,
                "study": round.study,
                "round": round.round,
                "max_train_steps": round.max_train_steps,
                "directory": str(round.directory),
                "message": f"{round.study}/{round.round}: {said}",
                "best": None if best is None else _document(best),
                "trials": {state: states.count(state) for state in dict.fromkeys(states)},
            }
        )

    def _tell(self) -> None:
        while (news := self._news.get()) is not None:
            if news["event"] == "best" and self._in_a_hurry.is_set():
                continue
            why = self._why_it_failed(json.dumps(news, allow_nan=False))
            if why is not None:
                self._view.message(f"run.notify: {self._round.command[0]} {why}. The round is not affected")

    def _why_it_failed(self, document: str) -> str | None:
        """Run the command with a document; return what went wrong."""
        try:
            process = subprocess.Popen(
                list(self._round.command),
                cwd=self._round.directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",  # it may say anything
                start_new_session=True,  # Ctrl-C is for the round
            )
        except (OSError, ValueError) as error:
            return f"cannot be run: {getattr(error, 'strerror', None) or error}"
        self._running = process
        try:
            _, said = process.communicate(document, timeout=self._patience_seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return f"took more than {self._patience_seconds:.0f} seconds and was ended"
        except OSError as error:
            _kill(process)
            return f"failed: {error.strerror}"
        finally:
            self._running = None
        if process.returncode == 0:
            return None
        told = " ".join(said.split())[-_MOST_SAID:]
        number = -process.returncode
        how = f"was ended by signal {number}" if number > 0 else f"failed with exit code {process.returncode}"
        return how + (f": {told}" if told else "")


def _end(process: subprocess.Popen[str]) -> None:
    """End the command and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _kill(process: subprocess.Popen[str]) -> None:
    """End the command and what it has started, and wait for it."""
    _end(process)
    process.wait()
    for pipe in (process.stdin, process.stderr):
        if pipe is not None:
            pipe.close()


def _cost(trial: Trial) -> float:
    """Return what ranks a trial, lower is better."""
    value = objective_value(trial)
    if value is None or not math.isfinite(value):
        return math.inf
    is_score = trial.answer_score is not None and trial.answer_score.is_objective
    best = best_evaluation(trial.evaluations)
    chosen = None if best is None else best.objective
    is_higher = is_score or (chosen is not None and chosen.direction == Direction.MAXIMIZE)
    return -value if is_higher else value


def _document(trial: Trial) -> dict[str, Any]:
    best = best_evaluation(trial.evaluations)
    loss = None if best is None or not math.isfinite(best.eval_loss) else best.eval_loss
    return {
        "trial": trial.number,
        "value": objective_value(trial),
        "eval_loss": loss,
        "step": None if best is None else best.step,
    }


def _in_words(trial: Trial) -> str:
    best, value = best_evaluation(trial.evaluations), objective_value(trial)
    return format.loss(value) if best is None else f"{format.loss(value)} at step {best.step}"
