"""A worker that an earlier run left is ended; any other process, whatever its number, is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tuner.engines.processes import (
    Identity,
    RecordedWorker,
    end_left_over,
    record_worker,
    recorded_workers,
)

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


@pytest.fixture
def sleeper():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def gone() -> Identity:
    """The identity of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        found = Identity.of(process.pid)
    assert found is not None
    return found


def write(directory: Path, worker: Identity, parent: Identity) -> None:
    (directory / "worker.pid").write_text(json.dumps(asdict(RecordedWorker(worker, parent))))


def test_a_worker_whose_parent_is_gone_is_ended(tmp_path: Path, sleeper) -> None:
    os.kill(sleeper.pid, signal.SIGSTOP)
    write(tmp_path, Identity.of(sleeper.pid), gone())
    assert end_left_over(tmp_path) == [sleeper.pid]
    assert sleeper.wait(5) == -signal.SIGKILL
    assert end_left_over(tmp_path) == []


def test_a_worker_whose_parent_lives_is_left_alone(tmp_path: Path, sleeper) -> None:
    record_worker(tmp_path / "worker.pid", sleeper.pid)
    assert [each.worker.pid for each in recorded_workers(tmp_path)] == [sleeper.pid]
    assert end_left_over(tmp_path) == []
    assert sleeper.poll() is None


@pytest.mark.parametrize("other", ["host", "boot", "started"])
def test_a_process_that_merely_has_the_number_is_left_alone(tmp_path: Path, sleeper, other: str) -> None:
    now = Identity.of(sleeper.pid)
    assert now is not None
    write(tmp_path, replace(now, **{other: 1 if other == "started" else "another"}), gone())
    assert end_left_over(tmp_path) == []
    assert sleeper.poll() is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"worker": 1, "parent": 2}', '{"worker": {"pid": 1}}'])
def test_a_file_that_is_no_record_ends_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "worker.pid").write_text(content)
    assert end_left_over(tmp_path) == []
