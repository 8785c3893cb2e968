"""`study promote --add`: a hyperparameter and values that the next round tries besides the incumbents'."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from tuner.config import HYPERPARAMETERS, RoundFile
from tuner.config.dimensions import read_dimension
from tuner.config.settings import typed_values
from tuner.config.yaml_text import YamlError
from tuner.errors import InputError
from tuner.methods.hyperparameters import Hyperparameter
from tuner.records import Choices, Dimension, Fixed, TimesSqrtRank

EXAMPLE = "--add lora_dropout=0,0.05 or --add weight_decay=1e-4:1e-1:log"
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
            raise _refused(text, f"{name} is added twice; write all of its values in one --add")
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
        raise _refused(text, f"{row.name}: {error}; each value is {row.allowed}") from None


def _refuse_nothing_new(text: str, name: str, added: Dimension, before: Dimension) -> None:
    if isinstance(added, (Fixed, Choices)) and isinstance(before, Fixed):
        values = added.values if isinstance(added, Choices) else (added.value,)
        if set(values) == {before.value}:
            raise _refused(text, f"{name} is already {before.value}; pass another value")


def _refused(text: str, why: str) -> InputError:
    return InputError(f"--add {text}: {why}\nExample: {EXAMPLE}")
