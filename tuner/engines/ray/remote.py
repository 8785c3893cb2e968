"""A worker program on another node, as its parent sees it: a process whose lines arrive in order, each once.

Its parent polls in a thread of its own, so that a slow database or upload never looks like silence.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tuner.engines.ray.host import Heard
from tuner.engines.ray.transfer import fetch, fetch_more, give_back, until_room
from tuner.process_log import halved, last_lines
from tuner.records import Died, event_to_json
from tuner.report.format import GpuReading
from tuner.whole import digest

SILENCE_SECONDS = 60.0
"""A node that answers nothing for so long is lost. Its worker ends as long after, by the host's lease."""
START_SECONDS = 300.0
"""The same for its first answer: many hosts of a node may be starting."""
POLL_SECONDS = 5.0
_PAUSE_SECONDS = 0.05
_SLACK_SECONDS = 20.0
"""How long a poll's answer may be under way."""
_LONG_CALL_SECONDS = 3600.0
_TRIES = 5
LOG_SECONDS = 5.0
"""How often the logs of commands on a node are fetched."""


class Unavailable(Exception):
    """A call got no answer: it may have been carried out or not, and is to be repeated."""


class HostLost(Exception):
    """The host has died, or was silent for too long. The message says which."""


class HostFailed(Exception):
    """The host could not do what it was asked, such as for lack of disk space."""


class Connection(Protocol):
    """Calls the methods of a host on another node."""

    def call(self, method: str, *arguments: Any, timeout_seconds: float) -> Any:
        """Call a method of `Host`. Raises Unavailable, HostLost or HostFailed."""
        ...

    def end(self) -> None:
        """End the host and what it runs, at once; calls that wait for it raise HostLost. May be repeated."""
        ...


class RemoteHost:
    """A host, polled from now on; calls are repeated until they are answered or the host is lost."""

    def __init__(
        self, connection: Connection, *, name: str, log: Path, silence_seconds: float = SILENCE_SECONDS
    ) -> None:
        self.name = name
        """Names the node in messages."""
        self.log = log
        self.gpus: tuple[GpuReading, ...] = ()
        self.lost: str | None = None
        """Why the host is gone; None while it answers."""
        self.exit_code: int | None = None
        """Of its worker, once its last line has arrived."""
        self.over = threading.Event()
        """Set when no more lines will arrive."""
        self._arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._connection = connection
        self._silence_seconds = silence_seconds
        self._log_bytes = 0
        self._wanted = True
        threading.Thread(target=self._poll, daemon=True, name=f"poll {name}").start()

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the host. Raises HostLost or HostFailed."""
        while self.lost is None:
            try:
                return self._connection.call(method, *arguments, timeout_seconds=_LONG_CALL_SECONDS)
            except Unavailable:
                time.sleep(_PAUSE_SECONDS)
        raise HostLost(self.lost)

    def lines(self) -> Iterator[str]:
        """Yield the worker's lines until its end, or until the host is lost; none if called again."""
        while (line := self._arrived.get()) is not None:
            yield line
        self._arrived.put(None)

    def end(self) -> None:
        """End the host and its worker."""
        self._wanted = False
        self._connection.end()

    def _poll(self) -> None:
        taken, heard_at = 0, time.monotonic()
        patience = max(START_SECONDS, self._silence_seconds)
        while self._wanted:
            try:
                heard: Heard = self._connection.call(
                    "events",
                    taken,
                    min(POLL_SECONDS, self._silence_seconds / 4),
                    self._log_bytes,
                    timeout_seconds=min(
                        POLL_SECONDS + _SLACK_SECONDS, heard_at + patience - time.monotonic() + 1
                    ),
                )
            except Unavailable as error:
                silent = time.monotonic() - heard_at
                if silent > patience:
                    self.lost = f"{self.name} has not answered for {silent:.0f} seconds ({error})"
                    break
                time.sleep(_PAUSE_SECONDS)
                continue
            except (HostLost, HostFailed) as error:
                self.lost = f"{self.name}: {error}"
                break
            heard_at, patience = time.monotonic(), self._silence_seconds
            taken += len(heard.lines)
            self.gpus = heard.gpus
            self._write_log(heard.log)
            for line in heard.lines:
                self._arrived.put(line)
            if heard.exit_code is not None and not heard.log:
                self.exit_code = heard.exit_code
                break
        if self.lost is None and self.exit_code is None:
            self.lost = f"{self.name}: its worker was ended"
        self.over.set()
        self._arrived.put(None)
        if self.lost is not None:
            self._connection.end()

    def _write_log(self, part: bytes) -> None:
        if part:
            self._log_bytes += len(part)
            halved(self.log)
            with suppress(OSError), self.log.open("ab") as file:  # a full disk costs a log, not the round
                file.write(part)

    def log_tail(self) -> str:
        """Return the last lines of the worker's log, to show to the user."""
        if not self.log.exists():
            return f"{self.name} wrote no log"
        return last_lines(self.log)


