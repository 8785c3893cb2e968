"""The JSON form of facts, assignments and events, by the types of their fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from tuner.records.events import Assignment, Event
from tuner.records.state import Said
from tuner.records.trials import Branch, Checkpoint, Evaluation, Packed

R = TypeVar("R")


def to_json(record: Any) -> Any:
    """Convert a record to JSON values. Floats keep every digit; NaN and infinity are unchanged."""
    if is_dataclass(record):
        return {each.name: to_json(getattr(record, each.name)) for each in fields(record)}
    if isinstance(record, Mapping):
        return {key: to_json(item) for key, item in record.items()}
    if isinstance(record, (list, tuple, Packed)):
        return [to_json(item) for item in record]
    return str(record) if isinstance(record, StrEnum) else record


def from_json(kind: type[R], document: Mapping[str, Any]) -> R:
    """Invert `to_json`. Raises TypeError for an unknown field."""
    readers = _readers(kind)  # type: ignore[arg-type]  # a class is hashable
    return kind(**{name: readers.get(name, _as_it_is)(value) for name, value in document.items()})


@cache
def _readers(kind: type[Any]) -> dict[str, Callable[[Any], Any]]:
    """Return a reader for each field of a dataclass."""
    hints = get_type_hints(kind)
    return {each.name: _reader(hints[each.name]) for each in fields(kind)}


def _reader(hint: Any) -> Callable[[Any], Any]:
    """Return a reader for values of a type; JSON's own types are unchanged."""
    if is_dataclass(hint):
        return lambda value: value if value is None else from_json(hint, value)  # type: ignore[arg-type]
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint
    of = get_args(hint)
    if get_origin(hint) is tuple:
        item = _reader(of[0])
        return tuple if item is _as_it_is else lambda values: tuple(map(item, values))
    if isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        item = _reader(of[1])
        if item is _as_it_is:
            return _as_it_is
        return lambda values: {key: item(value) for key, value in values.items()}
    of = tuple(each for each in of if each is not Packed)
    known = [reader for each in of if (reader := _reader(each)) is not _as_it_is] if _is_union(hint) else []
    if not known:
        return _as_it_is
    if set(known) == {tuple}:  # as in a hyperparameter's value
        return lambda value: tuple(value) if isinstance(value, list) else value
    (only,) = known
    return lambda value: None if value is None else only(value)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, type(int | None))


def _as_it_is(value: Any) -> Any:
    return value


def evaluation_from_json(document: Mapping[str, Any]) -> Evaluation:
    """Invert `to_json` for an Evaluation."""
    return from_json(Evaluation, document)


def checkpoint_from_json(document: Mapping[str, Any]) -> Checkpoint:
    """Invert `to_json` for a Checkpoint."""
    return from_json(Checkpoint, document)


def branch_from_json(document: Mapping[str, Any]) -> Branch:
    """Invert `to_json` for a Branch."""
    return from_json(Branch, document)


def assignment_from_json(document: Mapping[str, Any]) -> Assignment:
    """Invert `to_json` for an Assignment."""
    return from_json(Assignment, document)


def event_to_json(event: Said) -> dict[str, Any]:
    """Convert an event to a JSON object whose `event` is its kind."""
    return {"event": type(event).__name__.lower(), **to_json(event)}


def event_from_json(document: Mapping[str, Any]) -> Event:
    """Invert `event_to_json`. Raises KeyError for an unknown kind."""
    kind = Said.kinds[document["event"]]
    values = {key: value for key, value in document.items() if key != "event"}
    return from_json(kind, values)  # type: ignore[return-value]  # any kind that has been declared
