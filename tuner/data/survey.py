"""What a file holds before anyone has said how to read it: its format, and its number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

from tuner.data.formats import RowFormat
from tuner.data.locations import downloads
from tuner.data.segments import Row
from tuner.data.sources import open_sources
from tuner.errors import DataError

if TYPE_CHECKING:
    from tuner.spec import SourceSpec

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


def survey(source: SourceSpec, *, recognised: bool) -> tuple[str, int]:
    """The format of a source, by its first row, and how many rows it has.

    With `recognised` false the format is the source's own word. Raises DataError when there is no
    row, or one whose columns no format has.
    """
    every = tuple(column for columns in _COLUMNS.values() for column in columns)
    every_row = RowFormat("any", (), every, lambda _: (), (), lambda _: (), _nothing)
    found: str = source.format
    count = 0
    with downloads(None) as copies:
        for row in chain.from_iterable(each.rows(every_row) for each in open_sources(source, None, copies)):
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
            "mapped by `columns` in the round file, once the format is said"
        )
    return name


def _nothing(instruction: str, input: str) -> Mapping[str, str]:
    return {}
