"""The prompts that inference sends: token for token what the model was trained to complete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.data.files import LocalFile
from tuner.data.formats import RowFormat, row_format
from tuner.data.readers import reader_of
from tuner.data.rows import refuse_half_characters
from tuner.data.segments import Row, Segment, kind_of
from tuner.data.templates import TEMPLATES
from tuner.data.tokenise import Tokeniser
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.spec import SourceSpec


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is to complete."""

    row: int
    """1-based line of its file, or 1-based row where the file has no lines."""
    place: str
    """File and row as messages show them."""
    text: str
    """With the template of training, without what the tokenizer itself puts before a text."""
    ids: tuple[int, ...]
    """Token ids."""


def render_prompt(
    format_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    instruction: str,
    input: str = "",
    template: str | None = None,
) -> Prompt:
    """The training prompt of a format, with the source's `template`.

    `messages` and `sharegpt` are a conversation of one user's message; `completion` and `text` take the
    instruction as it is. Where a format has no place of its own for it, the input follows the instruction.
    Raises DataError.
    """
    chosen = row_format(format_name, tokenizer, template=template)
    row = Row(1, "the prompt", {"prompt": instruction, "context": input})
    return _prompt(row, _short_question(row, chosen), chosen, tokenizer)


def read_prompts(path: Path, source: SourceSpec, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts of a file, in its order.

    A row is one of the training rows of `source`, with or without its answer (of a conversation, the last
    turn of the assistant), or has `prompt`, and perhaps `context`, as `render_prompt` takes instruction and
    input. Raises DataError with file and line.
    """
    file = LocalFile(path, str(path))
    chosen = row_format(source.format, tokenizer, columns=source.columns, template=source.template)
    rows = reader_of(file)(file, chosen)
    prompts = [_prompt(row, _question(row, chosen), chosen, tokenizer) for row in rows]
    if not prompts:
        raise DataError(f"{path}: has no rows")
    return prompts


def refuse_prompt_beyond(
    prompt: Prompt, num_embeddings: int, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Raises DataError for a prompt with a token that a base with so many embeddings lacks."""
    if (token := max(prompt.ids)) >= num_embeddings:
        raise token_beyond(prompt.place, token, num_embeddings, tokenizer())


def token_beyond(
    place: str, token: int, num_embeddings: int, tokenizer: PreTrainedTokenizerBase
) -> DataError:
    """The error of a text with a token that a base with so many embeddings lacks."""
    text = tokenizer.convert_ids_to_tokens(token)
    return DataError(
        f"{place}: has the token {text!r} ({token}), and the model has embeddings for "
        f"{num_embeddings} tokens, 0 to {num_embeddings - 1}: the tokenizer has tokens that were added "
        "without resizing the model. Resize it (`model.resize_token_embeddings(len(tokenizer))`, then "
        "train and save it), take the tokenizer that belongs to it, or take the token out of the rows"
    )


def _prompt(
    row: Row, segments: tuple[Segment, ...], chosen: RowFormat, tokenizer: PreTrainedTokenizerBase
) -> Prompt:
    refuse_half_characters(row, segments)
    texts = [segment.text for segment in segments]
    ids = _tokeniser(tokenizer).prompt(*texts, starts_plain=chosen.starts_plain)
    if not ids:
        raise DataError(f"{row.place}: is empty; give the model some text to go on from")
    return Prompt(row.number, row.place, "".join(texts), tuple(ids))


def _question(row: Row, chosen: RowFormat) -> tuple[Segment, ...]:
    missing = [column for column in chosen.asking if column not in row.values]
    if not missing:
        return chosen.question(row)
    if "prompt" in row.values:
        return _short_question(row, chosen)
    found = ", ".join(map(repr, row.values)) or "none"
    raise DataError(
        f"{row.place}: no column {missing[0]!r}; columns found: {found}; a row to answer has "
        f"{' and '.join(map(repr, chosen.asking))}, as the training rows (format {chosen.name}), or 'prompt'"
    )


def _short_question(row: Row, chosen: RowFormat) -> tuple[Segment, ...]:
    texts = []
    for column in ("prompt", "context"):
        value = row.values.get(column)
        if column == "context" and value is None:
            value = ""
        if not isinstance(value, str):
            raise DataError(f"{row.place}: column {column!r} is {kind_of(value)}; it must be text")
        texts.append(value)
    return (Segment(chosen.prompt(*texts), is_target=False),)


@lru_cache(maxsize=2)
def _tokeniser(tokenizer: PreTrainedTokenizerBase) -> Tokeniser:
    return Tokeniser(tokenizer)


def chat_template_of(sources: Sequence[SourceSpec], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Jinja that renders a user's message as the rows of all these sources do; None where none does.

    That is the named template around the turns, `alpaca` for that format, after what the tokenizer puts
    before a text. None is also said where the tokenizer's own template is the one.
    """
    names = {template_name(source) for source in sources}
    if len(names) != 1 or (name := names.pop()) not in TEMPLATES:
        return None
    beginning = _tokeniser(tokenizer).prompt("", starts_plain=True)
    return "".join(tokenizer.convert_ids_to_tokens(beginning)) + TEMPLATES[name]


def template_name(source: SourceSpec) -> str:
    """What renders a source's prompts: a named template, `tokenizer` for its own, a format without turns."""
    if source.format in ("completion", "text"):
        return source.format
    return source.template or ("alpaca" if source.format == "alpaca" else "tokenizer")
