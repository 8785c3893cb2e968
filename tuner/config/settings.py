"""Values given on the command line, written into a round file as a person would: `--set`, `promote --add`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tuner.config.dimensions import read_dimension
from tuner.config.editing import edit_round
from tuner.config.parsing import RoundFile, read_round
from tuner.config.yaml_text import YamlError, parse
from tuner.errors import InputError, RoundFileError
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.table import HYPERPARAMETERS
from tuner.records import Choices, Dimension, Fixed, TimesSqrtRank

_SET_EXAMPLE = "--set hyperparameters.lora_r=16,32 or --set data.max_length=1024"
_TEXT_KEYS = frozenset({"goal"})
"""Keys whose commas are part of a sentence."""
_PLACE = "hyperparameters."


def typed_values(text: str) -> Any:
    """Return what `a,b` or `low:high[:log]` means in a round file: a list, or the keys of a range.

    Raises YamlError, or ValueError for a range that is no range.
    """
    if ":" not in text:
        return _yaml(f"[{text}]")
    low, high, *scale = (part.strip() for part in text.split(":"))
    if scale not in ([], ["log"]):
        raise ValueError(f"expects LOW:HIGH or LOW:HIGH:log, got {text}")
    return {"low": _yaml(low), "high": _yaml(high), "log": bool(scale)}


def with_settings(
    text: str, given: Sequence[str], path: Path, *, comment: str | None = None, refused: Collection[str] = ()
) -> tuple[str, dict[str, Any]]:
    """Return the text of a round file with `KEY=VALUE` set in it, and the values by key.

    Each line keeps its comment unless there is a new one. Keys of `refused` have options of their own. Raises
    InputError, with an example, for what cannot be read or is not allowed.
    """
    values: dict[str, Any] = {}
    for setting in given:
        key, has_value, written = (part.strip() for part in setting.partition("="))
        if not has_value or not key or not written:
            raise _refusal(setting, "expects KEY=VALUE")
        if key in refused or key in ("study", "round"):
            option = f"; use --{key.replace('_', '-')}" if key in refused else ""
            raise _refusal(setting, f"{key} cannot be set{option}")
        if key in values:
            raise _refusal(setting, f"{key} is set twice; write all of its values at once, as in KEY=A,B")
        try:
            values[key] = _value(key, written)
            text = edit_round(text, {key: values[key]}, {} if comment is None else {key: comment})
        except YamlError as error:
            raise _refusal(setting, f"{written} cannot be read: {error}") from None
        except ValueError as error:
            raise _refusal(setting, str(error)) from None
    if given:
        _refuse_mistakes(text, given, path)
    return text, values


def _refuse_mistakes(text: str, given: Sequence[str], path: Path) -> None:
    """Raise InputError for the first setting that is not allowed beside the rest of the file."""
    try:
        read_round(text, path)
    except RoundFileError as error:
        for setting in given:
            key = setting.partition("=")[0].strip()
            said = [f"{m.key}: {m.message}" for m in error.mistakes if m.key.startswith(key)]
            if said:
                raise _refusal(setting, "; ".join(said)) from None
        said = [f"{mistake.key}: {mistake.message}" for mistake in error.mistakes]
        raise _refusal(" --set ".join(given), "; ".join(said)) from None


def _value(key: str, written: str) -> Any:
    is_one = written[0] in "[{'\"" or key in _TEXT_KEYS
    if not is_one and key.startswith(_PLACE) and (":" in written or "," in written):
        return typed_values(written)
    return _yaml(f"[{written}]" if not is_one and "," in written else written)


def _yaml(text: str) -> Any:
    return parse(f"value: {text}").document["value"]


def _refusal(setting: str, why: str) -> InputError:
    return InputError(f"--set {setting}: {why}\nExample: {_SET_EXAMPLE}")


_ADD_EXAMPLE = "--add lora_dropout=0,0.05 or --add weight_decay=1e-4:1e-1:log"
NEVER_ADDED = frozenset({"batch_size"})
"""Changing one of these means tuning everything again."""


def added_dimensions(given: Sequence[str], file: RoundFile) -> dict[str, Dimension]:
    """Return the dimension of each `NAME=VALUES` or `NAME=LOW:HIGH[:log]`, by name.

    `file` is the round that is promoted. Raises InputError, with an example, for values that cannot be read,
    unknown or forbidden names, and names that the round already searches.
    """
    space = file.spec.space()
    added: dict[str, Dimension] = {}
    for text in given:
        name, has_values, values = (part.strip() for part in text.partition("="))
        if not has_values or not name or not values:
            raise _refused(text, "expects NAME=VALUE,VALUE or NAME=LOW:HIGH[:log]")
        if name not in file.spec.table:
            meant = get_close_matches(name, _allowed(), n=1)
            known = f"did you mean {meant[0]}?" if meant else f"allowed: {', '.join(sorted(_allowed()))}"
            raise _refused(text, f"{name} is unknown; {known}")
        if name in NEVER_ADDED:
            raise _refused(text, f"{name} cannot be added: changing it means tuning everything again")
        if name in added:
            raise _refused(text, f"{name} is added twice; write all of its values at once, as in NAME=A,B")
        row = file.spec.table[name]
        before = space.get(name)
        if row.only_if_written and row.default is not None:
            before = before or Fixed(row.default)
        if before is None:
            raise _refused(
                text,
                f"no trial of {file.spec.round} has {name}, by its "
                f"{row.only_with.chosen_by if row.only_with else name}; add both in the new file instead",
            )
        if not isinstance(before, (Fixed, TimesSqrtRank)):
            raise _refused(
                text,
                f"{name} is already searched in {file.spec.round}; edit its line in the new file instead",
            )
        added[name] = _dimension(text, row, values)
        _refuse_nothing_new(text, name, added[name], before)
    return added


def _allowed() -> set[str]:
    return set(HYPERPARAMETERS) - NEVER_ADDED


def _dimension(text: str, row: Hyperparameter, values: str) -> Dimension:
    try:
        return read_dimension(row, typed_values(values))
    except YamlError as error:
        raise _refused(text, f"{values} cannot be read: {error}") from None
    except ValueError as error:
        each = "" if row.allowed in str(error) else f"; each value is {row.allowed}"
        raise _refused(text, f"{row.name}: {error}{each}") from None


def _refuse_nothing_new(text: str, name: str, added: Dimension, before: Dimension) -> None:
    if isinstance(added, (Fixed, Choices)) and isinstance(before, Fixed):
        values = added.values if isinstance(added, Choices) else (added.value,)
        if set(values) == {before.value}:
            raise _refused(text, f"{name} is already {before.value}; pass another value")


def _refused(text: str, why: str) -> InputError:
    return InputError(f"--add {text}: {why}\nExample: {_ADD_EXAMPLE}")
