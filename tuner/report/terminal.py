"""Fit output to a terminal: tables that drop columns, not words, and curves drawn with characters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from tuner.playbook.selection import best_evaluation
from tuner.records import Evaluation
from tuner.report import format

_GAP = 2
"""Spaces between columns."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column with its cells."""

    name: str
    cells: tuple[Text | str, ...]
    rank: int
    """Columns of a higher rank are dropped first on a narrow terminal."""
    is_number: bool = True
    """Whether to align right, as for numbers."""
    min_width: int | None = None
    """Minimum width of a column that may wrap; None if it never wraps."""

    @property
    def width(self) -> int:
        """Width in characters."""
        whole = max(*map(len, self.name.splitlines() or [""]), self.longest_cell)
        return whole if self.min_width is None else min(whole, self.min_width)

    @property
    def longest_cell(self) -> int:
        """Width of its widest cell in characters; 0 without cells."""
        if (joined := _joined(self.cells)) is not None and joined.isascii():
            return max(map(len, self.cells), default=0)
        return max(map(_width, self.cells), default=0)

    @property
    def is_plain(self) -> bool:
        """Whether name and cells are lines of one style that rich would not change."""
        texts = [cell if isinstance(cell, str) else cell.plain for cell in (self.name, *self.cells)]
        has_spans = any(not isinstance(cell, str) and cell.spans for cell in self.cells)
        return not has_spans and "".join(texts).isprintable() and not any(text[-1:] == " " for text in texts)

    def padded(self, width: int) -> list[str]:
        """Return the texts of its cells, filled with blanks to the width."""
        texts = [cell if isinstance(cell, str) else cell.plain for cell in self.cells]
        if "".join(texts).isascii():
            return [text.rjust(width) if self.is_number else text.ljust(width) for text in texts]
        return [_padded(text, width, is_number=self.is_number) for text in texts]

    @property
    def folded(self) -> Column:
        """The same column with its name broken after underscores, no wider than its cells where possible."""
        room = self.longest_cell
        lines = [""]
        for part in re.findall(r"[^_]+_*|_+", self.name):
            if lines[-1] and len(lines[-1]) + len(part) > room:
                lines.append("")
            lines[-1] += part
        return replace(self, name="\n".join(lines))


def column(name: str, texts: Sequence[str], *, rank: int, min_width: int | None = None) -> Column:
    """Create a column of unstyled cells: words if it may wrap, otherwise numbers."""
    return Column(name, tuple(texts), rank, min_width is None, min_width)


def _joined(cells: Sequence[Text | str]) -> str | None:
    """Return all cells in one text; None if any is not a plain string."""
    try:
        return "".join(cells)  # type: ignore[arg-type]
    except TypeError:
        return None


def _padded(text: str, width: int, *, is_number: bool) -> str:
    blank = " " * (width - cell_len(text))
    return blank + text if is_number else text + blank


def _width(cell: Text | str) -> int:
    if isinstance(cell, Text):
        return cell.cell_len
    return len(cell) if cell.isascii() else cell_len(cell)


