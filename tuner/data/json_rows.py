"""Rows in JSON files (lists, lines or columns), read without loading the whole file into memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from tuner.data.examples import kind_of
from tuner.data.files import MAX_ROW_BYTES, DataFile, not_utf8
from tuner.errors import DataError

_READ_CHARACTERS = 1024 * 1024
"""How much more of a file is read to see what it is; the rest of it would not change the advice."""
_NOT_LINES = "not one JSON object a line"
_LIST = (
    f"{_NOT_LINES}: the file is a JSON list; call it .json (.json.gz where it is packed), which may hold a "
    "list, or write each of its objects on a line of its own (`jq -c '.[]' OLD > NEW.jsonl`)"
)


def over_lines(line: str, following: Iterator[tuple[int, str]]) -> str | None:
    """Return an explanation if the JSON that starts on a line continues on the following lines; else None."""
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
        # A truncated line may seem to continue on the next one; only JSON over several lines reaches a third.
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
    """Return the message for a line whose JSON is not an object."""
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
    """Read an object over several lines, which may be the one that contains the rows."""
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


_CHUNK_BYTES = 1024 * 1024
_SPACE = re.compile(r"[ \t\r\n]*")


class RepeatedKey(Exception):
    """An object names a key twice, so that one of the values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"the key {repeated!r} appears twice in one object; keep one of them")
    return values


DECODER = json.JSONDecoder(object_pairs_hook=_object)
"""Reads JSON as rows have it. Raises RepeatedKey, ValueError or RecursionError."""


def json_objects(file: DataFile) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON list; none for an empty file.

    Raises DataError with the 1-based row.
    """
    text = _Text(file)
    match text.take():
        case "":
            return
        case "[":
            more = text.peek() != "]"
        case _:
            raise DataError(f"{file.name}: is neither a list of objects nor one object a line")
    while more:
        yield text.object()
        match text.peek():
            case ",":
                text.take()
                text.row += 1
            case "]":
                more = False
            case "":
                raise text.error("the file ends within the list; is it cut off?")
            case found:
                raise text.error(f"expected , or ] after it, found {found!r}")
    text.take()
    if text.peek():
        raise text.error("there is text after the list's closing ]")


class _Text:
    """The file's text from where reading has come to."""

    def __init__(self, file: DataFile) -> None:
        self.row = 1
        """The row that is being read."""
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._undecodable: UnicodeDecodeError | None = None
        """What follows the text, where that is not UTF-8."""
        self._ended = False

    def error(self, what: str) -> DataError:
        """Return the error for a mistake in the row, or directly after it."""
        return DataError(f"{self._file.name}: row {self.row}: {what}")

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text) or not self._more():
                break
        if self._undecodable is not None and self._at == len(self._text):
            raise self.error(not_utf8(self._undecodable))
        return self._text[self._at : self._at + 1]

    def take(self) -> str:
        """Return `peek`, and go past it."""
        character = self.peek()
        self._at += len(character)
        return character

    def object(self) -> dict[str, Any]:
        """Return the object that begins here; its end is known only after parsing it."""
        begins = self.peek()
        if begins != "{":
            found = repr(begins) if begins else "nothing (is the file cut off?)"
            raise self.error(f"a row must be an object of columns and values, found {found}")
        while True:
            try:
                value, self._at = DECODER.raw_decode(self._text, self._at)
            except RepeatedKey as error:
                raise self.error(str(error)) from error
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._at > MAX_ROW_BYTES or not self._more():
                    raise self.error(self._wrong(error)) from error
            else:
                assert isinstance(value, dict)
                return value

    def _more(self) -> bool:
        """Read at least as much again as is waiting; False when there is nothing more."""
        if self._ended:
            return False
        waiting = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK_BYTES, len(waiting)))
        try:
            added = self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            added = error.object[: error.start].decode()
            self._undecodable = error
        self._ended = not chunk or self._undecodable is not None
        self._text, self._at = waiting + added, 0
        return bool(added) or not self._ended

    def _wrong(self, error: Exception) -> str:
        if self._undecodable is not None:
            return not_utf8(self._undecodable)
        if isinstance(error, json.JSONDecodeError):
            found = error.doc[error.pos : error.pos + 40]
            where = f", found {found!r}" if found else "; is the file cut off?"
            return f"not JSON: {error.msg}{where}"
        return f"not JSON that can be read: {error}"
