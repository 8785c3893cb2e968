"""Plug-ins, methods from outside of tuner: which ones a file names, and what its round records of them.

Checking a file imports no plug-ins. `study run`, `check --probe` and `promote` import the descriptions; the
round records what later readers need, so that they need no import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from tuner.errors import InputError
from tuner.methods import kinds, variants
from tuner.methods.hyperparameters import Hyperparameter, Tier
from tuner.methods.optimizers import Optimizer, optimizer
from tuner.methods.registry import imported, is_built_in, stand_in
from tuner.methods.schedules import Schedule, not_imported
from tuner.methods.table import HYPERPARAMETERS
from tuner.methods.variants import Variant
from tuner.records import Condition

Chooser: TypeAlias = Literal["optimizer", "schedule", "variant"]
"""A hyperparameter whose values are names of methods of the kind of the same name."""
CHOOSERS: tuple[Chooser, ...] = ("optimizer", "schedule", "variant")
_KINDS = {kind.__name__: kind for kind in (kinds.Number, kinds.Integer, kinds.Flag, kinds.OneOf)}
_UNKNOWN_STATE_BYTES = 8
"""Assumed for an optimizer that is not loaded; the value of AdamW."""


@dataclass(frozen=True, slots=True)
class PlugIn:
    """What a round records of a plug-in."""

    kind: Chooser
    name: str
    """As written in the file."""
    hyperparameters: tuple[Hyperparameter, ...]
    state_bytes: int = _UNKNOWN_STATE_BYTES
    """For an optimizer: bytes of state per weight."""
    amplifies_rounding: bool = True
    has_stable_phase: bool = False
    """For a schedule: whether the rate before the decay is the same at every horizon."""
    title: str = ""
    """For a variant: its name in messages."""
    packs: bool = True
    weights_per_output: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form that is recorded."""
        rows = [_row_to_json(row) for row in self.hyperparameters]
        return {**asdict(replace(self, hyperparameters=())), "hyperparameters": rows}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PlugIn:
        """Invert `to_json`. Keys added by later versions are ignored."""
        known = {field.name for field in fields(cls)}
        values = {key: value for key, value in document.items() if key in known}
        rows = tuple(_row_from_json(row) for row in document["hyperparameters"])
        return cls(**{**values, "hyperparameters": rows})

    def stand_in(self) -> None:
        """Use the recorded description of a schedule or variant, so that reports need no import."""
        own = self.hyperparameters
        match self.kind:
            case "schedule":
                phase = self.has_stable_phase
                known: object = not_imported(self.name, has_stable_phase=phase, hyperparameters=own)
            case "variant":
                known = variants.not_imported(
                    self.name,
                    title=self.title,
                    packs=self.packs,
                    weights_per_output=self.weights_per_output,
                    hyperparameters=own,
                )
            case "optimizer":
                return
        stand_in(self.kind, self.name, known)


def named(written: Mapping[str, Any]) -> list[tuple[Chooser, str]]:
    """Return the plug-ins named under `hyperparameters:` of a file, installed or not."""
    found = [
        (chooser, name)
        for chooser in CHOOSERS
        for name in _listed(written.get(chooser))
        if isinstance(name, str) and not is_built_in(chooser, name)
    ]
    return list(dict.fromkeys(found))


def _listed(raw: Any) -> list[Any]:
    return raw if isinstance(raw, list) else [raw]


def unloaded(
    written: Mapping[str, Any], recorded: Iterable[Mapping[str, Any]]
) -> tuple[tuple[Chooser, str], ...]:
    """Return the plug-ins that a file names and that are not recorded."""
    known = {(document["kind"], document["name"]) for document in recorded}
    return tuple(each for each in named(written) if each not in known)


def loaded(written: Mapping[str, Any]) -> tuple[PlugIn, ...]:
    """Import the plug-ins that a file names. Raises InputError for an invalid description."""
    plug_ins = tuple(_load(kind, name) for kind, name in named(written))
    table_with(plug_ins)
    return plug_ins


def _load(kind: Chooser, name: str) -> PlugIn:
    method: Optimizer | Schedule | Variant
    match kind:
        case "optimizer":
            method = imported(kind, name, Optimizer)
        case "schedule":
            method = imported(kind, name, Schedule)
        case "variant":
            method = _checked(imported(kind, name, Variant), name)
    if not isinstance(method.hyperparameters, (tuple, list)):
        raise InputError(f"{kind} {name}: expects a tuple of hyperparameters, got {method.hyperparameters!r}")
    for row in method.hyperparameters:
        _refuse_bad_row(row, place=f"{kind} {name}")
    rows = tuple(method.hyperparameters)
    if isinstance(method, Optimizer):
        return PlugIn(kind, name, rows, method.state_bytes, method.amplifies_rounding)
    if isinstance(method, Schedule):
        return PlugIn(kind, name, rows, has_stable_phase=method.has_stable_phase)
    return PlugIn(
        kind,
        name,
        rows,
        title=method.title,
        packs=method.packs,
        weights_per_output=method.weights_per_output,
    )


