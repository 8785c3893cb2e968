"""What a file holds before anyone has said how to read it: its format, and its number of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.data.formats import RowFormat
from tuner.data.sources import open_source
from tuner.errors import DataError

if TYPE_CHECKING:
    from tuner.spec import SourceSpec

_COLUMNS = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Columns by which a format is recognised, the most telling first."""


def recognise(columns: tuple[str, ...]) -> str | None:
    """The format that rows with these columns are in; None when there is none."""
    return next((name for name, needed in _COLUMNS.items() if set(needed) <= set(columns)), None)


def survey(source: SourceSpec, *, recognised: bool) -> tuple[str, int]:
    """The format of a source, by its first row, and how many rows it has.

    With `recognised` false the format is the source's own word. Raises DataError when there is no
    row, or one whose columns no format has.
    """
    every = tuple(column for columns in _COLUMNS.values() for column in columns)
    found: str = source.format
    count = 0
    for row in open_source(source, None).rows(RowFormat("any", (), every, lambda _: (), _nothing)):
        if not count and recognised:
            name = recognise(tuple(row.values))
            if name is None:
                listed = ", ".join(map(repr, row.values)) or "none"
                formats = "; ".join(f"{f} has {' and '.join(c)}" for f, c in _COLUMNS.items())
                raise DataError(f"{row.place}: no format has the columns {listed}: {formats}")
            found = name
        count += 1
    if not count:
        raise DataError(f"{source.path}: has no rows")
    return found, count


def _nothing(instruction: str, input: str) -> str:
    return instruction + input
