"""The two shapes data has between a file and its tokens: rows of named values, and segments of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Opening(Enum):
    """What stands before a row's text."""

    TEXT = auto()
    """What the tokenizer itself puts before a text, such as BOS."""
    TEMPLATE = auto()
    """The same, written out as a chat template has it: some tokenizers then put no space before the text."""
    WRITTEN = auto()
    """Nothing: the text brings its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read."""

    number: int
    """1-based line of the file where it begins, or 1-based row where the file has no lines of its own."""
    place: str
    """File and number as messages show them: `train.jsonl:12` or `train.json: row 12`."""
    values: Mapping[str, Any]
    """By column."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a row's text."""

    text: str
    is_target: bool
    """Whether a model that learns completions alone has its loss on these tokens."""
    is_masked: bool = False
    """Whether no loss sees these tokens, that on all tokens neither."""


def kind_of(value: Any) -> str:
    """A JSON value's type as a person would call it, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            digits = repr(value)
            return f"the number {digits if len(digits) <= 20 else digits[:20] + '...'}"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


def agreeing(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    differing = (at for at, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    return next(differing, min(len(text), len(other)))