@dataclass(frozen=True)
class Places:
    """Where a node has what the parent's documents name."""

    directory: Path
    """The job's folder of checkpoints, at the parent."""
    there: Mapping[str, str] = field(default_factory=dict)
    """Path of a file or directory at the parent -> path on the node; what is not in it is the same."""

    @property
    def is_shared(self) -> bool:
        """Return whether the node writes checkpoints where the parent reads them."""
        here = str(self.directory)
        return self.there.get(here, here) == here

    def here(self, path: str) -> Path:
        """Return where the parent keeps what a worker writes to its folder of checkpoints."""
        return self.directory / Path(path).relative_to(self.there[str(self.directory)])

    def moved(self, value: Any) -> Any:
        """Return a JSON value whose strings that begin with a known path name the node's."""
        match value:
            case str():
                return self._moved(value)
            case list():
                return [self.moved(item) for item in value]
            case dict():
                return {key: self.moved(item) for key, item in value.items()}
        return value

    def _moved(self, text: str) -> str:
        if text.startswith("-") and "=" in text:  # an option of a command
            name, _, value = text.partition("=")
            return f"{name}={self._moved(value)}"
        if not text.startswith("/"):
            return text
        for here in sorted(self.there, key=len, reverse=True):
            if text == here or text.startswith((f"{here}/", f"{here}:")):  # `metric.py:function`
                return self.there[here] + text[len(here) :]
        return text


