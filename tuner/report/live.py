"""Views of a running round: a live table on a terminal, one line per event elsewhere, or a progress bar."""

from __future__ import annotations

import os
import sys
import termios
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from rich.console import Console, RenderableType
from rich.live import Live

from tuner.records import (
    LOSS,
    Answered,
    Died,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    Preparing,
    Ready,
    Started,
    Trial,
)
from tuner.report import format
from tuner.report.board import Board, Row, board_table
from tuner.report.format import GpuReading
from tuner.report.terminal import marks_for

PREPARING_EVERY_SECONDS = 30
"""Between lines of plain output on the progress of preparing."""
_REFRESHES_PER_SECOND = 4
_LOCAL_MODES = 3
"""Index among the attributes of a terminal."""
_LINES_AROUND_ROWS = 8
"""Terminal lines not available to table rows: title, a header of up to three lines, progress, what is hidden,
prompt."""


class View(Protocol):
    """Display of a running round."""

    def event(self, event: Event) -> None:
        """Show a worker's event."""

    def trials(self, trials: Sequence[Trial]) -> None:
        """Show the recorded facts of trials: first of all trials, then of changed ones."""

    def message(self, text: str) -> None:
        """Show a message to the user."""

    def close(self) -> None:
        """Leave the last state on the screen and show nothing more."""


