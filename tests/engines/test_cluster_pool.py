"""The workers of a cluster as one, without Ray: which nodes get workers, and which are left out and why."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tuner
from tests.contracts.worker import ENDLESS, assignment, collect, ended, losses, saved
from tests.engines.test_hosts import PROGRAM, ROOT, Apart, Wire
from tests.studies import QUICKSTART, installed, round_file
from tuner.config import RoundSpec, load_round
from tuner.config.sections import AnswersSpec
from tuner.engines import Job, Program
from tuner.engines.ray.alike import NodeFacts, differences, module_digest, own_modules, versions
from tuner.engines.ray.engine import bundles
from tuner.engines.ray.host import Host
from tuner.engines.ray.nodes import Node, NodeRecords, refuse_impossible, seats
from tuner.engines.ray.opening import files_outside, inputs, is_on_the_hub, job_token
from tuner.engines.ray.pool import ClusterPool
from tuner.engines.ray.remote import Connection
from tuner.errors import InputError, RoundStopped
from tuner.records import Died, Event, NodeChanged, Ready, Started


class Machines:
    """A cluster within this process: each node has a scratch folder of its own and sees no other disk."""

    def __init__(self, tmp_path: Path, *names: str, gpus: int = 1) -> None:
        self.tmp_path = tmp_path
        self.alive = {name: Node(name, name, gpus, gpus) for name in names}
        self.kinds: dict[str, type[Host]] = {}
        self.wires: list[tuple[str, Wire]] = []
        self.requested: list[int] = []
        Apart.hidden = str(tmp_path / "parent")

    def nodes(self) -> list[Node]:
        taken = [name for name, wire in self.wires if not wire.is_dead]
        return [replace(node, free_gpus=node.gpus - taken.count(name)) for name, node in self.alive.items()]

    def connect(self, node: Node, *, gpus: int, name: str) -> Connection:
        kind = self.kinds.get(node.id, Apart)
        host = kind(scratch=str(self.tmp_path / node.id), on_lost=lambda: None)
        self.wires.append((node.id, Wire(host)))
        return self.wires[-1][1]

    def request(self, workers: int, *, gpus: int) -> None:
        self.requested.append(workers)

    def lose(self, name: str) -> None:
        del self.alive[name]
        for at, wire in self.wires:
            if at == name:
                wire.end()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def job(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    file = round_file(tmp_path / "parent", run="run: {slots: 1, resources_patience: 0.05}")
    document = {"slots": 1, "pause": 0.01}
    directory, cache = tmp_path / "parent" / "runs", tmp_path / "parent" / "cache"
    spec = file.spec.absolute(tmp_path / "parent")
    return Job(spec, Program(PROGRAM, lambda: document), directory, say=said.append, cache=cache)


@pytest.fixture
def opened(job: Job) -> Iterator[Callable[[Machines], ClusterPool]]:
    pools: list[ClusterPool] = []

    def pool_of(machines: Machines, **changes: Any) -> ClusterPool:
        pools.append(ClusterPool(replace(job, **changes), machines, NodeRecords()))
        return pools[-1]

    yield pool_of
    for pool in pools:
        pool.close()


class MachinesEngine:
    """The engine of such a cluster, for whole rounds."""

    machines: Machines

    def start(self, job: Job) -> ClusterPool:
        return ClusterPool(job, self.machines, NodeRecords())

    def gpu_readings(self) -> tuple[()]:
        return ()

    def now(self) -> float:
        return time.time()

    def close(self) -> None:
        pass


def ready(events: list[Event], count: int = 1) -> bool:
    return sum(isinstance(event, Ready) for event in events) >= count


def after(pool: ClusterPool, holds: Callable[[], bool], *, seconds: float = 90) -> list[Event]:
    """Events until something is true of the world."""
    deadline, events = time.monotonic() + seconds, []
    while not holds():
        assert time.monotonic() < deadline, events
        events += pool.events(0.2)
    return events


def test_the_second_worker_opens_with_the_first_trial_and_both_run(
    job: Job, opened: Any, tmp_path: Path
) -> None:
    pool = opened(Machines(tmp_path, "a", "b"))
    events = collect(pool, until=ready)
    assert pool.capacity() == 1
    pool.start(assignment(job.directory, 0, steps=ENDLESS))
    events += collect(pool, until=ready)
    assert [e.device.rpartition(" on ")[2] for e in events if isinstance(e, Ready)] == ["a", "b"]
    pool.start(assignment(job.directory, 1, steps=20))
    events += collect(pool, until=lambda seen: ended(seen) == {1})
    pool.stop(assignment(job.directory, 0).run)
    events += collect(pool, until=lambda seen: ended(seen) == {0})
    assert {e.environment["node"] for e in events if isinstance(e, Started)} == {"a", "b"}
    assert all((job.directory / c.path).is_dir() for c in saved(events))
    assert pool.capacity() == 2


def test_no_more_workers_than_the_command_says(job: Job, opened: Any, tmp_path: Path) -> None:
    machines = Machines(tmp_path, "a", "b", "c")
    pool = opened(machines, workers=2)
    collect(pool, until=ready)
    pool.start(assignment(job.directory, 0, steps=ENDLESS))
    collect(pool, until=ready)
    pool.events(5.0)
    assert len(machines.wires) == 2


def test_a_lost_nodes_trial_is_said_once_and_a_new_node_gets_a_worker(
    job: Job, opened: Any, tmp_path: Path, said: list[str]
) -> None:
    machines = Machines(tmp_path, "a", "b")
    pool = opened(machines)
    collect(pool, until=ready)
    pool.start(assignment(job.directory, 0, steps=ENDLESS))
    collect(pool, until=ready)
    pool.start(assignment(job.directory, 1, steps=ENDLESS))
    events = collect(pool, until=lambda seen: len(losses(seen, 1)) > 3)
    machines.lose("b")
    machines.alive["c"] = Node("c", "c", 1, 1)
    events += collect(pool, until=ready)
    assert [e.trials for e in events if isinstance(e, Died)] == [(1,)]
    changes = [e.node_change for e in events if isinstance(e, NodeChanged)]
    assert {(each.node, each.change, each.gpus) for each in changes} == {("c", "joined", 1), ("b", "lost", 1)}
    assert "node c joined: 1 GPU" in said
    assert "node b left the cluster" in said


class OtherTorch(Apart):
    def describe(self, modules: Any = ()) -> NodeFacts:
        facts = super().describe(modules)
        return replace(facts, versions={**facts.versions, "torch": "1.0"})


def test_a_node_with_another_version_is_left_out_with_what_differs(
    opened: Any, tmp_path: Path, said: list[str]
) -> None:
    machines = Machines(tmp_path, "a", "b")
    machines.kinds["a"] = OtherTorch
    pool = opened(machines)
    events = collect(pool, until=ready)
    assert not [e for e in events if isinstance(e, Died)]
    (left_out,) = said
    assert left_out.startswith("node a is left out: it has torch 1.0 instead of ")
    assert [name for name, wire in machines.wires if not wire.is_dead] == ["b"]


def test_a_cluster_of_other_versions_alone_is_bad_input(opened: Any, tmp_path: Path) -> None:
    machines = Machines(tmp_path, "a")
    machines.kinds["a"] = OtherTorch
    pool = opened(machines)
    events = collect(pool, until=lambda seen: any(isinstance(e, Died) for e in seen))
    (died,) = (e for e in events if isinstance(e, Died))
    assert died.is_input_error
    assert "torch 1.0 instead of" in died.reason


def test_a_node_with_another_workload_is_left_out(
    job: Job, opened: Any, tmp_path: Path, said: list[str]
) -> None:
    """Another model behind the same path: only its worker can know."""
    documents = iter([{"workload": "ours"}, {"workload": "another"}, *[{"workload": "ours"}] * 9])
    program = Program(PROGRAM, lambda: {"slots": 1, "pause": 0.01, **next(documents)})
    machines = Machines(tmp_path, "a", "b")
    pool = opened(machines, program=program)
    collect(pool, until=ready)
    pool.start(assignment(job.directory, 0, steps=ENDLESS))
    events = after(pool, lambda: any("another workload" in text for text in said))
    assert not ready(events)
    assert pool.capacity() == 0


class Broken(Apart):
    def launch(self, arguments: Any, environment: Any, token: str) -> None:
        super().launch(("-c", "raise SystemExit('the driver is too old')"), environment, token)


def test_a_node_that_fails_three_times_is_left_out_and_costs_no_trial(
    job: Job, opened: Any, tmp_path: Path, said: list[str]
) -> None:
    machines = Machines(tmp_path, "a", "b")
    machines.kinds["b"] = Broken
    pool = opened(machines)
    collect(pool, until=ready)
    pool.start(assignment(job.directory, 0, steps=ENDLESS))
    events = after(pool, lambda: any("left out" in text for text in said), seconds=60)
    assert not [e for e in events if isinstance(e, Died)]
    assert [name for name, _ in machines.wires].count("b") == 3
    assert any("node b is left out: failed 3 times" in text and "too old" in text for text in said)


def test_without_a_gpu_it_waits_then_stops(opened: Any, tmp_path: Path) -> None:
    machines = Machines(tmp_path, "a")
    machines.wires.append(("a", Wire(Apart(scratch=str(tmp_path / "x"), on_lost=lambda: None))))  # taken
    pool = opened(machines)
    with pytest.raises(RoundStopped, match=r"a 0 of 1 GPU free.*waited 0.05 minutes"):
        after(pool, lambda: False)
    assert machines.requested[0] == 1
    machines.wires[0][1].end()


@pytest.mark.parametrize(("workers", "asked"), [(1, []), (3, [3]), ("auto", [])])
def test_a_cluster_that_can_grow_is_asked_for_all_workers_while_some_have_room(
    opened: Any, tmp_path: Path, workers: Any, asked: list[int]
) -> None:
    machines = Machines(tmp_path, "a")
    pool = opened(machines, workers=workers)
    collect(pool, until=ready)
    assert machines.requested == asked
    pool.close()
    assert machines.requested == [*asked, 0]


class Receiving(Apart):
    """Another worker of its node receives the model, without end."""

    is_over = threading.Event()

    def claim(self, *_: Any) -> tuple[str, str]:
        if self.is_over.is_set():
            raise OSError("it was given up")
        return "busy", ""


def test_closing_does_not_wait_for_what_a_node_is_sent(job: Job, opened: Any, tmp_path: Path) -> None:
    machines = Machines(tmp_path, "a")
    machines.kinds["a"] = Receiving
    model = tmp_path / "parent" / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    spec = job.spec.model_copy(update={"model": job.spec.model.model_copy(update={"path": str(model)})})
    pool = opened(machines, spec=spec)
    after(pool, lambda: any("claim" in wire.calls for _, wire in machines.wires), seconds=20)
    closing = threading.Thread(target=pool.close, daemon=True)
    closing.start()
    closing.join(20.0)
    is_closed = not closing.is_alive()
    Receiving.is_over.set()
    closing.join(20.0)
    assert is_closed


def test_an_autoscaler_is_asked_for_gpus_or_for_nodes_that_offer_cpus() -> None:
    assert bundles(2, gpus=3) == [{"GPU": 3}, {"GPU": 3}]
    assert bundles(1, gpus=0) == [{"CPU": 1}]
    assert bundles(0, gpus=1) == []


def test_tokenised_rows_go_to_the_parent_and_to_other_nodes(job: Job, opened: Any, tmp_path: Path) -> None:
    """The first worker's node has made a table; the second's gets it before its worker starts."""
    table, content = "0123456789abcdef" * 2, b"tokens"
    pool = opened(Machines(tmp_path, "a", "b"))

    def on(node: str) -> list[Path]:
        return list((tmp_path / node / "tables").glob(f"*/{table}/tokens.npy"))

    after(pool, lambda: bool(list((tmp_path / "a" / "tables").glob("*"))))
    (tables,) = (tmp_path / "a" / "tables").glob("*")
    (tables / table).mkdir()
    (tables / table / "tokens.npy").write_bytes(content)
    (tables / "unfinished").mkdir()
    (tables / "sources").mkdir()
    (tables / "sources" / "hub.json").write_text("[]")
    collect(pool, until=ready)
    pool.start(assignment(job.directory, 0, steps=ENDLESS))
    collect(pool, until=ready)
    assert job.cache is not None
    assert sorted(path.name for path in job.cache.iterdir()) == [table, "sources"]
    (copy,) = on("b")
    assert copy.read_bytes() == content
    assert (copy.parents[1] / "sources" / "hub.json").read_text() == "[]"


def test_a_model_that_no_node_sees_is_sent_to_each(job: Job, opened: Any, tmp_path: Path) -> None:
    spec = job.spec
    model = tmp_path / "parent" / "base"
    model.mkdir(parents=True)
    (model / "weights").write_bytes(b"weights")
    moved = spec.model_copy(update={"model": spec.model.model_copy(update={"path": str(model)})})
    pool = opened(Machines(tmp_path, "a"), spec=moved)
    collect(pool, until=ready)
    (copy,) = (tmp_path / "a" / "files").glob("*/base/weights")
    assert copy.read_bytes() == b"weights"


class Offline(Apart):
    """A node without the Hub, and without the model in its cache."""

    def hub_commit(self, model: str, revision: str | None) -> str | None:
        self._alive()

    def reaches_hub(self) -> bool:
        self._alive()
        return False


def test_a_model_of_the_hub_goes_to_a_node_that_cannot_get_it(
    job: Job, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the parent's cache, at its commit; its worker is told the place, and what the user calls it."""
    from huggingface_hub import constants

    commit, cache = "0" * 40, tmp_path / "parent" / "hub"
    snapshot = cache / "models--org--base" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (cache / "models--org--base" / "refs").mkdir()
    (cache / "models--org--base" / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    spec = job.spec.model_copy(update={"model": job.spec.model.model_copy(update={"path": "org/base"})})
    program = Program(PROGRAM, lambda: {"slots": 1, "spec": spec.model_dump(mode="json")})
    machines = Machines(tmp_path, "a")
    machines.kinds["a"] = Offline
    pool = opened(machines, spec=spec, program=program)
    collect(pool, until=ready)
    (sent,) = (tmp_path / "a" / "files").glob("*/*/config.json")
    (log,) = job.directory.glob("worker-a-*.log")
    document = json.loads(log.read_text().partition("document ")[2])
    assert document["spec"]["model"]["path"] == str(sent.parent)
    assert document["spec"]["model"]["revision"] == commit
    assert document["paths"] == {str(sent.parent): "org/base", **others(document)}


class Told(Apart):
    """Remembers the variables that its workers were given."""

    given: list[dict[str, str]] = []  # noqa: RUF012

    def launch(self, arguments: Any, environment: Any, token: str) -> None:
        self.given.append(environment)
        super().launch(arguments, environment, token)


@pytest.mark.parametrize("is_command", [False, True], ids=["lora", "command"])
def test_keys_are_arguments_of_a_call_and_in_no_file(
    job: Job, opened: Any, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, is_command: bool
) -> None:
    """What tuner logs to a tracker is logged by the parent; a command may log by itself."""
    secrets = {name: f"key-{name}-" + "aBcDeFgH" * 4 for name in ("HF_TOKEN", "WANDB_API_KEY")}
    secrets["MLFLOW_TRACKING_PASSWORD"] = "aBcDeFgH" * 4
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    machines = Machines(tmp_path, "a")
    machines.kinds["a"] = Told
    monkeypatch.setattr(Told, "given", [])
    spec = command_spec(tmp_path / "parent") if is_command else job.spec
    pool = opened(machines, spec=spec)
    events = collect(pool, until=ready)
    pool.close()
    (variables,) = Told.given
    expected = secrets if is_command else {"HF_TOKEN": secrets["HF_TOKEN"]}
    assert {name: value for name, value in variables.items() if name in secrets} == expected
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name.startswith("worker-a-") for path in files)
    contents = b"".join(path.read_bytes() for path in files)
    assert not [name for name, secret in secrets.items() if secret.encode() in contents]
    assert not [name for name, secret in secrets.items() if secret in repr((said, events))]


