"""Examples as a person reads them: the text, and which of it the loss sees."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tuner.data.examples import Example, Examples
from tuner.data.segments import agreeing

WRITTEN = ("{!", "!}")
"""What is put around a special token that a row says itself."""

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as the model sees it."""

    place: str
    """Where it was read."""
    num_tokens: int
    num_targets: int
    pieces: list[tuple[str, bool]]
    """Its text in pieces, each with whether its tokens are targets; `WRITTEN` is around the special tokens
    that the row says itself, not its template."""
    num_written: int = 0
    """How many those are."""


def show_rows(examples: Examples, tokenizer: PreTrainedTokenizerBase, count: int) -> list[ShownRow]:
    """The first of each file, decoded from the very tokens that are trained on, special tokens visible."""
    shown = []
    for index in examples.from_each(count):
        example, written = examples[index], examples.written(index)
        num_tokens, num_targets = len(example.input_ids), int(example.is_target.sum())
        pieces = _pieces(example, written, tokenizer)
        shown.append(ShownRow(examples.place(index), num_tokens, num_targets, pieces, len(written)))
    return shown


def printable(text: str) -> str:
    """The text, with control characters written out: a terminal would take them for commands."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _pieces(
    example: Example, written: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Each piece as it reads after those before it: decoded alone, some tokenizers drop its first space."""
    breaks = {int(at) + 1 for at in np.flatnonzero(np.diff(example.is_target))}
    around = {at + side for at in written for side in (0, 1)} - {0}
    ends = sorted(breaks | around | {len(example.input_ids)})
    texts = [_decoded(example.input_ids[:end].tolist(), tokenizer) for end in ends]
    # Where a piece ends within a character, the character is shown with the next one.
    cuts = [0, *(agreeing(*pair) for pair in pairwise(texts)), len(texts[-1])]
    pieces: list[tuple[str, bool]] = []
    for (start, end), last in zip(pairwise(cuts), ends, strict=True):
        text, is_target = texts[-1][start:end], bool(example.is_target[last - 1])
        if last - 1 in written:
            text = text.join(WRITTEN)
        if pieces and last - 1 not in breaks and pieces[-1][1] == is_target:
            text = pieces.pop()[0] + text
        pieces.append((text, is_target))
    return pieces


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
