"""The engine `ray` on a real cluster of this machine: its contract, and nodes that join and are lost."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import tuner
from tests.contracts.engine import EngineContract, started
from tests.contracts.worker import ENDLESS, assignment, collect, ended, losses, saved
from tests.engines.clusters import ROOT, BlindEngine, LocalCluster, local_cluster
from tests.studies import QUICKSTART, round_file, write_round
from tuner.engines import Engine, Job, Program, RayEngine, Worker
from tuner.engines.ray.address import address_of, answers_to, refuse_unreachable, warning_of_no_token
from tuner.engines.ray.host import WORKER_TOKEN
from tuner.errors import InputError, RoundStopped
from tuner.records import Attempt, Died, Event, Ready, Started
from tuner.store import open_store

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray")]
PROGRAM = ("-m", "tests.engines.cluster_program")


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as cluster:
        yield cluster


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def job(cluster: LocalCluster, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = round_file(tmp_path, run=f"run: {{slots: 1, ray_address: '{cluster.address}'}}")
    document = {"slots": 1, "pause": 0.01}
    return Job(
        file.spec.absolute(tmp_path),
        Program(PROGRAM, lambda: document),
        tmp_path / "runs",
        1,
        say=said.append,
    )


def with_run(job: Job, **changes: Any) -> Job:
    """The job with other keys of `run`."""
    return replace(job, spec=job.spec.model_copy(update={"run": job.spec.run.model_copy(update=changes)}))


def ready(events: list[Event], count: int = 1) -> bool:
    return sum(isinstance(event, Ready) for event in events) == count


class TestRayEngine(EngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        engine = RayEngine()
        yield engine
        engine.close()


@pytest.mark.acceptance
class TestWithoutASharedDisk(EngineContract):
    @pytest.fixture
    def engine(self) -> Iterator[Engine]:
        engine = BlindEngine()
        yield engine
        engine.close()

    def test_its_checkpoints_are_here_and_not_on_the_node(self, engine: Engine, job: Job) -> None:
        with started(engine, job) as worker:
            collect(worker, until=ready)
            worker.start(assignment(job.directory, 0))
            events = collect(worker, until=lambda seen: ended(seen) == {0})
        for checkpoint in saved(events):
            assert (job.directory / checkpoint.path / "simulated.json").is_file()
        logs = list(job.directory.glob("worker-*.log"))
        assert len(logs) == 1
        document = json.loads(logs[0].read_text().partition("document ")[2].splitlines()[0])
        runs = [there for there, here in document["paths"].items() if here == str(job.directory)]
        assert ["work" in Path(there).parts for there in runs] == [True], "it wrote to a folder of its node"


def test_a_worker_for_each_gpu_and_a_node_that_joins_and_is_lost(
    cluster: LocalCluster,
    job: Job,
    said: list[str],
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The third worker runs on a new node; its trial resumes elsewhere when that node is lost."""
    caplog.set_level(logging.INFO, "tuner")
    engine = BlindEngine()
    with started(engine, replace(job, workers="auto")) as worker:
        collect(worker, until=ready)
        assert any("3 nodes" in message and "(1 GPU)" in message for message in said)
        (head,) = re.findall(r"(\S+) \(0 GPUs\)", said[0])
        assert f"nodes without a GPU get no worker while others have one: {head}" in said
        worker.start(assignment(job.directory, 0, steps=ENDLESS))
        collect(worker, until=ready)
        worker.start(assignment(job.directory, 1, steps=ENDLESS))
        node = cluster.add()
        collect(worker, until=ready)
        assert any("joined: 1 GPU" in message for message in said)
        assert_named_for_the_dashboard(job)
        worker.start(assignment(job.directory, 2, steps=300))
        seen = collect(worker, until=lambda events: len(losses(events, 2)) >= 20)
        where = {e.trial: e.environment["node"] for e in seen if isinstance(e, Started)}
        cluster.lose(node)
        seen += collect(worker, until=lambda events: any(isinstance(e, Died) for e in events), seconds=60)
        (died,) = (e for e in seen if isinstance(e, Died))
        assert died.trials == (2,)
        last = [c for c in saved([e for e in seen if getattr(e, "trial", 0) == 2]) if c.kind == "last"][-1]
        worker.stop(assignment(job.directory, 0).run)
        seen += collect(worker, until=lambda events: ended(events) == {0})
        worker.start(
            replace(
                assignment(job.directory, 2, steps=300),
                attempt=2,
                resume_from=str(job.directory / last.path),
                resume_sha256=last.sha256,
            )
        )
        rest = collect(worker, until=lambda events: ended(events) == {2})
        (again,) = (e for e in rest if isinstance(e, Started))
        assert again.step == last.step > 0
        assert again.environment["node"] != where[2]
        assert list(losses(rest, 2)) == list(range(0, 301, 2))
    engine.close()
    for message in said:
        assert message in caplog.messages, "what was said of nodes is in the log"
    assert "(raylet)" not in capfd.readouterr().out, "Ray's own errors are for the log"


