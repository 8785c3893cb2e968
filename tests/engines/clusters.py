"""A Ray cluster on this machine: a head without GPUs, and nodes with one fake GPU each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tuner.engines.ray.engine import RayEngine
from tuner.engines.ray.host import Host

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ROOT = os.fspath(Path(__file__).parents[2])
WHY = "Ray is not installed: pip install 'tuner-study[ray]'"
FAST = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
"""Of the head: a dead node is known after seconds."""
_SMALL = {"num_cpus": 1, "object_store_memory": 100_000_000}


class LocalCluster:
    """The cluster, which a test may lose nodes of."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={**_SMALL, "num_gpus": 0, "include_dashboard": False, "_system_config": FAST},
        )
        self.address = str(self._cluster.address)
        self.nodes: list[Any] = []

    def add(self, *, gpus: int = 1) -> Any:
        self.nodes.append(self._cluster.add_node(**_SMALL, num_gpus=gpus))
        return self.nodes[-1]

    def lose(self, node: Any) -> None:
        """Kill a node as a power cut does."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


@contextmanager
def local_cluster(*, nodes: int = 2) -> Iterator[LocalCluster]:
    """Start a cluster whose workers find the tests' programs; skip without Ray."""
    pytest.importorskip("ray", reason=WHY)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = ROOT
    cluster = None
    try:
        cluster = LocalCluster()
        for _ in range(nodes):
            cluster.add()
        yield cluster
    finally:
        import ray

        ray.shutdown()
        if cluster is not None:
            cluster.close()
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class BlindHost(Host):
    """A host whose node sees no file of the parent's machine."""

    def read_back(self, path: str) -> bytes | None:
        self._alive()

    def digest(self, path: str, weights: str | None = None) -> str | None:
        own = Path(path).is_relative_to(self.files.scratch)
        return super().digest(path, weights) if own else None


class BlindEngine(RayEngine):
    """A cluster without a shared file system, although its nodes are on one machine."""

    host = BlindHost
