"""What a file holds before anyone has said how to read it: its format, and its number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

from tuner.data.files import downloads
from tuner.data.formats import RowFormat
from tuner.data.segments import Row
from tuner.data.sources import open_sources
from tuner.errors import DataError

if TYPE_CHECKING:
    from tuner.config import SourceSpec

_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Columns by which a format is recognised, the most telling first."""


def recognise(columns: tuple[str, ...]) -> str | None:
    """The format that rows with these columns are in; None when there is none."""
    return next((name for name, needed in _COLUMNS.items() if set(needed) <= set(columns)), None)


_SYNONYMS = (
    ("prompt", "instruction", "question", "query", "problem", "request", "input"),
    ("completion", "output", "answer", "response", "solution", "target", "reply"),
    ("messages", "conversations", "conversation", "dialog", "dialogue", "chat"),
    ("text", "content", "document", "body"),
)
"""Names of one thing in data sets of other tools, the most usual first."""


def matching_columns(source: SourceSpec) -> dict[str, str]:
    """What a source's format finds under other names in its first row, as `columns` says it.

    Raises DataError when there is no row, or a column has no match.
    """
    with downloads(None) as copies:
        rows = chain.from_iterable(each.rows(_every_row()) for each in open_sources(source, None, copies))
        row = next(rows, None)
    if row is None:
        raise DataError(f"{source.path}: has no rows")
    found: dict[str, str] = {}
    needed = _COLUMNS[source.format]
    for column in (column for column in needed if column not in {**row.values, **source.columns}):
        taken = {*needed, *source.columns.values(), *found.values()}
        names = next((names for names in _SYNONYMS if column in names), ())
        match = next((name for name in names if name in row.values and name not in taken), None)
        if match is None:
            listed = ", ".join(map(repr, row.values)) or "none"
            raise DataError(
                f"{row.place}: no column {column!r}; columns found: {listed}; format {source.format} needs "
                f"{' and '.join(map(repr, needed))}; name the one to read as --columns {column}=NAME"
            )
        found[column] = match
    return {**found, **source.columns}


def _every_row() -> RowFormat:
    """A format that reads each column that any format recognises, or all."""
    every = tuple(column for columns in _COLUMNS.values() for column in columns)
    return RowFormat("any", every, (), lambda _: (), (), lambda _: (), _nothing)


def survey(source: SourceSpec, *, recognised: bool) -> tuple[str, int]:
    """The format of a source, by its first row, and how many rows it has.

    With `recognised` false the format is the source's own word. Raises DataError when there is no
    row, or one whose columns no format has.
    """
    found: str = source.format
    count = 0
    with downloads(None) as copies:
        for row in chain.from_iterable(
            each.rows(_every_row()) for each in open_sources(source, None, copies)
        ):
            if not count and recognised:
                found = _recognised(row)
            count += 1
    if not count:
        raise DataError(f"{source.path}: has no rows")
    return found, count


def _recognised(row: Row) -> str:
    name = recognise(tuple(row.values))
    if name is None:
        listed = ", ".join(map(repr, row.values)) or "none"
        formats = "; ".join(f"{f} has {' and '.join(c)}" for f, c in _COLUMNS.items())
        raise DataError(
            f"{row.place}: no format has the columns {listed}: {formats}; columns with other names are "
            "found or named by --columns, once --format says the format"
        )
    return name


def _nothing(instruction: str, input: str) -> Mapping[str, str]:
    return {}
