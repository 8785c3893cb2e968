"""Trials in TensorBoard: a folder of event files for each, with the HPARAMS tab."""

from __future__ import annotations

import time
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tuner.records import Evaluation, Trial, TrialState
from tuner.report.trackers.tracker import FollowedRound, metrics, outcome


class TensorBoard:
    """Writes to `CHECKPOINTS/tensorboard/ROUND/trial-0007`.

    Event files are small but hard to read back, so a resumed run is rewritten from facts.
    """

    def __init__(self, followed: FollowedRound) -> None:
        self._followed = followed
        self._directory = followed.checkpoints / "tensorboard" / followed.round
        self._writers: dict[int, Any] = {}

    def begin(self, trial: Trial) -> frozenset[int]:
        """As `Tool` says."""
        directory = self._directory / f"trial-{trial.number:04d}"
        for old in directory.glob("events.out.tfevents.*"):
            old.unlink()
        writer = EventFileWriter(str(directory))
        name = self._followed.name(trial)
        settings = hparams_pb(self._followed.settings(trial), trial_id=name)
        writer.add_event(Event(wall_time=time.time(), summary=settings))
        self._writers[trial.number] = writer
        return frozenset()

    def point(self, trial: Trial, evaluation: Evaluation) -> None:
        """As `Tool` says."""
        self._write(trial, metrics(evaluation), step=evaluation.step)
        self._writers[trial.number].flush()

    def end(self, trial: Trial) -> None:
        """See `Tool`. The best step is a scalar at the last step, shown in the table of HPARAMS."""
        self._write(trial, outcome(trial), step=trial.evaluations[-1].step)
        is_success = trial.state == TrialState.COMPLETE
        status = "STATUS_SUCCESS" if is_success else "STATUS_FAILURE"
        ended = plugin_data_pb2.HParamsPluginData(
            session_end_info=plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        )
        kept = metadata.create_summary_metadata(ended)
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=kept, tensor=metadata.NULL_TENSOR)
        writer = self._writers.pop(trial.number)
        writer.add_event(Event(wall_time=time.time(), summary=Summary(value=[value])))
        writer.close()

    def close(self) -> None:
        """As `Tool` says."""
        for writer in self._writers.values():
            writer.close()

    def _write(self, trial: Trial, values: dict[str, Any], *, step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=name, simple_value=v) for name, v in values.items()])
        event = Event(wall_time=time.time(), step=step, summary=summary)
        self._writers[trial.number].add_event(event)


def open_tool(followed: FollowedRound) -> TensorBoard:
    """As `tools.open_tool` says."""
    return TensorBoard(followed)
