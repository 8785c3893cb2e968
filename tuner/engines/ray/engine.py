"""The only module that imports Ray: the cluster, its nodes, and hosts as actors on them."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tuner.engines.protocol import Job, Worker
from tuner.engines.ray.address import address_of, refuse_unreachable, warning_of_no_token
from tuner.engines.ray.host import Host
from tuner.engines.ray.nodes import Node, NodeRecords, gpus_text, refuse_impossible
from tuner.engines.ray.pool import ClusterPool
from tuner.engines.ray.remote import HostFailed, HostLost, Unavailable
from tuner.errors import InputError
from tuner.installation import install_command
from tuner.report.format import GpuReading, count

_log = logging.getLogger(__name__)
_SLICE_SECONDS = 1.0


class RayEngine:
    """A Ray cluster: a worker for each GPU of each node, or as many as the job allows."""

    host: type[Host] = Host
    """What runs beside a worker."""

    def __init__(self) -> None:
        self._cluster: RayCluster | None = None
        self._pool: ClusterPool | None = None
        self._records = NodeRecords()

    def start(self, job: Job) -> Worker:
        """Join the cluster and open the first worker; the others open with the first trial.

        Raises InputError without an address, or if no node has enough GPUs.
        """
        job = replace(job, say=_logging(job.say))
        if self._cluster is None:
            self._cluster = RayCluster(job.spec.run.ray_address, self.host)
            job.say(self._cluster.description())
            if (warning := self._cluster.warning()) is not None:
                job.say(warning)
        refuse_impossible(job, self._cluster.nodes())
        self._pool = ClusterPool(job, self._cluster, self._records)
        return self._pool

    def gpu_readings(self) -> Sequence[GpuReading]:
        """Return the readings of the GPUs in use, on all nodes."""
        return () if self._pool is None else self._pool.gpu_readings()

    def now(self) -> float:
        """Return the time of this machine's clock."""
        return time.time()

    def close(self) -> None:
        """Leave the cluster; end it if `local` started it."""
        if self._cluster is not None:
            self._cluster.close()
            self._cluster = None


class RayCluster:
    """A cluster that this process has joined."""

    def __init__(self, address: str | None, host: type[Host]) -> None:
        self.address = address_of(address)
        self._host = host
        ray = _ray()
        self._joined = not ray.is_initialized()
        if self._joined:
            if self.address != "local":
                refuse_unreachable(self.address)
            _join(ray, self.address)
        self._actor = _actor_class(ray, host)
        self._ray = ray

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive, with the GPUs that nobody has taken."""
        from ray._private.state import available_resources_per_node

        alive = [each for each in self._ray.nodes() if each["Alive"]]
        free: dict[str, dict[str, float]] = available_resources_per_node()
        names = Counter(each["NodeManagerHostname"] for each in alive)
        here = self._ray.get_runtime_context().get_node_id()
        return [
            Node(
                each["NodeID"],
                each["NodeManagerHostname"]
                + (f"-{each['NodeID'][:4]}" if names[each["NodeManagerHostname"]] > 1 else ""),
                int(each["Resources"].get("GPU", 0)),
                int(free.get(each["NodeID"], {}).get("GPU", 0)),
                is_here=each["NodeID"] == here,
                is_for_work=each["Resources"].get("CPU", 0) > 0,
            )
            for each in alive
        ]

    def connect(self, node: Node, *, gpus: int, name: str) -> ActorConnection:
        """Start a host on exactly this node."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._actor.options(
            name=name,
            num_gpus=gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote()
        return ActorConnection(self._ray, actor)

    def request(self, workers: int, *, gpus: int) -> None:
        """Ask the autoscaler; a cluster without one ignores it."""
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=bundles(workers, gpus=gpus))

    def description(self) -> str:
        """Return which cluster this is, with its nodes and GPUs."""
        nodes = self.nodes()
        listed = ", ".join(f"{node.name} ({gpus_text(node.gpus)})" for node in nodes)
        address = self._ray.get_runtime_context().gcs_address
        return f"Ray cluster {address}: {count(len(nodes), 'node')}: {listed}"

    def warning(self) -> str | None:
        """Return what to say of a cluster that anybody can use who reaches it; None of one started here."""
        if self.address == "local":
            return None
        return warning_of_no_token(self._ray.get_runtime_context().gcs_address)

    def close(self) -> None:
        """Leave the cluster if this process joined it here."""
        if self._joined:
            self._ray.shutdown()


