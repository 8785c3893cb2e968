"""What a row says: its texts in order, and which of them the loss sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tuner.data.chat import Chat, Message, asked, read_messages
from tuner.data.plain_text import SEPARATORS
from tuner.data.segments import Row, Segment, kind_of
from tuner.data.sharegpt import conversation
from tuner.data.templates import TEMPLATES
from tuner.data.windows import Windows
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.spec import SourceSpec

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
    asking: tuple[str, ...]
    """Columns that `question` needs."""
    question: Callable[[Row], tuple[Segment, ...]]
    """What comes before a row's last completion, whether it has one or not. Raises DataError."""
    prompt: Callable[[str, str], str]
    """(instruction, input) as the text that comes before the completion in training."""
    said: Callable[[Row], str] | None = None
    """What a row says without the text around it, in whichever format it is written; None: its segments."""
    starts_plain: bool = True
    """Whether the tokenizer's own beginning (BOS) is put before the text; chat templates bring theirs."""
    windows: Windows | None = None
    """How a text becomes several examples, or a part of one; None: a row is an example."""
    more_identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides about segments besides the name and the tokenizer, as JSON values."""


def source_format(spec: SourceSpec, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
    """The format of a source as the round file says it. Raises DataError."""
    chosen = row_format(spec.format, tokenizer, columns=spec.columns, template=spec.template)
    if spec.split_on is None and spec.overlap_tokens is None:
        return chosen
    windows = Windows(
        overlap_tokens=spec.overlap_tokens or 0,
        fills=spec.group_records == "fill",
        separator=SEPARATORS[spec.split_on] if spec.split_on else "",
    )
    return replace(
        chosen, windows=windows, more_identity={**chosen.more_identity, "windows": asdict(windows)}
    )


def row_format(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    columns: Mapping[str, str] | None = None,
    template: str | None = None,
) -> RowFormat:
    """The format of that name.

    `columns` has what its columns are called where they have other names, `template` the text around the
    turns. Raises DataError when the format is unknown or the tokenizer cannot render it.
    """
    called = {**{column: column for column in _COLUMNS}, **(columns or {})}
    if name == "alpaca" and template in (None, "alpaca"):
        chosen = _alpaca(called)
    elif name == "completion":
        chosen = _completion(called)
    elif name == "text":
        chosen = _text(called)
    elif name in ("alpaca", "messages", "sharegpt"):
        chosen = _conversation(name, called, Chat(tokenizer, None if template == "tokenizer" else template))
    else:
        raise DataError(
            f"format {name!r} is not read; allowed are alpaca, messages, sharegpt, completion and text"
        )
    identity: dict[str, Any] = {}
    if columns:
        identity["columns"] = dict(columns)
    if template is not None:
        identity["template"] = TEMPLATES.get(template, template)
    return replace(chosen, more_identity=identity)


def require_columns(row: Row, row_format: RowFormat) -> None:
    """Raises DataError when the row lacks a column that the format needs."""
    if missing := [column for column in row_format.needed if column not in row.values]:
        found = ", ".join(map(repr, row.values)) or "none"
        optional = "".join(f" ({column!r} is optional)" for column in row_format.optional)
        raise DataError(
            f"{row.place}: no column {missing[0]!r}; columns found: {found}; format {row_format.name} "
            f"needs {' and '.join(map(repr, row_format.needed))}{optional}; other names are said by `columns`"
        )


_COLUMNS = (
    *("instruction", "input", "output", "messages", "conversations", "system"),
    *("prompt", "completion", "text"),
)


def _alpaca(called: Mapping[str, str]) -> RowFormat:
    def segments(row: Row) -> tuple[Segment, ...]:
        return *question(row), Segment(_string(row, called["output"]), is_target=True)

    def question(row: Row) -> tuple[Segment, ...]:
        return (Segment(_alpaca_prompt(*_alpaca_question(row, called)), is_target=False),)

    def said(row: Row) -> str:
        return " ".join((*_alpaca_question(row, called), _string(row, called["output"])))

    return RowFormat(
        "alpaca", *_alpaca_columns(called), segments, (called["instruction"],), question, _alpaca_prompt, said
    )


def _alpaca_columns(called: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (called["instruction"], called["output"]), (called["input"],)


def _alpaca_question(row: Row, called: Mapping[str, str]) -> tuple[str, str]:
    """Instruction and input, which is empty where there is none."""
    given = row.values.get(called["input"])
    instruction = _string(row, called["instruction"])
    return instruction, "" if given is None else _string(row, called["input"])


def _alpaca_prompt(instruction: str, input: str) -> str:
    template = _ALPACA_WITH_INPUT if input else _ALPACA_WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def _completion(called: Mapping[str, str]) -> RowFormat:
    def segments(row: Row) -> tuple[Segment, ...]:
        return *question(row), Segment(_string(row, called["completion"]), is_target=True)

    def question(row: Row) -> tuple[Segment, ...]:
        return (Segment(_string(row, called["prompt"]), is_target=False),)

    needed = (called["prompt"], called["completion"])
    return RowFormat("completion", needed, (), segments, needed[:1], question, _joined)


def _text(called: Mapping[str, str]) -> RowFormat:
    def segments(row: Row) -> tuple[Segment, ...]:
        return (Segment(_string(row, called["text"]), is_target=True),)

    def question(row: Row) -> tuple[Segment, ...]:
        return (Segment(_string(row, called["text"]), is_target=False),)

    return RowFormat("text", (called["text"],), (), segments, (called["text"],), question, _joined)


def _conversation(name: str, called: Mapping[str, str], chat: Chat) -> RowFormat:
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    match name:
        case "alpaca":
            needed, optional = _alpaca_columns(called)
        case "messages":
            needed, optional = (called["messages"],), ()
        case _:
            needed, optional = (called["conversations"],), (called["system"],)

    def messages(row: Row) -> list[Message]:
        match name:
            case "alpaca":
                output = _string(row, called["output"])
                return [*asking(row), {"role": "assistant", "content": output}]
            case "messages":
                return read_messages(row, called["messages"])
            case _:
                return conversation(row, column=called["conversations"], system_column=called["system"])

    def asking(row: Row) -> list[Message]:
        if name == "alpaca":
            return [asked(*_alpaca_question(row, called))]
        conversation = messages(row)
        return conversation[:-1] if conversation[-1]["role"] == "assistant" else conversation

    def segments(row: Row) -> tuple[Segment, ...]:
        return chat.segments(messages(row), row.place)

    def question(row: Row) -> tuple[Segment, ...]:
        if not (conversation := asking(row)):
            raise DataError(f"{row.place}: the conversation has no message to answer")
        return chat.question(conversation, row.place)

    def said(row: Row) -> str:
        return " ".join(message["content"] for message in messages(row))

    return RowFormat(
        name, needed, optional, segments, needed[:1], question, chat.prompt, said, starts_plain=chat.is_named
    )


def _joined(instruction: str, input: str) -> str:
    return f"{instruction}\n{input}" if input else instruction


def _string(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {column!r} is {kind_of(value)}; it must be text")
    return value
