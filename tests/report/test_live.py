from __future__ import annotations

import dataclasses
import io
import math
import re
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.studies import formula, round_file, silent_view
from tuner.engines import SimulatedWorker
from tuner.errors import Interrupted
from tuner.playbook import best_evaluation
from tuner.records import (
    Died,
    Ended,
    Evaluated,
    Event,
    Preparing,
    Progressed,
    Ready,
    Started,
    Trial,
    TrialState,
)
from tuner.report.board import Board, board_table
from tuner.report.format import GpuReading
from tuner.report.live import View, open_view
from tuner.report.terminal import ASCII, UNICODE
from tuner.store import open_store
from tuner.study.run import run_round

from . import synthetic


def open_on(file: io.StringIO, *, terminal: bool, width: int = 100, height: int = 24) -> View:
    console = Console(file=file, force_terminal=terminal, width=width, height=height, color_system=None)
    assert console.is_interactive == terminal
    return open_view(
        console=console,
        title="alpaca/round1",
        trials_total=8,
        max_train_steps=60,
        searched=("learning_rate", "lora_r"),
        clock=iter(range(10_000)).__next__,
    )


def begun(trial: Trial) -> Trial:
    return dataclasses.replace(trial, state=TrialState.WAITING, evaluations=(), reason=None, attempts=())


def drawn(board: Board) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(board_table(board, title="", searched=(), now=3.0, max_rows=None))
    return out.getvalue()


def play(view: View, trial: Trial) -> None:
    """A trial from its start to its end, as a worker says it."""
    view.trials([begun(trial)])
    view.event(Started("round1", trial.number, 1, 0))
    for evaluation in trial.evaluations:
        view.event(Progressed("round1", trial.number, 1, evaluation.step, 1.5))
        view.event(Evaluated("round1", trial.number, 1, evaluation))
    outcome = "infeasible" if trial.state is TrialState.INFEASIBLE else "complete"
    view.event(Ended("round1", trial.number, 1, trial.evaluations[-1].step, outcome, trial.reason))
    view.trials([trial])


class TestPlainLines:
    def test_a_trial_from_start_to_end(self) -> None:
        out = io.StringIO()
        view = open_on(out, terminal=False)
        view.event(Ready(2, "cpu"))
        evaluations = [synthetic.evaluation(step, loss) for step, loss in ((0, 2.5), (5, 1.25), (10, 1.5))]
        play(view, synthetic.trial(3, 1e-4, evaluations=evaluations))
        view.close()
        assert out.getvalue().splitlines() == [
            "alpaca/round1: 8 trials of 60 steps",
            "worker ready: cpu, 2 slots",
            "trial 3  starts  learning_rate 0.0001, lora_r 16",
            "trial 3  step 0/60  eval 2.5000  best 2.5000@0",
            "trial 3  step 5/60  eval 1.2500  best 1.2500@5",
            "trial 3  step 10/60  eval 1.5000  best 1.2500@5",
            "trial 3  complete  best 1.2500@5  (1 of 8 trials done, about 5 min 36 s left)",
        ]

    def test_an_evaluation_known_from_before_is_not_said_again(self) -> None:
        out = io.StringIO()
        view = open_on(out, terminal=False)
        trial = synthetic.trial(0, 1e-4)
        view.trials([dataclasses.replace(trial, state=TrialState.WAITING, evaluations=trial.evaluations[:4])])
        view.event(Started("round1", 0, 2, 15))
        for evaluation in trial.evaluations[:5]:
            view.event(Evaluated("round1", 0, 2, evaluation))
        assert "resumes from step 15" in out.getvalue()
        assert out.getvalue().count(" eval ") == 1
        assert "step 20/60" in out.getvalue()

    def test_reasons_are_shown_as_they_are(self) -> None:
        out = io.StringIO()
        view = open_on(out, terminal=False)
        play(view, synthetic.trials()[7])
        view.event(Died("killed by signal 9 [red]x[/red] :smile:"))
        view.message("see runs/round1/worker.log [bold]")
        assert "trial 7  infeasible: evaluation loss is nan at step 20  best 2.1000@5" in out.getvalue()
        assert "the worker died: killed by signal 9 [red]x[/red] :smile:" in out.getvalue()
        assert "see runs/round1/worker.log [bold]" in out.getvalue()

    def test_what_is_prepared_is_said_every_half_minute(self) -> None:
        out = io.StringIO()
        view = open_on(out, terminal=False)
        for thousand in range(70):  # two calls of the clock each, a second apart
            view.event(Preparing(f"tokenising rows.jsonl: {thousand},000 rows"))
        said = [line for line in out.getvalue().splitlines() if line.startswith("tokenising")]
        assert said == [f"tokenising rows.jsonl: {thousand},000 rows" for thousand in (14, 29, 44, 59)]

    def test_nothing_but_characters_of_every_encoding(self) -> None:
        out = io.StringIO()
        view = open_on(out, terminal=False)
        for trial in synthetic.trials():
            play(view, trial)
        assert out.getvalue().isascii()
        assert "\x1b" not in out.getvalue()


