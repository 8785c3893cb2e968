"""A worker as a subprocess of this machine: JSON lines on its pipes, its log in a file."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.errors import WorkerError
from tuner.records import Assignment, Died, Ended, Event, Ready, event_from_json, to_json

_LOG_TAIL_LINES = 15


def wait_for_former_workers(lock: Path, *, timeout_seconds: float = 60.0) -> None:
    """Wait until no worker of an earlier run holds the lock: two never write one folder.

    A worker whose parent was killed ends by itself, at once. Raises WorkerError when one does not.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_seconds
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise WorkerError(
                        f"{lock}: a worker of an earlier run is still there after {timeout_seconds:.0f} "
                        "seconds; end it (`pkill -f tuner.training`)"
                    ) from error
                time.sleep(0.1)


class LocalWorker:
    """One subprocess for one device, started at once, and again for the next trial after it died.

    `document` is called at each start and gives what `tuner.training` reads first; its keys are
    `spec`, `slots` (a number or "auto"), `cache`, `lock` and, once known, `base`. How many slots there
    are the process says when it is ready.
    """

    def __init__(
        self,
        document: Callable[[], Mapping[str, Any]],
        *,
        log: Path,
        close_seconds: float = 300.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._document = document
        self._slots = 0
        self._log = log
        self._close_seconds = close_seconds
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._said: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._held: set[int] = set()
        self._spawn()

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._process.pid if self._process else None

    def capacity(self) -> int:
        """Slots that are free now; of a process that died before it said how many, one to try it again."""
        if self._process is None and not self._slots:
            return 1
        return self._slots - len(self._held)

    def start(self, assignment: Assignment) -> None:
        """Begin a trial's attempt, in a new process if there is none."""
        if self._process is None:
            self._spawn()
        self._held.add(assignment.trial)
        self._send({"command": "start", "assignment": to_json(assignment)})

    def stop(self, trial: int) -> None:
        """Ask a trial to save itself and leave."""
        self._send({"command": "stop", "trial": trial})

    def events(self, timeout_seconds: float) -> list[Event]:
        """What was said since the last call; waits for the first at most so long."""
        said: list[Event] = []
        try:
            said.append(
                self._said.get(timeout=timeout_seconds) if timeout_seconds > 0 else self._said.get_nowait()
            )
            while True:
                said.append(self._said.get_nowait())
        except queue.Empty:
            pass
        return [self._noted(event) for event in said]

    def _noted(self, event: Event) -> Event:
        """What an event says of the slots; of a death, which trials it took along."""
        match event:
            case Ended(trial=trial):
                self._held.discard(trial)
            case Ready(slots=slots):
                self._slots = slots
            case Died():
                event = replace(event, trials=tuple(sorted(self._held)))
                self._held.clear()
                self._forget()
        return event

    def close(self) -> None:
        """Let every trial save, then end the process; kill it when that takes too long."""
        if self._process is None:
            return
        self._send({"command": "close"})
        try:
            self._process.wait(self._close_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._forget()

    def kill(self) -> None:
        """End the process at once, saving nothing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _spawn(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            log.write(f"--- worker starts {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            log.flush()
            # Its own session: Ctrl-C in the terminal reaches the parent alone, which then closes it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tuner.training"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                start_new_session=True,
                env=self._environment,
            )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()
        self._send(dict(self._document()))

    def _send(self, document: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        if self._process.stdin.closed:
            return
        try:
            self._process.stdin.write(json.dumps(document) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # the process is gone: its reader says Died

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        said_died = False
        for line in process.stdout:
            try:
                event = event_from_json(json.loads(line))
            except ValueError:
                continue  # a last line that the death of the process cut in two
            except (KeyError, TypeError) as error:
                process.kill()
                event = Died(
                    f"the worker says what this process does not know ({type(error).__name__}: {error}): was "
                    "tuner upgraded meanwhile? The same command, given again, goes on"
                )
            said_died = said_died or isinstance(event, Died)
            self._said.put(event)
        code = process.wait()
        if code != 0 and not said_died:
            self._said.put(
                Died(f"the worker ended with {_exit(code)}; its log, {self._log}, ends with:\n{self._tail()}")
            )

    def _forget(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.wait()
            if self._reader is not None:
                self._reader.join()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue  # nobody was left to read the command

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-_LOG_TAIL_LINES:])


def _exit(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
