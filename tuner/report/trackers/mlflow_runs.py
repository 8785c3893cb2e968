"""Trials in MLflow: an experiment for the study, a run for each trial."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from tuner.records import Evaluation, Trial, TrialState
from tuner.report.trackers.tracker import FollowedRound, Ledger, metrics, outcome

# Hides notices about created tables; warnings still show.
logging.getLogger("mlflow").setLevel(logging.WARNING)


class Mlflow:
    """Runs on the server of MLFLOW_TRACKING_URI, else in `CHECKPOINTS/mlflow.db`.

    The server knows the points of a run; the ledger maps trials to runs.
    """

    def __init__(self, followed: FollowedRound) -> None:
        local = f"sqlite:///{followed.checkpoints / 'mlflow.db'}"
        self._followed = followed
        self._client: Any = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)
        self._ledger = Ledger(followed.checkpoints / followed.round / "mlflow.json")
        self._runs: dict[int, str] = {}

    def begin(self, trial: Trial) -> frozenset[int]:
        """As `Tool` says."""
        given = self._ledger.find(trial.number)
        if given is not None and given.has_ended:
            return frozenset(evaluation.step for evaluation in trial.evaluations)
        if given is not None:
            self._runs[trial.number] = given.run
            self._client.update_run(given.run, status="RUNNING")
            had = self._client.get_metric_history(given.run, "eval_loss")
            return frozenset(metric.step for metric in had)
        run = self._client.create_run(self._experiment(), run_name=self._followed.name(trial)).info.run_id
        self._ledger.begin(trial.number, run)
        self._runs[trial.number] = run
        settings = self._followed.settings(trial)
        params = [Param(name, str(value)) for name, value in settings.items()]
        self._client.log_batch(run, params=params, tags=[RunTag("round", self._followed.round)])
        return frozenset()

    def point(self, trial: Trial, evaluation: Evaluation) -> None:
        """See `Tool`. A point's metrics are sent together, since one of them marks the point as sent."""
        self._client.log_batch(
            self._runs[trial.number], metrics=_metrics(metrics(evaluation), evaluation.step)
        )

    def end(self, trial: Trial) -> None:
        """As `Tool` says."""
        if trial.number not in self._runs:
            return
        run = self._runs.pop(trial.number)
        last = trial.evaluations[-1].step
        self._client.log_batch(
            run, metrics=_metrics(outcome(trial), last), tags=[RunTag("state", trial.state.value)]
        )
        self._client.set_terminated(run, "FINISHED" if trial.state == TrialState.COMPLETE else "FAILED")
        self._ledger.end(trial.number)

    def close(self) -> None:
        """As `Tool` says."""
        for run in self._runs.values():
            self._client.set_terminated(run, "KILLED")

    def _experiment(self) -> str:
        name = self._followed.study
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name, tags={"goal": self._followed.goal}))
        except MlflowException:
            # Another process created it first.
            return str(self._client.get_experiment_by_name(name).experiment_id)


def _metrics(values: dict[str, Any], step: int) -> list[Any]:
    now_milliseconds = int(time.time() * 1000)
    return [Metric(name, float(value), now_milliseconds, step) for name, value in values.items()]


def open_tool(followed: FollowedRound) -> Mlflow:
    """As `tools.open_tool` says."""
    return Mlflow(followed)
