"""Hyperparameters as the file has them: fixed, choices or a range; and their JSON Schemas."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

from tuner.config.wording import meant_method, meant_value
from tuner.errors import is_number, one_of, refusal, shown
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Anything, Flag, Integer, Kind, Layers, Method, Modules, Number, UnknownName
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Choices, Condition, Dimension, Fixed, Range, Space, TimesSqrtRank, Value, possible

DECAY_SHARE = 0.4
"""Of the horizon, by default. On 124M-parameter runs of 50k steps a decay of 40% ended at a loss of 2.955,
20% at 2.968, 60% at 2.951, none at 3.108."""

_RANGE_KEYS = ("low", "high", "log", "integer")


def read_dimension(hyperparameter: Hyperparameter, raw: Any) -> Dimension:
    """Parse one hyperparameter of the file. Raises ValueError with what is allowed."""
    return replace(_read(hyperparameter, raw), only_with=hyperparameter.only_with)


def _read(hyperparameter: Hyperparameter, raw: Any) -> Dimension:
    if isinstance(raw, Mapping):
        if "times_sqrt_r" in raw:
            return _read_times_sqrt_rank(hyperparameter, raw)
        if isinstance(hyperparameter.kind, Anything):
            return _read_range(Number(), raw)
        if isinstance(hyperparameter.kind, (Number, Integer)):
            return _read_range(hyperparameter.kind, raw)
        raise ValueError(
            f"cannot be a range; write one value ({hyperparameter.allowed}), or a list of values to search"
        )
    if _is_list_in_a_list(hyperparameter.kind, raw):
        return Fixed(parse_value(hyperparameter.kind, raw[0]))
    if _lists_choices(hyperparameter, raw):
        return _read_choices(hyperparameter, raw)
    return Fixed(parse_value(hyperparameter.kind, raw))


def parse_value(kind: Kind, raw: Any) -> Value:
    """Parse one value. Raises ValueError with what is allowed, and a suggestion where there is one."""
    try:
        return kind.parse(raw)
    except UnknownName as error:
        hint = meant_method(kind.kind, raw) if isinstance(kind, Method) else meant_value(raw, error.names)
        raise ValueError(refusal(error.allowed, raw, hint)) from None


def dimension_to_yaml(dimension: Dimension, kind: Kind | None = None) -> Any:
    """Return the dimension as it is written in a file: the inverse of `read_dimension`.

    With `kind`, also of one list whose outer list would be read as choices.
    """
    match dimension:
        case Fixed(value=tuple(value)) if isinstance(kind, Anything):
            return [value_to_yaml(value)]
        case Fixed(value=value):
            return value_to_yaml(value)
        case Choices(values=values):
            return [value_to_yaml(value) for value in values]
        case Range(low=low, high=high, log=log, integer=integer):
            bounds = {"low": value_to_yaml(low), "high": value_to_yaml(high)}
            return {**bounds, **({"log": True} if log else {}), **({"integer": True} if integer else {})}
        case TimesSqrtRank(factor=factor):
            return {"times_sqrt_r": value_to_yaml(factor)}


def value_to_yaml(value: Value) -> Any:
    """Return a value as a person would type it: tuples as lists, 16.0 as 16."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e6:
        return int(value)
    return value


