"""Workers in separate processes, with assignments and events as JSON lines; several of them as one."""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from tuner.engines.protocol import HasProcesses, Program, Worker
from tuner.errors import exit_words, last_words
from tuner.pipes import RESTING
from tuner.records import (
    Assignment,
    Beat,
    Checkpoint,
    CheckpointKind,
    Died,
    Ended,
    Event,
    Preparing,
    Ready,
    Remarked,
    RunId,
    Saved,
    Started,
    event_from_json,
    to_json,
)

_log = logging.getLogger(__name__)


class Process(Protocol):
    """The parent's connection to a running worker program."""

    def write(self, line: str) -> None:
        """Write a line to its standard input; do nothing if it has ended."""
        ...

    def lines(self) -> Iterator[str]:
        """Yield the lines of its standard output until it ends. Called in a separate thread."""
        ...

    def wait(self, timeout_seconds: float | None = None) -> int:
        """Return its exit code, negative for a signal. Raises TimeoutError if it has not ended by then."""
        ...

    def kill(self) -> None:
        """End it at once, without saving."""
        ...

    def last_words(self) -> str:
        """Return the end of its log, to show to the user."""
        ...


LOADING_SECONDS = 1800.0
"""How long a worker may be silent, unless it says otherwise, before it is ready."""
_AWAY_SECONDS = 30.0
"""After so long without a call, this process itself has been stopped, or its machine suspended."""

_RESTS_WITHIN_SECONDS = 60.0

_ENDS_WITHIN_SECONDS = 30.0
"""After SIGKILL. A process that waits for a device or a disk does not end, and is left to the system."""

_EXITS_WITHIN_SECONDS = 60.0
"""After it has said that it dies. One that the driver of its GPU keeps is killed then."""

_RUNNING: set[Process] = set()


def end_all_processes() -> None:
    """Kill every worker that this process has started, without saving."""
    for process in tuple(_RUNNING):
        process.kill()


def end_at_once(worker: Worker) -> None:
    """Kill the processes of one worker, without saving; other workers of this process go on."""
    if isinstance(worker, HasProcesses):
        worker.kill()


