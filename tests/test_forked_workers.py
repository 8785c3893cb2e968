"""A worker that is forked is a child like one that is started: its pipes, its exit code, its signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import forked_workers


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    if subprocess.Popen is not forked_workers.Popen:
        pytest.skip("workers are not forked here: it has a GPU, or no /proc")
    monkeypatch.setattr(forked_workers, "is_on", True)
    with subprocess.Popen(
        [sys.executable, "-m", forked_workers.PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        yield process
        process.kill()


def test_a_worker_whose_parent_closes_its_pipe_ends_with_its_exit_code(worker: subprocess.Popen[str]) -> None:
    assert os.getsid(worker.pid) == worker.pid
    said, log = worker.communicate(timeout=120)
    assert worker.returncode == 1, log
    assert said == ""


def test_a_worker_that_is_killed_is_known_by_the_signal(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    assert worker.wait(120) == -signal.SIGKILL
