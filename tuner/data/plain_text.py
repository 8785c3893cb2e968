"""Plain text: files into documents, and long documents into windows of tokens."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from tuner.data.examples import Row
from tuner.data.files import MAX_ROW_BYTES, DataFile, LocalFile, not_utf8
from tuner.errors import DataError

if TYPE_CHECKING:
    from tuner.config import SourceSpec


@dataclass(frozen=True, slots=True)
class Windows:
    """How texts become examples."""

    overlap_tokens: int = 0
    """Last tokens of an example that the next one of the same text begins with."""
    fills: bool = False
    """Whether records are put together as long as they fit; a row that does not is cut."""
    separator: str = ""
    """What stands between two records."""


def spans(num_tokens: int, *, room: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first new token, end) of each example that a text of this many tokens is cut into.

    All but the last have `room` tokens; each begins `overlap` tokens before the one before it ends.
    """
    assert 0 <= overlap < room
    begin = new = 0
    while new < num_tokens:
        end = min(begin + room, num_tokens)
        yield begin, new, end
        begin, new = end - overlap, end


SEPARATORS = {"line": "\n", "blank": "\n\n", "bytes": ""}
"""What stands between two records in an example."""

_Record = tuple[int, str]
"""The line it begins on, or its 1-based number where it is cut by bytes, and its text."""


def plain_text_rows(file: LocalFile, spec: SourceSpec) -> Iterator[Row]:
    """Yield rows with the column `text`, by `split_on` and `group_records`. Raises DataError."""
    assert spec.split_on is not None
    together = spec.group_records if isinstance(spec.group_records, int) else 1
    between = ":" if has_lines(spec) else ": row "
    remaining = _records(file, spec)
    while records := list(islice(remaining, together)):
        number = records[0][0]
        text = SEPARATORS[spec.split_on].join(text for _, text in records)
        yield Row(number, f"{file.name}{between}{number}", {"text": text})


def has_lines(spec: SourceSpec) -> bool:
    """Whether the numbers of its rows are lines of the file."""
    return spec.split_on != "bytes"


def _records(file: LocalFile, spec: SourceSpec) -> Iterator[_Record]:
    with DataFile(file) as opened:
        match spec.split_on:
            case "line":
                yield from _lines(opened)
            case "blank":
                yield from _paragraphs(opened)
            case _:
                assert spec.record_bytes is not None
                yield from _pieces(opened, spec.record_bytes)


def _lines(file: DataFile) -> Iterator[_Record]:
    """Yield lines that have text, without their line ends."""
    for number, line in file.lines():
        if line.strip():
            yield number, line.rstrip("\r\n")


def _paragraphs(file: DataFile) -> Iterator[_Record]:
    """Yield paragraphs: lines up to an empty one."""
    begins, text = 0, io.StringIO()  # a list of short lines would take many times their length
    for number, line in file.lines():
        if not line.strip():
            if text.tell():
                yield begins, text.getvalue().rstrip("\r\n")
                text = io.StringIO()
            continue
        if not text.tell():
            begins = number
        text.write(line)
        if text.tell() > MAX_ROW_BYTES:
            raise DataError(
                f"{file.name}:{begins}: the record is longer than {MAX_ROW_BYTES:,} characters; "
                "use `split_on: line` or `bytes`"
            )
    if text.tell():
        yield begins, text.getvalue().rstrip("\r\n")


def _pieces(file: DataFile, num_bytes: int) -> Iterator[_Record]:
    """Yield pieces of this many bytes; a character that would be cut goes to the next piece."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 0
    while True:
        waiting = decoder.getstate()[0]
        data = file.read(max(1, num_bytes - len(waiting)))
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(f"{file.name}: row {number + 1}: {not_utf8(error)}") from error
        if text:
            number += 1
            yield number, text
        if not data:
            return