def _checked(variant: Variant, name: str) -> Variant:
    """Return the variant. Raises InputError if its arguments at all defaults cannot be followed."""
    if variant.switch is not None:
        raise InputError(
            f"variant {name}: declares the switch {variant.switch}; remove it: `variant: {name}` selects it"
        )
    rows = (*HYPERPARAMETERS.values(), *variant.hyperparameters)
    defaults = {row.name: row.default for row in rows if row.default is not None}
    own = variants.own_arguments(variant, {**defaults, variants.CHOOSER: name})
    variants.refuse_arguments(replace(variant, name=name), own)
    return variant


def _refuse_bad_row(row: object, *, place: str) -> None:
    """Refuse a hyperparameter that cannot be recorded, or that does not allow its own default."""
    if not isinstance(row, Hyperparameter) or type(row.kind).__name__ not in _KINDS:
        raise InputError(
            f"{place}: expects hyperparameters of type tuner.methods.hyperparameters.Hyperparameter and of "
            f"the kinds {', '.join(_KINDS)}; got {row!r}"
        )
    if row.name in HYPERPARAMETERS or row.only_if_written:
        return
    try:
        row.kind.parse(row.default)
    except ValueError as error:
        raise InputError(f"{place}: the default of {row.name} cannot be used: {error}") from error


def state_bytes(optimizer_name: str, recorded: Iterable[Mapping[str, Any]]) -> int:
    """Return an optimizer's bytes of state per weight, without importing plug-ins."""
    if is_built_in("optimizer", optimizer_name):
        return optimizer(optimizer_name).state_bytes
    known = map(PlugIn.from_json, recorded)
    plug_in = next((p for p in known if (p.kind, p.name) == ("optimizer", optimizer_name)), None)
    return _UNKNOWN_STATE_BYTES if plug_in is None else plug_in.state_bytes


def table_with(plug_ins: Sequence[PlugIn]) -> Mapping[str, Hyperparameter]:
    """Return the table extended by the rows of plug-ins.

    Raises InputError if a row has the name of another hyperparameter.
    """
    rows = dict(HYPERPARAMETERS)
    for plug_in in plug_ins:
        for row in plug_in.hyperparameters:
            rows[row.name] = _merged(rows.get(row.name), row, plug_in)
    return MappingProxyType(rows)


def table_for(
    written: Mapping[str, Any], recorded: Iterable[Mapping[str, Any]]
) -> Mapping[str, Hyperparameter]:
    """Return the table for a file. Hyperparameters that may belong to an unloaded plug-in are accepted.

    Which trials have them is not known where plug-ins of several kinds are unloaded.
    """
    if not named(written):
        return HYPERPARAMETERS
    rows = dict(table_with([PlugIn.from_json(document) for document in recorded]))
    absent = unloaded(written, recorded)
    only_kind = absent[0][0] if len({kind for kind, _ in absent}) == 1 else None
    for key in written if absent else ():
        if key not in rows and str(key).isidentifier():
            owner = None if only_kind is None else Condition(only_kind, ())
            rows[key] = Hyperparameter(key, None, kinds.Anything(), "", only_with=owner)
    for kind, name in absent:
        for key in written:
            row = rows.get(key)
            if row is not None and row.only_with is not None and row.only_with.chosen_by == kind:
                rows[key] = _counting_with(row, kind, name)
    return MappingProxyType(rows)


def _merged(known: Hyperparameter | None, row: Hyperparameter, plug_in: PlugIn) -> Hyperparameter:
    kind, name = plug_in.kind, plug_in.name
    if known is None:
        return replace(row, only_with=Condition(kind, (name,)))
    if (known.kind, known.default) != (row.kind, row.default):
        raise InputError(
            f"{kind} {name}: declares {row.name}, which is already another hyperparameter; rename it"
        )
    if known.only_with is None:
        return known
    if known.only_with.chosen_by != kind:
        raise InputError(
            f"{kind} {name}: declares {row.name}, which belongs to {known.only_with.chosen_by}; rename it"
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
        "only_if_written": row.only_if_written,
        "may_follow_rank": row.may_follow_rank,
        "tier": str(row.tier),
        "in_decay": row.in_decay,
    }


def _tupled(value: Any) -> Any:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _row_from_json(document: Mapping[str, Any]) -> Hyperparameter:
    recorded = dict(document["kind"])
    made_by = _KINDS[recorded.pop("type")]
    kind = {key: _tupled(value) for key, value in recorded.items()}
    return Hyperparameter(
        name=document["name"],
        default=document["default"],
        kind=made_by(**kind),
        meaning=document["meaning"],
        default_note=document["default_note"],
        only_if_written=document.get("only_if_written", False),
        may_follow_rank=document.get("may_follow_rank", False),
        tier=Tier(document["tier"]),
        in_decay=document.get("in_decay"),
    )