class RemoteProcess:
    """A worker program on a node, as `ProgramWorker` drives one.

    Where the node does not see the parent's disk, a checkpoint is copied to it before its `Saved` is passed
    on, and deleted on the node afterwards; an assignment's starting point is sent before the assignment.
    """

    def __init__(
        self,
        host: RemoteHost,
        places: Places,
        *,
        token: str,
        environment: Mapping[str, str],
        patience_seconds: float = 600.0,
        follows_logs: bool = False,
    ) -> None:
        """`patience_seconds` is how long this machine's disk may be full.

        With `follows_logs` the logs in a trial's folder arrive while it runs, and not only at its end.
        """
        self.host = host
        self._patience_seconds = patience_seconds
        self.places = places
        """Where the node has what the parent names."""
        self._token = token
        self._environment = dict(environment)
        """Added to each attempt's environment: its node, GPUs and worker."""
        self._orders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._is_first = True
        self._directories: dict[tuple[int, int | None], str] = {}
        """Trial and horizon of a run -> its directory on the node."""
        self._ended = threading.Event()
        self._code = 1
        self._logs: dict[str, int] = {}
        """Log on the node -> how many of its bytes are here."""
        self._logs_lock = threading.Lock()
        threading.Thread(target=self._send_orders, daemon=True, name=f"orders {host.name}").start()
        if follows_logs and not places.is_shared:
            threading.Thread(target=self._follow_logs, daemon=True, name=f"logs {host.name}").start()

    def write(self, line: str) -> None:
        """Queue a line for its input."""
        self._orders.put(line)

    def lines(self) -> Iterator[str]:
        """Yield its lines, each after the checkpoint that it names; at its end, end the host."""
        try:
            for line in self.host.lines():
                yield self._arrived(line)
            if self.host.lost is not None:
                yield _died(self.host.lost)
        except (HostLost, HostFailed, OSError, ValueError) as error:
            # Without this checkpoint what follows is not true: an end without a best adapter, for one.
            yield _died(f"{self.host.name}: a checkpoint did not arrive: {self.host.lost or error}")
        finally:
            self._code = self.host.exit_code if self.host.exit_code is not None else 1
            self._orders.put(None)
            self._clean_up()
            self.host.end()
            self._ended.set()

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Return its exit code once its last line is passed on; 1 if its host was lost."""
        if not self._ended.wait(timeout_seconds):
            raise TimeoutError(f"{self.host.name}: the worker has not ended")
        return self._code

    def kill(self) -> None:
        """End worker and host at once."""
        self.host.end()

    def last_words(self) -> str:
        """Return the end of its log."""
        return self.host.log_tail()

    # --- to the node ------------------------------------------------------------------------------

    def _send_orders(self) -> None:
        number = 0
        try:
            while (line := self._orders.get()) is not None:
                number += 1
                self.host.call("order", number, self._for_the_node(line))
        except HostLost:
            return  # `lines` says so
        except (HostFailed, OSError, ValueError) as error:
            self.host.lost = f"{self.host.name}: an assignment could not be sent: {error}"
            self.host.end()

    def _for_the_node(self, line: str) -> str:
        document = json.loads(line)
        if self._is_first:
            self._is_first = False
            named = {there: here for here, there in self.places.there.items()}
            return json.dumps({**self.places.moved(document), "paths": named}) + "\n"
        if document.get("order") == "start":
            document = {"order": "start", "assignment": self._assignment(document["assignment"])}
        return json.dumps(document) + "\n"

    def _assignment(self, assignment: Mapping[str, Any]) -> dict[str, Any]:
        moved: dict[str, Any] = self.places.moved(dict(assignment))
        start, sha256 = assignment["resume_from"], assignment["resume_sha256"]
        if self.places.is_shared:
            return {**moved, "resume_from": start}
        horizon = assignment["max_train_steps"] if assignment["is_comparison"] else None
        self._directories[assignment["trial"], horizon] = moved["directory"]
        if start is None:
            return moved
        if Path(start).is_dir() and sha256 is not None:
            target = f"{moved['directory']}/start/{Path(start).name}"
            give_back(self.host.call, Path(start), target, sha256=sha256)
            moved["resume_from"] = target
        return moved

    # --- from the node ----------------------------------------------------------------------------

    def _arrived(self, line: str) -> str:
        try:
            document = json.loads(line)
            kind = document["event"]
        except (ValueError, KeyError, TypeError):
            return line  # for ProgramWorker to judge
        match kind:
            case "started":
                document["environment"] = {**document.get("environment", {}), **self._environment}
                return json.dumps(document)
            case "measured":
                measured = document["throughput"]
                measured["session"] = f"{self._environment['node']}/{measured['session']}"
                return json.dumps(document)
            case "saved" if not self.places.is_shared:
                self._take(document["checkpoint"])
            case "ended" if not self.places.is_shared:
                self._forget(document)
        return line

    def _take(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy a checkpoint here, unless a repeated save of the same step has brought it already.

        Such a save may replace the directory while it is read, so it is read again.
        """
        path, sha256 = checkpoint["path"], checkpoint["sha256"]
        source = f"{self.places.there[str(self.places.directory)]}/{path}"
        target = self.places.directory / path
        for left in reversed(range(_TRIES)):
            if target.is_dir() and digest(target) == sha256:
                break
            try:
                until_room(
                    lambda: fetch(self.host.call, source, target, sha256=sha256), self._patience_seconds
                )
            except (HostFailed, ValueError):
                if not left:
                    raise
                time.sleep(_PAUSE_SECONDS)
        self.host.call("delete", source)

    def _forget(self, ended: Mapping[str, Any]) -> None:
        """Delete what an ended attempt leaves on the node, but for its logs, which come here."""
        if (left := self._directories.pop((ended["trial"], ended.get("horizon")), None)) is None:
            return
        self._fetch_logs(left)
        self.host.call("delete", left)

    def _follow_logs(self) -> None:
        while not self._ended.wait(LOG_SECONDS):
            with suppress(HostLost, HostFailed):  # whoever reads its lines says so
                for directory in list(self._directories.values()):
                    self._fetch_logs(directory)

    def _fetch_logs(self, directory: str) -> None:
        """Fetch what is new in a folder's logs; a full disk costs a log, not the trial."""
        with self._logs_lock, suppress(OSError):
            for name, size in self.host.call("listing", directory):
                source = f"{directory}/{name}"
                if name.endswith(".log") and (taken := self._logs.get(source, 0)) < size:
                    target = self.places.here(directory) / name
                    self._logs[source] = fetch_more(self.host.call, source, target, size, taken)

    def _clean_up(self) -> None:
        """Delete the worker's folder on a node that still answers."""
        if self.host.lost is None:
            with suppress(HostLost, HostFailed):
                self.host.call("clean_up", self._token)


def _died(reason: str) -> str:
    return json.dumps(event_to_json(Died(reason)))
