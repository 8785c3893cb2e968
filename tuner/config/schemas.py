"""JSON Schemas that pydantic cannot generate: hyperparameters in their three forms, and enqueued points."""

from __future__ import annotations

from typing import Any

from tuner.errors import one_of
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Integer, Number
from tuner.methods.table import HYPERPARAMETERS

_CONTINUES = {
    "type": "string",
    "pattern": r"^[A-Za-z0-9_][A-Za-z0-9._-]*/[0-9]+$",
    "description": "Resume from a checkpoint of this trial, as ROUND/TRIAL.",
}


def hyperparameters_schema() -> dict[str, Any]:
    """Return the schema of an object whose properties are a scalar, a list or a range each."""
    properties = {name: _dimension_schema(row) for name, row in HYPERPARAMETERS.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def enqueue_schema() -> dict[str, Any]:
    """Return the schema of a list of points: one value for each hyperparameter."""
    properties = {name: row.kind.schema() for name, row in HYPERPARAMETERS.items()}
    point = {
        "type": "object",
        "properties": {**properties, "continues": _CONTINUES},
        "additionalProperties": False,
    }
    return {"type": "array", "items": point}


def _dimension_schema(row: Hyperparameter) -> dict[str, Any]:
    value = row.kind.schema()
    forms = [value, {"type": "array", "items": value, "minItems": 1, "uniqueItems": True}]
    if isinstance(row.kind, (Number, Integer)):
        forms.append(_range_schema(value, integer=isinstance(row.kind, Integer)))
    if row.may_follow_rank:
        forms.append(_object({"times_sqrt_r": {"type": "number", "exclusiveMinimum": 0}}, ["times_sqrt_r"]))
    default = {} if row.default is None else {"default": row.default}
    note = f" Default: {row.default_note}." if row.default is None else ""
    return {"anyOf": forms, "description": f"{row.meaning}{note}{_condition(row)}", **default}


def _condition(row: Hyperparameter) -> str:
    if row.only_with is None:
        return ""
    return f" Applies only to {row.only_with.chosen_by}: {one_of(row.only_with.values)}."


def _range_schema(bound: dict[str, Any], *, integer: bool) -> dict[str, Any]:
    properties = {
        "low": {**bound, "description": "Lower bound, included."},
        "high": {**bound, "description": "Upper bound, included."},
        "log": {"type": "boolean", "description": "Search the logarithm."},
        "integer": {"const": True} if integer else {"type": "boolean", "description": "Only whole numbers."},
    }
    return _object(properties, ["low", "high"])


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
