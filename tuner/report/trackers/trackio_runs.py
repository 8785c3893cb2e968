"""Trials in Trackio: the study is a project, the round a group, each trial a run."""

from __future__ import annotations

import io
import uuid
from contextlib import redirect_stdout
from typing import Any

import trackio

from tuner.records import Evaluation, Trial
from tuner.report.trackers.tracker import FollowedRound, Ledger, metrics, outcome


class Trackio:
    """Runs configured by the environment: TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL.

    Trackio's greeting on standard output is suppressed. If the process is killed, points of the last second
    may be lost.
    """

    def __init__(self, followed: FollowedRound) -> None:
        self._followed = followed
        self._ledger = Ledger(followed.checkpoints / followed.round / "trackio.json")
        self._runs: dict[int, Any] = {}

    def begin(self, trial: Trial) -> frozenset[int]:
        """See `Tool`. Trackio identifies a run by its name, so the name is made unique."""
        name = f"{self._followed.name(trial)} {uuid.uuid4().hex[:6]}"
        given = self._ledger.find(trial.number) or self._ledger.begin(trial.number, name)
        return frozenset(given.steps)

    def point(self, trial: Trial, evaluation: Evaluation) -> None:
        """As `Tool` says."""
        self._run(trial).log(metrics(evaluation), step=evaluation.step)
        self._ledger.add(trial.number, evaluation.step)

    def end(self, trial: Trial) -> None:
        """As `Tool` says."""
        given = self._ledger.find(trial.number)
        if given is not None and given.has_ended:
            return
        run = self._run(trial)
        run.log(outcome(trial), step=trial.evaluations[-1].step)
        self._finish(run)
        del self._runs[trial.number]
        self._ledger.end(trial.number)

    def close(self) -> None:
        """As `Tool` says."""
        for run in self._runs.values():
            self._finish(run)

    def _finish(self, run: Any) -> None:
        with redirect_stdout(io.StringIO()):
            run.finish()

    def _run(self, trial: Trial) -> Any:
        if trial.number not in self._runs:
            given = self._ledger.find(trial.number)
            assert given is not None
            with redirect_stdout(io.StringIO()):
                self._runs[trial.number] = trackio.init(
                    project=self._followed.study,
                    group=self._followed.round,
                    name=given.run,
                    config=self._followed.settings(trial),
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        return self._runs[trial.number]


def open_tool(followed: FollowedRound) -> Trackio:
    """As `tools.open_tool` says."""
    return Trackio(followed)