def test_the_login_to_the_hub_goes_to_nodes_for_a_model_or_data_there(
    job: Job, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `hf auth login` leaves it, in a file of the parent's machine."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_of_the_file")
    monkeypatch.setattr(Told, "given", [])
    source = job.spec.data.train[0].model_copy(update={"path": "org/private"})
    data = job.spec.data.model_copy(update={"train": [source]})
    machines = Machines(tmp_path, "a")
    machines.kinds["a"] = Told
    collect(opened(machines, spec=job.spec.model_copy(update={"data": data})), until=ready)
    assert [variables["HF_TOKEN"] for variables in Told.given] == ["hf_of_the_file"]
    assert not is_on_the_hub(job.spec)


def test_packages_that_workers_import_are_compared_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one whose name only an entry point knows; samplers and trackers run in the parent."""
    site = installed(tmp_path / "site", "sign-descent", optimizers="sign = sign_descent.methods:SIGN")
    for name in ("sign_descent", "their_scores", "their_samplers"):
        (site / name).mkdir()
        (site / name / "__init__.py").write_text("")
        (site / name / "methods.py").write_text("SIGN = 1\n")
    monkeypatch.syspath_prepend(site)
    spec = round_file(tmp_path / "other", optimizer="sign", sampler="their_samplers.methods:S").spec
    answers = AnswersSpec(metric="their_scores.methods:score")
    spec = spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"answers": answers})})
    assert list(own_modules(spec)) == ["sign_descent", "their_scores"]
    facts = NodeFacts("a", {**versions(), "sign_descent": "0123456789ab"}, (), 1)
    assert f"sign_descent 0123456789ab instead of {module_digest('sign_descent')}" in (
        differences(facts, spec) or ""
    )


def test_a_metrics_file_takes_along_what_it_can_import(job: Job, opened: Any, tmp_path: Path) -> None:
    study = tmp_path / "parent" / "scores"
    (study / "parts").mkdir(parents=True)
    for name in ("metric.py", "beside.py", "parts/__init__.py", "parts/more.py", "rows.jsonl"):
        (study / name).write_text(f"# {name}\n")
    answers = AnswersSpec(metric=f"{study}/metric.py:score")
    evaluation = job.spec.evaluation.model_copy(update={"answers": answers})
    spec = job.spec.model_copy(update={"evaluation": evaluation})
    program = Program(PROGRAM, lambda: {"slots": 1, "spec": spec.model_dump(mode="json")})
    pool = opened(Machines(tmp_path, "a"), spec=spec, program=program)
    collect(pool, until=ready)
    (log,) = job.directory.glob("worker-a-*.log")
    document = json.loads(log.read_text().partition("document ")[2])
    metric = document["spec"]["evaluation"]["answers"]["metric"]
    assert metric.endswith("/scores/metric.py:score")
    sent = Path(metric.partition(":")[0])
    assert tmp_path / "a" in sent.parents
    assert document["paths"][str(sent)] == f"{study}/metric.py"
    there = sorted(path.relative_to(sent.parent).as_posix() for path in sent.parent.rglob("*.*"))
    assert there == ["beside.py", "metric.py", "parts/__init__.py", "parts/more.py"]


def others(document: dict[str, Any]) -> dict[str, str]:
    return {there: here for there, here in document["paths"].items() if here != "org/base"}


def test_a_round_keeps_its_token(job: Job) -> None:
    assert job_token(job.directory) == job_token(job.directory)
    assert len(job_token(job.directory)) == 16
    (job.directory / ".cluster").write_text("")  # a full disk
    assert len(job_token(job.directory)) == 16


def test_what_a_round_file_names(job: Job) -> None:
    assert [key for key, _ in inputs(job.spec)] == ["model.path", "data.train", "data.eval"]


def test_a_head_that_offers_no_cpus_trains_nothing() -> None:
    nodes = [Node("head", "head", 0, 0, is_here=True, is_for_work=False), Node("a", "a", 0, 0)]
    assert seats(nodes, gpus_per_worker=1, workers="auto") == {"head": 0, "a": 1}
    assert seats(nodes, gpus_per_worker=1, workers=2) == {"head": 0, "a": 2}


@given(
    gpus=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    per_worker=st.integers(0, 4),
    workers=st.one_of(st.just("auto"), st.integers(1, 9)),
)
def test_seats(gpus: list[int], per_worker: int, workers: Any) -> None:
    nodes = [Node(str(at), str(at), count, count) for at, count in enumerate(gpus)]
    room = seats(nodes, gpus_per_worker=per_worker, workers=workers)
    if any(gpus) and per_worker:
        assert room == {node.id: node.gpus // per_worker for node in nodes}
    elif workers == "auto":
        assert set(room.values()) == {1}
    else:
        assert sum(room.values()) == workers
        assert max(room.values()) - min(room.values()) <= 1


@pytest.mark.parametrize(
    ("gpus", "per_worker", "workers", "expected"),
    [
        ([3, 2], 2, "auto", ["node a: 1 GPU of 3 stays idle: run.gpus_per_worker is 2"]),
        ([0, 4], 2, "auto", ["nodes without a GPU get no worker while others have one: a"]),
        ([1, 1], 1, 4, ["--workers 4: the cluster has room for 2 now; more start when nodes join"]),
        ([1], 2, "auto", "run.gpus_per_worker: 2: no node of the cluster has more than 1"),
        ([0], 2, "auto", "run.gpus_per_worker: 2: no node of the cluster has a GPU"),
        ([0, 0], 1, 2, []),
        ([3], 0, "auto", []),
    ],
)
def test_what_stays_idle_is_said_and_what_never_fits_is_bad_input(
    job: Job, said: list[str], gpus: list[int], per_worker: int, workers: Any, expected: list[str] | str
) -> None:
    run = job.spec.run.model_copy(update={"gpus_per_worker": per_worker})
    job = replace(job, workers=workers, spec=job.spec.model_copy(update={"run": run}))
    nodes = [Node(name, name, count, count) for name, count in zip("ab", gpus, strict=False)]
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            refuse_impossible(job, nodes)
    else:
        refuse_impossible(job, nodes)
        assert said == expected


def test_workers_lost_together_are_one_failure_of_their_node() -> None:
    records = NodeRecords()
    for _ in range(8):
        records.token("job")
    assert [records.fail("a", number) for number in range(1, 9)] == [1] * 8
    assert records.fail("b", 3) == 1
    records.token("job")
    assert records.fail("a", 9) == 2


class Counting(MachinesEngine):
    """Says what it is asked to run, and runs a program without torch in its place."""

    asked: list[tuple[bool, int | str]] = []  # noqa: RUF012

    def start(self, job: Job) -> ClusterPool:
        document = job.program.document()
        self.asked.append((bool(document.get("probe")), job.workers))
        job.say("two machines")
        return super().start(replace(job, program=Program(PROGRAM, lambda: {"slots": 1})))


def test_a_probe_runs_in_one_worker_of_the_chosen_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    study = tmp_path / "parent"
    study.mkdir()
    for name in ("base", "data"):
        (study / name).symlink_to(QUICKSTART / name)
    (study / "round1.yaml").write_text((QUICKSTART / "round1.yaml").read_text())
    Counting.machines = Machines(tmp_path, "a", "b")
    before = sorted(study.iterdir())
    said = tuner.Study(study).check("round1.yaml", probe=True, engine=f"{__name__}:Counting")
    assert said["ok"], said
    assert Counting.asked == [(True, 1)]
    assert "two machines" in said["remarks"]
    assert "the engine's workers do not time steps" in said["remarks"]
    assert all(wire.is_dead for _, wire in Counting.machines.wires)
    assert sorted(path for path in study.iterdir() if path.name != ".tuner-cache") == before


def test_status_shows_a_node_that_was_left_out_before_the_round_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    study = round_file(tmp_path / "parent", run="run: {slots: 1}").path.parent
    Counting.machines = Machines(tmp_path, "a", "b")
    Counting.machines.kinds["a"] = OtherTorch
    before = time.time()
    tuner.Study(study).run("round1.yaml", engine=f"{__name__}:Counting", progress=False)
    (status,) = tuner.Study(study).status()["rounds"]
    ((change,), state) = status["node_changes"], status["state"]
    assert (state, change["node"], change["change"], change["gpus"]) == ("complete", "a", "left_out", 1)
    assert change["reason"].startswith("it has torch 1.0 instead of ")
    assert before <= change["at"] <= time.time()


SCRIPT = """\
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--learning_rate", type=float)
parser.add_argument("--resume")
parser.add_argument("--words")
given, _ = parser.parse_known_args()
print("runs in", os.getcwd(), "sees", os.environ.get("CUDA_VISIBLE_DEVICES"))
print(pathlib.Path("note.txt").read_text(), pathlib.Path(given.words).read_text(), given.words)
start = json.loads(pathlib.Path(given.resume, "state.json").read_text())["step"] if given.resume else 0
every = int(os.environ["TUNER_EVALUATE_EVERY"])
for step in range(start, int(os.environ["TUNER_MAX_STEPS"]) + 1):
    if step % every == 0 and (step > start or not start):
        kept = pathlib.Path(os.environ["TUNER_OUTPUT_DIR"], f"step-{step}")
        kept.mkdir(parents=True)
        (kept / "state.json").write_text(json.dumps({"step": step}))
        line = {"step": step, "eval_loss": 1 / (1 + step * given.learning_rate), "checkpoint": str(kept)}
        with open(os.environ["TUNER_METRICS"], "a") as metrics:
            metrics.write(json.dumps(line) + "\\n")
"""

COMMAND_ROUND = """\
study: plain
round: round1
command:
  run: [python, train.py, "--words=OUTSIDE/words.txt", "${args}"]
  tool: none
  resume: [--resume, "${resume_from}"]
max_train_steps: 12
hyperparameters:
  learning_rate: {low: 1e-3, high: 1e-1, log: true}
  schedule: constant
evaluation: {every_steps: 3}
search: {trials: 3}
run: {gpus_per_worker: 0}
storage: sqlite:///tuner.db
"""


def command_spec(study: Path) -> RoundSpec:
    (study / "train.py").write_text(SCRIPT)
    (study / "words.txt").write_text("")
    (study / "command.yaml").write_text(COMMAND_ROUND.replace("OUTSIDE", str(study)))
    return load_round(study / "command.yaml").spec.absolute(study)


def test_a_commands_round_runs_on_nodes_that_see_no_file_of_its_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is sent; curves, checkpoints and logs arrive; GPUs that it is to leave alone are hidden."""
    monkeypatch.setenv("PYTHONPATH", ROOT)
    study = tmp_path / "parent"
    study.mkdir()
    outside = tmp_path / "parent-of-others"
    outside.mkdir()
    (outside / "words.txt").write_text("words from outside")
    written = COMMAND_ROUND.replace("OUTSIDE", str(outside))
    for name, text in (("train.py", SCRIPT), ("note.txt", "a note"), ("round1.yaml", written)):
        (study / name).write_text(text)
    MachinesEngine.machines = Machines(tmp_path, "a", "b", gpus=2)
    tuner.Study(study).run("round1.yaml", engine=f"{__name__}:MachinesEngine", progress=False)
    trials = tuner.Study(study).round("round1").trials
    assert [str(trial.state) for trial in trials] == ["complete"] * 3
    for trial in trials:
        rate = trial.hyperparameters["learning_rate"]
        assert [e.eval_loss for e in trial.evaluations] == [1 / (1 + s * rate) for s in (0, 3, 6, 9, 12)]
    kept = sorted((study / "runs").rglob("best/**/state.json"))
    assert len(kept) == 3
    logs = [path.read_text() for path in sorted((study / "runs").rglob("command.log"))]
    assert len(logs) == 3
    for log in logs:
        assert "sees -1" in log
        assert "a note words from outside" in log
        assert str(tmp_path / "parent") not in log


def test_a_file_named_from_a_folder_that_nodes_have_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", ROOT)
    study = tmp_path / "parent"
    study.mkdir()
    (tmp_path / "parent-words.txt").write_text("")
    written = COMMAND_ROUND.replace("OUTSIDE/words.txt", "../parent-words.txt")
    for name, text in (("train.py", SCRIPT), ("round1.yaml", written)):
        (study / name).write_text(text)
    MachinesEngine.machines = Machines(tmp_path, "a")
    with pytest.raises(InputError, match=r"\.\./parent-words.txt is outside the study's folder, and a node"):
        tuner.Study(study).run("round1.yaml", engine=f"{__name__}:MachinesEngine", progress=False)
    assert not (study / "tuner.db").exists()


def test_what_a_command_names_outside_of_its_folder(tmp_path: Path) -> None:
    study, other = tmp_path / "study", tmp_path / "other"
    for folder in (study, other):
        folder.mkdir()
        (folder / "file").write_text("")
    words = [
        "/bin/sh",
        "file",
        "../other/file",
        f"--data={other}",
        f"{study}/file",
        "${args}",
        "/no/such",
        "..",
        "/x" + "y" * 5000,
    ]
    (study / "round1.yaml").write_text(
        COMMAND_ROUND.replace('[python, train.py, "--words=OUTSIDE/words.txt", "${args}"]', json.dumps(words))
    )
    found = list(files_outside(load_round(study / "round1.yaml").spec, study))
    assert found == [("../other/file", other / "file"), (str(other), other)]