def bundles(workers: int, *, gpus: int) -> list[dict[str, int]]:
    """Return what an autoscaler is asked for; workers without GPUs go to nodes that offer CPUs."""
    return [{"GPU": gpus} if gpus else {"CPU": 1} for _ in range(workers)]


class ActorConnection:
    """Calls of a host that runs in an actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray = ray
        self._actor = actor
        self._ended = False

    def call(self, method: str, *arguments: Any, timeout_seconds: float) -> Any:
        """As in `Connection`."""
        errors = self._ray.exceptions
        deadline = time.monotonic() + timeout_seconds
        try:
            answer = getattr(self._actor, method).remote(*arguments)
            while not self._ended:
                try:
                    return self._ray.get(
                        answer, timeout=max(0.0, min(_SLICE_SECONDS, deadline - time.monotonic()))
                    )
                except errors.GetTimeoutError:
                    if time.monotonic() > deadline:
                        raise Unavailable(f"no answer within {timeout_seconds:.0f} seconds") from None
        except (errors.ActorDiedError, errors.ActorUnschedulableError) as error:
            raise HostLost(_first_line(error)) from error
        except errors.RayTaskError as error:
            raise HostFailed(str(error.cause) if error.cause else _first_line(error)) from error
        except errors.RayError as error:
            raise Unavailable(_first_line(error)) from error
        raise HostLost("it was ended")

    def end(self) -> None:
        """As in `Connection`."""
        if not self._ended:
            self._ended = True
            self._ray.kill(self._actor)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise InputError(
            f"engine ray: Ray is not installed; install it with: {install_command('ray')}"
        ) from error
    return ray


def _join(ray: Any, address: str) -> None:
    """Join or start a cluster; tuner's own code goes along, so that nodes run this version."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code = os.fspath(Path(__file__).parents[2])
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(
            address=address,
            namespace="tuner",
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"py_modules": [code], "excludes": ["**/__pycache__"]},
            **options,
        )
    except (ConnectionError, TimeoutError, RuntimeError, ValueError) as error:
        raise InputError(
            f"ray address {address}: cannot join this cluster: {_first_line(error)}. Run tuner on a machine "
            "of the cluster, one on which `ray start` was run"
        ) from error
    # Otherwise Ray prints the errors of its nodes, with their stack traces, among the round's lines.
    ray._private.worker.print_to_stdstream = _to_the_log
    for number, handler in handlers.items():
        if signal.getsignal(number) != handler:
            signal.signal(number, handler)  # tuner saves every trial before it ends


def _logging(say: Callable[[str], None]) -> Callable[[str], None]:
    """Return a `say` that the log has, too: a live view shows a node that left for a moment only."""

    def said(message: str) -> None:
        _log.info("%s", message)
        say(message)

    return said


def _to_the_log(said: Mapping[str, Any], **_: object) -> None:
    for line in said["lines"]:
        _log.info("Ray: %s", line)


_GROUPS = {"events": 1, "orders": 1, "files": 4}
_IN_GROUP = {
    "events": "events",
    "order": "orders",
    **dict.fromkeys(
        (
            "read_chunk",
            "write_chunk",
            "listing",
            "contents",
            "delete",
            "claim",
            "keep",
            "adopt",
            "digest",
            "own_copy",
        ),
        "files",
    ),
}


def _actor_class(ray: Any, host: type[Host]) -> Any:
    """Return the actor class of a host: calls of one kind keep their order, and a poll waits for no file."""

    def grouped(method: str, group: str) -> Any:
        def call(self: Any, *arguments: Any) -> Any:
            return getattr(host, method)(self, *arguments)

        return ray.method(concurrency_group=group)(call)

    methods = {method: grouped(method, group) for method, group in _IN_GROUP.items()}
    actor = type("TunerHost", (host,), methods)
    return ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups=_GROUPS)(actor)