def assert_named_for_the_dashboard(job: Job) -> None:
    """Ray's dashboard lists actors by these names: study, round, node, and the worker's number."""
    from ray.util import list_named_actors

    (folder,) = job.directory.glob(".cluster")
    found = [each["name"] for each in list_named_actors(all_namespaces=True) if each["namespace"] == "tuner"]
    named = [re.fullmatch(r"tuner tiny/round1 (\S+) \w{8}\.(\d+)", name) for name in found]
    assert all(named), found
    assert len(found) >= 3
    logs = {path.name for path in folder.parent.glob("worker-*.log")}
    assert {f"worker-{each[1]}-{each[2]}.log" for each in named if each} == logs


@pytest.mark.acceptance
@pytest.mark.timeout(400)
@pytest.mark.parametrize("whole_node", [False, True], ids=["raylet", "node"])
def test_a_stopped_raylet_or_node_costs_its_trial_an_attempt_and_its_worker_ends(
    cluster: LocalCluster, job: Job, whole_node: bool
) -> None:
    """SIGSTOP: nothing is closed, and nothing answers. A node that goes on later finds its lease over."""
    node = cluster.add()
    engine = BlindEngine()
    with started(engine, replace(job, workers="auto")) as worker:
        seen = collect(worker, until=ready)
        for trial in range(3):
            worker.start(assignment(job.directory, trial, steps=ENDLESS))
            if trial < 2:
                seen += collect(worker, until=ready)
        seen += collect(worker, until=lambda events: all(losses(events, trial) for trial in range(3)))
        lost = node.node_id[:4]
        where = {e.trial: e.environment for e in seen if isinstance(e, Started)}
        (trial,) = (trial for trial, env in where.items() if env["node"].endswith(lost))
        stopped = stop_node(node, whole=whole_node)
        said = collect(worker, until=lambda events: any(isinstance(e, Died) for e in events), seconds=150)
        (died,) = (e for e in said if isinstance(e, Died))
        assert died.trials == (trial,)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 120
        while workers_of(where[trial]["worker"]) and time.monotonic() < deadline:
            time.sleep(0.5)
        assert not workers_of(where[trial]["worker"])
        for other in {0, 1, 2} - {trial}:
            worker.stop(assignment(job.directory, other).run)
        collect(worker, until=lambda events: ended(events) == {0, 1, 2} - {trial})
    engine.close()
    cluster.lose(node)


