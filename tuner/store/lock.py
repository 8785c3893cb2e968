"""The write lock: one process per study or SQLite file; it is released when its process dies."""

from __future__ import annotations

import fcntl
import os
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, NullPool, text

from tuner.errors import StorageError
from tuner.store.database import RUN_LOCKS, database_file, explained, is_sqlite, open_engine, parse_url

_PATIENCE_SECONDS = 0.5
"""How long a taken lock is asked for: `is_held` may hold it for an instant."""

_RETRY_SECONDS = 0.05


@contextmanager
def hold_study(directory: Path, url: str, study: str) -> Iterator[None]:
    """Hold the write lock of `study`; messages name its `directory`.

    The lock goes when the block ends or the process dies, even by kill -9, and does not pass to child
    processes. With SQLite it is a lock on the file FILE.lock beside the database, and keeps out writers of
    other studies too; with PostgreSQL it is an advisory lock named after the study, and others may run at
    the same time. Raises StorageError that says which process holds what.
    """
    target = parse_url(url)
    subject = f"{directory}: the study {study}"
    with explained(target):
        hold = _hold_file if is_sqlite(target) else _hold_server
        release = hold(target, study, subject)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            release()


def is_held(directory: Path, url: str, study: str) -> bool:
    """Return whether any process, including this one, holds the lock.

    Creates nothing and blocks nobody. Raises StorageError when the server cannot be asked.
    """
    target = parse_url(url)
    with explained(target):
        if is_sqlite(target):
            path = _lock_file(target)
            return _is_file_locked(path) and _said_in(path)[1] in ("", study)
        with _lock_engine(target).connect() as connection:
            return _server_holder(connection, study) is not None


# --- SQLite: a file beside the database -----------------------------------------------------------


def _lock_file(url: URL) -> Path:
    return Path(f"{database_file(url).resolve()}.lock")


def _hold_file(url: URL, study: str, subject: str) -> Callable[[], None]:
    path = _lock_file(url)
    path.parent.stat()  # filelock would make the directory
    lock = FileLock(
        path, _PATIENCE_SECONDS, poll_interval=_RETRY_SECONDS, thread_local=False, fallback_to_soft=False
    )
    try:
        lock.acquire()
    except Timeout:
        holder, other = _said_in(path)
        if other in ("", study):
            raise _held_by(holder, subject) from None
        raise StorageError(
            f"{subject} cannot be written now: {holder} is writing the study {other} in the same file, "
            f"{database_file(url)}, and an SQLite file allows one writer; wait until that process ends, "
            "or use a separate `storage` for each study, or PostgreSQL"
        ) from None

    def release() -> None:
        path.unlink(missing_ok=True)
        lock.release()

    with ExitStack() as undo:
        undo.callback(release)
        path.write_text(f"{_this_process()}\n{study}")
        undo.pop_all()
    return release


def _said_in(path: Path) -> tuple[str, str]:
    """Return which process holds the file, and for which study; empty if none has written it."""
    try:
        holder, _, study = path.read_text().partition("\n")
    except FileNotFoundError:
        return "", ""
    return holder, study


def _is_file_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


# --- PostgreSQL: an advisory lock, on a connection of its own --------------------------------------

_TRY = text("SELECT pg_try_advisory_lock(:space, :key)")

_HOLDER = text(
    "SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid) "
    "WHERE locktype = 'advisory' AND classid = :space AND objid = :key AND objsubid = 2 AND granted "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
)


_sockets: set[int] = set()
"""Descriptors of connections that carry a lock of this process."""


def _hold_server(url: URL, study: str, subject: str) -> Callable[[], None]:
    connection = _lock_engine(url).connect()
    with ExitStack() as undo:
        undo.callback(connection.close)
        if _patiently(lambda: connection.scalar(_TRY, _numbers(study)) or None) is None:
            raise _held_by(_server_holder(connection, study) or "", subject)
        undo.pop_all()
    descriptor: int = connection.connection.driver_connection.fileno()  # type: ignore[union-attr]
    _sockets.add(descriptor)

    def release() -> None:
        _sockets.discard(descriptor)
        connection.close()

    return release


def _lock_engine(url: URL) -> Engine:
    # A connection that does nothing for hours: a router may forget it unless it is kept alive.
    engine = open_engine(url, poolclass=NullPool, application_name=_this_process()[:63], keepalives_idle=60)
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _server_holder(connection: Connection, study: str) -> str | None:
    holder: str | None = connection.scalar(_HOLDER, _numbers(study))
    return holder


def _numbers(study: str) -> dict[str, int]:
    return {"space": RUN_LOCKS, "key": zlib.crc32(study.encode()) & 0x7FFFFFFF}


def _patiently(attempt: Callable[[], int | None]) -> int | None:
    until = time.monotonic() + _PATIENCE_SECONDS
    while (got := attempt()) is None and time.monotonic() < until:
        time.sleep(_RETRY_SECONDS)
    return got


def _let_go_in_child() -> None:
    """Close sockets that a fork copied: an open copy would keep the lock when its holder dies.

    filelock does so with files. The numbers stay taken, by /dev/null, so that whatever still closes or
    writes to them hits nothing.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in _sockets:
        os.dup2(null, descriptor, inheritable=False)
    os.close(null)
    _sockets.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


# --- both ------------------------------------------------------------------------------------------


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _held_by(holder: str, subject: str) -> StorageError:
    return StorageError(
        f"{subject} is being run by {holder or 'another process'}; wait until it ends, or stop it"
    )
