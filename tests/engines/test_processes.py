"""A worker that an earlier run left is ended; any other process, whatever its number, is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest

from tuner.engines import LocalProcess
from tuner.engines.processes import (
    TOKEN,
    Identity,
    RecordedWorker,
    end_left_over,
    end_with_token,
    forget_ended,
    new_token,
    record_worker,
    recorded_workers,
    with_token,
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
    assert sleeper.wait(60) == -signal.SIGKILL
    assert end_left_over(tmp_path) == []


def test_a_worker_whose_parent_lives_is_left_alone(tmp_path: Path, sleeper) -> None:
    record_worker(tmp_path / "worker.pid", sleeper.pid)
    assert [each.worker.pid for each in recorded_workers(tmp_path).values()] == [sleeper.pid]
    assert end_left_over(tmp_path) == []
    assert sleeper.poll() is None


def test_the_record_of_a_worker_that_ended_with_its_parent_goes(tmp_path: Path, sleeper) -> None:
    write(tmp_path, gone(), gone())
    forget_ended(tmp_path)
    assert not (tmp_path / "worker.pid").exists()
    running = Identity.of(sleeper.pid)
    for worker, parent in ((running, gone()), (gone(), running), (gone(), replace(gone(), boot="another"))):
        write(tmp_path, worker, parent)
        forget_ended(tmp_path)
        assert (tmp_path / "worker.pid").exists()


@pytest.mark.parametrize("other", ["host", "boot", "started"])
def test_a_process_that_merely_has_the_number_is_left_alone(tmp_path: Path, sleeper, other: str) -> None:
    now = Identity.of(sleeper.pid)
    assert now is not None
    write(tmp_path, replace(now, **{other: 1 if other == "started" else "another"}), gone())
    assert end_left_over(tmp_path) == []
    assert sleeper.poll() is None


@pytest.fixture
def tree():
    """A process with a token, and its child in a session of its own."""
    token = new_token()
    program = (
        "import subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "child = subprocess.Popen(sleep, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, TOKEN: token}
    ) as process:
        assert process.stdout is not None
        yield token, process, int(process.stdout.readline())
        end_with_token(token)


def test_what_a_worker_started_is_known_by_its_token(tree) -> None:
    token, process, child = tree
    assert sorted(with_token(token)) == sorted([process.pid, child])
    assert end_with_token(token) == sorted([process.pid, child])
    assert process.wait(120) == -signal.SIGKILL
    assert Identity.of(child) is None
    assert list(with_token(new_token())) == []


@pytest.mark.parametrize("parent_lives", [True, False])
def test_a_recorded_token_ends_what_no_number_names(tmp_path: Path, tree, parent_lives: bool) -> None:
    """The host has another name now, and the worker's own number is another process's."""
    token, process, child = tree
    parent = Identity.of(os.getpid()) if parent_lives else gone()
    assert parent is not None
    recorded = RecordedWorker(replace(gone(), host="before"), replace(parent, host="before"), token)
    (tmp_path / "worker.pid").write_text(json.dumps(asdict(recorded)))
    assert end_left_over(tmp_path) == ([] if parent_lives else sorted([process.pid, child]))


def test_another_boot_ends_nothing(tmp_path: Path, tree) -> None:
    token, process, _ = tree
    recorded = RecordedWorker(gone(), replace(gone(), boot="another"), token)
    (tmp_path / "worker.pid").write_text(json.dumps(asdict(recorded)))
    assert end_left_over(tmp_path) == []
    assert process.poll() is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"worker": 1, "parent": 2}', '{"worker": {"pid": 1}}'])
def test_a_file_that_is_no_record_ends_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "worker.pid").write_text(content)
    assert end_left_over(tmp_path) == []


def test_a_system_that_does_not_tell_ends_nothing(monkeypatch) -> None:
    """As macOS, which has no /proc."""

    def missing(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", missing)
    assert end_with_token(new_token()) == []


def test_two_that_wait_for_a_process_close_its_input_one_after_the_other(tmp_path: Path) -> None:
    """Python's own `close` fails where another thread is within it with bytes left to write."""

    class Input:
        is_within = False

        def close(self) -> None:
            assert not self.is_within
            self.is_within = True
            time.sleep(0.05)
            self.is_within = False

    process = LocalProcess(["-c", ""], log=tmp_path / "worker.log")
    own, process.popen.stdin = process.popen.stdin, cast(Any, Input())
    with ThreadPoolExecutor() as threads:
        assert list(threads.map(process.wait, [60.0, 60.0])) == [0, 0]
    for stream in (own, process.popen.stdout):
        assert stream is not None
        stream.close()
