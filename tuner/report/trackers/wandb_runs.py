"""Trials in Weights & Biases: the study is a project, the round a group, each trial a run."""

from __future__ import annotations

import uuid
from typing import Any

import wandb

from tuner.records import Evaluation, Trial
from tuner.report.trackers.tracker import FollowedRound, Ledger, metrics, outcome


class WeightsAndBiases:
    """Runs configured by the environment: WANDB_MODE, WANDB_ENTITY, WANDB_API_KEY.

    Local files are in `CHECKPOINTS/wandb`. An offline run cannot list its points, so the ledger does.
    """

    def __init__(self, followed: FollowedRound) -> None:
        self._followed = followed
        self._ledger = Ledger(followed.checkpoints / followed.round / "wandb.json")
        self._runs: dict[int, Any] = {}

    def begin(self, trial: Trial) -> frozenset[int]:
        """See `Tool`. A run is opened when there is something to send."""
        given = self._ledger.find(trial.number) or self._ledger.begin(trial.number, uuid.uuid4().hex[:12])
        return frozenset(given.steps)

    def point(self, trial: Trial, evaluation: Evaluation) -> None:
        """As `Tool` says."""
        self._run(trial).log(metrics(evaluation), step=evaluation.step, commit=True)
        self._ledger.add(trial.number, evaluation.step)

    def end(self, trial: Trial) -> None:
        """As `Tool` says."""
        given = self._ledger.find(trial.number)
        if given is not None and given.has_ended:
            return
        run = self._run(trial)
        run.summary.update({**outcome(trial), "state": trial.state.value})
        run.finish()
        del self._runs[trial.number]
        self._ledger.end(trial.number)

    def close(self) -> None:
        """As `Tool` says."""
        for run in self._runs.values():
            run.finish()

    def _run(self, trial: Trial) -> Any:
        if trial.number not in self._runs:
            given = self._ledger.find(trial.number)
            assert given is not None
            self._runs[trial.number] = wandb.init(
                project=self._followed.study,
                group=self._followed.round,
                name=self._followed.name(trial),
                id=given.run,
                notes=self._followed.goal,
                config=self._followed.settings(trial),
                dir=str(self._followed.checkpoints),
                resume="allow",
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )
        return self._runs[trial.number]


def open_tool(followed: FollowedRound) -> WeightsAndBiases:
    """As `tools.open_tool` says."""
    return WeightsAndBiases(followed)
