"""Conversations as ShareGPT's exports and their many descendants write them, as messages."""

from __future__ import annotations

from typing import Any

from tuner.data.messages import SPEAKERS, Message, listed, message_of, read_system, text_of
from tuner.data.segments import Row, kind_of
from tuner.errors import DataError


def conversation(row: Row, *, column: str, system_column: str) -> tuple[Message, ...]:
    """The row's messages, the system column's text first where there is one.

    A conversation that opens with the model keeps that turn, as something that was said, not as something
    to learn. Raises DataError.
    """
    turns = tuple(_message(row, index, turn) for index, turn in enumerate(listed(row, column), start=1))
    system = read_system(row, system_column)
    if system and turns[0].role == "system":
        raise DataError(
            f"{row.place}: column {system_column!r} has a system message, and so has the conversation"
        )
    return (*system, *turns)


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
    role = SPEAKERS.get(speaker.strip().lower())
    if role is None:
        raise DataError(
            f"{row.place}: message {index} is from {speaker!r}, which is nobody this format knows; "
            f"allowed are {', '.join(SPEAKERS)}"
        )
    return message_of(row, index, turn, role, text_of(row, index, turn, "value"))
