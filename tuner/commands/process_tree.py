"""A command's processes: started in a session, found by their token, and ended as a whole tree."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tuner.errors import WorkerError
from tuner.process_start import start_ticks

TOKEN = "TUNER_TOKEN"
"""Variable that every process of an attempt inherits, whatever session it starts."""
GRACE_SECONDS = 15.0
"""Between SIGTERM and SIGKILL."""
_ENDS_WITHIN_SECONDS = 30.0
"""After SIGKILL. A process that waits for a device or a disk does not end."""
_POLL_SECONDS = 0.05


def new_token() -> str:
    """Return a token that names this worker process, which starts the attempt."""
    return f"{os.getpid()}-{start_ticks(os.getpid()) or 0}-{secrets.token_hex(8)}"


def is_token(text: str) -> bool:
    """Return whether a text is a whole token."""
    return re.fullmatch(r"\d+-\d+-[0-9a-f]{16}", text) is not None


def is_orphaned(token: str) -> bool:
    """Return whether the worker process that made the token is gone."""
    pid, started = map(int, token.split("-")[:2])
    # A system that does not tell when a process started reuses the number of a worker now and then.
    return start_ticks(pid) != started if started else not psutil.pid_exists(pid)


def start(
    command: Sequence[str], *, directory: Path, environment: Mapping[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own; its output goes to the log. Raises OSError."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=directory,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def with_token(token: str) -> Iterator[psutil.Process]:
    """Yield the living processes of this user whose environment has the token."""
    own = os.getuid()
    for process in psutil.process_iter():
        try:
            is_ours = process.uids().real == own and process.status() != psutil.STATUS_ZOMBIE
            if is_ours and process.environ().get(TOKEN) == token:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or is not ours to read
            continue


def end(
    token: str, popen: subprocess.Popen[bytes] | None = None, *, grace_seconds: float = GRACE_SECONDS
) -> None:
    """End an attempt's tree: SIGTERM, and SIGKILL for what is left after a while.

    torchrun's workers have sessions of their own, so that a signal to the group does not reach them. Raises
    WorkerError for processes that SIGKILL does not end.
    """
    if popen is not None and popen.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGTERM)
    elif popen is None:
        _signal(token, signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    while _is_alive(token, popen) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    deadline = time.monotonic() + _ENDS_WITHIN_SECONDS
    while _is_alive(token, popen):  # again, for one that was just being forked
        if time.monotonic() > deadline:
            left = ", ".join(str(process.pid) for process in with_token(token))
            raise WorkerError(
                f"the command's processes ({left}) have not ended {_ENDS_WITHIN_SECONDS:.0f} seconds after "
                "SIGKILL: they wait for a GPU or a disk that hangs (state D in `ps`), which may need a "
                "restart of the machine"
            )
        _signal(token, signal.SIGKILL)
        if popen is not None and popen.poll() is None:
            popen.kill()
        time.sleep(_POLL_SECONDS)


def end_orphans(tokens: Sequence[str]) -> int:
    """End what a killed worker process left running; returns the number of such attempts."""
    left = [token for token in tokens if is_orphaned(token) and any(with_token(token))]
    for token in left:
        end(token)
    return len(left)


class Guard:
    """A process beside this one that ends the last tree once this one is gone, even by SIGKILL."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tuner.commands.process_tree"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def watch(self, token: str) -> None:
        """Name the tree that is about to start. Does nothing if the guard itself was killed."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(token + "\n")
            self._process.stdin.flush()


def _guard() -> None:
    """Read tokens until the other process is gone, then end the tree of the last one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    *_, last = "", *(line.strip() for line in sys.stdin)
    if last and any(with_token(last)):
        end(last, grace_seconds=0.0)


def _is_alive(token: str, popen: subprocess.Popen[bytes] | None) -> bool:
    return (popen is not None and popen.poll() is None) or any(with_token(token))


def _signal(token: str, number: signal.Signals) -> None:
    for process in with_token(token):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def out_of_memory_kills() -> int | None:
    """Return how many processes the system has killed for want of memory; None if it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


if __name__ == "__main__":
    _guard()