def complete_space(
    written: Mapping[str, Any],
    *,
    max_train_steps: int,
    table: Mapping[str, Hyperparameter] = HYPERPARAMETERS,
) -> Space:
    """Return all hyperparameters that a trial can have: the file's, in its order, then the defaults, fixed.

    `written` has passed `read_dimension`. The defaults of `warmup_steps` and `decay_steps` shrink to
    fit into the horizon together with what the file sets; at least one step runs at the full rate.
    """
    space = {name: read_dimension(table[name], raw) for name, raw in written.items()}
    defaults = {name: Fixed(row.default) for name, row in table.items() if row.default is not None}
    room_to_decay = max_train_steps - (largest(space["warmup_steps"]) if "warmup_steps" in space else 0)
    defaults["decay_steps"] = Fixed(max(0, min(round(DECAY_SHARE * max_train_steps), room_to_decay)))
    room_to_warm_up = max_train_steps - 1 - largest(space.get("decay_steps", defaults["decay_steps"]))
    defaults["warmup_steps"] = Fixed(max(0, min(largest(defaults["warmup_steps"]), room_to_warm_up)))
    for name, row in table.items():
        if name in defaults and name not in space and not row.only_if_written:
            space[name] = replace(defaults[name], only_with=row.only_with)
    return possible(space)


def as_range(choices: Choices) -> dict[str, Any] | None:
    """Return the range between two numbers that are far apart, as the file has it; None for others."""
    values = choices.values
    if len(values) != 2 or not all(isinstance(value, float) for value in values):
        return None
    low, high = sorted(value for value in values if isinstance(value, float))
    return {"low": low, "high": high, "log": True} if high >= _WIDE * low > 0 else None


def as_numbers(text: str) -> str | None:
    """Return how the file searches two numbers that stand in one text, such as `1e-4..1e-3`; None without."""
    return _several_numbers(Number(), text) if _TWO_NUMBERS.fullmatch(text) else None


def largest(dimension: Dimension) -> int:
    """Return the largest value of an integer dimension."""
    match dimension:
        case Fixed(value=int(value)):
            return value
        case Choices(values=values):
            return max(value for value in values if isinstance(value, int))
        case Range(high=high):
            return int(high)
    raise TypeError(f"{dimension} does not hold whole numbers")


def describe(dimension: Dimension) -> str:
    """Return the values of a dimension in words, to follow `allowed:`."""
    match dimension:
        case Fixed(value=value):
            return shown(value_to_yaml(value))
        case Choices(values=values):
            return one_of([shown(value_to_yaml(value)) for value in values])
        case Range(low=low, high=high, integer=integer):
            return f"{'whole numbers ' if integer else ''}from {low:g} to {high:g}"
        case TimesSqrtRank(factor=factor):
            return f"{factor:g} x sqrt(lora_r)"


def _is_list_in_a_list(kind: Kind, raw: Any) -> bool:
    """Return whether a list is one value in a list of its own, where other lists are choices."""
    return isinstance(kind, Anything) and isinstance(raw, list) and len(raw) == 1 and isinstance(raw[0], list)


def _lists_choices(hyperparameter: Hyperparameter, raw: Any) -> bool:
    """Return whether a list is a list of choices; a flat list of layer names or numbers is one value."""
    if not isinstance(raw, list):
        return False
    if isinstance(hyperparameter.kind, (Modules, Layers)):
        return hyperparameter.kind.lists_choices(raw)
    return True


def _read_choices(hyperparameter: Hyperparameter, raw: list[Any]) -> Choices:
    if not raw:
        raise ValueError("is an empty list; write one value, or the values to search")
    values = tuple(parse_value(hyperparameter.kind, item) for item in raw)
    for position, value in enumerate(values):
        if value in values[:position]:
            raise ValueError(f"lists {shown(value_to_yaml(value))} twice")
    return Choices(values)


def _read_range(kind: Number | Integer, raw: Mapping[str, Any]) -> Range:
    if "step" in raw:
        raise ValueError(
            "step is not supported in a range; list the values to search instead, such as [8, 16, 32]"
        )
    if unknown := [key for key in raw if key not in _RANGE_KEYS]:
        raise ValueError(f"{shown(unknown[0])} is unknown in a range; allowed: {', '.join(_RANGE_KEYS)}")
    if missing := [key for key in ("low", "high") if key not in raw]:
        raise ValueError(f"the range lacks {' and '.join(missing)}; write {{low: ..., high: ...}}")
    if isinstance(kind, Integer) and raw.get("integer") is False:
        raise ValueError("allows whole numbers only; remove `integer: false`")
    integer = isinstance(kind, Integer) or _flag(raw, "integer")
    low, high = (_bound(raw, key, kind, integer=integer) for key in ("low", "high"))
    return Range(low, high, log=_flag(raw, "log"), integer=integer)


