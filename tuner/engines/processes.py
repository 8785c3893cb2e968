"""Which process is which, although numbers are used again: how a run ends what an earlier one left.

A process is ended only if its host, boot, number and start time are those recorded, or if its environment has
a recorded worker's token; and only once the process that started the worker is gone.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tuner.process_start import start_ticks
from tuner.whole import written_whole

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SWEEPS = 40
"""How often processes that were just being forked, or have not died yet, are looked for."""
_SWEEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Identity:
    """A process of one boot of one machine."""

    host: str
    boot: str
    pid: int
    started: int
    """As in `start_ticks`."""

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return the identity of a running process; None if there is none, or this system does not tell."""
        try:
            boot = _BOOT.read_text().strip()
        except OSError:
            return None
        started = start_ticks(pid)
        return None if started is None else cls(socket.gethostname(), boot, pid, started)

    @property
    def is_running(self) -> bool:
        """Return whether this very process runs here."""
        return Identity.of(self.pid) == self


TOKEN = "_TUNER_WORKER"
"""Variable that a worker's processes inherit, a command's among them, whatever session they start."""


def new_token() -> str:
    """Return a token for a worker that is to be started."""
    return secrets.token_hex(16)


def with_token(token: str) -> Iterator[int]:
    """Yield this user's processes, of this numbering of processes, whose environment has a token."""
    wanted, own = f"{TOKEN}={token}".encode(), os.getuid()
    try:
        here = _numbering("self")
    except OSError:  # a system without /proc
        return
    for place in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = place.stat().st_uid == own and _numbering(place.name) == here
            if is_ours and wanted in (place / "environ").read_bytes().split(b"\0"):
                yield int(place.name)
        except OSError:  # it has ended, or is not ours to read
            continue


def end_with_token(token: str) -> list[int]:
    """Kill a worker's processes, what they fork meanwhile too; return their numbers."""
    ended: list[int] = []
    for _ in range(_SWEEPS):
        found = [pid for pid in with_token(token) if pid != os.getpid() and Identity.of(pid) is not None]
        if not found:
            break
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                ended.append(pid)
        time.sleep(_SWEEP_SECONDS)
    return sorted(set(ended))


def _numbering(pid: str) -> str:
    """Return the name of a process's numbering: the same number in a container is another process."""
    return os.readlink(f"/proc/{pid}/ns/pid")  # noqa: PTH115


@dataclass(frozen=True, slots=True)
class RecordedWorker:
    """A worker and the process that started it, as recorded beside the worker's log."""

    worker: Identity
    parent: Identity
    token: str | None = None
    """In the environment of the worker's processes; earlier versions gave them none."""

    @property
    def is_left_over(self) -> bool:
        """Return whether the worker runs here although its parent has ended."""
        return self.worker.is_running and not self.parent.is_running

    @property
    def is_of_ended_parent_here(self) -> bool:
        """Return whether the parent was a process of this boot and has ended, whatever the host's name is."""
        now = Identity.of(os.getpid())
        if now is None or self.parent.boot != now.boot:
            return False
        return not replace(self.parent, host=now.host).is_running


def record_worker(path: Path, pid: int, token: str | None = None) -> None:
    """Record a worker that this process started; do nothing where the system does not tell enough."""
    worker, parent = Identity.of(pid), Identity.of(os.getpid())
    if worker is not None and parent is not None:
        with written_whole(path) as unnamed:
            unnamed.write_text(json.dumps(asdict(RecordedWorker(worker, parent, token))))


def forget_worker(path: Path, pid: int) -> None:
    """Remove the record of a worker that has ended, unless it is by now another worker's."""
    found = recorded_workers(path.parent).get(path)
    if found is None or found.worker.pid == pid:
        path.unlink(missing_ok=True)


def recorded_workers(directory: Path) -> dict[Path, RecordedWorker]:
    """Return the workers recorded in a directory, by file; files that cannot be read are no record."""
    found = {}
    for path in sorted(directory.glob("*.pid")):
        try:
            document = json.loads(path.read_text())
            worker, parent = Identity(**document["worker"]), Identity(**document["parent"])
            found[path] = RecordedWorker(worker, parent, document.get("token"))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def forget_ended(directory: Path) -> None:
    """Remove the records of workers that have ended with a parent of this boot, as kill -9 leaves them."""
    for path, recorded in recorded_workers(directory).items():
        if not recorded.is_of_ended_parent_here or recorded.worker.is_running:
            continue
        if recorded.token is None or not any(with_token(recorded.token)):
            path.unlink(missing_ok=True)


def end_left_over(directory: Path) -> list[int]:
    """Kill recorded workers whose parent has ended, and what they started; return their numbers."""
    ended = []
    for recorded in recorded_workers(directory).values():
        if recorded.is_left_over:
            try:
                os.kill(recorded.worker.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
            ended.append(recorded.worker.pid)
        if recorded.token is not None and recorded.is_of_ended_parent_here:
            ended += end_with_token(recorded.token)
    return ended
