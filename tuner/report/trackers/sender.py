"""Send facts to trackers in separate threads, so that a tracker cannot disturb the round."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tuner.records import Event, Trial
from tuner.report.live import View
from tuner.report.trackers.tracker import FollowedRound, Tool, open_tool

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
