"""What a row says: its texts in order, and which of them the loss sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tuner.data.chat import Chat
from tuner.data.segments import Row, Segment, kind_of
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One way to read rows."""

    name: str
    needed: tuple[str, ...]
    """Columns every row must have."""
    optional: tuple[str, ...]
    """Columns that are read where they exist."""
    segments: Callable[[Row], tuple[Segment, ...]]
    """A row's texts in order. Raises DataError with the row's place."""
    prompt: Callable[[str, str], str]
    """(instruction, input) as the text that comes before the completion in training."""
    starts_plain: bool = True
    """Whether the tokenizer's own beginning (BOS) is put before the text; chat templates bring theirs."""


def row_format(name: str, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
    """The format of that name. Raises DataError when it is unknown or the tokenizer cannot render it."""
    match name:
        case "alpaca":
            return RowFormat(name, ("instruction", "output"), ("input",), _alpaca, _alpaca_prompt)
        case "completion":
            return RowFormat(name, ("prompt", "completion"), (), _completion, _joined)
        case "text":
            return RowFormat(name, ("text",), (), _text, _joined)
        case "messages":
            chat = Chat(tokenizer)
            return RowFormat(name, ("messages",), (), chat.segments, chat.prompt, starts_plain=False)
    raise DataError(f"format {name!r} is not read; allowed are alpaca, messages, completion and text")


def require_columns(row: Row, row_format: RowFormat) -> None:
    """Raises DataError when the row lacks a column that the format needs."""
    if missing := [column for column in row_format.needed if column not in row.values]:
        found = ", ".join(map(repr, row.values)) or "none"
        optional = "".join(f" ({column!r} is optional)" for column in row_format.optional)
        raise DataError(
            f"{row.place}: no column {missing[0]!r}; columns found: {found}; format {row_format.name} "
            f"needs {' and '.join(map(repr, row_format.needed))}{optional}"
        )


def _alpaca(row: Row) -> tuple[Segment, ...]:
    given = row.values.get("input")
    prompt = _alpaca_prompt(_string(row, "instruction"), "" if given is None else _string(row, "input"))
    return Segment(prompt, is_target=False), Segment(_string(row, "output"), is_target=True)


def _alpaca_prompt(instruction: str, input: str) -> str:
    template = _ALPACA_WITH_INPUT if input else _ALPACA_WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def _completion(row: Row) -> tuple[Segment, ...]:
    return (
        Segment(_string(row, "prompt"), is_target=False),
        Segment(_string(row, "completion"), is_target=True),
    )


def _text(row: Row) -> tuple[Segment, ...]:
    return (Segment(_string(row, "text"), is_target=True),)


def _joined(instruction: str, input: str) -> str:
    return f"{instruction}\n{input}" if input else instruction


def _string(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {column!r} is {kind_of(value)}; it must be text")
    return value
