"""A round as one progress bar: what a script or a notebook shows while it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tuner.records import LOSS, Died, Ended, Event, Preparing, Trial
from tuner.report import format
from tuner.report.board import Board


class ProgressBar:
    """A View: one bar over the steps of all trials, in a terminal or in a notebook's cell."""

    def __init__(self, *, title: str, trials_total: int, max_train_steps: int) -> None:
        # It looks for a notebook, which takes a moment.
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
