"""Row formats: the texts of a row in order, and which of them the loss is computed on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tuner.data.chat import TEMPLATES, Chat, asked
from tuner.data.examples import Opening, Row, Segment, kind_of
from tuner.data.messages import (
    REASONING_KEYS,
    Conversation,
    Message,
    read_history,
    read_messages,
    read_system,
    read_tools,
)
from tuner.data.messages import conversation as sharegpt_messages
from tuner.data.plain_text import SEPARATORS, Windows
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.config import SourceSpec

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
    asks: Callable[[str, str], Mapping[str, Any]]
    """The columns of a row that asks this (instruction, input), without an answer."""
    with_system: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None
    """The columns of a row with a system's message, unless it has one; None where rows have none."""
    said: Callable[[Row], str] | None = None
    """What a row says without the text around it, in whichever format it is written; None: its segments."""
    opening: Opening = Opening.TEXT
    """What stands before the text; a tokenizer's own chat template writes its own."""
    windows: Windows | None = None
    """How a text becomes several examples, or a part of one; None: a row is an example."""
    more_identity: Mapping[str, Any] = field(default_factory=dict)
    """What decides about segments besides the name and the tokenizer, as JSON values."""
    remarks: Callable[[Row], Iterable[str]] = lambda _: ()
    """What a row says that is read otherwise, or not at all; the same words for each such row."""
    unread: tuple[str, ...] = ()
    """Columns that only other formats read, so that `remarks` can name them."""


def source_format(spec: SourceSpec, tokenizer: PreTrainedTokenizerBase) -> RowFormat:
    """Return the format of a source of the round file. Raises DataError."""
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
    """Return the format with this name.

    `columns` has what its columns are called where they have other names, `template` the text around the
    turns. Raises DataError when the format is unknown or the tokenizer cannot render it.
    """
    called = _called(columns or {})
    if name == "alpaca" and template in (None, "alpaca"):
        chosen = _alpaca(called, Chat(tokenizer, "alpaca"))
    elif name == "completion":
        chosen = _completion(called)
    elif name == "text":
        chosen = _text(called)
    elif name in ("alpaca", "messages", "sharegpt"):
        chosen = _conversation(name, called, Chat(tokenizer, None if template == "tokenizer" else template))
    else:
        raise DataError(f"unknown format {name!r}; allowed: alpaca, messages, sharegpt, completion and text")
    identity: dict[str, Any] = {}
    if columns:
        identity["columns"] = dict(columns)
    if template is not None:
        identity["template"] = TEMPLATES.get(template, template)
    return _with_unread_columns(replace(chosen, more_identity=identity))


def require_columns(row: Row, row_format: RowFormat) -> None:
    """Raise DataError if the row lacks a required column."""
    if missing := [column for column in row_format.needed if column not in row.values]:
        found = ", ".join(map(repr, row.values)) or "none"
        needed = " and ".join(map(repr, row_format.needed))
        optional = ", ".join(map(repr, row_format.optional))
        raise DataError(
            f"{row.place}: no column {missing[0]!r}; columns found: {found}; format {row_format.name} "
            f"needs {needed}{f' (optional: {optional})' if optional else ''}; map other names with `columns`"
        )


_COLUMNS = (
    *("instruction", "input", "output", "messages", "conversations", "system", "history", "tools"),
    *("prompt", "completion", "text"),
)
_READ_ELSEWHERE = (
    *("system", "history", "tools", "functions", "documents", "chat_template_kwargs"),
    *("image", "images", "audio", "audios", "video", "videos"),
    *("chosen", "rejected", "weight", "train", "loss", *REASONING_KEYS),
)
"""Columns that some format, here or in other tools, gives a meaning."""


_YIELDING = ("system", "history", "tools")
"""Columns that are not looked for where another one is mapped to their name."""
_NOWHERE = "\0"
"""The name of a column that is not looked for."""


def _called(columns: Mapping[str, str]) -> dict[str, str]:
    """Return the name of each column in the source."""
    given_away = {name for column, name in columns.items() if column != name and name in _YIELDING}
    own = {column: _NOWHERE if column in given_away else column for column in _COLUMNS}
    return {**own, **columns}


