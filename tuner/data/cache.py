"""Where tokenised tables are kept between runs, under a name that says what they were made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tuner.data.table import RowTable, TableWriter, read_table
from tuner.errors import StorageError

_UNFINISHED = "unfinished-"
_LOCKED_AFTER_SECONDS = 60.0
"""Between making a directory and locking it, at most."""


def cached_table(
    cache: Path | None, made_from: Mapping[str, Any], build: Callable[[TableWriter], None]
) -> RowTable:
    """The table that `build` writes, or the one it wrote before from the same.

    `made_from` holds everything that the table depends on, as JSON values. An entry appears under its
    name only when it is complete; one that is damaged is built again. Without a cache the table is in
    memory and nothing stays on disk. Raises what `build` raises, and StorageError.
    """
    entry = cache and cache / hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    found = read_table(entry, mapped=True) if entry else None
    if found is not None:
        return found
    try:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(cache)
        with _unfinished(cache) as unnamed:
            table = _built(unnamed, build, mapped=entry is not None)
            if entry is not None:
                _name(unnamed, entry)
        return table
    except OSError as error:
        place = cache or tempfile.gettempdir()
        raise StorageError(f"{place}: tokenised data cannot be written here: {error}") from error


@contextmanager
def _unfinished(cache: Path | None) -> Iterator[Path]:
    """A directory to build in, which is gone at the end; locked, so that it is known whether anyone does."""
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=cache) as directory:
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            with suppress(OSError):  # no locks on this disk: nothing is then taken for abandoned either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            unnamed = Path(directory) / "table"
            unnamed.mkdir()
            yield unnamed
        finally:
            os.close(descriptor)


def _remove_abandoned(cache: Path) -> None:
    """Delete what processes that were killed had begun; a directory is young before it is locked."""
    for directory in cache.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):  # locked, or gone meanwhile
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - os.fstat(descriptor).st_mtime > _LOCKED_AFTER_SECONDS:
                    shutil.rmtree(directory)
            finally:
                os.close(descriptor)


def _built(directory: Path, build: Callable[[TableWriter], None], *, mapped: bool) -> RowTable:
    with TableWriter(directory) as writer:
        build(writer)
    table = read_table(directory, mapped=mapped)
    if table is None:
        raise OSError("what was written could not be read back")
    return table


def _name(unnamed: Path, entry: Path) -> None:
    """Give a complete table its name, unless another process was faster with the same one."""
    if entry.exists() and read_table(entry, mapped=True) is None:
        shutil.rmtree(entry)
    try:
        unnamed.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
