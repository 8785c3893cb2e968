"""Examples as a person reads them: the text, and which of it the loss sees."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from tuner.data.examples import Example, Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Pieces = list[tuple[str, bool]]
"""A row's text in pieces, each with whether its tokens are targets."""


def show_rows(examples: Examples, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Pieces]:
    """The first rows, decoded from the very tokens that are trained on, special tokens visible."""
    return [_pieces(example, tokenizer) for example in examples[:count]]


def _pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    breaks = np.flatnonzero(np.diff(example.is_target)) + 1
    bounds = [0, *breaks.tolist(), len(example.input_ids)]
    return [
        (_decoded(example.input_ids[start:end].tolist(), tokenizer), bool(example.is_target[start]))
        for start, end in pairwise(bounds)
    ]


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
