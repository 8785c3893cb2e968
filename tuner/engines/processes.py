"""Which process is which, although numbers are used again: how a run ends what an earlier one left.

Only a process whose host, boot, number and start time are those recorded is ended, and only once the process
that started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_STARTED_FIELD = 19
"""Of /proc/PID/stat after the name in parentheses: clock ticks since the boot, whatever the clock does."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A process of one boot of one machine."""

    host: str
    boot: str
    pid: int
    started: int
    """In clock ticks since the boot."""

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return the identity of a running process; None if there is none, or this system does not tell."""
        try:
            boot, stat = _BOOT.read_text().strip(), Path(f"/proc/{pid}/stat").read_text()
        except (OSError, ValueError):
            return None
        after_name = stat[stat.rindex(")") + 2 :].split()
        if after_name[0] in ("Z", "X"):  # dead, not yet waited for
            return None
        return cls(socket.gethostname(), boot, pid, int(after_name[_STARTED_FIELD]))

    @property
    def is_running(self) -> bool:
        """Return whether this very process runs here."""
        return Identity.of(self.pid) == self


@dataclass(frozen=True, slots=True)
class RecordedWorker:
    """A worker and the process that started it, as recorded beside the worker's log."""

    worker: Identity
    parent: Identity

    @property
    def is_left_over(self) -> bool:
        """Return whether the worker runs here although its parent has ended."""
        return self.worker.is_running and not self.parent.is_running


def record_worker(path: Path, pid: int) -> None:
    """Record a worker that this process started; do nothing where the system does not tell enough."""
    worker, parent = Identity.of(pid), Identity.of(os.getpid())
    if worker is not None and parent is not None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(RecordedWorker(worker, parent))))
        temporary.replace(path)


def recorded_workers(directory: Path) -> list[RecordedWorker]:
    """Return the workers recorded in a directory; files that cannot be read are no record."""
    found = []
    for path in sorted(directory.glob("*.pid")):
        try:
            document = json.loads(path.read_text())
            found.append(RecordedWorker(Identity(**document["worker"]), Identity(**document["parent"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def end_left_over(directory: Path) -> list[int]:
    """Kill recorded workers whose parent has ended, and return their numbers."""
    ended = []
    for recorded in recorded_workers(directory):
        if recorded.is_left_over:
            try:
                os.kill(recorded.worker.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
            ended.append(recorded.worker.pid)
    return ended
