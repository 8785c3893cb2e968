"""Runs of `tuner` that start at once, as forks of a process that has loaded the libraries, with seams.

A seam is a call after which the disk or the database is another: a rename, a sync, a deletion, a commit. A
run counts its seams, and can be told to kill itself before or after one of them. Its worker, which it starts
as always, is forked as well: what it is asked to do, its pipes and its number are those of a real one.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
}
_SEAM_OF = {"rename": "rename", "replace": "rename", "fsync": "sync", "unlink": "delete", "rmdir": "delete"}
"""Calls of `os` by the kind of their seam; the kind commit is SQLAlchemy's."""
_MOST_BYTES = 2**20
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")


@dataclass(frozen=True, slots=True)
class Trap:
    """Where a process kills itself: at the n-th seam of a kind. Of workers only the first one does."""

    process: str
    """parent or worker"""
    seam: str
    number: int
    after: bool


@dataclass(frozen=True, slots=True)
class Wish:
    """What a run does that none does by itself."""

    trap: Trap | None = None
    tally: str | None = None
    """A file that gets a line, PROCESS SEAM, for each seam."""
    clock_jumps: tuple[float, ...] = ()
    """Seconds that the parent's clock is off, each for so many questions after another."""


class WarmRun:
    """A run, as `subprocess.Popen` shows one; its exit code is asked of the process that forked it."""

    def __init__(self, runs: WarmRuns, pid: int) -> None:
        self._runs = runs
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code; None while it runs."""
        if self.returncode is None:
            self.returncode = self._runs.ask({"poll": self.pid})["code"]
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end. Raises TimeoutError."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise TimeoutError(f"process {self.pid} still runs after {timeout:.0f} seconds")
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class WarmRuns:
    """The process that has loaded the libraries."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.warm", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT,
                cwd=ROOT,
            )

    def start(
        self, directory: Path, *arguments: str, wish: Wish | None = None, log: str = "said.log"
    ) -> WarmRun:
        """Run `tuner ARGUMENTS` in a session of its own; what it says is added to a file of the directory."""
        with (directory / log).open("ab") as file:
            request = {"run": arguments, "cwd": str(directory), "wish": asdict(wish or Wish())}
            return WarmRun(self, self.ask(request, file.fileno())["pid"])

    def ask(self, request: Mapping[str, Any], *descriptors: int) -> dict[str, Any]:
        """Send a request and return its answer."""
        send_request(self._requests, request, *descriptors)
        answer, _ = take_request(self._requests)
        return answer

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._process.wait(30)


def send_request(to: socket.socket, document: Mapping[str, Any], *descriptors: int) -> None:
    socket.send_fds(to, [json.dumps(document).encode()], descriptors)