def _bound(raw: Mapping[str, Any], key: str, kind: Number | Integer, *, integer: bool) -> float:
    try:
        bound = kind.parse(raw[key])
    except ValueError as error:
        raise ValueError(f"{key} {error}") from None
    if integer and not float(bound).is_integer():
        raise ValueError(f"{key} expects a whole number, got {shown(raw[key])}")
    return int(bound) if integer else bound


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    try:
        return Flag().parse(raw.get(key, False))
    except ValueError as error:
        raise ValueError(f"{key} {error}") from None


def _read_times_sqrt_rank(hyperparameter: Hyperparameter, raw: Mapping[str, Any]) -> TimesSqrtRank:
    if not hyperparameter.may_follow_rank:
        raise ValueError("times_sqrt_r is allowed only for lora_alpha")
    if len(raw) > 1:
        raise ValueError("times_sqrt_r allows no other keys beside it: {times_sqrt_r: 4}")
    try:
        return TimesSqrtRank(Number(above=0).parse(raw["times_sqrt_r"]))
    except ValueError as error:
        raise ValueError(f"times_sqrt_r {error}") from None


def advice_on(hyperparameter: Hyperparameter, raw: Any) -> str:
    """Return what to write instead of a refused value: a list or a range, of the numbers in `raw` if any.

    Empty where the refusal itself says it.
    """
    if _is_share(hyperparameter, raw):
        return "; it is a number of optimizer steps, not a share of the run"
    if isinstance(raw, Mapping) and (
        raw.keys() <= {*_RANGE_KEYS} or not raw.keys().isdisjoint(_NOT_IN_RANGES)
    ):
        return ""
    texts = [text for text in _texts(raw) if not is_number(text)]
    if not texts and raw is not None and not _has_inner(raw):
        return ""
    kind = Number() if isinstance(hyperparameter.kind, Anything) else hyperparameter.kind
    if isinstance(kind, (Number, Integer)):
        return f"; {_several_numbers(kind, '' if raw is None else shown(raw))}"
    if isinstance(raw, str):
        names = [name for name in re.split(r"[\s,|/;]+|\.{2,}", raw.strip("[]() ")) if name != "or"]
        if len(names) > 1 and all(_is_allowed(kind, name) for name in names):
            return f"; to search them, write a list: [{', '.join(names)}]"
    return ""


def _is_share(hyperparameter: Hyperparameter, raw: Any) -> bool:
    is_share = (isinstance(raw, float) and 0 < raw < 1) or (isinstance(raw, str) and raw.endswith("%"))
    return is_share and hyperparameter.name.endswith("_steps")


_NOT_IN_RANGES = ("step", "times_sqrt_r")
"""Keys whose refusal says what to write instead."""
_A_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
_NUMBER = re.compile(rf"(?<![\w.]){_A_NUMBER}(?!\w)")
_TWO_NUMBERS = re.compile(rf"{_A_NUMBER}(\.\.+|\s*[-:,;]\s*|\s+to\s+){_A_NUMBER}")
_WIDE = 10
"""Ratio of the bounds from which the scale of a range is shown as logarithmic."""


def _several_numbers(kind: Number | Integer, text: str) -> str:
    read = [written for written in _NUMBER.findall(re.sub(r"\.{2,}", " ", text)) if _fits(kind, written)]
    values = ", ".join(read) if len(read) > 1 else "A, B"
    bounds, more = "low: A, high: B", ", with log: true for a logarithmic scale"
    if len(read) == 2 and 0 <= float(read[0]) < float(read[1]):
        is_wide = float(read[1]) >= _WIDE * float(read[0]) > 0
        bounds, more = f"low: {read[0]}, high: {read[1]}{', log: true' if is_wide else ''}", ""
    return f"to search, write the values as a list, [{values}], or a range, {{{bounds}}}{more}"