class TestOnATerminal:
    @pytest.mark.parametrize("end", [Ready(2, "cpu"), Died("killed")])
    def test_what_is_prepared_is_shown_until_it_is_done(self, end: Event) -> None:
        board = Board(trials_total=8, max_train_steps=60)
        board.take(Preparing("tokenising rows.jsonl: 70,000 rows"), now=1.0)
        assert "tokenising rows.jsonl: 70,000 rows" in drawn(board)
        board.take(end, now=2.0)
        assert "tokenising" not in drawn(board)

    def test_what_was_being_prepared_is_not_left_on_the_screen(self) -> None:
        out = io.StringIO()
        view = open_on(out, terminal=True)
        view.event(Preparing("tokenising rows.jsonl: 70,000 rows"))
        view.close()
        assert "tokenising" not in out.getvalue().rpartition("\x1b[2K")[2]

    @pytest.mark.parametrize("width", [5, 20, 40, 80, 200])
    def test_a_round_at_any_width(self, width: int) -> None:
        out = io.StringIO()
        view = open_on(out, terminal=True, width=width, height=10)
        view.event(Ready(2, "cpu"))
        for trial in synthetic.trials():
            play(view, trial)
        view.event(Died("killed"))
        view.close()
        last = out.getvalue().rpartition("\x1b[2K")[2]
        assert len(last.splitlines()) >= 11, "all trials are shown at the end, whatever the height"
        assert all(len(line) <= width for line in last.splitlines() if "\x1b" not in line)
        if width >= 80:
            numbers = [line.split()[0] for line in last.splitlines() if line.split()[:1] != ["trial"]]
            assert [n for n in numbers if n in "01234567"][:8] == list("65432107"), "the best first"
            assert "8 of 8 trials" in last
            assert "infeasible: evaluation loss is nan at step 20" in out.getvalue()

    def test_it_may_be_closed_before_anything_happened(self) -> None:
        out = io.StringIO()
        open_on(out, terminal=True).close()
        assert "0 of 8 trials" in out.getvalue()


class _BoardView:
    """A view that keeps a board only."""

    def __init__(self) -> None:
        self.board = Board(trials_total=3, max_train_steps=8)
        self._silent = silent_view()

    def trials(self, trials: Sequence[Trial]) -> None:
        self.board.sync(trials)

    def event(self, event: Event) -> None:
        self.board.take(event, now=1.0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._silent, name)


def test_a_resumed_round_shows_its_recorded_trials_while_the_base_model_loads(tmp_path: Path) -> None:
    """Loading takes minutes: before the first event of a worker, the trials so far are on the screen."""
    shown: list[str] = []

    def run(stopping: Callable[[Board], bool]) -> None:
        view = _BoardView()

        def start(*_: object) -> SimulatedWorker:
            shown.append(drawn(view.board))
            return SimulatedWorker(formula, slots=1)

        run_round(
            round_file(tmp_path),
            make_worker=start,
            view=view,  # type: ignore[arg-type]
            stopping=lambda: stopping(view.board),
        )

    with pytest.raises(Interrupted):
        run(lambda board: 1 in board.rows and board.rows[1].step >= 4)
    with closing(open_store(f"sqlite:///{tmp_path}/tuner.db", study="tiny")) as store:
        recorded = store.trials("round1")
    assert [trial.state for trial in recorded] == [TrialState.COMPLETE, TrialState.WAITING]
    run(lambda board: False)
    first, second = shown
    assert "complete" not in first
    lines = {words[0]: line for line in second.splitlines() if (words := line.split())}
    for trial, state in zip(recorded, ("complete", "waiting"), strict=True):
        best = best_evaluation(trial.evaluations)
        assert best is not None
        assert f"{best.eval_loss:.4f}" in lines[str(trial.number)]
        assert state in lines[str(trial.number)]


