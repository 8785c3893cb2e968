"""The nodes of a cluster: how many workers each has room for, and what has happened on it."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tuner.engines.protocol import Job
from tuner.engines.ray.remote import Connection
from tuner.errors import InputError
from tuner.records import NodeChanged


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
    able = nearest(node for node in nodes if node.is_for_work)
    count = len(able) if workers == "auto" else workers
    room = {node.id: len(range(place, count, len(able))) for place, node in enumerate(able)}
    return {node.id: room.get(node.id, 0) for node in nodes}


def refuse_impossible(job: Job, nodes: Sequence[Node]) -> None:
    """Raise InputError if no node has enough GPUs for a worker; say which GPUs and nodes stay idle."""
    per_worker, most = job.spec.run.gpus_per_worker, max((node.gpus for node in nodes), default=0)
    if 0 < most < per_worker:
        raise InputError(f"run.gpus_per_worker: {per_worker}: no node of the cluster has more than {most}")
    if not per_worker:
        return
    if most == 0 and per_worker > 1 and nodes:
        raise InputError(f"run.gpus_per_worker: {per_worker}: no node of the cluster has a GPU")
    for node in nodes:
        if idle := node.gpus % per_worker:
            rule = f"run.gpus_per_worker is {per_worker}"
            job.say(f"node {node.name}: {gpus_text(idle)} of {node.gpus} stays idle: {rule}")
    if most and (without := [node.name for node in nodes if not node.gpus and node.is_for_work]):
        job.say(f"nodes without a GPU get no worker while others have one: {', '.join(without)}")
    room = sum(seats(nodes, gpus_per_worker=per_worker, workers="auto").values())
    if job.workers != "auto" and most and job.workers > room:
        job.say(f"--workers {job.workers}: the cluster has room for {room} now; more start when nodes join")


def nearest(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes with the parent's machine first."""
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
    changes: list[NodeChanged] = field(default_factory=list)
    """What the round has not been told yet."""
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


@dataclass(frozen=True)
class Seat:
    """A worker on a node, from the start of its opening on."""

    node: Node
    token: str

    @property
    def number(self) -> int:
        """Return the worker's number in this session."""
        return int(self.token.rpartition(".")[2])


def gpus_text(count: int) -> str:
    """Return `1 GPU` or `4 GPUs`."""
    return "1 GPU" if count == 1 else f"{count} GPUs"
