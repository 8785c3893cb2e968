"""Messages of a row: role, texts, and whether they are trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tuner.data.examples import Row, kind_of
from tuner.errors import DataError

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Where messages keep what the model thinks before it answers."""

SPEAKERS: Mapping[str, str] = {
    typed: role
    for role, names in {
        "system": "system",
        "user": "human user prompter",
        "assistant": "gpt assistant model bot chatgpt chatbot bing bard claude ai",
    }.items()
    for typed in names.split()
}
"""Names of the three who speak, in lower case, as the tools around ShareGPT write them."""

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
"""Names that chat templates have a branch for."""
_WEIGHTS = ("weight", "train", "training", "loss")
"""Keys by which other tools say whether a turn is learned."""
_REFUSED = ("tool_calls", "function_call")
_READ_ELSEWHERE = (
    *("name", "tool_call_id", "tool_responses", "refusal", "prefix", "recipient", "channel"),
    *("image", "images", "audio", "audios", "video", "videos", "train_detail", "loss_scale"),
    *("tools", "mask", "masked", "loss_mask"),
)
"""Keys of a message that other tools give a meaning, and that no rendering here has."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str
    content: str
    reasoning: Mapping[str, str] = field(default_factory=dict)
    """What was thought before the content, by the key that the row has it under."""
    is_learned: bool = True
    """Whether the loss may see it; False where the row says so."""
    remarks: tuple[str, ...] = ()
    """What the row says here that is read otherwise, or not at all."""

    @property
    def is_empty(self) -> bool:
        """Whether it says nothing, whatever a template writes around it."""
        return not any(text.strip() for text in (self.content, *self.reasoning.values()))

    @property
    def rendered(self) -> dict[str, str]:
        """As templates read it."""
        return {"role": self.role, "content": self.content, **self.reasoning}


@dataclass(frozen=True, slots=True)
class Conversation:
    """The messages of a row, in order, and the tools that they may call."""

    messages: tuple[Message, ...]
    tools: Sequence[Any] | None = None

    def answered(self, content: str) -> Conversation:
        """Return the conversation with an answer of the assistant added."""
        return self.followed_by(Message("assistant", content))

    def followed_by(self, message: Message) -> Conversation:
        """Return the conversation with one more message."""
        return replace(self, messages=(*self.messages, message))

    def asking(self) -> Conversation:
        """Return the conversation up to the assistant's last answer."""
        ends = self.messages[-1].role == "assistant"
        return replace(self, messages=self.messages[:-1]) if ends else self

    @property
    def said(self) -> str:
        """Return its texts without what a template writes around them."""
        return " ".join(" ".join((*message.reasoning.values(), message.content)) for message in self.messages)

    def remarks(self) -> Iterator[str]:
        """Yield remarks on what is read differently than written, or not learned."""
        for message in self.messages:
            yield from message.remarks
        answers = [m for m in self.messages[1:] if m.role == "assistant" and m.is_learned]
        if any(m.is_empty for m in answers) and not all(m.is_empty for m in answers):
            yield "an empty assistant turn among others is not learned"


def read_messages(row: Row, column: str) -> tuple[Message, ...]:
    """Return the messages of a row of format messages. Raises DataError."""
    turns = enumerate(listed(row, column), start=1)
    messages = tuple(_message(row, index, turn) for index, turn in turns)
    if messages[0].role == "assistant":
        raise DataError(
            f"{row.place}: the conversation begins with the assistant, so that turn answers nothing; "
            "begin with a user's message, or remove the turn"
        )
    return messages


def read_tools(row: Row, column: str) -> Sequence[Any] | None:
    """Return a row's tools, given as a list or as JSON; None if there are none. Raises DataError."""
    tools = _from_json(row, column)
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{row.place}: column {column!r} is {kind_of(tools)}; it must be a list of objects, "
            "each a function"
        )
    return tools


def read_history(row: Row, column: str) -> tuple[Message, ...]:
    """Return earlier turns from pairs of question and answer, given as a list or as JSON. Raises
    DataError."""
    pairs = _from_json(row, column)
    if pairs is None:
        return ()
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        found = "a list of something else" if isinstance(pairs, list) else kind_of(pairs)
        raise DataError(
            f"{row.place}: column {column!r} is {found}; it must be a list of pairs of texts, a question and "
            "an answer; rename the column if it has another meaning"
        )
    roles = ("user", "assistant")
    return tuple(Message(*turn) for pair in pairs for turn in zip(roles, pair, strict=True))


def read_system(row: Row, column: str) -> tuple[Message, ...]:
    """Return the system column as a message; none if it has no text. Raises DataError."""
    system = row.values.get(column)
    if system is None:
        return ()
    if not isinstance(system, str):
        raise DataError(f"{row.place}: column {column!r} is {kind_of(system)}; it must be text")
    if not system.strip():
        return ()
    return (Message("system", system),)


