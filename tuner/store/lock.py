"""The write lock: one process per study or SQLite file; it is released when its process dies."""

from __future__ import annotations

import fcntl
import os
import re
import select
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, NullPool, text
from sqlalchemy.exc import DBAPIError

from tuner.errors import StudyTaken
from tuner.process_start import start_ticks
from tuner.store.database import RUN_LOCKS, database_file, explained, is_sqlite, open_engine, parse_url

_PATIENCE_SECONDS = 0.5
"""How long a taken lock is asked for: `is_held` may hold it for an instant."""

_RETRY_SECONDS = 0.05

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_HOST_BYTES = 26
_HOLDER_FORM = re.compile(
    r"(?P<shown>process (?P<pid>\d+) on \S+) (?P<machine>[0-9a-f]{8})\.(?P<started>[0-9a-f]+)"
)


class Hold:
    """The write lock of a study while it is held, which a dropped connection or a deleted file can end."""

    def __init__(self, target: URL, study: str, subject: str) -> None:
        self._target, self._study, self._subject = target, study, subject
        self._held = self._take()

    def _take(self) -> _Held:
        with explained(self._target):
            take = _hold_file if is_sqlite(self._target) else _hold_server
            return take(self._target, self._study, self._subject)

    @property
    def is_lost(self) -> bool:
        """Return whether it is known to be lost; asks the server only if that has said something."""
        return self._held.is_lost()

    def renew(self) -> None:
        """Take it again if it was lost.

        Raises StudyTaken while another process holds it, StorageAway when the server cannot be reached, and
        StorageError when its directory is gone or closed.
        """
        if not self.is_lost:
            return
        self._held.release()
        self._held = _Held(is_lost=lambda: True, release=lambda: None)
        self._held = self._take()

    def release(self) -> None:
        """Let go of it."""
        self._held.release()


@dataclass(frozen=True, slots=True)
class _Held:
    is_lost: Callable[[], bool]
    release: Callable[[], None]


@contextmanager
def hold_study(directory: Path, url: str, study: str) -> Iterator[Hold]:
    """Hold the write lock of `study`; messages name its `directory`.

    The lock goes when the block ends or the process dies, even by kill -9, and does not pass to child
    processes. With SQLite it is a lock on the file FILE.lock beside the database, and keeps out writers of
    other studies too; with PostgreSQL it is an advisory lock named after the study, and others may run at
    the same time. Raises StudyTaken that says which process holds what, and StorageError as `explained` does.
    """
    hold = Hold(parse_url(url), study, f"{directory}: the study {study}")
    owner = os.getpid()
    try:
        yield hold
    finally:
        if os.getpid() == owner:
            hold.release()


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


def _hold_file(url: URL, study: str, subject: str) -> _Held:
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
        raise StudyTaken(
            f"{subject} cannot be written now: {holder} is writing the study {other} in the same file, "
            f"{database_file(url)}, and an SQLite file allows one writer; wait until that process ends, "
            "or use a separate `storage` for each study, or PostgreSQL"
        ) from None

    inode: int | None = None

    def is_lost() -> bool:
        try:
            return path.stat().st_ino != inode
        except OSError:
            return True

    def release() -> None:
        if not is_lost():
            path.unlink(missing_ok=True)
        lock.release()

    with ExitStack() as undo:
        undo.callback(lock.release)
        path.write_text(f"{_this_process()}\n{study}")
        inode = path.stat().st_ino
        undo.pop_all()
    return _Held(is_lost, release)


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


_END = text(
    "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid) "
    "WHERE locktype = 'advisory' AND classid = :space AND objid = :key AND objsubid = 2 AND granted "
    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
    "AND application_name = :holder"
)

_DEAD_SECONDS = 10.0
"""How long a server may take to end the connection of a dead holder."""

_sockets: set[int] = set()
"""Descriptors of connections that carry a lock of this process."""


def _hold_server(url: URL, study: str, subject: str) -> _Held:
    connection = _lock_engine(url).connect()

    def is_taken() -> int | None:
        return connection.scalar(_TRY, _numbers(study)) or None

    with ExitStack() as undo:
        undo.callback(connection.close)
        if _patiently(is_taken) is None and not (
            _end_dead_holder(connection, study) and _patiently(is_taken, _DEAD_SECONDS)
        ):
            raise _held_by(_shown(_server_holder(connection, study)), subject)
        undo.pop_all()
    driver: Any = connection.connection.driver_connection
    descriptor: int = driver.fileno()
    _sockets.add(descriptor)

    def is_lost() -> bool:
        if driver.closed:
            return True
        # To a connection that asks nothing the server says little: that it ends it, or a changed setting.
        waiting = select.poll()
        waiting.register(descriptor, select.POLLIN)
        if not waiting.poll(0):
            return False
        try:
            connection.scalar(text("SELECT 1"))
        except DBAPIError:
            return True
        return False

    def release() -> None:
        _sockets.discard(descriptor)
        with suppress(DBAPIError):
            connection.close()

    return _Held(is_lost, release)


def _end_dead_holder(connection: Connection, study: str) -> bool:
    """Let the server end the connection of a holder that was a process here and is gone; was it so?

    The server notices by itself once the socket is closed; a proxy or a tunnel may keep it open for hours.
    """
    holder = _server_holder(connection, study)
    if holder is None:
        return True
    if not is_dead(holder):
        return False
    try:
        connection.execute(_END, {**_numbers(study), "holder": holder})
    except DBAPIError:  # another user's
        return False
    return True


def _lock_engine(url: URL) -> Engine:
    # A connection that does nothing for hours: a router may forget it unless it is kept alive.
    engine = open_engine(url, poolclass=NullPool, application_name=_holder_here())
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def _server_holder(connection: Connection, study: str) -> str | None:
    holder: str | None = connection.scalar(_HOLDER, _numbers(study))
    return holder


def _numbers(study: str) -> dict[str, int]:
    return {"space": RUN_LOCKS, "key": zlib.crc32(study.encode()) & 0x7FFFFFFF}


def _patiently(attempt: Callable[[], int | None], seconds: float = _PATIENCE_SECONDS) -> int | None:
    until = time.monotonic() + seconds
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


def _holder_here() -> str:
    """Return this process as a PostgreSQL `application_name`, of at most 63 bytes."""
    host = socket.gethostname().encode("ascii", "replace")[:_HOST_BYTES].decode()
    return f"process {os.getpid()} on {host} {_machine()}.{start_ticks(os.getpid()) or 0:x}"


def is_dead(holder: str) -> bool:
    """Return whether a holder was a process of this machine and is gone."""
    found = _HOLDER_FORM.fullmatch(holder)
    if found is None or found["machine"] != _machine() or found["started"] == "0":
        return False
    return start_ticks(int(found["pid"])) != int(found["started"], 16)


def _shown(holder: str | None) -> str:
    found = _HOLDER_FORM.fullmatch(holder or "")
    return (holder or "") if found is None else found["shown"]


def _machine() -> str:
    """Return a name of what process numbers are unique in: one boot, and one container's numbering."""
    try:
        boot, numbering = _BOOT.read_text(), os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        return "unknown"
    return f"{zlib.crc32(f'{socket.gethostname()} {boot} {numbering}'.encode()):08x}"


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _held_by(holder: str, subject: str) -> StudyTaken:
    return StudyTaken(
        f"{subject} is being run by {holder or 'another process'}; wait until it ends, or stop it"
    )
