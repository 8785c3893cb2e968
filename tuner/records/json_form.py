"""The JSON form of facts, assignments and events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import Any

from tuner.records.events import (
    Answered,
    Assignment,
    Died,
    Ended,
    Evaluated,
    Event,
    Measured,
    Preparing,
    Progressed,
    Ready,
    Saved,
    Started,
)
from tuner.records.facts import AnswerScore, Attempt, Branch, Checkpoint, CheckpointKind, Evaluation
from tuner.records.objective import Direction, Objective
from tuner.records.space import Value
from tuner.records.throughput import Throughput

_EVENTS: dict[str, type[Event]] = {
    kind.__name__.lower(): kind
    for kind in (
        Preparing,
        Ready,
        Started,
        Progressed,
        Evaluated,
        Saved,
        Answered,
        Measured,
        Ended,
        Died,
    )
}


def to_json(record: Any) -> Any:
    """A record as JSON values. Floats keep every digit; NaN and infinity stay as they are."""
    return _plain(asdict(record))


def evaluation_from_json(document: Mapping[str, Any]) -> Evaluation:
    """The inverse of `to_json` for an Evaluation."""
    return Evaluation(
        **{
            **document,
            "example_nll": tuple(document.get("example_nll", ())),
            "example_tokens": tuple(document.get("example_tokens", ())),
            "objective": objective_from_json(document.get("objective")),
        }
    )


def objective_from_json(document: Mapping[str, Any] | None) -> Objective | None:
    """The inverse of `to_json` for an Objective, or for None."""
    if document is None:
        return None
    return Objective(**{**document, "direction": Direction(document["direction"])})


def checkpoint_from_json(document: Mapping[str, Any]) -> Checkpoint:
    """The inverse of `to_json` for a Checkpoint."""
    return Checkpoint(**{**document, "kind": CheckpointKind(document["kind"])})


def branch_from_json(document: Mapping[str, Any]) -> Branch:
    """The inverse of `to_json` for a Branch."""
    checkpoint, evaluation = document["checkpoint"], document["evaluation"]
    return Branch(
        **{
            **document,
            "attempts": tuple(Attempt(**attempt) for attempt in document["attempts"]),
            "checkpoint": None if checkpoint is None else checkpoint_from_json(checkpoint),
            "evaluation": None if evaluation is None else evaluation_from_json(evaluation),
        }
    )


def hyperparameters_from_json(document: Mapping[str, Any]) -> dict[str, Value]:
    """Hyperparameters whose lists became tuples again."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in document.items()}


def assignment_from_json(document: Mapping[str, Any]) -> Assignment:
    """The inverse of `to_json` for an Assignment."""
    return Assignment(
        **{
            **document,
            "hyperparameters": hyperparameters_from_json(document["hyperparameters"]),
            "trunk_steps": tuple(document.get("trunk_steps", ())),
        }
    )


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as a JSON object whose `event` names its kind."""
    return {"event": type(event).__name__.lower(), **to_json(event)}


def event_from_json(document: Mapping[str, Any]) -> Event:
    """The inverse of `event_to_json`. Raises KeyError for an unknown kind."""
    values = {key: value for key, value in document.items() if key != "event"}
    kind = _EVENTS[document["event"]]
    for name, parse in (("evaluation", evaluation_from_json), ("base", evaluation_from_json)):
        if values.get(name) is not None:
            values[name] = parse(values[name])
    if "checkpoint" in values:
        values["checkpoint"] = checkpoint_from_json(values["checkpoint"])
    for name in ("trials", "remarks"):
        if name in values:
            values[name] = tuple(values[name])
    if "throughput" in values:
        values["throughput"] = Throughput(**values["throughput"])
    if "score" in values:
        values["score"] = AnswerScore(**values["score"])
    return kind(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value
