"""Conversations as ShareGPT's exports and their many descendants write them, as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.data.chat import Message, listed, text_of
from tuner.data.segments import Row, kind_of
from tuner.errors import DataError

_ROLES: Mapping[str, str] = {
    typed: role
    for role, names in {
        "system": "system",
        "user": "human user prompter",
        "assistant": "gpt assistant model bot chatgpt chatbot bing bard claude",
    }.items()
    for typed in names.split()
}
"""Who speaks, in lower case."""


def conversation(row: Row, *, column: str, system_column: str) -> list[Message]:
    """The row's messages, the system column's text first where there is one.

    A conversation that opens with the model keeps that turn, as something that was said, not as something
    to learn. Raises DataError.
    """
    turns = [_message(row, index, turn) for index, turn in enumerate(listed(row, column), start=1)]
    system = row.values.get(system_column)
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise DataError(f"{row.place}: column {system_column!r} is {kind_of(system)}; it must be text")
    if turns[0]["role"] == "system":
        raise DataError(
            f"{row.place}: column {system_column!r} has a system message, and so has the conversation"
        )
    return [{"role": "system", "content": system}, *turns]


def _message(row: Row, index: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(
            f"{row.place}: message {index} is {kind_of(turn)}; it must be an object with from and value"
        )
    if "from" not in turn and "role" in turn:
        raise DataError(
            f"{row.place}: message {index} has role and not from, so these rows are messages: write "
            "`format: messages`, and the column's name as `columns: {messages: ...}`"
        )
    speaker = text_of(row, index, turn, "from")
    role = _ROLES.get(speaker.strip().lower())
    if role is None:
        raise DataError(
            f"{row.place}: message {index} is from {speaker!r}, which is nobody this format knows; "
            f"allowed are {', '.join(_ROLES)}"
        )
    return {"role": role, "content": text_of(row, index, turn, "value")}