def take_request(of: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Return a document and descriptors. Raises EOFError when the other side is gone."""
    content, descriptors, _, _ = socket.recv_fds(of, _MOST_BYTES, 4)
    if not content:
        raise EOFError
    document: dict[str, Any] = json.loads(content)
    return document, list(descriptors)


# --- the process that forks runs -----------------------------------------------------------------------


def main() -> None:
    """Answer requests until the tests close the socket."""
    _load_libraries()
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        try:
            request, descriptors = take_request(requests)
        except EOFError:
            os._exit(0)
        if "poll" in request:
            send_request(requests, {"code": _exit_code(request["poll"])})
            continue
        pid = os.fork()
        if pid == 0:
            requests.close()
            _be_a_run(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        send_request(requests, {"pid": pid})


def _load_libraries() -> None:
    """What a run and its worker import; none of it starts a thread, which a fork would lack."""
    for name in (
        *("alembic.command", "bitsandbytes", "optuna.storages._rdb.models", "optuna_dashboard", "peft"),
        *("pydantic.main", "rich.console", "rich.table", "ruamel.yaml", "scipy.stats", "typer.main"),
    ):
        import_module(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM, AutoTokenizer  # transformers loads what is named


def _exit_code(pid: int) -> int | None:
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def _be_a_run(request: Mapping[str, Any], descriptors: list[int]) -> NoReturn:
    os.setsid()
    _let_signals_in()
    _adopt_orphans()
    wish = request["wish"]
    null = os.open(os.devnull, os.O_RDONLY)
    take_over([null, descriptors[0], descriptors[0]], request["cwd"])
    worker_maker = _fork_worker_maker(wish)

    class Popen(subprocess.Popen[Any]):
        """Forks a worker program; starts everything else as always."""

        def _execute_child(self, *arguments: Any) -> None:
            execute = super()._execute_child  # type: ignore[misc]
            asked = inspect.signature(execute).bind(*arguments).arguments
            if asked["args"][:2] != [sys.executable, "-m"]:
                execute(*arguments)
                return
            work = {"run": list(asked["args"][2:]), "env": dict(asked["env"])}
            pipes = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
            send_request(worker_maker, work, *pipes)
            self.pid = take_request(worker_maker)[0]["pid"]
            self._child_created = True
            self._close_pipe_fds(*(asked[name] for name in _PIPES))  # type: ignore[attr-defined]

    subprocess.Popen = Popen  # type: ignore[misc]
    _set_seams("parent", wish)
    if wish["clock_jumps"]:
        _let_clock_jump(wish["clock_jumps"])
    run_module("tuner.cli", request["run"])


def _let_signals_in() -> None:
    """A terminal's: whoever is run in the background, or under nohup, ignores some of them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _adopt_orphans() -> None:
    """Become the parent of processes whose parent ends: so a worker is its run's child."""
    set_child_subreaper = 36
    if ctypes.CDLL(None, use_errno=True).prctl(set_child_subreaper, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def take_over(standard: list[int], cwd: str | None = None) -> None:
    """Let these be the standard streams, and close every other descriptor."""
    kept = [os.dup(each) for each in standard]
    for number, each in enumerate(kept):
        os.dup2(each, number)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        if int(name) > 2:
            try:
                os.close(int(name))
            except OSError:
                continue  # the listing's own
    if cwd is not None:
        os.chdir(cwd)


def run_module(name: str, arguments: list[str]) -> NoReturn:
    """Do what `python -m NAME ARGUMENTS` does, and end."""
    sys.argv = [name, *arguments]
    code: Any = 0
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001 (as Python does)
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code or 0)


# --- the process that forks a run's workers: as it was before the run began ------------------------------


def _fork_worker_maker(wish: Mapping[str, Any]) -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _make_workers(theirs, wish)
    theirs.close()
    return ours


def _make_workers(requests: socket.socket, wish: Mapping[str, Any]) -> NoReturn:
    is_first = True
    while True:
        try:
            request, descriptors = take_request(requests)
        except (EOFError, OSError):
            os._exit(0)
        between = os.fork()
        if between == 0:
            worker = os.fork()
            if worker == 0:
                os.setsid()
                take_over(descriptors)
                os.environ.clear()
                os.environ.update(request["env"])
                _set_seams("worker", wish if is_first else {**wish, "trap": None})
                module, *arguments = request["run"]
                run_module(module, arguments)
            send_request(requests, {"pid": worker})
            os._exit(0)
        os.waitpid(between, 0)
        is_first = False
        for descriptor in descriptors:
            os.close(descriptor)


# --- seams and the clock -----------------------------------------------------------------------------------


def _set_seams(process: str, wish: Mapping[str, Any]) -> None:
    from sqlalchemy.engine.default import DefaultDialect

    trap: dict[str, Any] = wish["trap"] or {}
    if trap.get("process") != process and wish["tally"] is None:
        return
    fatal = (trap["seam"], trap["number"]) if trap.get("process") == process else None
    tally = os.open(wish["tally"] or os.devnull, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    counts = Counter[str]()

    def seamed(seam: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            counts[seam] += 1
            os.write(tally, f"{process} {seam}\n".encode())
            is_fatal = fatal == (seam, counts[seam])
            if is_fatal and not trap["after"]:
                os.kill(os.getpid(), signal.SIGKILL)
            returned = call(*arguments, **named)
            if is_fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return returned

        return counted

    for seam, names in (
        ("rename", ("rename", "replace")),
        ("sync", ("fsync",)),
        ("delete", ("unlink", "rmdir")),
    ):
        for name in names:
            setattr(os, name, seamed(seam, getattr(os, name)))
    DefaultDialect.do_commit = seamed("commit", DefaultDialect.do_commit)  # type: ignore[method-assign]


def _let_clock_jump(jumps: list[float]) -> None:
    """Let the system's clock be wrong, by another time after each tenth question."""
    true, asked = time.time, iter(range(10**9))

    def jumping() -> float:
        return true() + jumps[next(asked) // 10 % len(jumps)]

    time.time = jumping


if __name__ == "__main__":
    main()