def _fits(kind: Number | Integer, written: str) -> bool:
    return _is_allowed(kind, int(written) if written.isdigit() else float(written))


def _is_allowed(kind: Kind, raw: Any) -> bool:
    try:
        kind.parse(raw)
    except ValueError:
        return False
    return True


def _texts(raw: Any) -> Iterator[str]:
    match raw:
        case str():
            yield raw
        case Mapping():
            yield from map(str, raw)
        case list():
            for item in raw:
                yield from _texts(item)


def _has_inner(raw: Any) -> bool:
    return isinstance(raw, list) and any(isinstance(item, (list, Mapping)) for item in raw)


_CONTINUES = {
    "type": "string",
    "pattern": r"^[A-Za-z0-9_][A-Za-z0-9._-]*/[0-9]+$",
    "description": "Resume from a checkpoint of this trial, as ROUND/TRIAL.",
}


def hyperparameters_schema() -> dict[str, Any]:
    """Return the schema of an object whose properties are a scalar, a list or a range each."""
    properties = {name: _dimension_schema(row) for name, row in HYPERPARAMETERS.items()}
    return {"type": "object", "properties": properties}


def names_schema(ignored_where_inactive: Set[str]) -> dict[str, Any]:
    """Return the schema of a file whose hyperparameters are known and may stand together.

    Of a method given as a path, the file alone does not say which hyperparameters it has.
    """
    choosers = [name for name, row in HYPERPARAMETERS.items() if isinstance(row.kind, Method)]
    paths = [_choosing({"pattern": ":"}, chooser) for chooser in choosers]
    hyperparameters = {
        "propertyNames": {"enum": list(HYPERPARAMETERS)},
        "allOf": list(_idle(ignored_where_inactive)),
    }
    point = {"propertyNames": {"enum": [*HYPERPARAMETERS, "continues"]}}
    enqueue = {"properties": {"enqueue": {"items": point}}}
    return {
        "if": {"properties": {"hyperparameters": {"not": {"anyOf": paths}}}},
        "then": {"properties": {"hyperparameters": hyperparameters, "search": enqueue}},
    }


def _idle(ignored_where_inactive: Set[str]) -> Iterator[dict[str, Any]]:
    """Yield the schema of each condition: without it, no hyperparameter that has it may be there."""
    conditions: dict[Condition, list[str]] = {}
    for name, row in HYPERPARAMETERS.items():
        if row.only_with is not None and name not in ignored_where_inactive:
            conditions.setdefault(row.only_with, []).append(name)
    for condition, names in conditions.items():
        yield {"if": _without(condition), "then": {"properties": dict.fromkeys(names, False)}}


def _without(condition: Condition) -> dict[str, Any]:
    """Return the schema of hyperparameters that choose none of a condition's values."""
    chooser = HYPERPARAMETERS[condition.chosen_by]
    chosen = _choosing({"enum": list(condition.values)}, chooser.name)
    if chooser.default in condition.values:
        return {"required": [chooser.name], "not": chosen}
    return {"not": chosen}


def _choosing(value: dict[str, Any], chooser: str) -> dict[str, Any]:
    """Return the schema of hyperparameters among whose values of a method there is one like this."""
    text = {"type": "string", **value}
    among = {"anyOf": [text, {"type": "array", "contains": text}]}
    return {"required": [chooser], "properties": {chooser: among}}


def enqueue_schema() -> dict[str, Any]:
    """Return the schema of a list of points: one value for each hyperparameter."""
    properties = {name: row.kind.schema() for name, row in HYPERPARAMETERS.items()}
    point = {
        "type": "object",
        "properties": {**properties, "continues": _CONTINUES},
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
