"""Methods that tuner does not have itself: which a file names, and what is recorded of them with its round.

A file is checked without importing what it names. `study run`, `check --probe` and `promote` load the
descriptions; a round keeps of them what later readers need, so that these import nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from tuner.errors import InputError
from tuner.methods import kinds
from tuner.methods.hyperparameters import Hyperparameter, Tier
from tuner.methods.optimizers import Optimizer, optimizer
from tuner.methods.registry import imported, is_built_in, is_known, stand_in
from tuner.methods.schedules import Schedule, schedule, warmup_length
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Choices, Condition, Dimension, Fixed, Hyperparameters, Range, Space, Value

Chooser: TypeAlias = Literal["optimizer", "schedule"]
"""A hyperparameter whose values are methods of the kind of the same name."""
CHOOSERS: tuple[Chooser, ...] = ("optimizer", "schedule")
_KINDS = {kind.__name__: kind for kind in (kinds.Number, kinds.Integer, kinds.Flag, kinds.OneOf)}
_PLACES, _MOST_SAMPLED = 513, 64
_UNKNOWN_STATE_BYTES = 8
"""Of an optimizer that is not loaded: AdamW's."""


@dataclass(frozen=True, slots=True)
class SampledRate:
    """A schedule's rate after warmup, for some of its hyperparameters."""

    values: dict[str, Any]
    """`warmup_steps` and its own hyperparameters."""
    decay_length: int | None
    """As `Schedule.decay_length`."""
    shares: tuple[float, ...]
    """Of the peak, at evenly spaced places from the end of the warmup to the last update."""


