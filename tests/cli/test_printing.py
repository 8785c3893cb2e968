"""What verbs print is seen: as it is written, and beside a live view."""

from __future__ import annotations

import ast
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.studies import ENVIRONMENT, tuner, write_round
from tuner.cli import printing
from tuner.cli.rounds import stop_signals
from tuner.records import Started
from tuner.report import open_view
from tuner.report.terminal import FittedTable, column

ROOT = Path(__file__).parents[2]
ANSWER = "stopping: saving all trials"


class Screen:
    """What a terminal shows after these characters; it knows the control sequences of rich's live view."""

    def __init__(self, written: str) -> None:
        self._lines: list[str] = [""]
        self._row = self._column = 0
        for piece in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", written):
            self._take(piece)

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self._lines)

    def _take(self, piece: str) -> None:
        match = re.fullmatch(r"\x1b\[(\d*)([A-Za-z])", piece)
        if piece == "\n":
            self._row += 1
            self._lines += [""] * (self._row + 1 - len(self._lines))
        elif piece == "\r":
            self._column = 0
        elif match and match[2] == "A":
            self._row = max(0, self._row - int(match[1] or 1))
        elif match and match[2] == "K":
            self._lines[self._row] = ""
        elif not piece.startswith("\x1b"):
            line = self._lines[self._row].ljust(self._column)
            self._lines[self._row] = line[: self._column] + piece + line[self._column + 1 :]
            self._column += 1


def test_only_one_place_makes_consoles() -> None:
    """There they are told to print every text as it is."""
    paths = sorted((ROOT / "tuner").rglob("*.py"))
    assert len(paths) > 200
    made = [
        str(path.relative_to(ROOT))
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "Console"
    ]
    assert made == ["tuner/cli/printing.py"]


@pytest.mark.parametrize("text", ["x[/y]", "[red]no[/red]", ":smile:", "[", "\\[b]"])
def test_a_console_prints_text_as_it_is(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    printing.output().print(text)
    printing.error_output().print(text)
    assert tuple(capsys.readouterr()) == (f"{text}\n", f"{text}\n")


def test_a_pipe_gets_no_blanks_at_the_ends_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table = FittedTable([column("words", ["a", "longer  words"], rank=0, min_width=3)])
    printing.output().print(table)
    assert capsys.readouterr().out == "words\na\nlonger  words\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_answer_to_a_signal_is_seen_beside_a_live_view(number: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=20, color_system=None)
    view = open_view(console=console, title="tiny/round1", trials_total=1, max_train_steps=8)
    with printing.spoken_by(view.message), stop_signals(ANSWER) as is_stopping:
        view.event(Started("round1", 0, 1, 0))
        signal.raise_signal(number)
        assert is_stopping()
        wait_until(lambda: ANSWER in out.getvalue())
        view.trials([])
        view.close()
    seen = Screen(out.getvalue().replace("\n", "\r\n")).text
    assert ANSWER in seen.splitlines()
    assert seen.index(ANSWER) < seen.index("tiny/round1")


def test_the_answer_to_a_signal_without_a_view(capsys: pytest.CaptureFixture[str]) -> None:
    with stop_signals(ANSWER):
        signal.raise_signal(signal.SIGINT)
        said = ""

        def is_said() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return said == f"{ANSWER}\n"

        wait_until(is_said)
        assert is_said(), "once, and nothing after it"


@pytest.mark.slow
def test_ctrl_c_on_a_terminal(tmp_path: Path) -> None:
    """A round of its own process, stopped by the key; then it goes on with the command it names."""
    write_round(tmp_path, trials=1, steps=20_000, every=2_000, learning_rate="1e-4")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"],
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        env={**os.environ, **ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"},
    )
    os.close(theirs)
    written = read_until(ours, "running", seconds=200)
    os.write(ours, b"\x03")
    written += read_until(ours, None, seconds=90)
    assert process.wait(60) == 130, Screen(written).text
    seen = Screen(written).text
    assert "^C" not in written, "an echoed key would shift the lines of the table"
    assert "stopping: saving all trials (Ctrl-C again to quit now)" in seen
    assert "resume with: tuner study run round1.yaml" in re.sub(r"\s+", " ", seen)


def test_plain_lines_say_what_a_trial_was_given(tmp_path: Path) -> None:
    write_round(tmp_path, base="no/such/model", data="no/such/data", steps=40, every=4, decay_steps=10)
    done = tuner("study", "run", "round1.yaml", "--engine", "simulated", directory=tmp_path)
    assert done.returncode == 0, done.stderr
    starts = [line for line in done.stderr.splitlines() if re.match(r"trial \d+  starts", line)]
    assert len(starts) == 3
    assert all(re.search(r"starts  learning_rate [\d.e-]+, lora_r \d", line) for line in starts)


def wait_until(is_so: object, *, seconds: float = 120) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def read_until(terminal: int, wanted: str | None, *, seconds: float) -> str:
    """What is written until these words, or until the end."""
    deadline, written = time.monotonic() + seconds, b""
    while wanted is None or wanted.encode() not in written:
        assert time.monotonic() < deadline, written.decode()
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            piece = os.read(terminal, 65_536)
        except OSError:
            break
        if not piece:
            break
        written += piece
    return written.decode()


def test_a_stream_that_was_closed_takes_what_is_written() -> None:
    stream = printing.outliving(None)
    print("said", file=stream, flush=True)
    assert not stream.isatty()
