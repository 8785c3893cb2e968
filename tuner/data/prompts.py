"""Prompts for inference, token for token as in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tuner.data.chat import TEMPLATES, with_fixed_date
from tuner.data.examples import Row, kind_of
from tuner.data.files import LocalFile
from tuner.data.formats import RowFormat, row_format
from tuner.data.readers import reader_of
from tuner.data.rows import refuse_half_characters
from tuner.data.tokenise import Tokeniser
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.config import SourceSpec


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt for the model to complete."""

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
    system: str = "",
    template: str | None = None,
) -> Prompt:
    """Return the training prompt of a format and `template`: the text of a row up to its answer.

    `messages` and `sharegpt` are a conversation of one user's message; `completion` and `text` take the
    instruction as it is, and no `system`. Where a format has no place of its own for it, the input follows
    the instruction. Raises DataError.
    """
    chosen = row_format(format_name, tokenizer, template=template)
    row = Row(1, "the prompt", chosen.asks(instruction, input))
    return _prompt(_with_system(row, chosen, system), chosen, tokenizer)


def read_prompts(
    path: Path, source: SourceSpec, tokenizer: PreTrainedTokenizerBase, *, system: str = ""
) -> list[Prompt]:
    """Return the prompts of a file, in its order.

    A row is one of the training rows of `source`, with or without its answer (of a conversation, the last
    turn of the assistant), or has `prompt`, and perhaps `context` and `system`, as `render_prompt` takes
    them. Where the training rows have turns it may also have `messages` or `conversations`; and a file
    whose rows are messages themselves is one conversation. `system` is for the rows that have none. Raises
    DataError with file and line.
    """
    file = LocalFile(path, str(path))
    chosen = row_format(source.format, tokenizer, columns=source.columns, template=source.template)
    formats = [chosen, *_conversations(source, tokenizer)]
    prompts = []
    for row in _whole_conversation(list(reader_of(file)(file, chosen)), path, formats):
        asking, its = _asking(row, formats)
        prompts.append(_prompt(_with_system(asking, its, system), its, tokenizer))
    if not prompts:
        raise DataError(f"{path}: has no rows")
    return prompts


def refuse_prompt_beyond(
    prompt: Prompt, num_embeddings: int, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> None:
    """Raise DataError for a prompt with a token beyond the base model's embeddings."""
    if (token := max(prompt.ids)) >= num_embeddings:
        raise token_beyond(prompt.place, token, num_embeddings, tokenizer())


def token_beyond(
    place: str, token: int, num_embeddings: int, tokenizer: PreTrainedTokenizerBase
) -> DataError:
    """Return the error for a text with a token beyond the base model's embeddings."""
    text = tokenizer.convert_ids_to_tokens(token)
    return DataError(
        f"{place}: has the token {text!r} ({token}), and the model has embeddings for "
        f"{num_embeddings} tokens, 0 to {num_embeddings - 1}: the tokenizer has tokens that were added "
        "without resizing the model. Resize it (`model.resize_token_embeddings(len(tokenizer))`, then "
        "train and save it), take the tokenizer that belongs to it, or take the token out of the rows"
    )


def _conversations(source: SourceSpec, tokenizer: PreTrainedTokenizerBase) -> list[RowFormat]:
    """Return the conversation formats in the template of the training rows; none if these have no turns."""
    if source.format in ("completion", "text"):
        return []
    return [row_format(name, tokenizer, template=template_name(source)) for name in ("messages", "sharegpt")]


def _whole_conversation(rows: list[Row], path: Path, formats: Sequence[RowFormat]) -> list[Row]:
    """Return the rows; a single one if each row is a message."""
    asking = {column for each in formats for column in each.asking}
    are_messages = all({"role", "content"} <= row.values.keys() - asking for row in rows)
    if not rows or not are_messages or len(formats) == 1:
        return rows
    return [Row(1, str(path), {"messages": [dict(row.values) for row in rows]})]


def _prompt(row: Row, chosen: RowFormat, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    segments = chosen.question(row)
    refuse_half_characters(row, segments)
    ids = _tokeniser(tokenizer).prompt(segments, chosen.opening)
    if not ids:
        raise DataError(f"{row.place}: is empty; write some text for the model to continue")
    text = "".join(segment.text for segment in segments)
    return Prompt(row.number, row.place, text, tuple(ids))


def _with_system(row: Row, chosen: RowFormat, system: str) -> Row:
    if not system:
        return row
    if chosen.with_system is None:
        raise DataError(
            f"{row.place}: rows of format {chosen.name} have no system message; write it into the prompt, as "
            "the training rows have it"
        )
    return replace(row, values=chosen.with_system(row.values, system))


def _asking(row: Row, formats: Sequence[RowFormat]) -> tuple[Row, RowFormat]:
    """Return the row in a format. Raises DataError if it has no prompt."""
    for each in formats:
        if all(column in row.values for column in each.asking):
            return row, each
    chosen = formats[0]
    if "prompt" in row.values:
        values = chosen.asks(_text(row, "prompt"), _text(row, "context"))
        return _with_system(replace(row, values=values), chosen, _text(row, "system")), chosen
    [missing, *_] = [column for column in chosen.asking if column not in row.values]
    found = ", ".join(map(repr, row.values)) or "none"
    others = "".join(f", {column!r}" for each in formats[1:] for column in each.asking)
    raise DataError(
        f"{row.place}: no column {missing!r}; columns found: {found}; a row to answer needs "
        f"{' and '.join(map(repr, chosen.asking))}, as the training rows (format {chosen.name}){others} or "
        "'prompt'"
    )


def _text(row: Row, column: str) -> str:
    """Return the text of an optional column, empty if it is missing."""
    value = row.values.get(column)
    if column != "prompt" and value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {column!r} is {kind_of(value)}; it must be text")
    return value


@lru_cache(maxsize=2)
def _tokeniser(tokenizer: PreTrainedTokenizerBase) -> Tokeniser:
    return Tokeniser(tokenizer)


def chat_template_of(
    sources: Sequence[SourceSpec], tokenizer: PreTrainedTokenizerBase
) -> str | dict[str, str] | None:
    """Return a chat template that renders messages like the training rows; None if it is the tokenizer's own.

    That is the named template around the turns, `alpaca` for that format, after what the tokenizer puts
    before a text; or the tokenizer's own with the date that it was trained with. None is also said where rows
    have no template, or several.
    """
    names = {template_name(source) for source in sources}
    if len(names) == 1 and names <= TEMPLATES.keys():
        beginning = _tokeniser(tokenizer).beginning
        return "".join(tokenizer.convert_ids_to_tokens(beginning)) + TEMPLATES[names.pop()]
    own = tokenizer.chat_template
    if "tokenizer" not in names or not own:
        return None
    fixed: str | dict[str, str] = (
        {key: with_fixed_date(template) for key, template in own.items()}
        if isinstance(own, dict)
        else with_fixed_date(own)
    )
    return None if fixed == own else fixed


def renders_prompts_of(sources: Sequence[SourceSpec]) -> bool:
    """Whether the template of an export renders the prompts of the first source."""
    names = {template_name(source) for source in sources}
    return template_name(sources[0]) == "tokenizer" or (len(names) == 1 and names <= TEMPLATES.keys())


def template_name(source: SourceSpec) -> str:
    """Return what renders a source's prompts: a template, `tokenizer` for its own, or a format."""
    if source.format in ("completion", "text"):
        return source.format
    return source.template or ("alpaca" if source.format == "alpaca" else "tokenizer")
