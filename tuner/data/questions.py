"""Evaluation rows as questions: a prompt, and the completion that is its reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from tuner.data.metrics import Metric
from tuner.data.prompts import Prompt
from tuner.data.splits import Part
from tuner.data.tokenise import Fate
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Question:
    """A row up to its last completion, and that completion."""

    prompt: Prompt
    """Token for token what training rows complete."""
    reference: str
    """The completion as the tokenizer decodes it, without special tokens and white space around it."""
    reference_tokens: int
    """Its tokens, without the end of text."""


def questions(
    parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase, *, beginning: int, max_examples: int
) -> tuple[Question, ...]:
    """The first evaluation rows that have a prompt and a whole completion.

    Left out are rows of format `text` and rows that `max_length` cuts, since the end of their completion is
    not known. `beginning` is the number of tokens that the tokenizer puts before a text. Raises DataError
    where no row is left.
    """
    found = tuple(islice((q for part in parts for q in _of_part(part, tokenizer, beginning)), max_examples))
    if not found:
        sources = ", ".join(dict.fromkeys(f"{part.path} (format {part.format})" for part in parts))
        raise DataError(
            f"evaluation.answers: {sources}: no evaluation row has a prompt and a completion that max_length "
            "leaves whole, so there is nothing to answer; give eval rows in alpaca, messages, sharegpt or "
            "completion, or take evaluation.answers out"
        )
    return found


def try_metric(metric: Metric, question: Question) -> None:
    """Compare a row's completion, and an empty answer, with the row. Raises MetricError."""
    for answer in (question.reference, ""):
        metric(answer, question.reference, place=question.prompt.place)


def _of_part(part: Part, tokenizer: PreTrainedTokenizerBase, beginning: int) -> Iterator[Question]:
    if part.format == "text":
        return
    table = part.turns or part.table
    for index, row in enumerate(part.rows.tolist()):
        if table.fates[row] != Fate.KEPT:
            continue
        start, end = table.tokens.offsets[row], table.tokens.offsets[row + 1]
        ids, is_target = table.tokens.tokens[start:end], table.tokens.targets[start:end]
        split = int(np.flatnonzero(~is_target)[-1]) + 1
        # The first token is never a target: alone it is no prompt.
        if split <= max(1, beginning):
            continue
        said = [token for token in ids[split:].tolist() if token != tokenizer.eos_token_id]
        prompt = tuple(ids[:split].tolist())
        yield Question(
            Prompt(int(table.numbers[row]), part.place(index), str(tokenizer.decode(prompt)), prompt),
            str(tokenizer.decode(said, skip_special_tokens=True)).strip(),
            len(said),
        )
