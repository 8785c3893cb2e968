from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tuner.data.row_table import RowTable, TableWriter, cached_table
from tuner.data.tokenise import Fate, TokenisedRow
from tuner.errors import StorageError


class Builder:
    """Writes a table of two rows, the second one dropped, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, writer: TableWriter) -> None:
        self.calls += 1
        kept = TokenisedRow(np.array([5, 6, 7], np.int32), np.array([False, False, True]), 9, Fate.TRUNCATED)
        dropped = TokenisedRow(np.zeros(0, np.int32), np.zeros(0, bool), 1, Fate.EMPTY)
        says_one, says_none = np.array([1], np.int64), np.zeros(0, np.int64)
        writer.append(kept, digest=bytes(range(16)), likeness=bytes(range(1, 17)), number=3, written=says_one)
        writer.append(dropped, digest=bytes(16), likeness=bytes(16), number=4, written=says_none)


def check(table: RowTable) -> None:
    assert table.tokens.tokens.tolist() == [5, 6, 7]
    assert table.tokens.targets.tolist() == [False, False, True]
    assert table.tokens.offsets.tolist() == [0, 3, 3]
    assert table.tokens.num_targets.tolist() == [1, 0]
    assert table.tokens.written.tolist() == [1]
    assert table.full_lengths.tolist() == [9, 1]
    assert table.fates.tolist() == [Fate.TRUNCATED, Fate.EMPTY]
    assert table.numbers.tolist() == [3, 4]
    assert table.digests.tolist() == [[0x0706050403020100, 0x0F0E0D0C0B0A0908], [0, 0]]
    assert table.likenesses.tolist() == [[0x0807060504030201, 0x100F0E0D0C0B0A09], [0, 0]]


def entry_of(cache: Path) -> Path:
    [entry] = cache.iterdir()
    return entry


def test_a_table_is_built_once_and_mapped_from_disk(tmp_path: Path) -> None:
    build = Builder()
    for _ in range(3):
        table = cached_table(tmp_path / "cache", {"a": 1}, build)
        check(table)
        assert isinstance(table.tokens.tokens, np.memmap)
    assert build.calls == 1
    cached_table(tmp_path / "cache", {"a": 2}, build)
    assert build.calls == 2


@pytest.mark.parametrize("is_cached", [False, True])
def test_what_a_killed_process_left_behind_is_removed(tmp_path: Path, is_cached: bool) -> None:
    if is_cached:
        cached_table(tmp_path, {"a": 1}, Builder())
    left, held = (tmp_path / f"unfinished-{name}" for name in ("left", "held"))
    for directory in (left, held):
        directory.mkdir()
        (directory / "tokens.npy").touch()
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    cached_table(tmp_path, {"a": 1}, Builder())
    os.close(descriptor)
    assert [directory.exists() for directory in (left, held)] == [False, True]


def test_many_processes_at_once_take_nothing_from_each_other(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for table in pool.map(lambda n: cached_table(tmp_path, {"a": n % 3}, Builder()), range(60)):
            check(table)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_is_being_built_is_locked(tmp_path: Path) -> None:
    def build(writer: TableWriter) -> None:
        descriptor = os.open(entry_of(tmp_path), os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
        Builder()(writer)

    check(cached_table(tmp_path, {"a": 1}, build))


def test_without_a_cache_nothing_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    table = cached_table(None, {}, Builder())
    check(table)
    assert not isinstance(table.tokens.tokens, np.memmap)
    assert list(tmp_path.iterdir()) == []


def test_whatever_file_of_an_entry_is_damaged_it_is_built_again(tmp_path: Path) -> None:
    build = Builder()
    cached_table(tmp_path, {}, build)
    names = sorted(path.name for path in entry_of(tmp_path).iterdir())
    assert len(names) == 11
    for name in names:
        for damage in ("missing", "shortened", "a bit flipped", "emptied"):
            path = entry_of(tmp_path) / name
            content = path.read_bytes()
            match damage:
                case "missing":
                    path.unlink()
                case "shortened":
                    path.write_bytes(content[:-1])
                case "a bit flipped":
                    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
                case "emptied":
                    path.write_bytes(b"")
            calls = build.calls
            check(cached_table(tmp_path, {}, build))
            assert build.calls == calls + 1, (name, damage)
    check(cached_table(tmp_path, {}, build))


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(writer: TableWriter) -> None:
        Builder()(writer)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_table(tmp_path, {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_finishes_first_wins(tmp_path: Path) -> None:
    other = Builder()

    def build(writer: TableWriter) -> None:
        cached_table(tmp_path, {}, other)
        Builder()(writer)

    check(cached_table(tmp_path, {}, build))
    check(cached_table(tmp_path, {}, other))
    assert other.calls == 1


def test_a_cache_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write tokenised data here"):
        cached_table(tmp_path / "file" / "cache", {}, Builder())
