"""Nothing waits for the disk in the tests' process and its forks: no test cuts the power."""

from __future__ import annotations

import os
import sqlite3
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

_fsync = os.fsync

is_on = True
"""Whether it is so for the test that runs."""


def install() -> None:
    """Let files and SQLite databases that are written from now on reach the disk when the system likes."""
    from sqlalchemy import event
    from sqlalchemy.pool import Pool

    install_for_files()
    event.listen(Pool, "checkout", _relax)


def install_for_files() -> None:
    """Let files do so, in a worker, which loads no database."""
    os.fsync = _sync


def on_the_disk(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Return the inodes of what is synced from now on, as it is synced."""
    found: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: found.add(os.fstat(descriptor).st_ino))
    return found


def _sync(descriptor: Any) -> None:
    if not is_on:
        _fsync(descriptor)


def _relax(connection: Any, *_: object) -> None:
    if is_on and isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")