def open_view(
    *,
    console: Console,
    title: str,
    trials_total: int,
    max_train_steps: int,
    searched: Sequence[str] = (),
    gpus: Callable[[], Sequence[GpuReading]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> View:
    """Return a live table if `console` is an interactive terminal, else plain lines.

    `console` writes to standard error. `searched` names the hyperparameters to show, the most informative
    first. `gpus` is read whenever the table is drawn.
    """
    board = Board(trials_total=trials_total, max_train_steps=max_train_steps)
    if console.is_interactive:
        return _LiveView(console, board, title=title, searched=searched, gpus=gpus, clock=clock)
    return _PlainView(console, board, title=title, searched=searched, clock=clock)


# --- plain lines ----------------------------------------------------------------------------------


class _PlainView:
    def __init__(
        self,
        console: Console,
        board: Board,
        *,
        title: str,
        searched: Sequence[str],
        clock: Callable[[], float],
    ) -> None:
        self._console, self._board, self._searched, self._clock = console, board, searched, clock
        self._prepared_at = clock()
        trials = format.count(board.trials_total, "trial")
        self.message(f"{title}: {trials} of {format.count(board.max_train_steps, 'step')}")

    def event(self, event: Event) -> None:
        known = isinstance(event, Evaluated) and event.evaluation.step in self._seen(event.trial)
        self._board.take(event, now=self._clock())
        line = None if known else _line(event, self._board, self._searched)
        if isinstance(event, Preparing) and not self._is_time():
            return
        if line is not None:
            self.message(line + (self._remaining() if isinstance(event, Ended) else ""))

    def _is_time(self) -> bool:
        """Return whether to print the progress of preparing again."""
        now = self._clock()
        if now - self._prepared_at < PREPARING_EVERY_SECONDS:
            return False
        self._prepared_at = now
        return True

    def _seen(self, trial: int) -> frozenset[int]:
        row = self._board.rows.get(trial)
        return frozenset(row.by_step) if row else frozenset()

    def _remaining(self) -> str:
        eta = self._board.eta_seconds(self._clock())
        done = f"  ({self._board.num_results} of {self._board.trials_total} trials done"
        return f"{done}, about {format.duration(eta)} left)" if eta else f"{done})"

    def trials(self, trials: Sequence[Trial]) -> None:
        self._board.sync(trials)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


def _line(event: Event, board: Board, searched: Sequence[str]) -> str | None:
    """Return an event's line of plain output; None for events too frequent to print."""
    match event:
        case Preparing(doing=doing):
            return doing
        case Ready():
            return f"worker ready: {event.device}, {format.count(event.slots, 'slot')}"
        case Started():
            chosen = format.settings(board.rows[event.trial].hyperparameters, searched)
            verb = f"resumes from step {event.step}" if event.step else "starts"
            if where := format.place(event.environment):
                verb = f"{verb} on {where}"
            return f"trial {event.trial}  {verb}  {chosen}".rstrip()
        case Evaluated(evaluation=evaluation):
            step = f"step {evaluation.step}/{board.max_train_steps}"
            return (
                f"trial {event.trial}  {step}  eval {format.loss(evaluation.eval_loss)}"
                f"{_objective(evaluation)}  best {_best(board.rows[event.trial])}"
            )
        case Answered(score=score):
            return f"trial {event.trial}  answers {format.answers_in_words(score)}"
        case Ended():
            reason = f": {event.reason}" if event.reason else ""
            return f"trial {event.trial}  {event.outcome}{reason}  best {_best(board.rows[event.trial])}"
        case Died():
            return f"the worker died: {event.reason}"
        case _:
            return None


def _objective(evaluation: Evaluation) -> str:
    """Return the objective's value if it is not the loss."""
    chosen = evaluation.objective
    return "" if chosen is None else f"  {chosen.metric} {format.loss(evaluation.value)}"


def _best(row: Row) -> str:
    return f"{format.loss(row.best.value)}@{row.best.step}" if row.best else "-"


# --- on a terminal --------------------------------------------------------------------------------


class _LiveView:
    """A live table. rich draws from its own thread, so every access to the board holds the lock."""

    def __init__(
        self,
        console: Console,
        board: Board,
        *,
        title: str,
        searched: Sequence[str],
        gpus: Callable[[], Sequence[GpuReading]] | None,
        clock: Callable[[], float],
    ) -> None:
        self._console, self._board, self._title = console, board, title
        self._searched, self._gpus, self._clock = searched, gpus, clock
        self._lock = threading.Lock()
        self._is_closed = False
        self._live = Live(
            get_renderable=self._draw,
            console=console,
            refresh_per_second=_REFRESHES_PER_SECOND,
            redirect_stdout=False,
        )
        hide_keys()
        self._live.start()

    def event(self, event: Event) -> None:
        with self._lock:
            self._board.take(event, now=self._clock())
            line = _line(event, self._board, self._searched)
        is_news = isinstance(event, Died) or (
            isinstance(event, Ended) and event.outcome in ("infeasible", "failed")
        )
        if is_news and line is not None:
            self.message(line)

    def trials(self, trials: Sequence[Trial]) -> None:
        with self._lock:
            self._board.sync(trials)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, emoji=False, highlight=False)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._board.preparing = None
        self._live.stop()
        show_keys()

    def _draw(self) -> RenderableType:
        readings = () if self._gpus is None or self._is_closed else tuple(self._gpus())
        with self._lock:
            taken = _LINES_AROUND_ROWS + len(readings) + (self._board.preparing is not None)
            room = None if self._is_closed else max(1, self._console.height - taken)
            return board_table(
                self._board,
                title=self._title,
                searched=self._searched,
                now=self._clock(),
                max_rows=room,
                gpus=readings,
                marks=marks_for(self._console.options.ascii_only),
            )


_shown_keys: list[Any] = []
"""The attributes of standard input's terminal while its keys are not shown."""


def hide_keys() -> None:
    """Stop the terminal from showing typed keys: an echoed ^C or line break shifts the lines of a live view.

    Does nothing without a terminal, and in the background, where a change would stop the process.
    """
    try:
        keyboard = sys.stdin.fileno()
        if _shown_keys or os.tcgetpgrp(keyboard) != os.getpgrp():
            return
        before = termios.tcgetattr(keyboard)
        hidden = list(before)
        hidden[_LOCAL_MODES] = before[_LOCAL_MODES] & ~termios.ECHO
        termios.tcsetattr(keyboard, termios.TCSADRAIN, hidden)
    except (OSError, ValueError, AttributeError, termios.error):  # no terminal, or no standard input
        return
    _shown_keys.append(before)


def show_keys() -> None:
    """Let the terminal show typed keys again, and its cursor; nothing where it has hung up since."""
    if not _shown_keys:
        return
    before = _shown_keys.pop()
    with suppress(OSError, termios.error):
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
    sys.stderr.write("\x1b[?25h")
    sys.stderr.flush()


class ProgressBar:
    """A View: one bar over the steps of all trials, in a terminal or in a notebook's cell."""

    def __init__(self, *, title: str, trials_total: int, max_train_steps: int) -> None:
        # Slow to import: tqdm looks for a notebook.
        from tqdm.auto import tqdm

        self._board = Board(trials_total=trials_total, max_train_steps=max_train_steps)
        self._bar = tqdm(total=trials_total * max_train_steps, desc=title, unit="step", dynamic_ncols=True)

    def event(self, event: Event) -> None:
        """As `View` says."""
        self._board.take(event, now=time.monotonic())
        match event:
            case Preparing(doing=doing):
                self._bar.set_postfix_str(doing)
            case Ended(outcome="infeasible" | "failed" as outcome, reason=reason):
                self.message(f"trial {event.trial}: {outcome}: {reason}")
            case Died(reason=reason):
                self.message(f"the worker died: {reason}")
            case _:
                self._draw()

    def trials(self, trials: Sequence[Trial]) -> None:
        """As `View` says."""
        self._board.sync(trials)
        self._draw()

    def message(self, text: str) -> None:
        """As `View` says."""
        self._bar.write(text)

    def close(self) -> None:
        """As `View` says."""
        self._draw()
        self._bar.close()

    def _draw(self) -> None:
        board = self._board
        done = f"{board.num_results} of {board.trials_total} trials"
        best = board.best.best if board.best else None
        noun = (best.objective or LOSS).noun if best else ""
        said = f"{done}, best {noun} {format.loss(best.value)}" if best else done
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(max(0, self._bar.total - board.remaining_steps - self._bar.n))


class Silence:
    """A View that shows nothing."""

    def event(self, event: Event) -> None:
        """As `View` says."""

    def trials(self, trials: Sequence[Trial]) -> None:
        """As `View` says."""

    def message(self, text: str) -> None:
        """As `View` says."""

    def close(self) -> None:
        """As `View` says."""
