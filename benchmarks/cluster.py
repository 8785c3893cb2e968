"""What one parent serves on a Ray cluster: events a second, its share of a core, memory, checkpoint bytes.

Runs a real round of a study on a real cluster of this machine, whose nodes have fake GPUs and do not see the
parent's disk. The worker program has no torch: an evaluation takes a second and leaves checkpoints, and
losses come from a formula. Needs the extra `ray` and, with 64 workers, about 12 GB of memory.

    python benchmarks/cluster.py --workers 64 --trials 1000 --checkpoint-kb 100
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, os.fspath(ROOT))

from tests.engines.cluster_program import obey  # noqa: E402
from tuner.engines import Job, LoraFormula, Program, RayEngine, SimulatedWorker, Worker  # noqa: E402
from tuner.engines.ray.host import Host  # noqa: E402
from tuner.engines.simulated import keep_on_disk  # noqa: E402
from tuner.records import (  # noqa: E402
    Assignment,
    Checkpoint,
    CheckpointKind,
    Ended,
    Event,
    Ready,
    Saved,
)
from tuner.whole import digest  # noqa: E402

NAME = "benchmarks.cluster"
STEPS, EVERY = 20, 2

ROUND = """\
study: cluster
round: round1
goal: How many workers does one parent serve?
model: {{path: {base}/base, dtype: float32}}
data:
  train: [{{path: {base}/data/train.jsonl, format: alpaca}}]
  eval: [{{path: {base}/data/eval.jsonl, format: alpaca}}]
  max_length: 64
max_train_steps: {steps}
hyperparameters:
  learning_rate: {{low: 1e-4, high: 1e-2, log: true}}
  lora_r: [4, 8, 16, 32]
  batch_size: 8
  schedule: linear
  decay_steps: 5
search: {{trials: {trials}}}
evaluation: {{every_steps: {every}, max_examples: 32}}
run: {{slots: 1, decay_branches: false, ray_address: "{address}"}}
storage: sqlite:///tuner.db
"""


# --- on the nodes -------------------------------------------------------------------------------------


class Apart(Host):
    """A host whose node does not see the parent's disk."""

    def read_back(self, path: str) -> bytes | None:
        super().read_back(path)
        return None


def work() -> int:
    """Run trials of a formula: an evaluation a second, with a checkpoint each."""
    document = json.loads(sys.stdin.readline())
    payload = os.urandom(document["bytes"])

    def keep(assignment: Assignment, kind: CheckpointKind, step: int) -> Checkpoint:
        kept = keep_on_disk(assignment, kind, step)
        place = Path(assignment.directory).parent / kept.path
        (place / "weights").write_bytes(payload)
        return replace(kept, size_bytes=kept.size_bytes + len(payload), sha256=digest(place))

    worker = SimulatedWorker(
        LoraFormula("cluster", pace_steps=STEPS),
        slots=1,
        ready=Ready(1, "formula", workload="formula"),
        keep=keep,
    )
    return obey(worker, lambda: float(document["seconds"]))


# --- in the parent ------------------------------------------------------------------------------------


@dataclass
class Measured:
    """What passed through the parent since all workers were ready."""

    wanted: int
    events: int = 0
    bytes: int = 0
    trials: int = 0
    ready: int = 0
    began: float | None = None
    ended: float = 0.0
    cpu_seconds: float = 0.0
    peaks: list[int] = field(default_factory=list)

    def take(self, events: list[Event]) -> None:
        """Count events; the clock starts with the last worker."""
        import psutil

        self.ready += sum(isinstance(event, Ready) for event in events)
        process = psutil.Process()
        if self.began is None and self.ready >= self.wanted:
            self.began, self.cpu_seconds = time.monotonic(), sum(process.cpu_times()[:2])
            print(f"{self.ready} workers are ready", file=sys.stderr, flush=True)
        elif self.began is not None:
            self.events += len(events)
            self.bytes += sum(event.checkpoint.size_bytes for event in events if isinstance(event, Saved))
            self.trials += sum(isinstance(event, Ended) for event in events)
            if events:
                self.ended = time.monotonic()
                self.peaks.append(process.memory_info().rss)

    def document(self) -> dict[str, Any]:
        """Return the numbers."""
        import psutil

        assert self.began is not None
        seconds = self.ended - self.began
        cpu = sum(psutil.Process().cpu_times()[:2]) - self.cpu_seconds
        return {
            "workers": self.wanted,
            "seconds": round(seconds, 1),
            "trials_ended": self.trials,
            "events_per_second": round(self.events / seconds, 1),
            "checkpoint_megabytes_per_second": round(self.bytes / seconds / 1e6, 2),
            "parent_share_of_a_core": round(cpu / seconds, 3),
            "parent_megabytes": round(max(self.peaks) / 1e6),
        }


class Counted:
    """A worker whose events are counted."""

    def __init__(self, worker: Worker, measured: Measured) -> None:
        self._worker, self._measured = worker, measured

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def events(self, timeout_seconds: float) -> list[Event]:
        said = self._worker.events(timeout_seconds)
        self._measured.take(said)
        return said


class FormulaEngine(RayEngine):
    """The cluster, with the program of this file in place of training."""

    host = Apart
    measured = Measured(0)
    document: dict[str, Any] = {}  # noqa: RUF012

    def start(self, job: Job) -> Worker:
        program = Program(("-m", NAME, "--work"), lambda: self.document)
        return Counted(super().start(replace(job, program=program)), self.measured)  # type: ignore[return-value]


def main(options: argparse.Namespace) -> None:
    """Start a cluster, run the round, print the numbers as JSON."""
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.fspath(ROOT),
        "OMP_NUM_THREADS": "1",
        "TUNER_SCRATCH": tempfile.mkdtemp(prefix="tuner-cluster-"),
    }
    import ray
    from ray.cluster_utils import Cluster

    import tuner
    from benchmarks.cluster import FormulaEngine as Engine

    small = {"num_cpus": 1, "object_store_memory": 200_000_000}
    cluster = Cluster(
        initialize_head=True, head_node_args={**small, "num_gpus": 0, "include_dashboard": False}
    )
    for at in range(options.nodes):
        cluster.add_node(**small, num_gpus=len(range(at, options.workers, options.nodes)))
    Engine.measured = Measured(options.workers)
    Engine.document = {"seconds": options.seconds, "bytes": options.checkpoint_kb * 1000}
    try:
        with tempfile.TemporaryDirectory() as study:
            text = ROUND.format(
                base=ROOT / "studies" / "quickstart",
                steps=STEPS,
                every=EVERY,
                trials=options.trials,
                address=cluster.address,
            )
            (Path(study) / "round1.yaml").write_text(text)
            tuner.Study(study).run("round1.yaml", engine=f"{NAME}:FormulaEngine", progress=False)
            database = (Path(study) / "tuner.db").stat().st_size
        print(json.dumps({**Engine.measured.document(), "database_megabytes": round(database / 1e6, 1)}))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=1.0, help="Time of an evaluation.")
    parser.add_argument("--checkpoint-kb", type=int, default=100)
    typed = parser.parse_args()
    if typed.work:
        sys.exit(work())
    main(typed)
