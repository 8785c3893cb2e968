"""Parse a round file, or report every mistake with its line and key."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tuner.config.round_file import RECORDED_KEYS, RoundSpec
from tuner.config.wording import EXAMPLES, Location, key_like, meant_value, unknown_key
from tuner.config.yaml_limits import MAX_BYTES
from tuner.config.yaml_text import YamlError, parse
from tuner.errors import InputError, Mistake, RoundFileError, is_number, one_of, refusal, shown
from tuner.methods.plug_ins import CHOOSERS, PlugIn, loaded
from tuner.methods.schedules import refuse_bad_rates, schedule
from tuner.methods.table import HYPERPARAMETERS
from tuner.process_log import harmless
from tuner.records import corners


@dataclass(frozen=True, slots=True)
class RoundFile:
    """A round file without mistakes."""

    path: Path
    text: str
    spec: RoundSpec

    @property
    def directory(self) -> Path:
        """Return the absolute directory that its relative paths refer to."""
        return self.path.parent.absolute()

    @property
    def hints(self) -> tuple[str, ...]:
        """Return hints on old spellings and their replacements."""
        evaluation = parse(self.text).document.get("evaluation")
        answers = evaluation.get("answers") if isinstance(evaluation, dict) else None
        if not isinstance(answers, dict) or answers.get("objective") is not True:
            return ()
        line = self.line("evaluation.answers.objective")
        return (
            f"{self.path.name}:{line}: evaluation.answers.objective is now written "
            "`objective: {metric: answers}`, at the top level of the file; both mean the same",
        )

    def edited(self, text: str) -> RoundFile:
        """The file with another text, which knows as much of its plug-ins. Raises RoundFileError."""
        return read_round(text, self.path, plug_ins=[PlugIn.from_json(each) for each in self.spec.plug_ins])

    def line(self, key: str) -> int | None:
        """Return the 1-based line of a key such as `data.train[0].path`, or of its nearest parent."""
        parts = re.findall(r"\[\d+\]|[^.\[\]]+", key)
        return parse(self.text).line(tuple(int(p[1:-1]) if p.startswith("[") else p for p in parts))

    def placed(self, error: InputError) -> InputError:
        """Return the error as the mistake of the line that has the value it is about; else the error itself.

        Its message begins with a key that the file has, with the kind and name of a method, as in `optimizer
        m:X`, or with the path of the model or of missing rows.
        """
        message = str(error)
        if isinstance(error, RoundFileError) or (found := self._about(message)) is None:
            return error
        key, said = found
        return RoundFileError(self.path, [Mistake(self.line(key), key, said)])

    def _about(self, message: str) -> tuple[str, str] | None:
        """Return the key that a message is about, and what it says of it."""
        if (named := _METHOD_FIRST.match(message)) is not None:
            key = _KEYS_OF_KINDS[named["kind"]]
            return (key, message) if named["name"] in _listed(self._written(key)) else None
        # Before the keys: a folder may have the name of one.
        absolute = self.spec.absolute(self.directory)
        if message.startswith((f"{self.spec.model.path}:", f"{absolute.model.path}:")):
            return "model.path", message
        for part in ("train", "eval", "test"):
            sources = zip(getattr(self.spec.data, part), getattr(absolute.data, part), strict=True)
            for at, (source, meant) in enumerate(sources):
                if (
                    message.startswith((f"{harmless(source.path)}:", f"{harmless(meant.path)}:"))
                    and not Path(meant.path).exists()
                ):
                    return f"data.{part}[{at}].path", message
        if (named := _KEY_FIRST.match(message)) is not None and self._written(named["key"]) is not None:
            return named["key"], message[named.end() :]
        return None

    def _written(self, key: str) -> Any:
        """Return the value of a dotted key as the file has it; None without one."""
        value: Any = parse(self.text).document
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value


_KEYS_OF_KINDS = {
    "optimizer": "hyperparameters.optimizer",
    "schedule": "hyperparameters.schedule",
    "variant": "hyperparameters.variant",
    "sampler": "search.sampler",
    "metric": "objective.metric",
    "engine": "run.engine",
    "tracker": "run.report_to",
}
_METHOD_FIRST = re.compile(rf"(?P<kind>{'|'.join(_KEYS_OF_KINDS)}) (?P<name>\S+?)(, which is \S+)?: ")
_KEY_FIRST = re.compile(r"(?P<key>[a-z_]+(\.[a-z_]+)*)(: | (?=\S+: ))")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def load_round(path: Path) -> RoundFile:
    """Read and check a round file.

    Raises InputError when there is none, and RoundFileError with all of its mistakes, in the file's order.
    """
    return read_round(_read_text(path), path)


def with_plug_ins(file: RoundFile) -> RoundFile:
    """Return the file with the descriptions of the methods it names that tuner does not have, imported.

    Those of a command are its own, whatever their names. Raises InputError where one cannot be imported, and
    RoundFileError where hyperparameters are not as they say.
    """
    if file.spec.command is not None:
        return file
    try:
        plug_ins = loaded(file.spec.hyperparameters)
    except InputError as error:
        raise file.placed(error) from None
    if not plug_ins:
        return file
    found = read_round(file.text, file.path, plug_ins=plug_ins)
    for plug_in in plug_ins:
        if plug_in.kind == "schedule":
            _refuse_bad_schedule(found, plug_in.name)
    return found


def _refuse_bad_schedule(file: RoundFile, name: str) -> None:
    """Refuse a custom schedule whose rate cannot be computed for trials of this file."""
    for trial in corners(file.spec.space(), {"schedule": name}):
        try:
            refuse_bad_rates(schedule(name), trial, file.spec.max_train_steps)
        except InputError as error:
            key = "hyperparameters.schedule"
            mistake = Mistake(file.line(key), key, f"{name}: {error}")
            raise RoundFileError(file.path, [mistake]) from error


def read_round(text: str, path: Path, *, plug_ins: Sequence[PlugIn] = ()) -> RoundFile:
    """Check the text of a round file that is, or will be, at `path`. Raises RoundFileError."""
    try:
        parsed = parse(text)
    except YamlError as mistake:
        raise RoundFileError(path, [Mistake(mistake.line, "", mistake.message)]) from None
    if not isinstance(parsed.document, dict):
        raise RoundFileError(path, [_not_a_round(parsed.document)])
    found = _validate(parsed.document, [plug_in.to_json() for plug_in in plug_ins])
    if isinstance(found, RoundSpec):
        return RoundFile(path, text, found)
    mistakes = [Mistake(parsed.line(at), dotted(at), message) for at, message in found.items()]
    raise RoundFileError(path, sorted(mistakes, key=lambda mistake: mistake.line or 0))


def dotted(location: Location) -> str:
    """`data.train[0].format` for the place ("data", "train", 0, "format")."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).removeprefix(".")


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is a pipe or a device; use a file, since it is read more than once")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(f"{path} has {size:,} bytes, too many for a round file; is it another file?")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in error.object[: error.end]:
            raise InputError(f"{path} is not a text file; name a round file, such as round1.yaml") from None
        line = error.object.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 text: byte {error.object[error.start]:#04x}; save the file as UTF-8"
        raise RoundFileError(path, [Mistake(line, "", message)]) from None
    except IsADirectoryError:
        there = _files_in(path)
        hint = f"name the round file in it, such as {path / there[0]}" if there else "it has no round file"
        raise InputError(f"{path} is a directory; {hint}") from None
    except FileNotFoundError:
        there = _files_in(path.parent)
        nearest = get_close_matches(path.name, there, n=5, cutoff=0)
        hint = f"in this folder: {', '.join(nearest)}" if there else "create one with `tuner study new`"
        raise InputError(f"there is no round file {path}; {hint}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _files_in(folder: Path) -> list[str]:
    return sorted(other.name for other in folder.glob("*.y*ml") if other.is_file())


def _not_a_round(document: Any) -> Mistake:
    if document is None:
        return Mistake(None, "", "is empty; create a round file with `tuner study new`")
    read = "a list" if isinstance(document, list) else shown(document)
    return Mistake(1, "", f"expects `key: value` lines such as `study: NAME`, got {read}")


_SOURCE = {"path": "x", "format": "text"}
_STAND_INS: dict[Location, Any] = {
    ("study",): "x",
    ("round",): "x",
    ("model",): {"path": "x"},
    ("model", "path"): "x",
    ("data",): {"train": [_SOURCE], "eval": [_SOURCE]},
    ("data", "train"): [_SOURCE],
    ("data", "eval"): [_SOURCE],
    **{("data", part, 0): _SOURCE for part in ("train", "eval", "test")},
    **{("data", part, 0, key): _SOURCE[key] for part in ("train", "eval", "test") for key in _SOURCE},
    ("search", "enqueue", 0): {},
    ("run", "report_to", 0): "tensorboard",
    ("max_train_steps",): 1,
    ("command",): {"run": ["x"]},
    ("command", "run"): ["x"],
    ("command", "run", 0): "x",
    ("command", "resume", 0): "x",
}
"""Right values for what has no default, so that the rest can be checked beside it; list positions are 0."""


def _validate(document: dict[str, Any], plug_ins: list[dict[str, Any]]) -> RoundSpec | dict[Location, str]:
    """The spec, or all mistakes.

    Rules between keys run only on keys that are each right, so what is wrong is taken out, or replaced where
    it has no default, and the rest is validated again until nothing new turns up.
    """
    found: dict[Location, str] = {}
    seen: set[Location] = set()
    mended = copy.deepcopy(document)
    own = {row["name"] for plug_in in plug_ins for row in plug_in["hyperparameters"]}
    known = (*_KNOWN_KEYS, *(f"hyperparameters.{name}" for name in sorted(own)))
    for recorded in RECORDED_KEYS:
        if mended.pop(recorded, None) is not None:
            found[recorded,] = unknown_key((recorded,), known)
    if plug_ins:
        mended["plug_ins"] = plug_ins
    while True:
        try:
            spec = RoundSpec.model_validate(mended)
        except ValidationError as error:
            fresh = [each for each in error.errors(include_url=False) if each["loc"] not in seen]
        else:
            return found or spec
        if not fresh:
            return found
        wrong = {dotted(at) for at in seen}
        for each in fresh:
            seen.add(each["loc"])
            message = _message(each, known)
            if wrong.isdisjoint(each.get("ctx", {}).get("rests_on", ())) and not (
                _may_belong_to_a_method(each["loc"], message, own) and wrong & _CHOOSERS
            ):
                found[each["loc"]] = message
            _mend(mended, each["loc"])


_CHOOSERS = {f"hyperparameters.{chooser}" for chooser in CHOOSERS}
_MISSPELT = 0.85
"""Similarity above which a name is a known one with a slip; `sgd_momentum` is less like `muon_momentum`."""


def _may_belong_to_a_method(location: Location, message: str, own: Collection[str]) -> bool:
    """Return whether a name is no misspelt hyperparameter or other key, or is one of plug-ins' `own`."""
    name = str(location[-1])
    is_misspelt = key_like(name) is not None or get_close_matches(name, HYPERPARAMETERS, cutoff=_MISSPELT)
    is_like_none = message.startswith("unknown") and not is_misspelt
    return location[0] in ("hyperparameters", "search") and (is_like_none or name in own)


def _mend(document: dict[str, Any], location: Location) -> None:
    """Remove a wrong value, so that its default is used; or replace it by a valid one.

    What went with something around it is left alone.
    """
    parent: Any = document
    for part in location[:-1]:
        is_there = part in parent if isinstance(parent, dict) else isinstance(parent, list)
        if not is_there:
            return
        parent = parent[part]
    stand_in = _STAND_INS.get(tuple(0 if isinstance(part, int) else part for part in location))
    if stand_in is not None:
        parent[location[-1]] = copy.deepcopy(stand_in)
    else:
        parent.pop(location[-1], None)


_EXPECTED = {
    "int_type": "a whole number{bounds}",
    "int_from_float": "a whole number{bounds}",
    "float_type": "a number{bounds}",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (in quotes where it looks like a number)",
    "string_too_short": "text that is not empty",
    "string_too_long": "at most 100 characters",
    "string_pattern_mismatch": "letters, digits, `_`, `.` and `-` (no `.` or `-` first: it names a folder)",
    "list_type": "a list such as {example}",
    "dict_type": "`key: value` lines such as {example}",
    "model_type": "`key: value` lines such as {example}",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "a number above {gt:g}",
    "less_than": "a number below {lt:g}",
    "too_short": "at least {min_length} entry",
}
"""Messages for pydantic's types of error, in terms of the round file."""


def _message(error: ErrorDetails, known: Collection[str]) -> str:
    context, location, raw = error.get("ctx", {}), error["loc"], error["input"]
    match error["type"]:
        case "mistake":
            return str(context["message"])
        case "unknown_key" | "extra_forbidden":
            return unknown_key(location, known)
        case "missing":
            return f"missing: {_meaning(location)}"
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", context["expected"])
            return refusal(one_of(allowed), raw, meant_value(raw, allowed))
        case kind if kind in _EXPECTED:
            field = _field(location)
            more = {"bounds": "" if field is None else _bounds(field), "example": _example(location, raw)}
            said = refusal(_EXPECTED[kind].format(**context, **more), raw)
            return f"{said}{_advice(location, kind, raw)}"
        case _:
            return f"{error['msg']}, got {shown(raw)}"


def _meaning(location: Location) -> str:
    """Return the first sentence of a key's description."""
    field = _field(location)
    assert field is not None
    described = " ".join((field.description or "").split())
    return re.split(r"(?<=[\w`])[.;] ", described)[0].removesuffix(".")


def _field(location: Location) -> FieldInfo | None:
    """Return the description of a key; None below what has no keys of its own."""
    model: type[BaseModel] | None = RoundSpec
    field: FieldInfo | None = None
    for part in location:
        if isinstance(part, str):
            field = None if model is None else model.model_fields.get(part)
            model = None if field is None else _model_in(field.annotation)
    return field


def _bounds(field: FieldInfo) -> str:
    """Return ` of at least 1` for a number's bounds."""
    inner = [each for part in get_args(field.annotation) for each in getattr(part, "__metadata__", ())]
    fields = [field, *(each for each in inner if isinstance(each, FieldInfo))]  # of `Annotated[...] | None`
    said = [
        f"{words} {bound:g}"
        for limit in (limit for each in fields for limit in each.metadata)
        for name, words in (("ge", "of at least"), ("gt", "above"), ("lt", "below"))
        if (bound := getattr(limit, name, None)) is not None
    ]
    return f" {' and '.join(said)}" if said else ""


def _example(location: Location, raw: Any) -> str:
    """Return a value that is allowed in a place of sections or lists, with the path that was read if any."""
    name = re.sub(r"\[\d+\]", "[]", dotted(location))
    path = raw if isinstance(raw, str) and re.fullmatch(r"[\w./~-]+", raw) else "PATH"
    return EXAMPLES.get(name, "{key: value}").replace("PATH", path)


def _advice(location: Location, kind: str, raw: Any) -> str:
    """Return, to follow a refusal of the wrong kind, how to have the default, or what the number means."""
    field = _field(location)
    if field is None:
        return ""
    if raw is None:
        return "; write one" if field.is_required() else "; write one, or remove this line"
    if isinstance(raw, str) and kind in ("int_type", "float_type") and not is_number(raw):
        return f". Meaning: {_meaning(location)}"
    return ""


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name in RECORDED_KEYS:
            continue
        yield f"{prefix}{name}"
        if name == "hyperparameters":
            yield from (f"{prefix}{name}.{each}" for each in HYPERPARAMETERS)
        elif section := _model_in(field.annotation):
            yield from _keys(section, f"{prefix}{name}.")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model of a field that holds a section or a list of sections."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for each in get_args(annotation) if (model := _model_in(each))), None)


_KNOWN_KEYS = tuple(_keys(RoundSpec))
