"""Names, paths and reasons are printed as they are, whatever a terminal library would make of brackets."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
from rich.console import Console, RenderableType

from tests.playbook.test_reproduction import LOSSES, found
from tuner.playbook.results import Finding
from tuner.records import (
    Died,
    Ended,
    Preparing,
    RunId,
    Started,
    TrialState,
)
from tuner.report import RoundPlan, plan_table, round_status, status_table, summary, trial_page, trials_table
from tuner.report.board import Board, board_table
from tuner.report.format import GpuReading
from tuner.report.live import open_view
from tuner.report.reproduction import reproduction_page

from . import synthetic

TEXTS = ["x[/y]", "[red]no[/red]", "tuner[wandb]", "[link=x]", ":smile:", "[", "\\[b]", "[[bold]]", "[/]"]


def shown(renderable: RenderableType) -> str:
    """On a console that reads markup, which every one does that is not told otherwise."""
    out = io.StringIO()
    Console(file=out, width=300).print(renderable)
    return out.getvalue()


def renderables(text: str) -> Iterator[RenderableType]:
    """All that the report makes for terminals, with this text wherever there is one of the user's."""
    lost = synthetic.trial(0, 1e-4, state=TrialState.INFEASIBLE, reason=text)
    status = round_status(
        text, max_train_steps=60, trials=synthetic.trials(), promised=8, is_running=False, adapters={6: text}
    )
    yield status_table(text, [status])
    yield trials_table([lost])
    yield trial_page(lost, max_train_steps=60, adapter=text)
    plan = RoundPlan(1, 1, 1.0, 1, 1, 1, 0.5, 1, 0, 0)
    yield plan_table(plan, title=text, remarks=[text])
    report = synthetic.report(goal=text)
    reading = replace(report.reading, evidence=(text,))
    finding = Finding("boundary", "warning", text)
    yield summary(
        replace(
            report,
            reading=replace(reading, findings=(finding,)),
            adapters=dict.fromkeys(report.adapters, text),
            next_command=text,
        )
    )
    yield reproduction_page(text, found(*LOSSES, remarks=(text,)))
    board = Board(trials_total=1, max_train_steps=1)
    board.take(Preparing(text), now=0.0)
    yield board_table(
        board, title=text, searched=(), now=1.0, max_rows=None, gpus=[GpuReading(0, text, 1, 2, None)]
    )


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_is_read_as_markup(text: str) -> None:
    printed = [shown(renderable) for renderable in renderables(text)]
    assert len(printed) == 7
    for page in printed:
        assert text in page


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_happens_is_told_as_it_was_said(text: str, is_terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, width=300, height=40, force_terminal=is_terminal, color_system=None)
    view = open_view(console=console, title=text, trials_total=1, max_train_steps=1)
    view.event(Started("r", 0, 1, 0))
    view.event(Ended("r", 0, 1, 1, "failed", f"{text} ended"))
    view.event(Died(f"{text} died", runs=(RunId("round1", 0),)))
    view.message(f"{text} said")
    view.close()
    assert all(f"{text}{what}" in out.getvalue() for what in ("", " ended", " died", " said"))
