"""What runs beside a worker program on its node: a subprocess, its lines, its files, and a lease.

A host is a plain object that knows no Ray. Its parent calls its methods over a connection that may lose or
repeat a call, so each method may be called twice.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tuner.engines.devices import gpu_meter, open_nvml, visible_devices
from tuner.engines.processes import TOKEN
from tuner.engines.ray.alike import NodeFacts, module_digest, versions
from tuner.engines.ray.node_files import NodeFiles, hub_commit, needed_digest
from tuner.report.format import GpuReading

LEASE_SECONDS = 45.0
"""A host that hears nothing from its parent for so long ends its worker."""
CLOSE_SECONDS = 15.0
"""From the end of a worker's input until it is killed."""
WORKER_TOKEN = TOKEN
"""Environment variable by which a worker, and what it starts, is recognised: `JOB.SESSION.NUMBER`."""

_MAX_LINES = 1000
_MAX_LOG_BYTES = 64 * 1024
_MOST_LOG_BYTES = 8 * 1024**2
"""Of a worker's log on its node, once its parent has it."""
_READING_SECONDS = 2.0
_LAUNCHER = (
    "import ctypes,os,sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"  # PR_SET_PDEATHSIG, SIGKILL: survives exec
    "os.getppid() == int(sys.argv[1]) or os._exit(1)\n"  # its parent died before prctl
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)
"""Runs the worker program so that it dies with its host, however that dies."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A host's answer to a poll."""

    lines: tuple[str, ...]
    """The worker's next lines of output."""
    exit_code: int | None
    """Of the worker; None until it has ended and `lines` holds its last one."""
    log: bytes
    """The next part of the worker's standard error."""
    gpus: tuple[GpuReading, ...] = ()
    """How busy the worker's GPUs are."""