def stop_node(node: Any, *, whole: bool) -> list[int]:
    """Stop a node's raylet, or all its processes; return them."""
    (raylet,) = (each[0].process for name, each in node.all_processes.items() if name == "raylet")
    stopped = [raylet.pid]
    if whole:
        stopped += [child.pid for child in psutil.Process(raylet.pid).children(recursive=True)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    return stopped


def test_a_cluster_that_answers_without_a_token_is_known(cluster: LocalCluster) -> None:
    assert answers_to(cluster.address, {**os.environ, "RAY_AUTH_MODE": "disabled"}) is True
    assert "whoever reaches its ports can run code" in (warning_of_no_token(cluster.address) or "")


@pytest.mark.parametrize("address", ["10.0.0.1", "head", ":6379", "head:port"])
def test_an_address_without_a_port_is_bad_input(address: str) -> None:
    with pytest.raises(InputError, match=r"write HOST:PORT"):
        refuse_unreachable(address)


def test_an_address_at_which_nothing_answers_is_bad_input_before_ray_tries_for_minutes() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(InputError, match=r"nothing answers there \(.*refused"):
            refuse_unreachable(address, patience_seconds=0.5)


class WithoutTorch(BlindEngine):
    """A cluster on which every round runs a program without torch."""

    def start(self, job: Job) -> Worker:
        return super().start(replace(job, program=Program(PROGRAM, lambda: {"slots": 1})))


@pytest.mark.acceptance
def test_auto_runs_all_its_rounds_on_a_cluster(cluster: LocalCluster, tmp_path: Path) -> None:
    write_round(tmp_path, trials=2, steps=10, every=5, run="run: {slots: 1, production_steps: 20}")
    study, where = tuner.Study(tmp_path), f"{__name__}:WithoutTorch"
    study.auto("round1.yaml", engine=where, ray_address=cluster.address, progress=False)
    rounds = study.status()["rounds"]
    assert [(each["round"], each["state"]) for each in rounds] == [
        ("round1", "complete"),
        ("round2", "complete"),
    ]
    ran = attempts(tmp_path, [each["round"] for each in rounds])
    assert all("node" in attempt.environment for attempt in ran)


def attempts(directory: Path, rounds: list[str]) -> list[Attempt]:
    """All attempts of some rounds; there is one at least."""
    with closing(open_store(f"sqlite:///{directory / 'tuner.db'}", study="tiny")) as store:
        found = [attempt for name in rounds for t in store.trials(name) for attempt in t.attempts]
    assert found
    return found


@pytest.mark.acceptance
def test_a_sweep_runs_on_a_cluster(cluster: LocalCluster, tmp_path: Path) -> None:
    """Of so few rows that they are seen several times, or no sweep would be needed."""
    for name in ("train.jsonl", "eval.jsonl"):
        rows = (QUICKSTART / "data" / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(rows[:20]))
    changes = {"data": tmp_path, "steps": 20, "every": 10, "run": "run: {slots: 1, production_steps: 40}"}
    write_round(tmp_path, **changes)
    study, where = tuner.Study(tmp_path), f"{__name__}:WithoutTorch"
    found = study.sweep("round1.yaml", engine=where, ray_address=cluster.address, progress=False)
    rounds = [each["round"] for each in study.status()["rounds"] if each["state"] == "complete"]
    assert rounds
    assert all(name.startswith("sweep-") for name in rounds), rounds
    assert f"max_train_steps: {found or 10}" in (tmp_path / "round1.yaml").read_text()
    assert all("node" in attempt.environment for attempt in attempts(tmp_path, rounds))


TOKEN = "0123456789" * 4
WITH_TOKEN = """
import ray, sys
small = {"num_cpus": 1, "object_store_memory": 100_000_000}
head = ray.init(address="local", include_dashboard=False, **small)
print(head.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.mark.acceptance
def test_a_token_that_a_cluster_refuses_is_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # without ~/.ray/auth_token
    variables = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with subprocess.Popen(
        [sys.executable, "-c", WITH_TOKEN],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as head:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        with pytest.raises(InputError, match=r"asks for a token\. Set RAY_AUTH_MODE=token"):
            refuse_unreachable(address)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        with pytest.raises(InputError, match=r"refuses the token of this shell, or the shell has none"):
            refuse_unreachable(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN[::-1])
        with pytest.raises(InputError, match=r"refuses the token"):
            refuse_unreachable(address)
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        refuse_unreachable(address)
        assert warning_of_no_token(address) is None
        head.communicate("")


def test_more_gpus_for_a_worker_than_a_node_has_is_bad_input(job: Job) -> None:
    engine = RayEngine()
    with pytest.raises(InputError, match=r"run.gpus_per_worker: 3: no node of the cluster has more than 1"):
        engine.start(with_run(job, gpus_per_worker=3))
    engine.close()


def test_it_waits_for_a_gpu_as_long_as_the_file_says(job: Job) -> None:
    other = RayEngine()
    with started(other, replace(job, workers="auto")) as holder:
        collect(holder, until=ready)
        holder.start(assignment(job.directory, 0, steps=ENDLESS))
        collect(holder, until=ready)
        engine = RayEngine()
        worker = engine.start(with_run(job, resources_patience=0.05))
        with pytest.raises(RoundStopped, match=r"no node has 1 GPU free .*run.resources_patience"):
            collect(worker, until=ready)
        worker.close()
        engine.close()
    other.close()


DRIVER = """
import sys, time
from pathlib import Path
from tests.contracts.worker import ENDLESS, assignment, collect
from tests.studies import round_file
from tuner.engines import Job, Program, RayEngine
from tuner.records import Evaluated, Ready

place, address = Path(sys.argv[1]), sys.argv[2]
file = round_file(place, run=f"run: {{slots: 1, ray_address: '{address}'}}")
program = Program(("-m", "tests.engines.cluster_program"), lambda: {"slots": 1, "pause": 0.05})
worker = RayEngine().start(Job(file.spec.absolute(place), program, place / "runs", 1))
collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
worker.start(assignment(place / "runs", 0, steps=ENDLESS))
collect(worker, until=lambda seen: any(isinstance(e, Evaluated) for e in seen))
print("running", flush=True)
time.sleep(100)
"""


def test_a_killed_driver_leaves_nothing_on_the_nodes(cluster: LocalCluster, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), cluster.address],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "running\n"
        token = (tmp_path / "runs" / ".cluster").read_text()
        assert len(workers_of(token)) == 1
        driver.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while workers_of(token) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers_of(token)


def workers_of(token: str) -> list[int]:
    """Processes of a round, wherever they were started."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(WORKER_TOKEN, "").startswith(token):
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize("address", ["ray://head:10001", "auto", None])
def test_an_address_that_names_no_cluster_is_bad_input(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match=r"HOST:6379"):
        address_of(address)


def test_the_address_is_the_options_then_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert address_of(None) == "head:6379"
    assert address_of("other:6379") == "other:6379"
