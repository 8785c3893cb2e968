"""Ctrl-C twice ends everything, a command that heeds no signal too; a terminal that is gone saves first."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.commands.driving import document, written
from tuner.store import open_store

RUN = [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

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


def until(is_so: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)
    assert is_so()


def round_of_commands(directory: Path, *, pause: float = 0.1) -> None:
    """One trial of 24 steps, and seconds between two steps."""
    written(
        directory, document(hyperparameters={"learning_rate": 0.05, "schedule": "constant", "pause": pause})
    )


def state_of_trial(directory: Path) -> tuple[str, str | None, int]:
    store = open_store(f"sqlite:///{directory}/tuner.db", study="commands")
    try:
        (trial,) = store.trials("round1")
    finally:
        store.close()
    return str(trial.state), trial.attempts[0].outcome, len(trial.attempts)


@pytest.mark.slow
@pytest.mark.parametrize("is_ignored", [False, True], ids=["told", "ignored"])
def test_a_terminal_that_is_gone_stops_no_save(tmp_path: Path, is_ignored: bool) -> None:
    """No write to its streams fails. Where SIGHUP is ignored, the round goes on."""
    round_of_commands(tmp_path, pause=0.1 if is_ignored else 0.5)
    ours, theirs = pty.openpty()

    def open_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    running = subprocess.Popen(
        RUN,
        cwd=tmp_path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=open_terminal,
        env=ENVIRONMENT,
    )
    os.close(theirs)
    log = tmp_path / "runs" / "round1" / "tuner.log"
    drained = threading.Thread(target=_drain, args=(ours,), daemon=True)
    drained.start()
    until(lambda: running.poll() is not None or (log.exists() and "step 4: eval loss" in log.read_text()))
    assert running.poll() is None
    os.close(ours)  # the terminal hangs up
    assert running.wait(120) == (0 if is_ignored else 130)
    ends = ("complete", "complete", 1) if is_ignored else ("waiting", "stopped", 1)
    assert state_of_trial(tmp_path) == ends
    until(lambda: of(tmp_path) == [])


def _drain(descriptor: int) -> None:
    with suppress(OSError):
        while os.read(descriptor, 4096):
            pass


def test_a_write_that_meets_the_end_of_the_terminal_goes_nowhere() -> None:
    """In a process of its own, without the signal: it may come after the write that fails."""
    ours, theirs = pty.openpty()
    program = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from tuner import cli
def speak(arguments):
    print("begun", file=sys.stderr, flush=True)
    sys.stdin.readline()
    for _ in range(3):
        print("to whom?", file=sys.stderr, flush=True)
        print("to whom?", flush=True)
    return 7
cli.run = speak
cli.main()
"""
    running = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    assert b"begun" in os.read(ours, 64)
    os.close(ours)
    running.communicate(b"\n", timeout=60)
    assert running.returncode == 7


@pytest.mark.slow
@pytest.mark.acceptance
def test_under_nohup_a_hangup_changes_nothing(tmp_path: Path) -> None:
    round_of_commands(tmp_path)
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            ["nohup", *RUN], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT
        )
    until(lambda: running.poll() is not None or "step 4" in (tmp_path / "log").read_text())
    running.send_signal(signal.SIGHUP)
    assert running.wait(120) == 0, (tmp_path / "log").read_text()
    assert state_of_trial(tmp_path) == ("complete", "complete", 1)


@pytest.mark.slow
def test_twice_ends_a_command_that_heeds_no_signal(tmp_path: Path) -> None:
    written(tmp_path, document(script="stubborn.py"))
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            RUN, cwd=tmp_path, stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True
        )
    try:
        until((tmp_path / "started").exists)
        running.send_signal(signal.SIGINT)
        until(lambda: "Ctrl-C again" in (tmp_path / "log").read_text())
        assert len(of(tmp_path)) >= 3  # this one, the command and its child; the worker as well
        begun = time.monotonic()
        running.send_signal(signal.SIGINT)
        assert running.wait(60) == 130, (tmp_path / "log").read_text()
        took = time.monotonic() - begun
        print(f"ended after {took:.2f} s")
        until(lambda: of(tmp_path) == [])
        assert took < 30  # five seconds, on a machine that does nothing else
    finally:
        for process in of(tmp_path):
            process.kill()
        running.wait()
