"""Worker programs that start at once, as forks of a process that has loaded the libraries.

Loading torch, transformers and peft takes a worker five seconds of CPU, and hundreds of tests start one.
What a fork is asked to do, its pipes, its number and its exit are those of `python -m tuner.training`, and
tuner itself it loads from scratch. Most of engines, and all of faults and commands, are tested with processes
of their own.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tests import unsynced
from tests.faults.warm import run_module, send_request, take_over, take_request

ROOT = Path(__file__).parents[1]
PROGRAM = "tuner.training"
_NOT_FOR_LIBRARIES = {
    *("PYTHONPATH", "_TUNER_WORKER", "PYTEST_CURRENT_TEST", "COLUMNS", "CUDA_VISIBLE_DEVICES"),
    "TORCHINDUCTOR_CACHE_DIR",  # torch sets it in the tests' process, once its compiler is loaded there
}
"""Variables that no library reads while it is loaded; where others differ, a worker starts as always."""
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_SET_CHILD_SUBREAPER = 36

is_on = False
"""Whether the test that runs is served."""


class Popen(subprocess.Popen[Any]):
    """Forks a worker program; starts everything else as always."""

    def _execute_child(self, *arguments: Any) -> None:
        execute = super()._execute_child  # type: ignore[misc]
        asked = inspect.signature(execute).bind(*arguments).arguments
        environment = asked["env"]
        if (
            not is_on
            or list(asked["args"]) != [sys.executable, "-m", PROGRAM]
            or not asked["start_new_session"]
            or environment is None
            or not _maker().suits(environment)
        ):
            execute(*arguments)
            return
        work = {"env": dict(environment), "cwd": os.fspath(asked["cwd"] or Path.cwd()), "umask": _umask()}
        self.pid = _maker().fork(work, *(asked[name] for name in ("p2cread", "c2pwrite", "errwrite")))
        self._child_created = True
        self._close_pipe_fds(*(asked[name] for name in _PIPES))  # type: ignore[attr-defined]


class Maker:
    """The process that has loaded the libraries, as its parent sees it."""

    def __init__(self) -> None:
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._lock = threading.Lock()
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_workers", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=self._environment,
                cwd=ROOT,
            )

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether libraries that are loaded with these variables are those of the process."""
        return _for_libraries(environment) == _for_libraries(self._environment)

    def fork(self, work: Mapping[str, Any], *descriptors: int) -> int:
        """The number of a new worker, a child of this process as one that it starts itself."""
        prctl = ctypes.CDLL(None).prctl
        with self._lock:
            prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                send_request(self._requests, work, *descriptors)
                pid: int = take_request(self._requests)[0]["pid"]
            finally:
                prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return pid

    def close(self) -> None:
        """End the process."""
        self._requests.close()
        self._process.wait(60)


_makers: list[Maker] = []


def _maker() -> Maker:
    if not _makers:
        _makers.append(Maker())
    return _makers[0]


def close() -> None:
    """End the process if it was started."""
    while _makers:
        _makers.pop().close()


def _for_libraries(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name not in _NOT_FOR_LIBRARIES and not name.startswith("TUNER_")
    }


def _umask() -> int:
    """This process's, which cannot be asked for without setting it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    raise AssertionError("Linux says its umask")


# --- the process that forks ----------------------------------------------------------------------------


def main() -> NoReturn:
    """Fork workers until the tests close the socket."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM, AutoTokenizer  # transformers loads what is named
    unsynced.install_for_files()
    written = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    installed = [place for place in sys.path[1:] if place not in written]
    requests = socket.socket(fileno=int(sys.argv[1]))
    while True:
        try:
            work, descriptors = take_request(requests)
        except EOFError:
            os._exit(0)
        told, tells = os.pipe()
        between = os.fork()
        if between == 0:
            worker = os.fork()
            if worker == 0:
                _be_a_worker(work, descriptors, installed)
            os.write(tells, str(worker).encode())
            os._exit(0)
        os.waitpid(between, 0)  # now the worker is a child of the tests' process, which is told only then
        send_request(requests, {"pid": int(os.read(told, 32))})
        for descriptor in (told, tells, *descriptors):
            os.close(descriptor)


def _be_a_worker(work: Mapping[str, Any], descriptors: list[int], installed: list[str]) -> NoReturn:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    take_over(descriptors, work["cwd"])
    os.umask(work["umask"])
    os.environ.clear()
    os.environ.update(work["env"])
    named = [place for place in work["env"].get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [work["cwd"], *named, *installed]
    importlib.invalidate_caches()
    run_module(PROGRAM, [])


if __name__ == "__main__":
    main()
