"""How many workers run on which node, as nodes join and leave, and what has to agree before one is used."""

from __future__ import annotations

import json
import os
import queue
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol

from tuner.config import RoundSpec
from tuner.engines.program import ProgramWorker
from tuner.engines.protocol import Job, Program
from tuner.engines.ray.host import COMPARED_PACKAGES, NodeFacts, module_digest, versions
from tuner.engines.ray.remote import Connection, HostFailed, HostLost, Places, RemoteHost, RemoteProcess
from tuner.engines.ray.transfer import Sender, fetch, give_back, hub_commit, hub_snapshot, is_seen
from tuner.errors import InputError, RoundStopped
from tuner.records import Assignment, Died, Ended, Event, Preparing, Ready, RunId
from tuner.report.format import GpuReading

MAX_FAILURES = 3
"""Failures of a node's workers, without a trial that ended between them, after which it is left out."""
_SCAN_SECONDS = 2.0
_OPENING_AT_ONCE = 4
"""Workers that a node opens at the same time."""
_POLL_SECONDS = 0.02
_TABLE = re.compile(r"[0-9a-f]{32}")
"""Name of a finished table in the folder of tokenised rows."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster that is alive."""

    id: str
    name: str
    gpus: int
    free_gpus: int
    is_here: bool = False
    """Whether it is the parent's machine."""
    is_for_work: bool = True
    """Whether it offers CPUs: a head started with `--num-cpus=0` does not."""


class Cluster(Protocol):
    """The machines that an engine may use."""

    def nodes(self) -> Sequence[Node]:
        """Return the nodes that are alive."""
        ...

    def connect(self, node: Node, *, gpus: int, name: str) -> Connection:
        """Start a host on a node that has `gpus` free, and return the connection to it."""
        ...

    def request(self, workers: int, *, gpus: int) -> None:
        """Ask a cluster that can grow for room for so many workers; 0 asks for nothing more."""
        ...


