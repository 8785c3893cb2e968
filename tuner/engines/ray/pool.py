"""How many workers run on which node, as nodes join and leave, and what has to agree before one is used."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from tuner.engines.program import ProgramWorker
from tuner.engines.protocol import Job
from tuner.engines.ray.nodes import Cluster, Node, NodeRecords, Seat, gpus_text, nearest, seats
from tuner.engines.ray.opening import Opener, Unlike
from tuner.engines.ray.remote import RemoteProcess
from tuner.errors import InputError, RoundStopped
from tuner.records import Assignment, Died, Ended, Event, NodeChange, NodeChanged, Preparing, Ready, RunId
from tuner.report.format import GpuReading, node_change

MAX_FAILURES = 3
"""Failures of a node's workers, without a trial that ended between them, after which it is left out."""
_SCAN_SECONDS = 2.0
_OPENING_AT_ONCE = 4
"""Workers that a node opens at the same time."""
_POLL_SECONDS = 0.02


class ClusterPool:
    """The workers of a cluster as one. The first opens at once, the others with the first trial."""

    def __init__(
        self, job: Job, cluster: Cluster, records: NodeRecords, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` returns seconds since the epoch."""
        self._job = job
        self._cluster = cluster
        self._records = records
        self._clock = clock
        self._gpus_per_worker = job.spec.run.gpus_per_worker
        self._said: queue.SimpleQueue[Preparing] = queue.SimpleQueue()
        """Events of the threads that open workers."""
        self._opened: queue.SimpleQueue[tuple[Seat, ProgramWorker | Exception]] = queue.SimpleQueue()
        self._opening: set[Seat] = set()
        self._workers: dict[ProgramWorker, Seat] = {}
        self._ready: dict[ProgramWorker, Ready] = {}
        self._holder: dict[RunId, ProgramWorker] = {}
        self._first: Ready | None = None
        self._grows, self._closed, self._has_asked = False, False, False
        self._scanned_at = self._waiting_since = time.monotonic() - _SCAN_SECONDS
        self._known: dict[str, Node] = {}
        self._opener = Opener(
            job,
            cluster,
            records,
            say=lambda doing: self._said.put(Preparing(doing)),
            known=lambda: list(self._known.values()),
        )
        self._grow()

    # --- a worker to the study --------------------------------------------------------------------

    def capacity(self) -> int:
        """Number of free slots in workers that are ready."""
        return sum(worker.capacity() for worker in self._ready)

    def start(self, assignment: Assignment) -> None:
        """Start a trial on the worker with the most free slots."""
        self._grows = True
        worker = max(self._ready, key=lambda worker: worker.capacity())
        self._holder[assignment.run] = worker
        worker.start(assignment)

    def stop(self, run: RunId) -> None:
        """Ask a run to save and stop."""
        if run in self._holder:
            self._holder[run].stop(run)

    def events(self, timeout_seconds: float) -> list[Event]:
        """Return all events since the last call; wait up to the timeout for the first.

        Raises RoundStopped if there was no worker, and no room for one, for `run.resources_patience`.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            said = [*self._spoken(), *self._settled()]
            for worker in list(self._workers):
                said += self._heard(worker)
            self._grow()
            left = deadline - time.monotonic()
            if said or left <= 0:
                return said
            time.sleep(min(_POLL_SECONDS, left))

    def close(self) -> None:
        """Save every trial, and end the workers at the same time."""
        self._closed = True
        self._opener.give_up()
        closing = [threading.Thread(target=worker.close) for worker in self._workers]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()
        while self._opening:
            seat, opened = self._opened.get()
            self._opening.discard(seat)
            if isinstance(opened, ProgramWorker):
                opened.close()
        self._cluster.request(0, gpus=self._gpus_per_worker)

    def kill(self) -> None:
        """As `HasProcesses` says; `close` ends those that are being opened."""
        self._closed = True
        for worker in list(self._workers):
            worker.kill()

    def gpu_readings(self) -> list[GpuReading]:
        """Return how busy the workers' GPUs are, each with its node's name."""
        return [
            replace(reading, name=f"{reading.name} on {seat.node.name}")
            for worker, seat in list(self._workers.items())
            if isinstance(worker.process, RemoteProcess)
            for reading in worker.process.host.gpus
        ]

    # --- what its parts say -----------------------------------------------------------------------

    def _spoken(self) -> Iterator[Event]:
        """Yield the events of openings; once the round has begun, also what became of nodes."""
        while not self._said.empty():
            yield self._said.get()
        if self._first is not None:
            changes, self._records.changes = self._records.changes, []
            yield from changes

    def _settled(self) -> list[Event]:
        """Take workers whose opening is over."""
        events: list[Event] = []
        while not self._opened.empty():
            seat, opened = self._opened.get()
            self._opening.discard(seat)
            if isinstance(opened, ProgramWorker):
                self._workers[opened] = seat
            else:
                events += self._refused(seat, opened)
        return events

    def _refused(self, seat: Seat, error: Exception) -> list[Event]:
        """Record why a worker could not be opened; before the first one is ready, that is an event."""
        is_certain = isinstance(error, (Unlike, InputError))
        self._failed(seat, str(error), leave_out=is_certain)
        if self._first is not None or (is_certain and self._has_others()):
            return []
        return [Died(f"{seat.node.name}: {error}", is_input_error=is_certain)]

    def _has_others(self) -> bool:
        nodes = [node for node in self._cluster.nodes() if node.id not in self._records.left_out]
        room = seats(nodes, gpus_per_worker=self._gpus_per_worker, workers=self._job.workers)
        return any(room.values())

    def _heard(self, worker: ProgramWorker) -> Iterator[Event]:
        for event in worker.events(0.0):
            seat = self._workers[worker]
            match event:
                case Ready():
                    if not self._is_alike(worker, event):
                        return
                    self._ready[worker] = event
                    # A full disk is that of its node.
                    event = replace(event, waits_for_disk=False, device=f"{event.device} on {seat.node.name}")
                case Preparing(doing=doing):
                    event = replace(event, doing=f"node {seat.node.name}: {doing}")
                case Ended(run=run):
                    self._holder.pop(run, None)
                    self._records.failures.pop(seat.node.id, None)
                case Died(reason=reason, runs=runs, is_input_error=is_input_error):
                    was_ready = self._ready.pop(worker, None) is not None
                    del self._workers[worker]
                    for run in runs:
                        self._holder.pop(run, None)
                    of_node = is_input_error and not was_ready and self._first is not None
                    self._failed(seat, reason, leave_out=of_node)
                    if self._first is not None and not runs and not (is_input_error and was_ready):
                        return  # it costs nothing: another takes its place
                    yield event
                    if self._ready:  # many workers of a node die in a row, and others are well
                        left = f"{len(self._ready)} of {len(self._ready) + 1} workers"
                        yield Preparing(f"{seat.node.name}: a worker was lost, {left} go on")
                    return
            yield event

    def _is_alike(self, worker: ProgramWorker, ready: Ready) -> bool:
        """Return whether a worker has the first one's base model and data; end it and its node if not."""
        seat = self._workers[worker]
        if self._first is None:
            self._first = ready
            threading.Thread(target=self._opener.share, args=(worker,), daemon=True).start()
            return True
        if ready.workload == self._first.workload:
            return True
        del self._workers[worker]
        threading.Thread(target=worker.close, daemon=True).start()
        why = "has another base model or other data behind the same path (another workload)"
        self._failed(seat, why, leave_out=True)
        return False

    def _failed(self, seat: Seat, reason: str, *, leave_out: bool = False) -> None:
        """Count a failure of a node; leave the node out after the last."""
        node, records = seat.node, self._records
        records.lost_workers.append(seat.token)
        failures = records.fail(node.id, seat.number)
        if node.id in records.left_out:
            return
        if leave_out or failures >= MAX_FAILURES:
            times = "" if leave_out else f"failed {MAX_FAILURES} times: "
            records.left_out[node.id] = f"{times}{reason}"
            self._changed(node, "left_out", reason=f"{times}{reason}")
        elif self._first is not None:
            self._job.say(f"node {node.name}: a worker ended: {reason}")

    # --- growing ----------------------------------------------------------------------------------

    def _grow(self) -> None:
        """Open workers where there is room, every few seconds; say what it waits for if there is none."""
        now = time.monotonic()
        if self._closed or now - self._scanned_at < _SCAN_SECONDS:
            return
        self._scanned_at = now
        nodes = [node for node in self._cluster.nodes() if node.id not in self._records.left_out]
        self._tell_changes(nodes)
        self._ask_for_room(nodes)
        wanted = self._wanted(nodes)
        for node in wanted:
            self._open(node)
        if self._workers or self._opening:
            self._waiting_since = now
            return
        self._wait(nodes, now - self._waiting_since)

    def _ask_for_room(self, nodes: Sequence[Node]) -> None:
        """Ask a cluster that can grow for all workers that the command says, once; Ray remembers it."""
        workers, per_worker = self._job.workers, self._gpus_per_worker
        if workers == "auto" or self._has_asked:
            return
        if sum(seats(nodes, gpus_per_worker=per_worker, workers=workers).values()) < workers:
            self._cluster.request(workers, gpus=per_worker)
            self._has_asked = True

    def _wanted(self, nodes: Sequence[Node]) -> list[Node]:
        """Return the node of each worker to open now."""
        taken = Counter(seat.node.id for seat in (*self._opening, *self._workers.values()))
        if not self._grows or not self._opener.shared.is_set():
            room = {} if taken else self._room(nodes)
            return [node for node in nearest(nodes) if room.get(node.id)][:1]
        room = self._room(nodes)
        opening = Counter(seat.node.id for seat in self._opening)
        wanted = [
            node
            for node in nearest(nodes)
            for _ in range(min(room[node.id], _OPENING_AT_ONCE - opening[node.id]))
        ]
        return wanted if self._job.workers == "auto" else wanted[: max(0, self._job.workers - taken.total())]

    def _room(self, nodes: Sequence[Node]) -> dict[str, int]:
        """Return how many more workers each node has room for now."""
        taken = Counter(seat.node.id for seat in (*self._opening, *self._workers.values()))
        per_worker = self._gpus_per_worker
        total = seats(nodes, gpus_per_worker=per_worker, workers=self._job.workers)
        room = {}
        for node in nodes:
            free = total[node.id] - taken[node.id]
            has_gpus = per_worker > 0 and node.gpus > 0
            room[node.id] = max(0, min(free, node.free_gpus // per_worker) if has_gpus else free)
        return room

    def _tell_changes(self, nodes: Sequence[Node]) -> None:
        now = {node.id: node for node in nodes}
        if self._known:
            for node in nodes:
                if node.id not in self._known:
                    self._changed(node, "joined")
            for id, node in self._known.items():
                if id not in now and id not in self._records.left_out:
                    self._changed(node, "lost")
        self._known = now

    def _changed(
        self, node: Node, change: Literal["joined", "lost", "left_out"], *, reason: str | None = None
    ) -> None:
        changed = NodeChange(node.name, change, node.gpus, self._clock(), reason)
        self._records.changes.append(NodeChanged(changed))
        self._job.say(f"node {node.name} {node_change(changed)}")

    def _wait(self, nodes: Sequence[Node], waited_seconds: float) -> None:
        patience = self._job.spec.run.resources_patience
        per_worker = self._gpus_per_worker
        self._cluster.request(1 if self._job.workers == "auto" else self._job.workers, gpus=per_worker)
        has = ", ".join(
            f"{node.name} {node.free_gpus} of {gpus_text(node.gpus)} free" for node in nearest(nodes)
        )
        out = "".join(f"; left out: {why}" for why in self._records.left_out.values())
        missing = f"no node has {gpus_text(per_worker)} free for a worker ({has or 'no nodes'}{out})"
        if waited_seconds > 60 * patience:
            raise RoundStopped(
                f"{missing}; waited {patience:g} minutes (run.resources_patience). Every trial is saved"
            )
        self._said.put(Preparing(f"waiting: {missing}"))

    # --- opening ----------------------------------------------------------------------------------

    def _open(self, node: Node) -> None:
        seat = Seat(node, self._records.token(self._opener.job_token))
        self._opening.add(seat)
        threading.Thread(target=self._opens, args=(seat,), daemon=True, name=f"open {node.name}").start()

    def _opens(self, seat: Seat) -> None:
        """Open a worker on a node, in a thread of its own."""
        opened: ProgramWorker | Exception
        try:
            opened = self._opener.worker(seat)
        except Exception as error:  # noqa: BLE001  told to the main thread, which judges it
            opened = error
        self._opened.put((seat, opened))
