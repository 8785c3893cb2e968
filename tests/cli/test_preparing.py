"""How far reading a round's data is, on standard error."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import pytest
from rich.console import Console

from tuner.cli.printing import progress_shown


@pytest.fixture
def seconds() -> Iterator[float]:
    return iter([0.0, 29.0, 31.0, 60.0, 62.0])


def test_a_pipe_has_a_line_every_half_a_minute(seconds: Iterator[float]) -> None:
    out = io.StringIO()
    with progress_shown(Console(file=out), clock=seconds.__next__) as say:
        for rows in (10, 20, 30, 40):
            say(f"tokenising [a]: {rows} rows")
    assert out.getvalue() == "tokenising [a]: 20 rows\ntokenising [a]: 40 rows\n"


def test_a_terminal_has_one_line_that_goes() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60)
    with progress_shown(console) as say:
        say("tokenising [a]: 10 rows")
        deadline = time.monotonic() + 120
        while "tokenising [a]: 10 rows" not in out.getvalue():  # drawn from a thread
            assert time.monotonic() < deadline, out.getvalue()
            time.sleep(0.01)
    assert out.getvalue().endswith("\x1b[2K"), "erased"