def listed(row: Row, column: str) -> list[Any]:
    """Return a column's list. Raises DataError if it is empty or not a list."""
    messages = row.values[column]
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if isinstance(messages, list) else kind_of(messages)
        raise DataError(f"{row.place}: column {column!r} is {found}; it must be a list of messages")
    return messages


def message_of(
    row: Row, index: int, turn: Mapping[str, Any], role: str, content: str, *remarks: str
) -> Message:
    """Return a message with its other keys. Raises DataError for keys that would be silently lost."""
    if refused := [key for key in _REFUSED if turn.get(key)]:
        raise DataError(
            f"{row.place}: message {index} has {refused[0]!r}, which is not rendered; write the "
            "call into the content in the form of the model's template"
        )
    reasoning = {key: text_of(row, index, turn, key) for key in REASONING_KEYS if turn.get(key) is not None}
    learned = {key: _is_learned(row, index, turn, key) for key in _WEIGHTS if turn.get(key) is not None}
    wanted = [key for key, value in learned.items() if value and role != "assistant"]
    return Message(
        role,
        content,
        reasoning,
        is_learned=all(learned.values()),
        remarks=(
            *remarks,
            *(f"{key!r} on a turn of {role} is not read: the assistant's are learned" for key in wanted),
            *(f"{key!r} of a message is not read" for key in _READ_ELSEWHERE if turn.get(key)),
        ),
    )


def text_of(row: Row, index: int, message: Mapping[str, Any], key: str) -> str:
    """Return the text of a message's key. Raises DataError."""
    value = message.get(key)
    if not isinstance(value, str):
        found = kind_of(value) if key in message else "missing"
        raise DataError(f"{row.place}: message {index}: {key!r} is {found}; it must be text")
    return value


def _message(row: Row, index: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"{row.place}: message {index} is {kind_of(turn)}; it must be an object with role and content"
        )
    if "role" not in turn and "from" in turn:
        raise DataError(
            f"{row.place}: message {index} has 'from' instead of 'role', so these rows are "
            "ShareGPT: write `format: sharegpt`, and name the column as `columns: {conversations: ...}`"
        )
    written = text_of(row, index, turn, "role")
    role = _role(row, index, written)
    said = () if role == written else (f"the role {written!r} is read as {role}",)
    return message_of(row, index, turn, role, text_of(row, index, turn, "content"), *said)


def _role(row: Row, index: int, written: str) -> str:
    name = written.strip().lower()
    if name in _ROLES:
        return name
    if name in SPEAKERS:
        return SPEAKERS[name]
    others = ", ".join(alias for alias in SPEAKERS if alias not in _ROLES)
    raise DataError(
        f"{row.place}: message {index} has the role {written!r}, which is not known; roles are "
        f"{', '.join(_ROLES)}, and {others} are read as user or assistant; rename it in the file. If "
        "another column has the conversation, name it as `columns: {messages: ...}`; turns of from and value "
        "are `format: sharegpt`"
    )


def _is_learned(row: Row, index: int, turn: Mapping[str, Any], key: str) -> bool:
    value = turn[key]
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise DataError(
            f"{row.place}: message {index}: {key!r} is {kind_of(value)}; it must be 0 or false (not "
            "learned), or 1 or true (learned)"
        )
    return bool(value)


def _from_json(row: Row, column: str) -> Any:
    """Return a column's value, parsed if it is text; None if it is empty. Raises DataError."""
    value = row.values.get(column)
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{row.place}: column {column!r} is text that is not JSON: {error}") from error
    is_empty = value is None or value == [] or (isinstance(value, str) and not value.strip())
    return None if is_empty else value


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)


def conversation(row: Row, *, column: str, system_column: str) -> tuple[Message, ...]:
    """Return the row's messages, beginning with the system column's text if there is one.

    A conversation that opens with the model keeps that turn, as something that was said, not as something
    to learn. Raises DataError.
    """
    turns = tuple(
        _sharegpt_message(row, index, turn) for index, turn in enumerate(listed(row, column), start=1)
    )
    system = read_system(row, system_column)
    if system and turns[0].role == "system":
        raise DataError(
            f"{row.place}: column {system_column!r} has a system message, but so has the conversation"
        )
    return (*system, *turns)


def _sharegpt_message(row: Row, index: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"{row.place}: message {index} is {kind_of(turn)}; it must be an object with from and value"
        )
    if "from" not in turn and "role" in turn:
        raise DataError(
            f"{row.place}: message {index} has role instead of from, so these rows are messages: write "
            "`format: messages`, and name the column as `columns: {messages: ...}`"
        )
    speaker = text_of(row, index, turn, "from")
    role = SPEAKERS.get(speaker.strip().lower())
    if role is None:
        raise DataError(
            f"{row.place}: message {index} is from {speaker!r}, which this format does not know; "
            f"allowed: {', '.join(SPEAKERS)}"
        )
    return message_of(row, index, turn, role, text_of(row, index, turn, "value"))