class Silence:
    """How long a worker has said nothing, and how long it may.

    Until it is ready that is a given time. Then its heartbeats say so; without any there is no limit.
    """

    def __init__(self, loading_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._loading_seconds, self._clock = loading_seconds, clock
        self.begin()

    def begin(self) -> None:
        """A process starts."""
        self._allowed: float | None = self._loading_seconds
        self._doing = "loading"
        self._beats = False
        self._heard_at = self._asked_at = self._clock()

    def heard(self, event: Event) -> None:
        """Take what the worker says."""
        self._heard_at = self._clock()
        match event:
            case Beat(doing=doing, allowed_seconds=allowed):
                self._doing, self._allowed, self._beats = doing, allowed, True
            case Preparing(doing=doing):
                self._doing = doing
            case Ready():
                self._allowed = None

    def ordered(self) -> None:
        """A worker that waits without a limit has been given work: if it has heartbeats, a limit begins."""
        if self._beats and self._allowed is None:
            self._doing, self._allowed, self._heard_at = (
                "starting a trial",
                self._loading_seconds,
                self._clock(),
            )

    def too_long(self) -> str | None:
        """Return a sentence if the worker has been silent for longer than it may; ask every few seconds."""
        now = self._clock()
        if now - self._asked_at > _AWAY_SECONDS:
            self._heard_at = now  # what it said meanwhile has not been read yet
        self._asked_at = now
        if self._allowed is None or now - self._heard_at <= self._allowed:
            return None
        return (
            f"the worker said nothing for {now - self._heard_at:.0f} seconds ({self._doing}) and was killed; "
            "its trials resume from their checkpoints"
        )


class ProgramWorker:
    """A process of a worker program, started at once and, after it died, again for the next trial.

    The program reports its number of slots once it is ready.
    """

    def __init__(
        self,
        program: Program,
        launch: Callable[[], Process],
        *,
        close_seconds: float = 300.0,
        silence_seconds: float = LOADING_SECONDS,
    ) -> None:
        """`silence_seconds` is how long it may be silent while it loads; see `Silence`."""
        self._program = program
        self._launch = launch
        self._close_seconds = close_seconds
        self._silence = Silence(silence_seconds)
        self._slots = 0
        self._reader: threading.Thread | None = None
        self._said: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._rests = False
        self._remaining: list[Event] = []
        """What it said before it came to rest."""
        self._held: set[RunId] = set()
        self._why_killed: str | None = None
        """Why the current process was killed, if it hung."""
        self._killed_at: float | None = None
        self._dead: set[Process] = set()
        """Those whose death has been said: a second one would be taken for a successor's."""
        self._saying = threading.Lock()
        self._left: dict[Process, str] = {}
        """Processes that were killed and did not end, with what to say: nobody waits for them, or listens."""
        self.process: Process | None = None
        """The current process."""
        self._begin()

    def capacity(self) -> int:
        """Number of free slots; 1 if the process died before reporting, to try again."""
        if self.process is None and not self._slots:
            return 1
        return self._slots - len(self._held)

    def start(self, assignment: Assignment) -> None:
        """Start a trial's attempt, in a new process if none runs."""
        if self.process is None:
            self._begin()
        self._held.add(assignment.run)
        self._silence.ordered()
        self._order({"order": "start", "assignment": to_json(assignment)})

    def stop(self, run: RunId) -> None:
        """Ask a run to save and stop; one that died with its process needs no asking."""
        if run in self._held:
            self._order({"order": "stop", "run": to_json(run)})

    def events(self, timeout_seconds: float) -> list[Event]:
        """Return the events since the last call; wait up to the timeout for the first."""
        said, self._remaining = self._remaining, []
        try:
            said.append(
                self._said.get(timeout=timeout_seconds) if timeout_seconds > 0 else self._said.get_nowait()
            )
            while True:
                said.append(self._said.get_nowait())
        except queue.Empty:
            pass
        self._end_if_silent()
        return [self._noted(event) for event in said if not isinstance(event, Beat)]

    def close(self) -> None:
        """Save every trial, then end the process; kill it if that takes too long."""
        if self.process is None:
            return
        self._order({"order": "close"})
        until = time.monotonic() + self._close_seconds
        while self.process not in self._left and not _has_ended(self.process, 0.5):
            self._end_if_silent()
            if self._killed_at is None and time.monotonic() > until:
                self.kill()
        if (reason := self._left.get(self.process)) is not None:
            _log.warning("%s", reason)
        self._forget()

    def rest(self) -> bool:
        """Let it wait for another round, with the base model; False if it does not, and is to be closed.

        It must be ready and hold no trial. A last call of `events` returns the remaining events.
        """
        if self.process is None or self._held or not self._slots or self._rests:
            return self._rests
        self._order({"order": "rest"})
        until = time.monotonic() + _RESTS_WITHIN_SECONDS
        said: list[Event] = []
        while self.process is not None and time.monotonic() < until and Preparing(RESTING) not in said:
            said += self.events(0.1)
        self._remaining = [event for event in said if event != Preparing(RESTING)]
        self._rests = Preparing(RESTING) in said
        return self._rests

    def begin_round(
        self, program: Program, launch: Callable[[], Process], *, log: str, silence_seconds: float
    ) -> None:
        """Give a resting worker another round, as if it were started for it; `log` is a path of its machine.

        One that has died meanwhile says so, as any worker that dies before it is ready.
        """
        self._program, self._launch, self._slots = program, launch, 0
        self._rests, self._remaining = False, []
        self._silence = Silence(silence_seconds)
        self._order({"order": "round", "document": {**program.document(), "log": log}})

    @property
    def is_alive(self) -> bool:
        """Return whether its process runs."""
        return self.process is not None and not _has_ended(self.process, 0.0)

    def kill(self) -> None:
        """As `HasProcesses` says."""
        if self.process is not None:
            self._killed_at = time.monotonic()
            self.process.kill()

    def _end_if_silent(self) -> None:
        """Kill a process that hangs: it saves nothing more, and its trials resume in another one.

        One that does not end then is left, as if it were dead.
        """
        if self.process is None or self.process in self._left:
            return
        if self._killed_at is None:
            if (why := self._silence.too_long()) is not None:
                self._why_killed = why
                self.kill()
        elif (waited := time.monotonic() - self._killed_at) > _ENDS_WITHIN_SECONDS:
            self._leave(self.process, self._why_killed or "the worker was killed", waited)

    def _leave(self, process: Process, why: str, waited: float) -> None:
        """Wait no longer for a process that was killed, and say why."""
        self._left[process] = reason = (
            f"{why}. It has not ended {waited:.0f} s later: it waits for a GPU or a disk that hangs (state D "
            f"in `ps`), which may need a restart of the machine; {process.last_words()}"
        )
        self._say_died(process, Died(reason))

    def _noted(self, event: Event) -> Event:
        """Update the slots from an event; add the lost trials to a death."""
        match event:
            case Ended(run=run):
                self._held.discard(run)
            case Ready(slots=slots):
                self._slots = slots
            case Died():
                event = replace(event, runs=tuple(sorted(self._held, key=str)))
                self._held.clear()
                self._forget()
        return event

    def _begin(self) -> None:
        self.process = self._launch()
        self._silence.begin()
        self._why_killed = self._killed_at = None
        _RUNNING.add(self.process)
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        self._order(dict(self._program.document()))

    def _order(self, document: Mapping[str, Any]) -> None:
        assert self.process is not None
        self.process.write(json.dumps(document) + "\n")

    def _read(self, process: Process) -> None:
        """Pass on what a process says, up to its death."""
        try:
            for event in _events_of(process):
                if process not in self._dead:
                    self._silence.heard(event)
                    if isinstance(event, Died):
                        self._say_died(process, event)
                    else:
                        self._said.put(event)
            code = process.wait()
            if code != 0 and process not in self._dead:
                why = self._why_killed or f"the worker ended with {exit_words(code)}"
                self._say_died(process, Died(f"{why}; {process.last_words()}"))
        except Exception as error:  # noqa: BLE001  nobody else would ever say that the worker has ended
            process.kill()
            self._say_died(process, Died(f"reading the worker's events failed: {last_words(error)}"))

    def _say_died(self, process: Process, death: Died) -> None:
        """Say a process's death, unless the reader, or who waits for it, has said it at the same moment."""
        with self._saying:
            if process not in self._dead:
                self._dead.add(process)
                self._said.put(death)

    def _forget(self) -> None:
        """Wait for the end of a process that has said its death, so that its GPU is free for another one."""
        self._rests = False
        process, self.process = self.process, None
        if process is None:
            return
        if process not in self._left and not _has_ended(process, _EXITS_WITHIN_SECONDS):
            process.kill()
            if not _has_ended(process, _ENDS_WITHIN_SECONDS):
                self._leave(process, "the worker was killed", _ENDS_WITHIN_SECONDS)
                _log.warning("%s", self._left[process])
        _RUNNING.discard(process)
        if process not in self._left and self._reader is not None:
            self._reader.join()


def _events_of(process: Process) -> Iterator[Event]:
    """Yield the events in a process's lines to its end; kill it and yield its death if one is unknown."""
    for line in process.lines():
        try:
            yield event_from_json(json.loads(line))
        except ValueError:
            continue  # a last line truncated by the death of the process
        except (KeyError, TypeError) as error:
            process.kill()
            yield Died(
                f"cannot read the worker's message ({type(error).__name__}: {error}): was tuner upgraded "
                "meanwhile? Run the same command again to resume"
            )


def _has_ended(process: Process, timeout_seconds: float) -> bool:
    try:
        process.wait(timeout_seconds)
    except TimeoutError:
        return False
    return True


MAX_DEATHS = 2
"""Consecutive deaths before being ready after which a device counts as broken."""
_POLL_SECONDS = 0.02


MAX_ALIKE = 3
"""Failures in a row with one cause after which a worker is stopped."""
_EXCEPTION = re.compile(r"[\w.]*(Error|Exception|Exit)\b.*")


class Breaker:
    """The failures of a worker in a row, without a new checkpoint or a trial's end between them."""

    def __init__(self) -> None:
        self._cause, self._count = "", 0
        self._trials: list[int] = []
        """Of the failures that were counted."""
        self._started: set[RunId] = set()

    def heard(self, event: Event) -> str | None:
        """Take an event; return the reason once there were too many failures with one cause."""
        match event:
            case Started(run=run):
                self._started.add(run)
            case Saved(checkpoint=Checkpoint(kind=kind)) if kind != CheckpointKind.BEST:
                self._count = 0
            case Ended(run=run, outcome="failed") if run not in self._started:
                pass  # its checkpoint could not be read, which is no fault of the worker
            case Ended(run=run, outcome="failed", reason=reason):
                self._started.discard(run)
                return self._failed(reason or "", run.trial)
            case Ended(run=run, outcome="complete" | "infeasible" | "pruned"):
                self._started.discard(run)
                self._count = 0
            case Died(reason=reason, runs=runs):
                self._started.clear()
                return self._failed(reason, *(run.trial for run in runs))
        return None

    def _failed(self, reason: str, *trials: int) -> str | None:
        cause = cause_of(reason)
        self._count = self._count + 1 if cause == self._cause else 1
        self._trials = [*(self._trials if self._count > 1 else ()), *trials]
        self._cause = cause
        if self._count != MAX_ALIKE:
            return None
        return (
            f"{MAX_ALIKE} failures in a row with one cause{_whose(self._trials)}: {reason}. Remove the cause"
        )


def _whose(trials: Sequence[int]) -> str:
    """Return whose failures they were, as the second part of a sentence; empty if they were of no trial."""
    match sorted(set(trials)):
        case []:
            return ""
        case [number]:
            return f", all of trial {number}, whose hyperparameters may be the cause"
        case numbers:
            return f", of the trials {', '.join(map(str, numbers))}"


def cause_of(reason: str) -> str:
    """Return what failures with one cause have in common: no numbers, and of a log its last exception."""
    first, *tail = reason.splitlines() or [""]
    raised = next((found for line in reversed(tail) if (found := _EXCEPTION.search(line))), None)
    return re.sub(r"\d+", "#", first + (raised[0] if raised else ""))


class WorkerPool:
    """A worker that combines several. The first starts at once, the others with the first trial.

    By then, the first one has prepared the data and measured the base model, and the others reuse both.
    """

    def __init__(self, makers: Sequence[Callable[[], Worker]]) -> None:
        self._waiting = list(makers[1:])
        self._workers = [makers[0]()]
        self._holder: dict[RunId, Worker] = {}
        """Run -> its worker."""
        self._deaths: dict[Worker, int] = {}
        """Consecutive deaths of a worker before being ready."""
        self._breakers: dict[Worker, Breaker] = defaultdict(Breaker)

    def capacity(self) -> int:
        """Number of free slots in workers that are ready."""
        return sum(worker.capacity() for worker in self._workers)

    def start(self, assignment: Assignment) -> None:
        """Start a trial on the worker with the most free slots."""
        while self._waiting:
            self._workers.append(self._waiting.pop(0)())
        worker = max(self._workers, key=lambda worker: worker.capacity())
        self._holder[assignment.run] = worker
        worker.start(assignment)

    def stop(self, run: RunId) -> None:
        """Ask a run to save and stop."""
        if run in self._holder:
            self._holder[run].stop(run)

    def events(self, timeout_seconds: float) -> list[Event]:
        """Return all events since the last call; wait up to the timeout for the first."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            said = [event for worker in list(self._workers) for event in self._heard(worker)]
            left = deadline - time.monotonic()
            if said or left <= 0:
                return said
            time.sleep(min(_POLL_SECONDS, left))

    def _heard(self, worker: Worker) -> list[Event]:
        """Return a worker's events; drop one that keeps failing if there is another, else end the round."""
        said = worker.events(0.0)
        for event in tuple(said):
            if (why := self._breakers[worker].heard(event)) is not None and worker in self._workers:
                said += self._stopped(worker, why)
            if isinstance(event, Ready):
                self._deaths.pop(worker, None)
            elif isinstance(event, Died):
                self._deaths[worker] = self._deaths.get(worker, 0) + 1
                has_others = len(self._workers) > 1 and worker in self._workers
                if self._deaths[worker] == MAX_DEATHS and has_others:
                    self._workers.remove(worker)
        return said

    def _stopped(self, worker: Worker, why: str) -> list[Event]:
        """Stop a worker for good; return its last events and what to say."""
        if len(self._workers) == 1:
            return [Died(f"the round stops after {why}", is_input_error=True)]
        self._workers.remove(worker)
        worker.close()
        left = f"{len(self._workers)} of {len(self._workers) + 1} workers go on"
        return [*worker.events(0.0), Remarked(f"warning: a worker is stopped after {why}\n{left}")]

    def close(self) -> None:
        """Save every trial, then end the workers one after another."""
        self._waiting.clear()
        for worker in self._workers:
            worker.close()

    def kill(self) -> None:
        """As `HasProcesses` says."""
        self._waiting.clear()
        for worker in self._workers:
            end_at_once(worker)
