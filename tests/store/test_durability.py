"""A store among other processes: one that dies, one that reads meanwhile, several that open at once."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store import processes
from tuner.store import open_store


@contextlib.contextmanager
def running(program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = processes.start(program, *arguments)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("milliseconds", [0, 7, 40, 111])
def test_a_killed_writer_leaves_whole_transactions(url: str, milliseconds: int) -> None:
    with running("record_forever", url) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(milliseconds / 1000)
        writer.kill()
        said = [1, *map(int, writer.stdout.read().split())]
    store = open_store(url, study="study")
    known = processes.steps_known(store)
    # The last record may have been committed and not yet announced.
    assert known in (said[-1], said[-1] + 1)
    store.record(*processes.step(known + 1))
    assert processes.steps_known(store) == known + 1
    store.close()


def test_a_killed_writer_leaves_a_sound_file(tmp_path: Path) -> None:
    with running("record_forever", f"sqlite:///{tmp_path}/tuner.db") as writer:
        assert writer.stdout is not None
        for _ in range(20):
            writer.stdout.readline()
    connection = sqlite3.connect(tmp_path / "tuner.db")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()


def test_readers_and_the_writer_never_meet(url: str) -> None:
    with running("record_forever", url) as writer:
        assert writer.stdout is not None
        for _ in range(10):
            writer.stdout.readline()
        with running("read_for", url, 2) as one, running("read_for", url, 2) as two:
            for reader in (one, two):
                output, _ = reader.communicate(timeout=60)
                assert reader.returncode == 0
                reads, known = map(int, output.split())
                assert reads >= 3
                assert known >= 10
        assert writer.poll() is None


def test_a_reader_that_stops_halfway_holds_nothing_up(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    store = open_store(url, study="study")
    store.record(*processes.beginning())
    foreign = sqlite3.connect(tmp_path / "tuner.db", isolation_level=None)
    foreign.execute("BEGIN")
    foreign.execute("SELECT count(*) FROM tuner_trials").fetchone()
    began = time.monotonic()
    store.record(*processes.step(1))
    assert time.monotonic() - began < 30
    foreign.close()
    store.close()


def test_processes_may_open_a_new_database_at_once(url: str) -> None:
    readers = [processes.start("read_for", url, 0.1) for _ in range(6)]
    for reader in readers:
        reader.communicate(timeout=60)
    assert [reader.returncode for reader in readers] == [0] * 6
