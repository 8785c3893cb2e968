"""How a running round looks on a terminal of any width and height."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from tuner.records import TrialState
from tuner.report import format
from tuner.report.board import Board, Row
from tuner.report.devices import GpuReading, gpu_line
from tuner.report.fitted_table import Column, FittedTable, column
from tuner.report.textplot import UNICODE, Marks, sparkline

STATE_STYLES = {
    TrialState.WAITING: "dim",
    TrialState.RUNNING: "cyan",
    TrialState.COMPLETE: "green",
    TrialState.PRUNED: "yellow",
    TrialState.INFEASIBLE: "yellow",
    TrialState.FAILED: "red",
}
_BAR_WIDTH = 20


def board_table(
    board: Board,
    *,
    title: str,
    searched: Sequence[str],
    now: float,
    max_rows: int | None,
    gpus: Sequence[GpuReading] = (),
    marks: Marks = UNICODE,
) -> RenderableType:
    """Title, one row a trial, the round's progress, what is being prepared and the GPUs.

    `max_rows` None shows every trial.
    """
    rows = _rows_to_show(board, max_rows)
    return Group(
        Text(title, style="bold", no_wrap=True, overflow="ellipsis"),
        FittedTable(_columns(board, rows, searched, marks)),
        *_left_out(board, rows),
        FittedTable(_progress(board, now=now, marks=marks), has_header=False),
        *_preparing(board),
        *(Text(gpu_line(gpu), style="dim", no_wrap=True, overflow="ellipsis") for gpu in gpus),
    )


def _preparing(board: Board) -> list[Text]:
    if board.preparing is None:
        return []
    return [Text(board.preparing, style="dim", no_wrap=True, overflow="ellipsis")]


def _rows_to_show(board: Board, max_rows: int | None) -> list[Row]:
    """All rows by number, or the most interesting ones: running, the best, then the latest."""
    rows = sorted(board.rows.values(), key=lambda row: row.number)
    if max_rows is None or len(rows) <= max_rows:
        return rows

    def interest(row: Row) -> tuple[bool, bool, bool, int]:
        is_running, is_best = row.state is TrialState.RUNNING, row is board.best
        return is_running, is_best, row.state is not TrialState.WAITING, row.number

    shown = sorted(rows, key=interest, reverse=True)[:max_rows]
    return sorted(shown, key=lambda row: row.number)


def _left_out(board: Board, shown: Sequence[Row]) -> list[Text]:
    numbers = {row.number for row in shown}
    hidden: dict[str, int] = {}
    for row in board.rows.values():
        if row.number not in numbers:
            hidden[row.state.value] = hidden.get(row.state.value, 0) + 1
    return [Text(f"and {format.counts(hidden)} not shown", style="dim", no_wrap=True)] if hidden else []


def _columns(board: Board, rows: Sequence[Row], searched: Sequence[str], marks: Marks) -> list[Column]:
    """All columns from left to right."""
    best, steps = board.best, board.max_train_steps
    chosen = [
        column(name, [format.value(row.hyperparameters.get(name)) for row in rows], rank=rank)
        for name, rank in zip(searched, [3, *[8] * len(searched)], strict=False)
    ]
    lines = [sparkline(row.evaluations, step=row.step, max_train_steps=steps, marks=marks) for row in rows]
    states = tuple(Text(row.state, style=STATE_STYLES[row.state]) for row in rows)
    return [
        column("trial", [str(row.number) for row in rows], rank=0),
        *chosen,
        Column("curve", tuple(Text(line, style="cyan") for line in lines), rank=6, is_number=False),
        column("step", [f"{row.step}/{steps}" for row in rows], rank=1),
        column("train", [_train_loss(row) for row in rows], rank=7),
        column("eval", [_last_loss(row) for row in rows], rank=5),
        Column("best", tuple(_best_cell(row, is_leader=row is best) for row in rows), rank=2),
        Column("state", states, rank=4, is_number=False),
    ]


def _train_loss(row: Row) -> str:
    """The latest: of the last sign of life, or of the evaluation that was recorded."""
    recorded = row.evaluations[-1].train_loss if row.by_step else None
    return format.loss(recorded if row.train_loss is None else row.train_loss)


def _last_loss(row: Row) -> str:
    return format.loss(row.evaluations[-1].eval_loss if row.by_step else None)


def _best_cell(row: Row, *, is_leader: bool) -> Text:
    if row.best is None:
        return Text(format.NOTHING)
    return Text(f"{format.loss(row.best.eval_loss)}@{row.best.step}", style="bold green" if is_leader else "")


def _progress(board: Board, *, now: float, marks: Marks) -> list[Column]:
    """One line, whose parts go one by one where there is no room."""
    done = round(_BAR_WIDTH * board.done_share)
    bar = Text.assemble((marks.bar * done, "cyan"), (marks.bar * (_BAR_WIDTH - done), "bright_black"))
    pace, eta = board.steps_per_second(now), board.eta_seconds(now)
    words = [
        f"{board.num_results} of {board.trials_total} trials",
        f"{format.percent(board.done_share)} of the steps",
        f"about {format.duration(eta)} left" if eta else "",
        f"{format.number(pace)} steps/s" if pace is not None else "",
    ]
    parts = [column("", [text], rank=rank) for rank, text in enumerate(words) if text]
    return [Column("", (bar,), rank=len(words)), *parts] if marks.bar else parts
