"""Trials in other tools: every point once, whatever is interrupted; and a tool's failure is its own."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tuner.config import RoundSpec
from tuner.installation import install_command
from tuner.records import Continuation, Evaluation, Event, Ready, Trial, TrialState
from tuner.report.trackers import FollowedRound, Tool, not_installed
from tuner.report.trackers.tracker import FollowedView, open_tool

RUNNING, COMPLETE, INFEASIBLE = TrialState.RUNNING, TrialState.COMPLETE, TrialState.INFEASIBLE
HYPERPARAMETERS = {"learning_rate": 1e-3, "lora_r": 8, "target_modules": ("q_proj", "v_proj")}


def trial(number: int, upto: int, state: TrialState = RUNNING, *, train_loss: float = 2.5) -> Trial:
    """Evaluated every 2 steps; the loss of step 4 is the best."""
    evaluations = tuple(
        Evaluation(
            step,
            3.0 + number + abs(step - 4),
            train_loss=train_loss if step else None,
            learning_rate=1e-3 if step else None,
        )
        for step in range(0, upto + 1, 2)
    )
    continues = Continuation("round0", 3, 2) if number == 1 else None
    return Trial("round1", number, HYPERPARAMETERS, state, continues=continues, evaluations=evaluations)


@dataclass
class Screen:
    """A view that keeps what it is told."""

    events: list[Event] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    is_closed: bool = False

    def event(self, event: Event) -> None:
        self.events.append(event)

    def trials(self, trials: Any) -> None:
        self.seen.append(trials)

    def message(self, text: str) -> None:
        self.messages.append(text)

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Notebook:
    """A tool in memory that outlives the process, so to say; it may fail at a point."""

    points: dict[int, list[int]] = field(default_factory=dict)
    ended: dict[int, str] = field(default_factory=dict)
    fails_at: tuple[int, int] | None = None
    sent: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event | None = None
    """Waits for it before each point."""

    def begin(self, trial: Trial) -> frozenset[int]:
        return frozenset(self.points.setdefault(trial.number, []))

    def point(self, trial: Trial, evaluation: Evaluation) -> None:
        if self.goes_on is not None:
            assert self.goes_on.wait(30)
        if (trial.number, evaluation.step) == self.fails_at:
            raise ConnectionError("nobody\nanswers")
        self.points[trial.number].append(evaluation.step)
        self.sent.set()

    def end(self, trial: Trial) -> None:
        self.ended[trial.number] = trial.state.value

    def close(self) -> None:
        pass


def show(*told: tuple[Trial, ...], tools: Mapping[str, Callable[[], Tool]], patience: float = 60) -> Screen:
    """One process that is told these facts."""
    screen = Screen()
    view = FollowedView(screen, tools, patience_seconds=patience)
    for trials in told:
        view.trials(trials)
    view.close()
    assert screen.seen == list(told)
    assert screen.is_closed
    return screen


def test_every_point_is_sent_once_over_several_processes() -> None:
    notebook = Notebook()
    tools = {"notebook": lambda: notebook}
    show((trial(0, 2),), (trial(0, 4), trial(1, -1)), tools=tools)
    assert notebook.points == {0: [0, 2, 4]}
    show((trial(0, 4), trial(1, 0)), (trial(0, 8, COMPLETE), trial(1, 2, INFEASIBLE)), tools=tools)
    show((trial(0, 8, COMPLETE), trial(1, 2, INFEASIBLE)), tools=tools)
    assert notebook.points == {0: [0, 2, 4, 6, 8], 1: [0, 2]}
    assert notebook.ended == {0: "complete", 1: "infeasible"}


def test_the_view_goes_on_as_before() -> None:
    screen = Screen()
    view = FollowedView(screen, {})
    view.event(Ready(1, "cpu"))
    view.message("hello")
    assert (screen.events, screen.messages) == ([Ready(1, "cpu")], ["hello"])
    view.close()


def test_a_failure_is_said_once_and_disturbs_no_other_tool() -> None:
    failing, other = Notebook(fails_at=(0, 2)), Notebook()
    tools = {"failing": lambda: failing, "other": lambda: other}
    screen = show((trial(0, 0),), (trial(0, 2),), (trial(0, 8, COMPLETE),), tools=tools)
    [message] = screen.messages
    assert message.startswith(
        "run.report_to: failing failed (ConnectionError: nobody answers). The round continues"
    )
    assert other.points == {0: [0, 2, 4, 6, 8]}
    failing.fails_at = None
    assert show((trial(0, 8, COMPLETE),), tools=tools).messages == []
    assert failing.points == {0: [0, 2, 4, 6, 8]}


def test_a_tool_that_cannot_be_opened_is_a_failure_too() -> None:
    def broken() -> Tool:
        raise ImportError("libfoo.so")

    assert (
        "broken failed (ImportError: libfoo.so)" in show((trial(0, 0),), tools={"broken": broken}).messages[0]
    )


def test_nothing_waits_for_a_slow_tool() -> None:
    """Of what it is told meanwhile it gets the latest facts; at the end it is waited for a while."""
    slow = Notebook(goes_on=threading.Event())
    screen = show((trial(0, 0),), (trial(0, 2),), (trial(0, 4),), tools={"slow": lambda: slow}, patience=0.05)
    assert slow.points in ({}, {0: []})
    assert screen.messages == [
        "run.report_to: slow did not finish within 0 seconds; run the round again to send the rest"
    ]
    assert slow.goes_on is not None
    slow.goes_on.set()
    assert slow.sent.wait(30)


# --- the tools themselves -------------------------------------------------------------------------

Points: TypeAlias = dict[str, dict[str, list[tuple[int, float]]]]
"""By run and name of the number, in the order in which the tool gives them."""


def from_tensorboard(directory: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import api_pb2, metadata

    found: Points = {}
    for run in sorted((directory / "tensorboard" / "round1").iterdir()):
        events = EventAccumulator(str(run)).Reload()
        assert {"_hparams_/session_start_info", "_hparams_/session_end_info"} == set(events.summary_metadata)
        kept = {
            tag: metadata.parse_session_end_info_plugin_data(about.plugin_data.content)
            if "end" in tag
            else metadata.parse_session_start_info_plugin_data(about.plugin_data.content)
            for tag, about in events.summary_metadata.items()
        }
        assert kept["_hparams_/session_start_info"].hparams["max_train_steps"].number_value == 8
        status = kept["_hparams_/session_end_info"].status
        assert api_pb2.Status.Name(status) == f"STATUS_{'FAILURE' if run.name.endswith('1') else 'SUCCESS'}"
        tags = events.Tags()["scalars"]
        found[f"round1/{int(run.name[-4:])}"] = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags
        }
    return found


def from_mlflow(directory: Path) -> Points:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{directory / 'mlflow.db'}")
    found: Points = {}
    for run in client.search_runs([client.get_experiment_by_name("toy").experiment_id]):
        assert run.data.params["target_modules"] == "q_proj,v_proj"
        assert run.data.params["learning_rate"] == "0.001"
        assert run.info.status == ("FINISHED" if run.info.run_name == "round1/0" else "FAILED")
        found[run.info.run_name] = {
            name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
    return found


def from_wandb(directory: Path) -> Points:
    """Of the offline runs, which `wandb sync` sends: records of protocol buffers in a log like LevelDB's."""
    from wandb.proto import wandb_internal_pb2

    def records(path: Path) -> Iterator[Any]:
        data, at, part = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            part += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):
                yield wandb_internal_pb2.Record.FromString(part)
                part = b""

    found: Points = {}
    for file in sorted(
        (directory / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime
    ):
        kept = list(records(file))
        name = next(r.run.display_name for r in kept if r.WhichOneof("record_type") == "run")
        numbers = found.setdefault(name, {})
        for record in kept:
            match record.WhichOneof("record_type"):
                case "history":
                    values = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                case "summary":
                    values = {item.key: json.loads(item.value_json) for item in record.summary.update}
                    values = {key: value for key, value in values.items() if key.startswith("best_")}
                case _:
                    continue
            for key, value in values.items():
                if not key.startswith("_"):
                    numbers.setdefault(key, []).append((values.get("_step", 8), float(value)))
    return found


def from_trackio(directory: Path) -> Points:
    from trackio.sqlite_storage import SQLiteStorage

    found: Points = {}
    for run in SQLiteStorage.get_runs("toy"):
        numbers = found.setdefault(run.split()[0], {})
        for log in SQLiteStorage.get_logs("toy", run):
            for key, value in log.items():
                if key not in ("step", "timestamp"):
                    numbers.setdefault(key, []).append((log["step"], float(value)))
    return found


READERS = {
    "tensorboard": from_tensorboard,
    "mlflow": from_mlflow,
    "wandb": from_wandb,
    "trackio": from_trackio,
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_round_that_was_interrupted_in(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process adds what is new; the third has nothing to add. On local files, without a server."""
    pytest.importorskip(name, reason=f"{name} is not installed: {install_command(name)}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is first imported
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    round = FollowedRound("toy", "round1", "Does it follow", 8, tmp_path / "runs")
    tools = {name: lambda: open_tool(name, round)}
    done = (trial(0, 8, COMPLETE), trial(1, 8, INFEASIBLE, train_loss=math.nan))
    for told in (
        [(trial(0, 2), trial(1, 0))],
        [(trial(0, 4), trial(1, 4, train_loss=math.nan)), done],
        [done],
    ):
        assert show(*told, tools=tools).messages == []
    found = READERS[name](tmp_path / "runs")
    for number, run in enumerate(("round1/0", "round1/1")):
        steps = [0, 2, 4, 6, 8]
        assert found[run]["eval_loss"] == [(step, 3 + number + abs(step - 4)) for step in steps]
        assert [step for step, _ in found[run]["train_loss"]] == steps[1:]
        assert [value for _, value in found[run]["learning_rate"]] == pytest.approx([1e-3] * 4)
        assert found[run]["best_step"] == [(8, 4)]
        assert found[run]["best_eval_loss"] == [(8, 3 + number)]
    assert math.isnan(found["round1/1"]["train_loss"][-1][1])
    assert found["round1/0"]["train_loss"][-1] == (8, 2.5)
    assert set(found) == {"round1/0", "round1/1"}


def test_names_of_the_round_file_are_those_of_the_modules() -> None:
    items = RoundSpec.model_json_schema()["$defs"]["RunSpec"]["properties"]["report_to"]["items"]
    names = items["anyOf"][0]["enum"]
    assert sorted(names) == sorted(READERS)
    modules = Path(open_tool.__code__.co_filename).parent.glob("*_runs.py")
    assert sorted(path.stem.removesuffix("_runs") for path in modules) == sorted(names)


def test_what_is_not_installed_is_known_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what a user brings nothing is known until it is imported."""
    assert not_installed(["tensorboard", "no_such_package:Tool"]) == []
    missing = [name for name in ("mlflow", "trackio", "wandb") if name not in sys.modules]
    monkeypatch.setattr(sys, "path", [])
    assert not_installed(["no_such_package:Tool", *missing]) == missing
