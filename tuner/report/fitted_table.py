"""A terminal table that leaves out its less important columns instead of breaking words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text

_GAP = 2
"""Blanks between columns."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column with its cells."""

    name: str
    cells: tuple[Text, ...]
    rank: int
    """Columns of a higher rank go first where the terminal is narrow."""
    is_number: bool = True
    """Numbers stand at the right of their column."""
    min_width: int | None = None
    """The least width of a column whose words may wrap; None for one that never does."""

    @property
    def width(self) -> int:
        """Characters it needs on a line."""
        whole = max([len(self.name), *(cell.cell_len for cell in self.cells)])
        return whole if self.min_width is None else min(whole, self.min_width)


def column(name: str, texts: Sequence[str], *, rank: int, min_width: int | None = None) -> Column:
    """A column of unstyled cells; one that may wrap holds words, any other numbers."""
    return Column(name, tuple(Text(text) for text in texts), rank, min_width is None, min_width)


class FittedTable:
    """Columns side by side, as many as the console has room for; at least the first by rank."""

    def __init__(
        self, columns: Sequence[Column], *, row_styles: Sequence[str] = (), has_header: bool = True
    ) -> None:
        self._columns, self._row_styles, self._has_header = tuple(columns), tuple(row_styles), has_header

    def left_out(self, width: int) -> tuple[str, ...]:
        """The names of columns that a console of so many characters has no room for."""
        shown = fitting(self._columns, width)
        return tuple(c.name for c in self._columns if all(c is not other for other in shown))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = fitting(self._columns, options.max_width)
        table = Table(
            box=None,
            pad_edge=False,
            padding=(0, _GAP, 0, 0),
            header_style="bold",
            show_header=self._has_header,
        )
        for column in shown:
            justify: JustifyMethod = "right" if column.is_number else "left"
            table.add_column(Text(column.name), justify=justify, no_wrap=column.min_width is None)
        rows = list(zip(*(column.cells for column in shown), strict=True))
        for cells, style in zip(rows, self._row_styles or [""] * len(rows), strict=True):
            table.add_row(*cells, style=style)
        yield table


def fitting(columns: Sequence[Column], width: int) -> tuple[Column, ...]:
    """The columns of lowest rank that fit side by side, in their order."""
    kept: list[Column] = []
    room = width + _GAP
    for column in sorted(columns, key=lambda column: column.rank):
        if kept and column.width + _GAP > room:
            break
        kept.append(column)
        room -= column.width + _GAP
    return tuple(column for column in columns if any(column is other for other in kept))
