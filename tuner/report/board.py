"""The trials of a running round as rows, the choice of rows in a small window, and their table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from tuner.playbook.selection import best_evaluation
from tuner.records import (
    Answered,
    AnswerScore,
    Died,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    Hyperparameters,
    Preparing,
    Progressed,
    Ready,
    Started,
    Trial,
    TrialState,
)
from tuner.report import format
from tuner.report.format import GpuReading, gpu_line, place
from tuner.report.terminal import UNICODE, Column, FittedTable, Marks, column, sparkline


@dataclass
class Row:
    """One trial as of the last event."""

    number: int
    hyperparameters: Hyperparameters = field(default_factory=dict)
    state: TrialState = TrialState.WAITING
    reason: str | None = None
    step: int = 0
    train_loss: float | None = None
    by_step: dict[int, Evaluation] = field(default_factory=dict)
    answers: AnswerScore | None = None
    place: str = ""
    """Where it ran last, if that is not this machine."""

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Evaluations so far, by step."""
        return tuple(self.by_step[step] for step in sorted(self.by_step))

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation so far."""
        return best_evaluation(self.evaluations)


class Board:
    """The trials of one round, updated by facts and events.

    Events come first, but facts are final: `sync` overrides a state set by an event.
    """

    def __init__(self, *, trials_total: int, max_train_steps: int) -> None:
        self.trials_total = trials_total
        self.max_train_steps = max_train_steps
        self.rows: dict[int, Row] = {}
        self.preparing: str | None = None
        """What a worker prepares until it is ready."""
        self._executed_steps = 0
        self._started_at: float | None = None

    def sync(self, trials: Sequence[Trial]) -> None:
        """Apply the recorded facts."""
        for trial in trials:
            row = self.rows.setdefault(trial.number, Row(trial.number))
            row.hyperparameters, row.state, row.reason = trial.hyperparameters, trial.state, trial.reason
            row.by_step |= {evaluation.step: evaluation for evaluation in trial.evaluations}
            row.step = max([row.step, *row.by_step])
            row.answers = trial.answer_score

    def take(self, event: Event, *, now: float) -> None:
        """Apply a worker's event at `now`, in seconds on any clock."""
        match event:
            case Preparing(doing=doing):
                self.preparing = doing
            case Ready():
                self.preparing = None
            case Started():
                self._started_at = now if self._started_at is None else self._started_at
                row = self._row(event.trial)
                row.state, row.step = TrialState.RUNNING, event.step
                row.place = place(event.environment)
            case Progressed():
                row = self._advance(event.trial, event.step)
                row.train_loss = event.train_loss
            case Evaluated():
                row = self._advance(event.trial, event.evaluation.step)
                row.by_step[event.evaluation.step] = event.evaluation
            case Answered():
                self._row(event.trial).answers = event.score
            case Ended():
                row = self._advance(event.trial, event.step)
                row.state, row.reason = _state_after(event), event.reason
            case Died(trials=numbers):
                self.preparing = None
                for row in self.rows.values():
                    if row.state is TrialState.RUNNING and row.number in numbers:
                        row.state = TrialState.WAITING
            case _:
                pass

    def _row(self, number: int) -> Row:
        return self.rows.setdefault(number, Row(number))

    def _advance(self, number: int, step: int) -> Row:
        row = self._row(number)
        self._executed_steps += max(0, step - row.step)
        row.step = max(row.step, step)
        return row

    @property
    def best(self) -> Row | None:
        """The best trial so far: by the value of a per-trial objective, else by its evaluations.

        Leaves out infeasible ones.
        """
        able = [r for r in self.rows.values() if r.state is not TrialState.INFEASIBLE and r.best is not None]
        return min(able, key=_merit, default=None)

    @property
    def num_results(self) -> int:
        """Number of trials that count towards `search.trials`."""
        return sum(row.state.is_result for row in self.rows.values())

    @property
    def remaining_steps(self) -> int:
        """Steps still to run if every unfinished trial reaches the horizon."""
        unfinished = [row for row in self.rows.values() if not row.state.is_final]
        to_come = max(0, self.trials_total - self.num_results - len(unfinished))
        begun = sum(max(0, self.max_train_steps - row.step) for row in unfinished)
        return begun + to_come * self.max_train_steps

    @property
    def done_share(self) -> float:
        """Share of the round's steps that is done, 0 to 1."""
        total = self.trials_total * self.max_train_steps
        return min(1.0, max(0.0, 1 - self.remaining_steps / total)) if total else 1.0

    def steps_per_second(self, now: float) -> float | None:
        """Steps per second of all trials since the first started; None before any."""
        if self._started_at is None or self._executed_steps == 0 or now <= self._started_at:
            return None
        return self._executed_steps / (now - self._started_at)

    def eta_seconds(self, now: float) -> float | None:
        """Seconds until the round is done, at the pace so far; None without a pace."""
        pace = self.steps_per_second(now)
        return None if pace is None else self.remaining_steps / pace


def _merit(row: Row) -> tuple[float, float, int]:
    assert row.best is not None
    score = row.answers.mean if row.answers is not None and row.answers.is_objective else -math.inf
    return -score, row.best.cost, row.number


