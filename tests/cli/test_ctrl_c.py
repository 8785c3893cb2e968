"""Ctrl-C twice ends everything: a command that heeds no signal, and its worker; exit 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.commands.driving import document, written

STUBBORN = """
import signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open("started", "w").write(str(child.pid))
while True:
    time.sleep(1)
"""


def of(directory: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(directory) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.slow
def test_twice_ends_a_command_that_heeds_no_signal(tmp_path: Path) -> None:
    written(tmp_path, document(script="stubborn.py"))
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"],
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        while "Ctrl-C again" not in (tmp_path / "log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        assert len(of(tmp_path)) >= 3  # this one, the command and its child; the worker as well
        begun = time.monotonic()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130, (tmp_path / "log").read_text()
        took = time.monotonic() - begun
        print(f"ended after {took:.2f} s")
        assert of(tmp_path) == []
        assert took < 30  # five seconds, on a machine that does nothing else
    finally:
        for process in of(tmp_path):
            process.kill()
        running.wait()
