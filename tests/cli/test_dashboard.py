"""`study dashboard`: optuna-dashboard on this machine, for this study, and its URL nobody's business."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.studies import round_file
from tests.study.simulation import simulate
from tuner.cli import run

MINUTE = 60


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The dashboard of a round that was simulated, on a free port, and its address."""
    simulate(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "tuner.cli", "study", "dashboard", "--port", "0"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever is run in the background ignores Ctrl-C, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    try:
        address = re.match(r"(http://127\.0\.0\.1:\d+)/dashboard ", process.stderr.readline())
        assert address is not None
        yield process, address[1]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def get(url: str) -> tuple[str, str]:
    """The address that answers in the end, and what it says."""
    with urllib.request.urlopen(url, timeout=MINUTE) as answer:
        return answer.url, answer.read().decode()


@pytest.mark.slow
def test_the_study_is_served_until_ctrl_c(served: tuple[subprocess.Popen[str], str]) -> None:
    process, address = served
    url, page = get(f"{address}/")
    assert url == f"{address}/dashboard/" or url == f"{address}/dashboard"
    assert "<html" in page.lower()
    listed = json.loads(get(f"{address}/api/studies")[1])
    assert [study["study_name"] for study in listed["study_summaries"]] == ["tiny/round1"]
    command_line = Path(f"/proc/{process.pid}/cmdline")
    if command_line.exists():
        words = command_line.read_bytes().decode().split("\0")
        assert "dashboard" in words
        assert not any("sqlite" in word or "tuner.db" in word for word in words)
    process.send_signal(signal.SIGINT)
    assert process.wait(MINUTE) == 0
    assert process.stderr is not None
    assert process.stderr.read().strip() == "next: tuner study status"


@pytest.mark.slow
def test_a_port_that_is_taken(
    served: tuple[subprocess.Popen[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    port = served[1].rpartition(":")[2]
    assert run(["study", "dashboard", "--port", port]) == 2
    assert f"--port {port}: Address already in use; choose another" in capsys.readouterr().err


def test_a_study_that_has_not_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    round_file(tmp_path)
    assert run(["study", "dashboard"]) == 2
    assert "no round has started" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["round1.yaml"]
