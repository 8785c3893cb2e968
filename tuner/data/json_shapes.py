"""What JSON is that was taken for one object a line, and how it becomes that."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tuner.data.segments import kind_of
from tuner.errors import DataError

_READ_CHARACTERS = 1024 * 1024
"""How much more of a file is read to see what it is; the rest of it would not change the advice."""
_NOT_LINES = "not one JSON object a line"
_LIST = (
    f"{_NOT_LINES}: the file is a JSON list; call it .json (.json.gz where it is packed), which may hold a "
    "list, or write each of its objects on a line of its own (`jq -c '.[]' OLD > NEW.jsonl`)"
)


def over_lines(line: str, following: Iterator[tuple[int, str]]) -> str | None:
    """What there is to say where the JSON that begins on a line goes on with those that follow; else None."""
    text = line
    try:
        for _, more in following:
            text += more
            if len(text) > _READ_CHARACTERS:
                break
    except DataError:  # what is wrong further down is not what is asked
        pass
    value: Any = None
    try:
        value, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
    except json.JSONDecodeError as error:
        # A line that is cut off may go on with the next; nothing goes on for longer but what is meant to.
        goes_on = error.lineno > 2
    except (ValueError, RecursionError):
        goes_on = False
    else:
        goes_on = end > len(line)
    if not goes_on:
        return None
    if text.lstrip().startswith("["):
        return _LIST
    if text.lstrip().startswith("{"):
        return _objects(value)
    return None


def not_a_row(value: Any, following: Iterator[tuple[int, str]]) -> str:
    """What there is to say of a line's JSON that is no object."""
    if _are_rows(value):
        if _is_message(value[0]):
            return (
                "a list of messages; a row must be an object of columns and values, such as "
                '{"messages": [...]}'
            )
        if _is_last(following):
            return _LIST
    return f"{kind_of(value)}; a row must be an object of columns and values"


def _objects(value: Any) -> str:
    """Of an object over several lines, which may be one that holds the rows."""
    lists = [key for key, held in value.items() if _are_rows(held)] if isinstance(value, dict) else []
    if len(lists) == 1 and not _is_message(value[lists[0]][0]):
        return (
            f"{_NOT_LINES}: the object goes over several lines, with a list under {lists[0]!r}; if these are "
            f"the rows, write each of them on one line (`jq -c '.[\"{lists[0]}\"][]' OLD > NEW.jsonl`)"
        )
    return (
        f"{_NOT_LINES}: an object goes over several lines; write each on one line (`jq -c . OLD > NEW.jsonl`)"
    )


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(item, dict) for item in value)


def _is_message(value: dict[str, Any]) -> bool:
    return "role" in value or "from" in value


def _is_last(following: Iterator[tuple[int, str]]) -> bool:
    try:
        return not any(line.strip() for _, line in following)
    except DataError:
        return False