@dataclass(frozen=True, slots=True)
class PlugIn:
    """What a round records of a method that tuner does not have itself."""

    kind: Chooser
    name: str
    """As the file says it."""
    hyperparameters: tuple[Hyperparameter, ...]
    state_bytes: int = _UNKNOWN_STATE_BYTES
    """Of an optimizer: bytes of its state for each weight."""
    amplifies_rounding: bool = True
    rates: tuple[SampledRate, ...] = ()
    """Of a schedule: its rate by its hyperparameters."""

    def to_json(self) -> dict[str, Any]:
        """As it is recorded."""
        rows = [_row_to_json(row) for row in self.hyperparameters]
        rates = [asdict(sampled) for sampled in self.rates]
        return {
            **asdict(replace(self, hyperparameters=(), rates=())),
            "hyperparameters": rows,
            "rates": rates,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PlugIn:
        """The inverse of `to_json`; keys that a later version adds are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in document.items() if key in known}
        rows = tuple(_row_from_json(row) for row in document["hyperparameters"])
        rates = tuple(
            SampledRate(**{**sampled, "shares": tuple(sampled["shares"])})
            for sampled in document.get("rates", ())
        )
        return cls(**{**values, "hyperparameters": rows, "rates": rates})

    def stand_in(self) -> None:
        """Let what is recorded of a schedule stand in for it, so that a report imports nothing."""
        if self.kind == "schedule" and self.rates:
            stand_in("schedule", self.name, _recorded_schedule(self))


def named(written: Mapping[str, Any]) -> list[tuple[Chooser, str]]:
    """Return the methods among `hyperparameters:` of a file that tuner does not have itself."""
    found = [
        (chooser, name)
        for chooser in CHOOSERS
        for name in _listed(written.get(chooser))
        if isinstance(name, str) and not is_built_in(chooser, name) and is_known(chooser, name)
    ]
    return list(dict.fromkeys(found))


def _listed(raw: Any) -> list[Any]:
    return raw if isinstance(raw, list) else [raw]


def unloaded(
    written: Mapping[str, Any], recorded: Iterable[Mapping[str, Any]]
) -> tuple[tuple[Chooser, str], ...]:
    """Return those that a file names and of which nothing is recorded."""
    known = {(document["kind"], document["name"]) for document in recorded}
    return tuple(each for each in named(written) if each not in known)


def loaded(written: Mapping[str, Any]) -> tuple[PlugIn, ...]:
    """Import what a file names. Raises InputError where that is no description, or has wrong rows."""
    plug_ins = tuple(_load(kind, name) for kind, name in named(written))
    table_with(plug_ins)
    return plug_ins


def sampled(plug_in: PlugIn, space: Space, max_train_steps: int) -> PlugIn:
    """Return what to record of an imported schedule: its rates for the hyperparameters a round may draw."""
    method = schedule(plug_in.name)
    names = ["warmup_steps", *(row.name for row in plug_in.hyperparameters if row.name in space)]
    points = itertools.product(*(_samples(space[name]) for name in names))
    rates = []
    for point in itertools.islice(points, _MOST_SAMPLED):
        values = dict(zip(names, point, strict=True))
        first = warmup_length(values)
        last = max(first, max_train_steps - 1)
        places = [first + (last - first) * place / (_PLACES - 1) for place in range(_PLACES)]
        shares = tuple(float(method.multiplier(round(at), values, max_train_steps)) for at in places)
        rates.append(SampledRate(values, method.decay_length(values), shares))
    return replace(plug_in, rates=tuple(rates))


def _samples(dimension: Dimension) -> tuple[Value, ...]:
    match dimension:
        case Fixed(value=value):
            return (value,)
        case Choices(values=values):
            return values
        case Range(low=low, high=high, integer=integer):
            three = (low, (low + high) / 2, high)
            return tuple(round(value) for value in three) if integer else three
        case _:
            return ()


def _recorded_schedule(plug_in: PlugIn) -> Schedule:
    """A schedule by its sampled rates: those of the nearest hyperparameters, straight between two places."""

    def nearest(values: Hyperparameters) -> SampledRate:
        return min(plug_in.rates, key=lambda sampled: _distance(sampled.values, values))

    def multiplier(updates_done: int, values: Hyperparameters, max_train_steps: int) -> float:
        shares, first = nearest(values).shares, warmup_length(values)
        place = (updates_done - first) / max(1, max_train_steps - 1 - first) * (len(shares) - 1)
        below = max(0, min(len(shares) - 2, int(place)))
        return shares[below] + (shares[below + 1] - shares[below]) * min(1.0, place - below)

    return Schedule(
        name=plug_in.name,
        multiplier=multiplier,
        decay_length=lambda values: nearest(values).decay_length,
        hyperparameters=plug_in.hyperparameters,
    )


def _distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[int, float]:
    """How many names or switches differ, and then by how much the numbers do."""
    pairs = [(value, other.get(name, value)) for name, value in one.items()]
    numbers = [(float(a), float(b)) for a, b in pairs if _is_number(a) and _is_number(b)]
    others = sum(a != b for a, b in pairs if not (_is_number(a) and _is_number(b)))
    return others, math.fsum(abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in numbers)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _load(kind: Chooser, name: str) -> PlugIn:
    method: Optimizer | Schedule = (
        imported(kind, name, Optimizer) if kind == "optimizer" else imported(kind, name, Schedule)
    )
    for row in method.hyperparameters:
        if not isinstance(row, Hyperparameter) or type(row.kind).__name__ not in _KINDS:
            raise InputError(
                f"{kind} {name}: expects hyperparameters as tuner.methods.hyperparameters.Hyperparameter, of "
                f"the kinds {', '.join(_KINDS)}; got {row!r}"
            )
    if isinstance(method, Optimizer):
        return PlugIn(kind, name, method.hyperparameters, method.state_bytes, method.amplifies_rounding)
    return PlugIn(kind, name, method.hyperparameters)


def state_bytes(optimizer_name: str, recorded: Iterable[Mapping[str, Any]]) -> int:
    """Return the bytes of an optimizer's state for each weight, without importing what is not tuner's."""
    if is_built_in("optimizer", optimizer_name):
        return optimizer(optimizer_name).state_bytes
    known = map(PlugIn.from_json, recorded)
    plug_in = next((p for p in known if (p.kind, p.name) == ("optimizer", optimizer_name)), None)
    return _UNKNOWN_STATE_BYTES if plug_in is None else plug_in.state_bytes


def table_with(plug_ins: Sequence[PlugIn]) -> Mapping[str, Hyperparameter]:
    """Return the table with the rows of these.

    Raises InputError where one brings a name that tuner has with another meaning.
    """
    rows = dict(HYPERPARAMETERS)
    for plug_in in plug_ins:
        for row in plug_in.hyperparameters:
            rows[row.name] = _merged(rows.get(row.name), row, plug_in)
    return MappingProxyType(rows)


def table_for(
    written: Mapping[str, Any], recorded: Iterable[Mapping[str, Any]]
) -> Mapping[str, Hyperparameter]:
    """Return the table for a file. What only a method may know that is not loaded is let pass."""
    if not named(written):
        return HYPERPARAMETERS
    rows = dict(table_with([PlugIn.from_json(document) for document in recorded]))
    for kind, name in unloaded(written, recorded):
        for key in written:
            row = rows.get(
                key, Hyperparameter(key, None, kinds.Anything(), "", only_with=Condition(kind, ()))
            )
            if row.only_with is not None and row.only_with.chosen_by == kind and str(key).isidentifier():
                rows[key] = _counting_with(row, kind, name)
    return MappingProxyType(rows)


def _merged(known: Hyperparameter | None, row: Hyperparameter, plug_in: PlugIn) -> Hyperparameter:
    kind, name = plug_in.kind, plug_in.name
    if known is None:
        return replace(row, only_with=Condition(kind, (name,)))
    if (known.kind, known.default) != (row.kind, row.default):
        raise InputError(
            f"{kind} {name}: brings {row.name}, which is another hyperparameter already; rename it"
        )
    if known.only_with is None:
        return known
    if known.only_with.chosen_by != kind:
        raise InputError(
            f"{kind} {name}: brings {row.name}, which belongs to {known.only_with.chosen_by}; rename it"
        )
    return _counting_with(known, kind, name)


def _counting_with(row: Hyperparameter, kind: Chooser, name: str) -> Hyperparameter:
    values = row.only_with.values if row.only_with is not None else ()
    return replace(row, only_with=Condition(kind, tuple(dict.fromkeys((*values, name)))))


def _row_to_json(row: Hyperparameter) -> dict[str, Any]:
    kind = {"type": type(row.kind).__name__, **asdict(row.kind)}  # type: ignore[call-overload]
    return {
        "name": row.name,
        "default": row.default,
        "kind": kind,
        "meaning": row.meaning,
        "default_note": row.default_note,
        "tier": str(row.tier),
    }


def _row_from_json(document: Mapping[str, Any]) -> Hyperparameter:
    kind = dict(document["kind"])
    made_by = _KINDS[kind.pop("type")]
    if "names" in kind:
        kind["names"] = tuple(kind["names"])
    return Hyperparameter(
        name=document["name"],
        default=document["default"],
        kind=made_by(**kind),
        meaning=document["meaning"],
        default_note=document["default_note"],
        tier=Tier(document["tier"]),
    )