class TestBoardTable:
    def drawn(
        self, board: Board, *, width: int = 120, max_rows: int | None = None, ascii: bool = False
    ) -> str:
        console = Console(file=io.StringIO(), width=width, record=True, force_terminal=False)
        console.print(
            board_table(
                board,
                title="alpaca/round1",
                searched=("learning_rate", "lora_r"),
                now=30.0,
                max_rows=max_rows,
                marks=ASCII if ascii else UNICODE,
            )
        )
        return console.export_text()

    def board(self) -> Board:
        board = Board(trials_total=16, max_train_steps=60)
        board.sync(synthetic.trials())
        board.take(Started("round1", 8, 1, 0), now=0.0)
        board.take(Progressed("round1", 8, 1, 7, 1.75), now=10.0)
        return board

    def test_columns_of_a_wide_terminal(self) -> None:
        lines = self.drawn(self.board()).splitlines()
        head = ["trial", "learning_rate", "lora_r", "curve", "step", "train", "eval", "best", "state"]
        assert lines[1].split() == head
        assert "2.7e-3" not in lines[10]
        assert lines[10].split()[0:3] == ["7", "0.0027", "32"], "infeasible trials come last"
        assert lines[10].split()[-2:] == ["2.1000@5", "infeasible"]
        assert lines[9].split()[-5:] == ["7/60", "1.7500", "-", "-", "running"]
        assert "8 of 16 trials" in lines[-1]
        assert "0.233 steps/s" in lines[-1]

    @pytest.mark.parametrize(
        ("width", "shown"),
        [
            (66, {"trial", "step", "best", "learning_", "rate", "lora_", "r", "state", "eval"}),
            (20, {"trial", "step"}),
        ],
    )
    def test_a_narrow_terminal_keeps_what_matters_most(self, width: int, shown: set[str]) -> None:
        head = re.split(r"\n +6 ", self.drawn(self.board(), width=width))[0].splitlines()[1:]
        assert set(" ".join(head).split()) == shown

    @pytest.mark.parametrize("width", [60, 80, 100])
    def test_every_searched_hyperparameter_is_seen(self, width: int) -> None:
        """At 80 columns each has its own; on a narrower terminal, a line names those of the best trial."""
        names = ["learning_rate", "lora_r", "lora_alpha", "warmup_steps", "weight_decay", "lora_dropout"]
        board = self.board()
        for row in board.rows.values():
            row.hyperparameters = {name: 0.123 + n for n, name in enumerate(names)}
        console = Console(file=io.StringIO(), width=width, record=True, force_terminal=False)
        console.print(board_table(board, title="", searched=names, now=30.0, max_rows=None))
        seen = console.export_text()
        assert all(f"{0.123 + n:.3g}" in seen for n in range(len(names)))
        assert ("trial 6: " in seen) == (width < 80)

    def test_curves_share_a_scale(self) -> None:
        """A trial that stays at 4.2 does not look like one that falls to 1.9."""
        board = Board(trials_total=2, max_train_steps=10)
        for number, last in enumerate((1.9, 4.2)):
            evaluations = [synthetic.evaluation(0, 4.6), synthetic.evaluation(10, last)]
            board.sync([synthetic.trial(number, 1e-4, evaluations=evaluations)])
        low, high = (line.split()[3][-1] for line in self.drawn(board).splitlines()[2:4])
        assert (low, high) == (UNICODE.levels[0], UNICODE.levels[6])

    def test_a_low_terminal_keeps_what_runs_and_the_best(self) -> None:
        text = self.drawn(self.board(), max_rows=2)
        assert [line.split()[0] for line in text.splitlines()[2:4]] == ["6", "8"]
        assert "and 6 complete, 1 infeasible not shown" in text
        assert self.drawn(self.board(), max_rows=1).splitlines()[2].split()[0] == "8"

    def test_ascii_terminals(self) -> None:
        board = self.board()
        board.rows[0].by_step[5] = synthetic.evaluation(5, math.nan)
        rows = self.drawn(board, ascii=True).splitlines()[:-1]
        assert all(row.isascii() for row in rows)


def test_gpus_are_read_for_each_drawing_and_cost_rows() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=9, color_system=None)
    readings = [GpuReading(n, "NVIDIA H200", 30 * 10**9, 150 * 10**9, 0.5) for n in range(2)]
    view = open_view(
        console=console,
        title="t",
        trials_total=3,
        max_train_steps=60,
        gpus=lambda: readings,
        clock=lambda: 0.0,
    )
    view.trials([dataclasses.replace(begun(synthetic.trial(n, 1e-4)), number=n) for n in range(3)])
    deadline = time.monotonic() + 120
    while "GPU 0" not in out.getvalue():  # drawn from a thread
        assert time.monotonic() < deadline, out.getvalue()
        time.sleep(0.05)
    assert "GPU 0  30 GB of 150 GB (20%), 50% busy  NVIDIA H200" in out.getvalue()
    assert "2 waiting not shown" in out.getvalue()
    view.close()
    assert "GPU" not in out.getvalue().rpartition("0 of 3 trials")[2]