class FittedTable:
    """A table with as many columns as fit the console; at least the first by rank.

    With `folds`, names are broken over several lines before a column is dropped.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        row_styles: Sequence[str] = (),
        has_header: bool = True,
        folds: bool = False,
    ) -> None:
        self._columns, self._row_styles, self._has_header = tuple(columns), tuple(row_styles), has_header
        self._folds = folds

    def left_out(self, width: int) -> tuple[str, ...]:
        """Return the names of columns that do not fit a console of this width."""
        shown = {column.name.replace("\n", "") for column in self._shown(width)}
        return tuple(column.name for column in self._columns if column.name not in shown)

    def _shown(self, width: int) -> tuple[Column, ...]:
        shown = fitting(self._columns, width)
        if self._folds and len(shown) < len(self._columns):
            return fitting([column.folded for column in self._columns], width)
        return shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self._shown(options.max_width)
        num_rows = max((len(column.cells) for column in shown), default=0)
        styles = self._row_styles or [""] * num_rows
        widths = [max(len(column.name), column.longest_cell) for column in shown]
        fits = all(widths) and sum(widths) + _GAP * (len(widths) - 1) <= options.max_width
        if fits and all(column.is_plain for column in shown):
            yield from _lines(console, shown, widths, styles, has_header=self._has_header)
            return
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
        rows = zip(*(column.cells for column in shown), strict=True)
        for cells, style in zip(rows, styles, strict=True):
            table.add_row(*(Text(c) if isinstance(c, str) else c for c in cells), style=style)
        yield table


def _lines(
    console: Console,
    columns: Sequence[Column],
    widths: Sequence[int],
    row_styles: Sequence[str],
    *,
    has_header: bool,
) -> Iterator[Segment]:
    """Yield rows that need no wrapping as `rich.table` would, which takes a hundred times as long."""

    @cache
    def style_of(row: str, own: Style | str) -> Style:
        return console.get_style(row) + console.get_style(own)

    end, gap = Segment.line(), " " * _GAP
    if has_header:
        names = [
            _padded(column.name, width, is_number=column.is_number)
            for column, width in zip(columns, widths, strict=True)
        ]
        yield Segment(gap.join(names), style_of("bold", ""))
        yield end
    padded = zip(*(column.padded(width) for column, width in zip(columns, widths, strict=True)), strict=True)
    if console.color_system is None:
        yield from (Segment(f"{gap.join(texts)}\n") for texts in padded)
        return
    styled = [(place, column.cells) for place, column in enumerate(columns) if _joined(column.cells) is None]
    for row, (texts, row_style) in enumerate(zip(padded, row_styles, strict=True)):
        begin, before = 0, ""
        for place, cells in styled:
            own = "" if isinstance(cell := cells[row], str) else cell.style
            before += gap.join(texts[begin:place]) + (gap if place > begin else "")
            yield Segment(before, style_of(row_style, ""))
            yield Segment(texts[place], style_of(row_style, own))
            begin, before = place + 1, gap
        if begin < len(texts):
            yield Segment(before + gap.join(texts[begin:]), style_of(row_style, ""))
        yield end


def fitting(columns: Sequence[Column], width: int) -> tuple[Column, ...]:
    """Return the columns of lowest rank that fit side by side, in their order."""
    kept: list[Column] = []
    room = width + _GAP
    for column in sorted(columns, key=lambda column: column.rank):
        if kept and column.width + _GAP > room:
            break
        kept.append(column)
        room -= column.width + _GAP
    return tuple(column for column in columns if any(column is other for other in kept))


@dataclass(frozen=True, slots=True)
class Marks:
    """Characters to draw with."""

    levels: str
    """From low to high."""
    ahead: str
    """Part of the run still to come."""
    not_finite: str
    eval_loss: str
    train_loss: str
    best: str
    above: str
    """A loss above the top of the plot."""
    axis: str
    corner: str
    floor: str
    bar: str
    """Part of a progress bar; empty if it looked like a part still to come."""


UNICODE = Marks("▁▂▃▄▅▆▇█", "·", "×", "●", "·", "★", "▲", "│", "└", "─", "━")
ASCII = Marks("_.:-=+*#", " ", "x", "o", ".", "*", "^", "|", "+", "-", "")


def marks_for(ascii_only: bool) -> Marks:
    """Return characters for a console's encoding, by rich's `console.options.ascii_only`."""
    return ASCII if ascii_only else UNICODE


def sparkline(
    evaluations: Sequence[Evaluation],
    *,
    step: int,
    max_train_steps: int,
    scale: tuple[float, float],
    width: int = 12,
    marks: Marks = UNICODE,
) -> str:
    """Draw a run in `width` characters: its length is the progress, its height the loss.

    Each character shows the last evaluation in its part of the run, or the previous one if it has none;
    the part after `step` is still to come. `scale` are the losses of the lowest and the highest character,
    the same for all runs that are to be compared; a loss outside of it is drawn at the edge.
    """
    low, high = scale
    line, reached = "", math.ceil(width * min(step, max_train_steps) / max(1, max_train_steps))
    for cell in range(1, width + 1):
        seen = [e.eval_loss for e in evaluations if e.step * width <= cell * max_train_steps]
        if cell > max(reached, 1) or not seen:
            line += marks.ahead
        elif not math.isfinite(seen[-1]):
            line += marks.not_finite
        else:
            share = min(1.0, max(0.0, (seen[-1] - low) / (high - low))) if high > low else 0.0
            line += marks.levels[round(share * (len(marks.levels) - 1))]
    return line


def curve(
    evaluations: Sequence[Evaluation],
    *,
    max_train_steps: int,
    width: int = 60,
    height: int = 12,
    marks: Marks = UNICODE,
) -> list[str]:
    """Plot evaluation and train loss by step as lines of text with axes; empty without a loss.

    The top of the plot is at most twice the first evaluation's loss, so that a divergence does not flatten
    the rest; higher values are drawn at the edge.
    """
    losses = [(e.step, e.eval_loss) for e in evaluations if math.isfinite(e.eval_loss)]
    if not losses:
        return []
    trained = [(e.step, e.train_loss) for e in evaluations if e.train_loss is not None]
    finite = [loss for _, loss in [*losses, *trained] if math.isfinite(loss)]
    low, high = min(finite), min(max(finite), 2 * abs(losses[0][1]) or 1.0)
    high = high if high > low else low + max(1e-4, 1e-3 * abs(low))
    grid = [[" "] * width for _ in range(height)]

    def draw(step: int, loss: float, mark: str) -> None:
        if not math.isfinite(loss):
            return
        column = round(min(step / max(1, max_train_steps), 1.0) * (width - 1))
        row = round((high - min(loss, high)) / (high - low) * (height - 1))
        grid[row][column] = marks.above if loss > high else mark

    for step, loss in trained:
        draw(step, loss, marks.train_loss)
    for step, loss in losses:
        draw(step, loss, marks.eval_loss)
    best = best_evaluation(evaluations)
    if best is not None:
        draw(best.step, best.eval_loss, marks.best)
    return _with_axes(grid, low=low, high=high, max_train_steps=max_train_steps, marks=marks)


def _with_axes(
    grid: list[list[str]], *, low: float, high: float, max_train_steps: int, marks: Marks
) -> list[str]:
    height, width = len(grid), len(grid[0])
    labels = {0: high, height // 2: high - (high - low) * (height // 2) / (height - 1), height - 1: low}
    margin = max(len(format.loss(level)) for level in labels.values())
    lines = [
        f"{format.loss(labels[row]) if row in labels else '':>{margin}} {marks.axis}{''.join(cells).rstrip()}"
        for row, cells in enumerate(grid)
    ]
    lines.append(f"{'':>{margin}} {marks.corner}{marks.floor * width}")
    ends = f"0{f'step {max_train_steps}':>{width - 1}}"
    return [*lines, f"{'':>{margin}}  {ends}"]
