"""The prompt that inference sends: token for token what the model was trained to complete."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tuner.data.formats import row_format
from tuner.data.tokenise import Tokeniser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_prompt(
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    instruction: str,
    input: str = "",
    template: str | None = None,
) -> list[int]:
    """Token ids of the training prompt of a format, with the source's `template`.

    `messages` and `sharegpt` are a conversation of one user's message; `completion` and `text` take the
    instruction as it is. Where a format has no place of its own for it, the input follows the instruction.
    Raises DataError.
    """
    chosen = row_format(format_name, tokenizer, template=template)
    text = chosen.prompt(instruction, input)
    return _tokeniser(tokenizer).prompt(text, starts_plain=chosen.starts_plain)


@lru_cache(maxsize=2)
def _tokeniser(tokenizer: PreTrainedTokenizerBase) -> Tokeniser:
    return Tokeniser(tokenizer)