def _with_unread_columns(chosen: RowFormat) -> RowFormat:
    """Return the format with a remark on columns that only other formats read."""
    unread = tuple(name for name in _READ_ELSEWHERE if name not in (*chosen.needed, *chosen.optional))
    own = chosen.remarks

    def remarks(row: Row) -> Iterator[str]:
        yield from own(row)
        for column in unread:
            if row.values.get(column) not in (None, "", [], {}):
                yield f"format {chosen.name} does not read the column {column!r}"

    return replace(chosen, remarks=remarks, unread=unread)


def _alpaca(called: Mapping[str, str], chat: Chat) -> RowFormat:
    """Return the Alpaca format; rows with a system text or earlier turns use the template of that name."""

    def segments(row: Row) -> tuple[Segment, ...]:
        if earlier := _earlier(row, called):
            return chat.segments(
                conversation(row, earlier).answered(_string(row, called["output"])), row.place
            )
        return *question(row), _answer(_string(row, called["output"]))

    def question(row: Row) -> tuple[Segment, ...]:
        if earlier := _earlier(row, called):
            return chat.question(conversation(row, earlier), row.place)
        return (Segment(_alpaca_prompt(*_alpaca_question(row, called)), is_target=False),)

    def conversation(row: Row, earlier: tuple[Message, ...]) -> Conversation:
        instruction, input = _alpaca_question(row, called)
        return Conversation((*earlier, asked(instruction, f"### Input:\n{input}" if input else "")))

    def said(row: Row) -> str:
        texts = (*_alpaca_question(row, called), _string(row, called["output"]))
        return " ".join((*(message.content for message in _earlier(row, called)), *texts))

    def remarks(row: Row) -> Iterator[str]:
        if earlier := _earlier(row, called):
            yield from conversation(row, earlier).answered(_string(row, called["output"])).remarks()

    return RowFormat(
        "alpaca",
        *_alpaca_columns(called),
        segments,
        (called["instruction"],),
        question,
        _alpaca_asks(called),
        _with_system_column(called),
        said,
        opening=Opening.TEMPLATE,
        remarks=remarks,
    )


def _alpaca_asks(called: Mapping[str, str]) -> Callable[[str, str], Mapping[str, Any]]:
    return lambda instruction, input: {called["instruction"]: instruction, called["input"]: input}


def _with_system_column(
    called: Mapping[str, str], messages: str | None = None
) -> Callable[[Mapping[str, Any], str], Mapping[str, Any]]:
    """Return a conversation with a system column; `messages` is the column of the turns."""

    def with_system(values: Mapping[str, Any], system: str) -> Mapping[str, Any]:
        own = values.get(called["system"])
        has_one = bool(own.strip() if isinstance(own, str) else own) or _begins_with_system(
            values.get(messages or "")
        )
        return values if has_one else {**values, called["system"]: system}

    return with_system


def _with_system_message(column: str) -> Callable[[Mapping[str, Any], str], Mapping[str, Any]]:
    def with_system(values: Mapping[str, Any], system: str) -> Mapping[str, Any]:
        turns = values.get(column)
        if not isinstance(turns, list) or _begins_with_system(turns):
            return values
        return {**values, column: [{"role": "system", "content": system}, *turns]}

    return with_system