def seats(nodes: Sequence[Node], *, gpus_per_worker: int, workers: int | Literal["auto"]) -> dict[str, int]:
    """Return how many workers each node has room for, by its id.

    Nodes without a GPU get workers only if no node has one, and those that offer CPUs: one each, or as many
    as `workers` says in all.
    """
    if gpus_per_worker and any(node.gpus for node in nodes):
        return {node.id: node.gpus // gpus_per_worker for node in nodes}
    able = _nearest(node for node in nodes if node.is_for_work)
    count = len(able) if workers == "auto" else workers
    room = {node.id: len(range(place, count, len(able))) for place, node in enumerate(able)}
    return {node.id: room.get(node.id, 0) for node in nodes}


def _nearest(nodes: Iterable[Node]) -> list[Node]:
    return sorted(nodes, key=lambda node: (not node.is_here, node.name, node.id))


@dataclass
class NodeRecords:
    """What happened on the nodes during a run of a round, also across starts of the engine."""

    failures: Counter[str] = field(default_factory=Counter)
    """Node id -> failures since a trial ended on it; workers lost at the same time are one failure."""
    failed_at: dict[str, int] = field(default_factory=dict)
    """Node id -> number of the newest worker at its last failure."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Node id -> why it gets no more workers."""
    lost_workers: list[str] = field(default_factory=list)
    """Tokens of workers that may still run on a node that was lost."""
    session: str = field(default_factory=lambda: secrets.token_hex(4))
    num_workers: int = 0

    def token(self, job: str) -> str:
        """Return a new worker's token."""
        self.num_workers += 1
        return f"{job}.{self.session}.{self.num_workers}"

    def fail(self, node: str, number: int) -> int:
        """Count the failure of a node's worker; return the node's failures."""
        if number > self.failed_at.get(node, 0):
            self.failures[node] += 1
            self.failed_at[node] = self.num_workers
        return self.failures[node]


class _Unlike(Exception):
    """A node differs from the others, and is left out with this message."""


@dataclass(frozen=True)
class _Seat:
    """A worker on a node, from the start of its opening on."""

    node: Node
    token: str

    @property
    def number(self) -> int:
        """Return the worker's number in this session."""
        return int(self.token.rpartition(".")[2])


class ClusterPool:
    """The workers of a cluster as one. The first opens at once, the others with the first trial."""

    def __init__(self, job: Job, cluster: Cluster, records: NodeRecords) -> None:
        self._job = job
        self._cluster = cluster
        self._records = records
        self._job_token = job_token(job.directory)
        self._gpus_per_worker = job.spec.run.gpus_per_worker
        self._sender = Sender(int(job.spec.run.send_model_up_to * 1e9))
        self._said: queue.SimpleQueue[Preparing | str] = queue.SimpleQueue()
        """Events and messages of the threads that open workers."""
        self._opened: queue.SimpleQueue[tuple[_Seat, ProgramWorker | Exception]] = queue.SimpleQueue()
        self._opening: set[_Seat] = set()
        self._workers: dict[ProgramWorker, _Seat] = {}
        self._ready: dict[ProgramWorker, Ready] = {}
        self._holder: dict[RunId, ProgramWorker] = {}
        self._first: Ready | None = None
        self._commit: str | None = None
        """Of the base model on the Hub, as the first worker loaded it."""
        self._grows, self._closed = False, False
        self._shared_tables = threading.Event()
        """Set once the first worker's tokenised rows are here for others."""
        self._scanned_at = self._waiting_since = time.monotonic() - _SCAN_SECONDS
        self._known: dict[str, Node] = {}
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
        """Yield the events of openings, and tell their messages."""
        while not self._said.empty():
            said = self._said.get()
            if isinstance(said, Preparing):
                yield said
            else:
                self._job.say(said)

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

    def _refused(self, seat: _Seat, error: Exception) -> list[Event]:
        """Record why a worker could not be opened; before the first one is ready, that is an event."""
        is_certain = isinstance(error, (_Unlike, InputError))
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
            threading.Thread(target=self._share, args=(seat, worker), daemon=True).start()
            return True
        if ready.workload == self._first.workload:
            return True
        del self._workers[worker]
        threading.Thread(target=worker.close, daemon=True).start()
        why = "has another base model or other data behind the same path (another workload)"
        self._failed(seat, why, leave_out=True)
        return False

    def _failed(self, seat: _Seat, reason: str, *, leave_out: bool = False) -> None:
        """Count a failure of a node; leave the node out after the last."""
        node, records = seat.node, self._records
        records.lost_workers.append(seat.token)
        failures = records.fail(node.id, seat.number)
        if node.id in records.left_out:
            return
        if leave_out or failures >= MAX_FAILURES:
            times = "" if leave_out else f"failed {MAX_FAILURES} times: "
            records.left_out[node.id] = f"{times}{reason}"
            self._job.say(f"node {node.name} is left out: {times}{reason}")
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
        wanted = self._wanted(nodes)
        for node in wanted:
            self._open(node)
        if self._workers or self._opening:
            self._waiting_since = now
            return
        self._wait(nodes, now - self._waiting_since)

    def _wanted(self, nodes: Sequence[Node]) -> list[Node]:
        """Return the node of each worker to open now."""
        taken = Counter(seat.node.id for seat in (*self._opening, *self._workers.values()))
        if not self._grows or not self._shared_tables.is_set():
            room = {} if taken else self._room(nodes)
            return [node for node in _nearest(nodes) if room.get(node.id)][:1]
        room = self._room(nodes)
        opening = Counter(seat.node.id for seat in self._opening)
        wanted = [
            node
            for node in _nearest(nodes)
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
                    self._job.say(f"node {node.name} joined: {gpus_text(node.gpus)}")
            for id, node in self._known.items():
                if id not in now and id not in self._records.left_out:
                    self._job.say(f"node {node.name} left the cluster")
        self._known = now

    def _wait(self, nodes: Sequence[Node], waited_seconds: float) -> None:
        patience = self._job.spec.run.resources_patience
        per_worker = self._gpus_per_worker
        self._cluster.request(1 if self._job.workers == "auto" else self._job.workers, gpus=per_worker)
        has = ", ".join(
            f"{node.name} {node.free_gpus} of {gpus_text(node.gpus)} free" for node in _nearest(nodes)
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
        seat = _Seat(node, self._records.token(self._job_token))
        self._opening.add(seat)
        threading.Thread(target=self._opens, args=(seat,), daemon=True, name=f"open {node.name}").start()

    def _opens(self, seat: _Seat) -> None:
        """Open a worker on a node, in a thread of its own."""
        opened: ProgramWorker | Exception
        try:
            opened = self._worker(seat)
        except Exception as error:  # noqa: BLE001  told to the main thread, which judges it
            opened = error
        self._opened.put((seat, opened))

    def _worker(self, seat: _Seat) -> ProgramWorker:
        node, per_worker = seat.node, self._gpus_per_worker
        name = (
            f"tuner {self._job.spec.study}/{self._job.spec.round} {node.name} {seat.token.split('.', 1)[1]}"
        )
        connection = self._cluster.connect(node, gpus=per_worker if node.gpus else 0, name=name)
        self._job.directory.mkdir(parents=True, exist_ok=True)
        host = RemoteHost(
            connection,
            name=f"node {node.name}",
            log=self._job.directory / f"worker-{node.name}-{seat.number}.log",
        )
        with ExitStack() as undo:
            undo.callback(host.end)
            facts: NodeFacts = host.call("describe", sorted(_modules(self._job.spec)))
            refuse_unlike(facts, self._job.spec)
            host.call("end_orphans", self._job_token, self._records.session, list(self._records.lost_workers))
            places, revision = self._places(host, seat.token)
            model = self._job.spec.model.path
            variables = self._variables(facts, node)
            host.call("launch", list(self._job.program.arguments), variables, seat.token)
            undo.pop_all()
        where = {"node": node.name, "worker": seat.token}
        if facts.gpus:
            where["gpu"] = ",".join(facts.gpus)
        launch = partial(RemoteProcess, host, places, token=seat.token, environment=where)
        return ProgramWorker(_with_model(self._job.program, places.there.get(model), revision), launch)

    def _places(self, host: RemoteHost, token: str) -> tuple[Places, str | None]:
        """Send the worker what it does not see; return where it has it, and the model's commit."""
        spec, there = self._job.spec, dict[str, str]()
        study = None if self._job.cache is None else self._job.cache.parent
        if spec.command is not None and study is not None and not is_seen(host.call, study):
            raise _Unlike(
                f"it does not see {study}: a training command needs its folder on a disk that all nodes share"
            )

        def say(doing: str) -> None:
            self._said.put(Preparing(f"{host.name}: {doing}"))

        for key, path in inputs(spec):
            place = self._sender.place(host.call, path, key=key, say=say)
            if place != str(path):
                there[str(path)] = place
        revision = self._commit
        if not Path(spec.model.path).is_absolute():
            snapshot = self._sent_snapshot(host, revision or spec.model.revision, say)
            if snapshot is not None:
                there[spec.model.path], revision = snapshot
        runs, tables = host.call("work_directory", token, _key(self._job.cache or self._job.directory))
        self._job.directory.mkdir(parents=True, exist_ok=True)
        if not is_seen(host.call, self._job.directory):
            there[str(self._job.directory)] = runs
        cache = self._job.cache
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            if not is_seen(host.call, cache):
                there[str(cache)] = tables
                self._send_tables(host, cache, tables)
        return Places(self._job.directory, there), revision

    def _sent_snapshot(
        self, host: RemoteHost, revision: str | None, say: Callable[[str], None]
    ) -> tuple[str, str] | None:
        """Send a model of the Hub from this machine's cache to a node that cannot get it.

        Returns its place and its commit; None if it is not needed, or not here either.
        """
        model = self._job.spec.model
        if host.call("hub_commit", model.path, revision) is not None or host.call("reaches_hub"):
            return None
        snapshot = hub_snapshot(model.path, revision)
        if snapshot is None:
            return None  # the worker says that it can neither find nor download it
        return self._sender.place(host.call, snapshot, key="model.path", say=say), snapshot.name

    def _send_tables(self, host: RemoteHost, cache: Path, tables: str) -> None:
        """Send tokenised rows to a node, the newest first, up to the bound for models."""
        left = self._sender.up_to_bytes
        found = [path for path in cache.iterdir() if path.is_dir() and _TABLE.fullmatch(path.name)]
        for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            left -= sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
            if left < 0:
                return
            target = f"{tables}/{path.name}"
            if not host.call("listing", target):
                give_back(host.call, path, target, sha256=self._sender.fingerprint(path))

    def _share(self, seat: _Seat, worker: ProgramWorker) -> None:
        """Fetch what the first worker made that others need: its tokenised rows, and its model's commit."""
        process = worker.process
        if not isinstance(process, RemoteProcess):
            self._shared_tables.set()
            return
        host, cache = process.host, self._job.cache
        model = self._job.spec.model
        try:
            if not Path(model.path).is_absolute():
                self._commit = host.call("hub_commit", model.path, model.revision) or hub_commit(
                    model.path, model.revision
                )
            tables = None if cache is None else process.places.there.get(str(cache))
            if cache is not None and tables is not None:
                names = {name.partition("/")[0] for name, _ in host.call("listing", tables)}
                for name in sorted(filter(_TABLE.fullmatch, names)):
                    if not (cache / name).is_dir():
                        path = f"{tables}/{name}"
                        fetch(host.call, path, cache / name, sha256=host.call("digest", path))
        except (HostLost, HostFailed, OSError, ValueError) as error:
            self._said.put(
                f"{host.name}: tokenised rows were not fetched, other nodes make them anew: {error}"
            )
        self._shared_tables.set()

    def _variables(self, facts: NodeFacts, node: Node) -> dict[str, str]:
        """Return the variables that a worker gets besides its node's; an empty one is removed."""
        passed = {name: os.environ[name] for name in _PASSED if name in os.environ}
        if not Path(self._job.spec.model.path).is_absolute() and (token := _hub_token()):
            passed["HF_TOKEN"] = token
        if "OMP_NUM_THREADS" in passed:
            return passed
        known = list(self._known.values()) or [node]
        room = seats(known, gpus_per_worker=self._gpus_per_worker, workers=self._job.workers)
        others = max(1, room.get(node.id, 1))
        # Ray sets it to 1. Alone on its node, a worker uses what torch would take by itself.
        return {**passed, "OMP_NUM_THREADS": "" if others == 1 else str(max(1, facts.cores // others))}


_PASSED = (
    "CUDA_DEVICE_ORDER",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "OMP_NUM_THREADS",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TOKENIZERS_PARALLELISM",
)
"""Variables of the parent that its workers get; as arguments of a call, so that no log shows them."""


def _hub_token() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def inputs(spec: RoundSpec) -> Iterator[tuple[str, Path]]:
    """Yield the files and directories that a round file with absolute paths names, by key."""
    if Path(spec.model.path).is_absolute():
        yield "model.path", Path(spec.model.path)
    for name in ("train", "eval", "test"):
        for source in getattr(spec.data, name):
            if Path(source.path).is_absolute() and Path(source.path).exists():
                yield f"data.{name}", Path(source.path)
    answers = spec.evaluation.answers
    if answers is not None and (path := Path(answers.metric.rpartition(":")[0])).is_absolute():
        yield "evaluation.answers.metric", path


def _modules(spec: RoundSpec) -> Iterator[str]:
    """Yield the names of modules that a round file names as `package.module:Name`, apart from tuner's own."""
    for text in re.findall(r'"([A-Za-z_][\w.]*):[A-Za-z_]\w*"', json.dumps(spec.model_dump(mode="json"))):
        package = text.partition(".")[0]
        if package not in ("tuner", "optuna") and module_digest(package) != "not installed":
            yield package


def refuse_unlike(facts: NodeFacts, spec: RoundSpec) -> None:
    """Refuse a node with other versions than this machine's. Raises _Unlike with what differs."""
    here = {**versions(), **{name: module_digest(name) for name in _modules(spec)}}
    unlike = [
        f"{name} {there} instead of {here[name]}"
        for name, there in facts.versions.items()
        if name in here and there != here[name]
    ]
    if unlike:
        same = ", ".join(("Python", *COMPARED_PACKAGES))
        raise _Unlike(f"it has {', '.join(unlike)}; install the same versions of {same} on all nodes")


def _with_model(program: Program, path: str | None, revision: str | None) -> Program:
    """Return the program with the base model's place on the node and its commit, if they are known."""
    if revision is None:
        return program

    def document() -> Mapping[str, Any]:
        said: dict[str, Any] = json.loads(json.dumps(program.document()))
        model = said.get("spec", {}).get("model")
        if model is not None:
            model.update({"path": path or model["path"], "revision": revision})
        return said

    return replace(program, document=document)


def job_token(directory: Path) -> str:
    """Return the round's random name on all nodes, by which its workers are recognised; made once."""
    path = directory / ".cluster"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()


def _key(path: Path) -> str:
    return sha256(str(path).encode()).hexdigest()[:16]


def gpus_text(count: int) -> str:
    """Return `1 GPU` or `4 GPUs`."""
    return "1 GPU" if count == 1 else f"{count} GPUs"