def _state_after(event: Ended) -> TrialState:
    """Mark the trial of a stopped or failed attempt as waiting, until the facts say that it has ended."""
    match event.outcome:
        case "complete" | "pruned" | "infeasible":
            return TrialState(event.outcome)
        case _:
            return TrialState.WAITING


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
    """Render the title, one row per trial, the round's progress, preparation and the GPUs.

    With `max_rows` None, shows every trial.
    """
    rows = _rows_to_show(board, max_rows)
    table = FittedTable(_columns(board, rows, searched, marks), folds=True)
    return Group(
        Text(title, style="bold", no_wrap=True, overflow="ellipsis"),
        table,
        *_left_out(board, rows),
        _HiddenSettings(table, board.best, searched),
        FittedTable(_progress(board, now=now, marks=marks), has_header=False),
        *_preparing(board),
        *(Text(gpu_line(gpu), style="dim", no_wrap=True, overflow="ellipsis") for gpu in gpus),
    )


@dataclass(frozen=True)
class _HiddenSettings:
    """The best trial's hyperparameters that have no column, because the terminal is too narrow for all."""

    table: FittedTable
    best: Row | None
    searched: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        hidden = set(self.table.left_out(options.max_width)) & set(self.searched)
        if self.best is not None and hidden:
            names = [name for name in self.searched if name in hidden]
            said = f"trial {self.best.number}: {format.settings(self.best.hyperparameters, names)}"
            yield Text(said, style="dim")


def _preparing(board: Board) -> list[Text]:
    if board.preparing is None:
        return []
    return [Text(board.preparing, style="dim", no_wrap=True, overflow="ellipsis")]


def _rows_to_show(board: Board, max_rows: int | None) -> list[Row]:
    """Return all rows, the best first, or the most interesting: the best, running ones, then the others."""
    rows = sorted(board.rows.values(), key=_place)
    if max_rows is None or len(rows) <= max_rows:
        return rows
    best = board.best if max_rows > 1 else None
    shown = sorted(rows, key=lambda row: (row is not best, row.state is not TrialState.RUNNING))[:max_rows]
    return sorted(shown, key=_place)


def _place(row: Row) -> tuple[int, tuple[float, float, int]]:
    """Return a sort key: the best first, then trials not yet evaluated, then infeasible and failed ones."""
    if row.state in (TrialState.INFEASIBLE, TrialState.FAILED):
        return 2, (0.0, 0.0, row.number)
    return (1, (0.0, 0.0, row.number)) if row.best is None else (0, _merit(row))


def _left_out(board: Board, shown: Sequence[Row]) -> list[Text]:
    numbers = {row.number for row in shown}
    hidden: dict[str, int] = {}
    for row in board.rows.values():
        if row.number not in numbers:
            hidden[row.state.value] = hidden.get(row.state.value, 0) + 1
    return [Text(f"and {format.counts(hidden)} not shown", style="dim", no_wrap=True)] if hidden else []


def _columns(board: Board, rows: Sequence[Row], searched: Sequence[str], marks: Marks) -> list[Column]:
    """Return all columns from left to right."""
    best, steps, scale = board.best, board.max_train_steps, _scale(board)
    chosen = [
        column(name, [format.value(row.hyperparameters.get(name)) for row in rows], rank=3)
        for name in searched
    ]
    lines = [
        sparkline(row.evaluations, step=row.step, max_train_steps=steps, scale=scale, marks=marks)
        for row in rows
    ]
    states = tuple(Text(row.state, style=STATE_STYLES[row.state]) for row in rows)
    return [
        column("trial", [str(row.number) for row in rows], rank=0),
        *chosen,
        Column("curve", tuple(Text(line, style="cyan") for line in lines), rank=6, is_number=False),
        column("step", [f"{row.step}/{steps}" for row in rows], rank=1),
        column("train", [_train_loss(row) for row in rows], rank=7),
        column("eval", [_last_loss(row) for row in rows], rank=5),
        Column(_best_header(rows), tuple(_best_cell(row, is_leader=row is best) for row in rows), rank=2),
        Column("state", states, rank=4, is_number=False),
        *([column("where", [row.place for row in rows], rank=8)] if any(row.place for row in rows) else []),
    ]


def _scale(board: Board) -> tuple[float, float]:
    """Return the losses that all curves are drawn between: the lowest, and the first, the base model's.

    A divergence does not flatten the other curves.
    """
    runs = [row.evaluations for row in board.rows.values() if row.by_step]
    losses = [e.eval_loss for run in runs for e in run if math.isfinite(e.eval_loss)]
    first = [run[0].eval_loss for run in runs if math.isfinite(run[0].eval_loss)]
    return min(losses, default=0.0), max(first, default=0.0)


def _train_loss(row: Row) -> str:
    """Return the latest step: of the last heartbeat or of the last recorded evaluation."""
    recorded = row.evaluations[-1].train_loss if row.by_step else None
    return format.loss(recorded if row.train_loss is None else row.train_loss)


def _last_loss(row: Row) -> str:
    return format.loss(row.evaluations[-1].eval_loss if row.by_step else None)


def _best_header(rows: Sequence[Row]) -> str:
    chosen = next((row.best.objective for row in rows if row.best is not None), None)
    return "best" if chosen is None else f"best {chosen.metric}"


def _best_cell(row: Row, *, is_leader: bool) -> Text:
    if row.best is None:
        return Text(format.NOTHING)
    return Text(f"{format.loss(row.best.value)}@{row.best.step}", style="bold green" if is_leader else "")


def _progress(board: Board, *, now: float, marks: Marks) -> list[Column]:
    """A single line that drops its parts one by one on a narrow console."""
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
