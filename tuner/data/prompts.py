"""The prompt that inference sends: token for token what the model was trained to complete."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from tuner.data.formats import row_format
from tuner.data.templates import TEMPLATES
from tuner.data.tokenise import Tokeniser

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.spec import SourceSpec


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


def chat_template_of(sources: Sequence[SourceSpec], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Jinja that renders a user's message as the rows of all these sources do; None where none does.

    That is the named template around the turns, `alpaca` for that format, after what the tokenizer puts
    before a text. None is also said where the tokenizer's own template is the one.
    """
    names = {_template_name(source) for source in sources}
    if len(names) != 1 or (name := names.pop()) not in TEMPLATES:
        return None
    beginning = _tokeniser(tokenizer).prompt("", starts_plain=True)
    return "".join(tokenizer.convert_ids_to_tokens(beginning)) + TEMPLATES[name]


def _template_name(source: SourceSpec) -> str:
    """Of a format without turns, the format's."""
    if source.format in ("completion", "text"):
        return source.format
    return source.template or ("alpaca" if source.format == "alpaca" else "tokenizer")