class Host:
    """A worker's process on this node, started by `launch`.

    Without a call for `lease_seconds` it ends the process and calls `on_lost`.
    """

    def __init__(
        self,
        *,
        scratch: str | None = None,
        lease_seconds: float = LEASE_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
        on_lost: Callable[[], None] = lambda: os._exit(1),
    ) -> None:
        self.files = NodeFiles(Path(scratch) if scratch else default_scratch())
        self._lease_seconds = lease_seconds
        self._close_seconds = close_seconds
        self._on_lost = on_lost
        self._heard_at = time.monotonic()
        self._said = threading.Condition()
        self._lines: deque[str] = deque()
        self._forgotten = 0
        """Lines that the parent has acknowledged."""
        self._code: int | None = None
        self._process: subprocess.Popen[str] | None = None
        self._runner: threading.Thread | None = None
        self._orders_taken = 0
        self._log: Path | None = None
        self._log_from = 0
        """Bytes of the log that its file does not have any more."""
        self._read_at = -_READING_SECONDS
        self._gpus: tuple[GpuReading, ...] = ()
        self._meter: Callable[[], tuple[GpuReading, ...]] | None = None
        self._devices: tuple[str, ...] | None = None
        """GPUs of the worker."""
        threading.Thread(target=self._keep_lease, daemon=True, name="lease").start()

    # --- before it starts -------------------------------------------------------------------------

    def describe(self, modules: Sequence[str] = ()) -> NodeFacts:
        """Return what this node computes with, and its version of the user's modules."""
        self._alive()
        with self._busy():
            found = {**versions(), **{name: module_digest(name) for name in modules}}
        return NodeFacts(socket.gethostname(), found, visible_devices(), os.cpu_count() or 1)

    def end_orphans(self, job: str, session: str, lost: Sequence[str]) -> list[int]:
        """Kill workers of `job` that a former session, or a host in `lost`, left behind; return their ids.

        Their folders are deleted.
        """
        self._alive()
        return self.files.end_orphans(WORKER_TOKEN, job, session, frozenset(lost))

    def launch(self, arguments: Sequence[str], environment: Mapping[str, str], token: str) -> None:
        """Start the worker program, whose log is in its own folder; an empty variable is removed. Once."""
        self._alive()
        if self._runner is not None:
            return
        self._devices = visible_devices({**os.environ, **environment})
        work = self.files.work(token)
        work.mkdir(parents=True, exist_ok=True)
        self._log = work / "worker.log"
        self._runner = threading.Thread(
            target=self._run, args=(tuple(arguments), {**environment, WORKER_TOKEN: token}), daemon=True
        )
        self._runner.start()

    # --- while it runs ----------------------------------------------------------------------------

    def order(self, number: int, line: str) -> None:
        """Write a line to the worker's input; orders count from 1, and one that came before is ignored."""
        self._alive()
        with self._said:
            started = self._said.wait_for(lambda: self._process is not None or self._code is not None, 60.0)
            if number <= self._orders_taken or not started or self._process is None:
                return
            self._orders_taken = number
            process = self._process
        assert process.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # it has ended: its exit code says so
            process.stdin.write(line)
            process.stdin.flush()

    def events(self, after: int, timeout_seconds: float, log_from: int = 0) -> Heard:
        """Return the lines after the first `after`, which it forgets; wait up to the timeout for one."""
        self._alive()
        with self._said:
            while self._forgotten < after and self._lines:
                self._lines.popleft()
                self._forgotten += 1
            self._said.wait_for(lambda: bool(self._lines) or self._code is not None, timeout_seconds)
            lines = tuple(islice(self._lines, _MAX_LINES))
            code = self._code if len(lines) == len(self._lines) else None
        self._alive()
        return Heard(lines, code, self._logged(log_from), self._readings())

    def close_input(self) -> None:
        """End the worker's input, which tells it that nobody waits for it any more."""
        self._alive()
        self._close_input()

    def kill(self) -> None:
        """Kill the worker and what it started in its session."""
        self._alive()
        self._kill()

    # --- files: see NodeFiles ---------------------------------------------------------------------

    def work_directory(self, token: str, tables: str, bound_bytes: int) -> tuple[str, str]:
        """Return where a worker writes on this node if it does not see the parent's disk: checkpoints, and
        tokenised rows, which the workers of `tables` share. Both stay while this host lives; of what no host
        uses, the node keeps at most `bound_bytes`.
        """
        self._alive()
        with self._busy():
            runs, rows = self.files.work_directory(token, tables, bound_bytes)
        return str(runs), str(rows)

    def own_copy(self, token: str, path: str) -> str:
        """Copy a directory that was sent into a worker's folder, where the worker may change it."""
        self._alive()
        with self._busy():
            return str(self.files.own_copy(token, Path(path)))

    def read_back(self, path: str) -> bytes | None:
        """Return a small file's content; None if this node does not see it."""
        self._alive()
        try:
            return Path(path).read_bytes()
        except OSError:
            return None

    def digest(self, path: str, weights: str | None = None) -> str | None:
        """Return the hash of a file, or of a directory's `needed_files`; None if the node does not see it."""
        self._alive()
        with self._busy():
            return needed_digest(Path(path), weights=weights) if Path(path).exists() else None

    def hub_commit(self, model: str, revision: str | None) -> str | None:
        """Return the commit of a model in this node's Hub cache; None if it is not there."""
        self._alive()
        return hub_commit(model, revision)

    def reaches_hub(self) -> bool:
        """Return whether this node can download from the Hub."""
        self._alive()
        from huggingface_hub import constants

        from tuner.data.pretrained import can_be_resolved

        with self._busy():
            return not constants.HF_HUB_OFFLINE and can_be_resolved(constants.ENDPOINT)

    def listing(self, path: str) -> list[tuple[str, int]]:
        """Return the files under a directory with their sizes, sorted by name; empty if it is missing."""
        self._alive()
        return self.files.listing(Path(path))

    def contents(self, path: str) -> list[tuple[str, int, bytes | None]]:
        """As `NodeFiles.contents`."""
        self._alive()
        return self.files.contents(Path(path))

    def read_chunk(self, path: str, offset: int, size: int) -> bytes:
        """Return a part of a file."""
        self._alive()
        with Path(path).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def claim(self, fingerprint: str, name: str, size_bytes: int, bound_bytes: int) -> tuple[str, str]:
        """As `NodeFiles.claim`."""
        self._alive()
        return self.files.claim(fingerprint, name, size_bytes, bound_bytes)

    def write_chunk(self, fingerprint: str, name: str, offset: int, content: bytes) -> None:
        """As `NodeFiles.write`."""
        self._alive()
        self.files.write(fingerprint, name, offset, content)

    def keep(self, fingerprint: str, name: str) -> str:
        """As `NodeFiles.keep`."""
        self._alive()
        with self._busy():
            return self.files.keep(fingerprint, name)

    def adopt(self, fingerprint: str, name: str, target: str) -> None:
        """As `NodeFiles.adopt`."""
        self._alive()
        self.files.adopt(fingerprint, name, Path(target))

    def clean_up(self, token: str) -> None:
        """Delete a worker's folder."""
        self._alive()
        self.files.delete(self.files.work(token))

    def delete(self, path: str) -> None:
        """Delete a file or directory below this node's scratch folder, and nothing elsewhere."""
        self._alive()
        self.files.delete(Path(path))

    # --- behind it --------------------------------------------------------------------------------

    def _alive(self) -> None:
        self._heard_at = time.monotonic()

    def _busy(self) -> _Busy:
        return _Busy(self._alive)

    def _run(self, arguments: tuple[str, ...], changes: Mapping[str, str]) -> None:
        """Start the process and read it to its end, in one thread: the process dies with this thread."""
        code, log = 1, self._log
        assert log is not None
        variables = {**os.environ, **changes}
        variables = {name: value for name, value in variables.items() if changes.get(name) != ""}
        try:
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [sys.executable, "-S", "-c", _LAUNCHER, str(os.getpid()), *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=file,
                    text=True,
                    bufsize=1,
                    start_new_session=True,
                    env=variables,
                )
            with self._said:
                self._process = process
                self._said.notify_all()
            assert process.stdout is not None
            with process.stdout as said:
                for line in said:
                    with self._said:
                        self._lines.append(line)
                        self._said.notify_all()
            code = process.wait()
        except OSError as error:
            with log.open("a") as file:
                file.write(f"the worker cannot be started: {error}\n")
        finally:
            with self._said:
                self._code = code
                self._said.notify_all()

    def _logged(self, offset: int) -> bytes:
        if self._log is None or offset < self._log_from:
            return b""  # a call that was repeated late
        try:
            part = self.read_chunk(str(self._log), offset - self._log_from, _MAX_LOG_BYTES)
            if not part and offset - self._log_from > _MOST_LOG_BYTES:
                os.truncate(self._log, 0)  # the parent has it all
                self._log_from = offset
            return part
        except OSError:
            return b""

    def _readings(self) -> tuple[GpuReading, ...]:
        now = time.monotonic()
        if self._devices is not None and now - self._read_at >= _READING_SECONDS:
            self._read_at = now
            if self._meter is None:
                self._meter = gpu_meter(open_nvml(), self._devices) or (lambda: ())
            self._gpus = tuple(self._meter())
        return self._gpus

    def _keep_lease(self) -> None:
        while time.monotonic() - self._heard_at < self._lease_seconds:
            time.sleep(min(1.0, self._lease_seconds / 4))
        self._close_input()
        deadline = time.monotonic() + self._close_seconds
        while self._runner is not None and self._code is None and time.monotonic() < deadline:
            time.sleep(0.1)
        self._kill()
        self._on_lost()

    def _close_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError, ValueError, OSError):
                self._process.stdin.close()

    def _kill(self) -> None:
        if self._process is not None and self._code is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


class _Busy:
    """Keeps the lease during a call that takes long, since the parent waits for its answer."""

    def __init__(self, alive: Callable[[], None]) -> None:
        self._alive = alive
        self._over = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._renew, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _renew(self) -> None:
        while not self._over.wait(1.0):
            self._alive()


def default_scratch() -> Path:
    """Return this node's folder for files: TUNER_SCRATCH, or one in the folder of temporary files."""
    named = os.environ.get("TUNER_SCRATCH")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"tuner-{os.getuid()}"
