"""Facts on their way to other tools, in threads of their own, so that nothing there disturbs the round."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tuner.records import Event, Trial
from tuner.report.live import View
from tuner.report.trackers.tracker import FollowedRound, Tool, open_tool

_PATIENCE_SECONDS = 60.0
"""What a tool has at the end of a run to take what is waiting."""


def followed(view: View, tools: Sequence[str], round: FollowedRound) -> View:
    """A view that also shows the facts it is told in these tools; the view itself where there are none."""
    openers = {name: partial(open_tool, name, round) for name in tools}
    return FollowedView(view, openers) if openers else view


class FollowedView:
    """A View whose trials are sent on to tools by name, each opened in its own thread."""

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
        """As `View` says; waits, but not for ever, until the tools have what was sent."""
        for sender in self._senders:
            sender.close(self._patience_seconds)
        self._view.close()


class _Sender:
    """Sends one tool what it does not have yet. Of facts that come faster than it takes them, the latest."""

    def __init__(self, name: str, opener: Callable[[], Tool], warn: Callable[[str], None]) -> None:
        self._name, self._opener, self._warn = name, opener, warn
        self._news = threading.Condition()
        self._latest: dict[int, Trial] = {}
        self._is_closing = False
        self._had: dict[int, set[int]] = {}
        """Steps that the tool has, by trial."""
        self._ended: set[int] = set()
        self._thread = threading.Thread(target=self._run, name=f"report to {name}", daemon=True)
        self._thread.start()

    def take(self, trials: Sequence[Trial]) -> None:
        """Send these facts, soon."""
        with self._news:
            self._latest |= {trial.number: trial for trial in trials}
            self._news.notify()

    def close(self, patience_seconds: float) -> None:
        """Wait until all is sent, so long at most."""
        with self._news:
            self._is_closing = True
            self._news.notify()
        self._thread.join(patience_seconds)
        if self._thread.is_alive():
            self._warn(
                f"run.report_to: {self._name} is not done after {patience_seconds:.0f} seconds and is left; "
                "running the round again sends what is missing"
            )

    def _run(self) -> None:
        try:
            tool = None
            while (trials := self._wait()) is not None:
                tool = tool or self._opener()
                self._send(tool, trials)
            if tool is not None:
                tool.close()
        except Exception as error:  # noqa: BLE001  whatever a tool raises, the round is not its concern
            said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self._warn(
                f"run.report_to: {self._name} failed ({said}). The round goes on without it; put that right, "
                "and running the round again sends what is missing"
            )

    def _wait(self) -> Sequence[Trial] | None:
        """The latest facts; None when there are none any more."""
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