def _begins_with_system(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else None
    if not isinstance(first, dict):
        return False
    return str(first.get("role", first.get("from"))).strip().lower() in ("system", "developer")


def _alpaca_columns(called: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (called["instruction"], called["output"]), _named(called, "input", "system", "history")


def _named(called: Mapping[str, str], *columns: str) -> tuple[str, ...]:
    """Return the names of these columns in the file."""
    return tuple(called[column] for column in columns if called[column] != _NOWHERE)


def _earlier(row: Row, called: Mapping[str, str]) -> tuple[Message, ...]:
    """Return the messages before a row's instruction."""
    return (*read_system(row, called["system"]), *read_history(row, called["history"]))


def _alpaca_question(row: Row, called: Mapping[str, str]) -> tuple[str, str]:
    """Return instruction and input; the input is empty if there is none."""
    given = row.values.get(called["input"])
    instruction = _string(row, called["instruction"])
    return instruction, "" if given is None else _string(row, called["input"])


def _alpaca_prompt(instruction: str, input: str) -> str:
    template = _ALPACA_WITH_INPUT if input else _ALPACA_WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def _completion(called: Mapping[str, str]) -> RowFormat:
    def segments(row: Row) -> tuple[Segment, ...]:
        return *question(row), _answer(_string(row, called["completion"]))

    def question(row: Row) -> tuple[Segment, ...]:
        return (Segment(_string(row, called["prompt"]), is_target=False),)

    needed = (called["prompt"], called["completion"])
    return RowFormat("completion", needed, (), segments, needed[:1], question, _joined(called["prompt"]))


def _answer(text: str) -> Segment:
    """Return the row's answer; an empty answer and the EOS after it are never targets."""
    says = bool(text.strip())
    return Segment(text, is_target=says, is_masked=not says)


def _text(called: Mapping[str, str]) -> RowFormat:
    def segments(row: Row) -> tuple[Segment, ...]:
        return (Segment(_string(row, called["text"]), is_target=True),)

    def question(row: Row) -> tuple[Segment, ...]:
        return (Segment(_string(row, called["text"]), is_target=False),)

    return RowFormat(
        "text", (called["text"],), (), segments, (called["text"],), question, _joined(called["text"])
    )


def _conversation(name: str, called: Mapping[str, str], chat: Chat) -> RowFormat:
    """Return rows of any format as a chat template renders them."""
    return _alpaca_turns(called, chat) if name == "alpaca" else _turns(name, called, chat)


def _alpaca_turns(called: Mapping[str, str], chat: Chat) -> RowFormat:
    def asking(row: Row) -> Conversation:
        return Conversation((*_earlier(row, called), asked(*_alpaca_question(row, called))))

    return _templated(
        "alpaca",
        _alpaca_columns(called),
        chat,
        conversation=lambda row: asking(row).answered(_string(row, called["output"])),
        asking=asking,
        asks=_alpaca_asks(called),
        with_system=_with_system_column(called),
    )


def _turns(name: str, called: Mapping[str, str], chat: Chat) -> RowFormat:
    """Return rows with a column of messages, or of ShareGPT's turns."""
    has_messages = name == "messages"
    column = called["messages" if has_messages else "conversations"]
    optional = _named(called, "tools") if has_messages else _named(called, "system", "tools")

    def conversation(row: Row) -> Conversation:
        if has_messages:
            messages = read_messages(row, column)
        else:
            messages = sharegpt_messages(row, column=column, system_column=called["system"])
        return Conversation(messages, read_tools(row, called["tools"]))

    def asks(instruction: str, input: str) -> Mapping[str, Any]:
        text = asked(instruction, input).content
        turn = {"role": "user", "content": text} if has_messages else {"from": "human", "value": text}
        return {column: [turn]}

    return _templated(
        name,
        ((column,), optional),
        chat,
        conversation=conversation,
        asking=lambda row: conversation(row).asking(),
        asks=asks,
        with_system=_with_system_message(column) if has_messages else _with_system_column(called, column),
    )


def _templated(
    name: str,
    columns: tuple[tuple[str, ...], tuple[str, ...]],
    chat: Chat,
    *,
    conversation: Callable[[Row], Conversation],
    asking: Callable[[Row], Conversation],
    asks: Callable[[str, str], Mapping[str, Any]],
    with_system: Callable[[Mapping[str, Any], str], Mapping[str, Any]],
) -> RowFormat:
    """Return a format in a chat template; `asking` returns a conversation up to its last answer."""
    needed, optional = columns

    def question(row: Row) -> tuple[Segment, ...]:
        if not (open_ended := asking(row)).messages:
            raise DataError(f"{row.place}: the conversation has no message to answer")
        return chat.question(open_ended, row.place)

    return RowFormat(
        name,
        needed,
        optional,
        lambda row: chat.segments(conversation(row), row.place),
        needed[:1],
        question,
        asks,
        with_system,
        lambda row: conversation(row).said,
        opening=Opening.TEMPLATE if chat.is_named else Opening.WRITTEN,
        remarks=lambda row: conversation(row).remarks(),
    )


def _joined(column: str) -> Callable[[str, str], Mapping[str, Any]]:
    return lambda instruction, input: {column: f"{instruction}\n{input}" if input else instruction}


def _string(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {column!r} is {kind_of(value)}; it must be text")
    return value
