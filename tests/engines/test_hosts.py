"""A worker on another machine, without Ray: over connections that drop, repeat, die and fall silent."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.worker import (
    ENDLESS,
    WorkerContract,
    assignment,
    collect,
    ended,
    losses,
    saved,
    wait_until_ready,
)
from tuner.engines import Program, ProgramWorker
from tuner.engines.ray.host import LEASE_SECONDS, WORKER_TOKEN, Heard, Host
from tuner.engines.ray.node_files import NodeFiles
from tuner.engines.ray.remote import (
    SILENCE_SECONDS,
    HostFailed,
    HostLost,
    Places,
    RemoteHost,
    RemoteProcess,
    Unavailable,
)
from tuner.engines.ray.transfer import Parcel, Sender, fetch, give_back, is_seen, until_room
from tuner.errors import InputError
from tuner.records import Died, Ended, Evaluated, Saved, Started
from tuner.whole import digest

PROGRAM = ("-m", "tests.engines.cluster_program")
ROOT = os.fspath(Path(__file__).parents[2])


class Apart(Host):
    """A host on a machine that sees none of the parent's files."""

    hidden: str = ""

    def read_back(self, path: str) -> bytes | None:
        return None if path.startswith(self.hidden) else super().read_back(path)

    def digest(self, path: str, weights: str | None = None) -> str | None:
        return None if path.startswith(self.hidden) else super().digest(path, weights)


class Wire:
    """A connection to a host in this process, with faults."""

    def __init__(self, host: Host, *, drops: float = 0.0, repeats: float = 0.0, seed: int = 0) -> None:
        self.host = host
        self.is_dead = False
        self.is_silent = False
        self.calls: list[str] = []
        self._chances = (drops, repeats)
        self._random = random.Random(seed)

    def call(self, method: str, *arguments: Any, timeout_seconds: float) -> Any:
        if self.is_dead:
            raise HostLost("it was killed")
        if self.is_silent:
            time.sleep(min(0.2, timeout_seconds))
            raise Unavailable("no answer")
        self.calls.append(method)
        drops, repeats = self._chances
        try:
            answer = getattr(self.host, method)(*arguments)
            if self._random.random() < repeats:
                answer = getattr(self.host, method)(*arguments)
        except (OSError, ValueError) as error:
            raise HostFailed(str(error)) from error
        if self._random.random() < drops:
            raise Unavailable("the answer was lost")
        if self.is_dead or self.is_silent:
            raise Unavailable("the answer was lost")
        return answer

    def end(self) -> None:
        if not self.is_dead and not self.is_silent:  # a cut cable carries no order to end
            self.is_dead = True
            self.host._kill()


class Machine:
    """A node of its own scratch folder, on which workers can be opened."""

    def __init__(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "parent" / "runs"
        self.directory.mkdir(parents=True)
        self.scratch = tmp_path / "node"
        self.hosts: list[Host] = []
        self.wires: list[Wire] = []
        self.lost = threading.Event()

    def host(self, *, lease_seconds: float = 60.0, close_seconds: float = 1.0) -> Host:
        host = Host(
            scratch=str(self.scratch),
            lease_seconds=lease_seconds,
            close_seconds=close_seconds,
            on_lost=self.lost.set,
        )
        self.hosts.append(host)
        return host

    def worker(
        self,
        *,
        document: dict[str, object] | None = None,
        host: Host | None = None,
        silence_seconds: float = 60.0,
        is_shared: bool = False,
        follows_logs: bool = False,
        **faults: Any,
    ) -> ProgramWorker:
        token = f"job.session.{len(self.wires)}"
        wire = Wire(host or self.host(), **faults)
        self.wires.append(wire)
        remote = RemoteHost(
            wire, name="node a", log=self.directory / f"{token}.log", silence_seconds=silence_seconds
        )
        runs, _ = remote.call("work_directory", token, "tables", 10**9)
        places = Places(self.directory, {} if is_shared else {str(self.directory): runs})
        remote.call("launch", PROGRAM, {"PYTHONPATH": ROOT}, token)
        said = {"slots": 2, "pause": 0.0, **(document or {})}
        environment = {"node": "a", "worker": token}
        return ProgramWorker(
            Program(PROGRAM, lambda: said),
            lambda: RemoteProcess(
                remote, places, token=token, environment=environment, follows_logs=follows_logs
            ),
        )

    def close(self) -> None:
        for wire in self.wires:
            wire.is_silent = False
            wire.end()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


class TestRemoteWorker(WorkerContract):
    """The contract of a worker, on a node that sees no file of the parent's and loses every tenth answer."""

    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
        machine = Machine(tmp_path_factory.mktemp("cluster"))
        yield machine
        machine.close()

    @pytest.fixture
    def directory(self, place: Machine) -> Path:
        return place.directory

    @pytest.fixture
    def worker(self, place: Machine) -> Iterator[ProgramWorker]:
        worker = place.worker(drops=0.1, repeats=0.1)
        yield worker
        worker.close()

    @pytest.fixture(scope="class")
    def ready_worker(self, place: Machine) -> Iterator[ProgramWorker]:
        worker = place.worker(drops=0.1, repeats=0.1, seed=1)
        wait_until_ready(worker)
        yield worker
        worker.close()


def started(worker: ProgramWorker, machine: Machine, *, steps: int = 2000) -> list[Any]:
    """Start a long trial and wait for its first checkpoint."""
    wait_until_ready(worker)
    worker.start(assignment(machine.directory, 0, steps=steps))
    return collect(worker, until=lambda seen: len(saved(seen)) >= 3)


def died(worker: ProgramWorker) -> Died:
    said = collect(worker, until=lambda seen: any(isinstance(e, Died) for e in seen), seconds=120)
    return next(e for e in said if isinstance(e, Died))


def is_gone(pid: int, *, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def pid_of(host: Host) -> int:
    assert host._process is not None
    return host._process.pid


@pytest.mark.parametrize("seed", range(2))
def test_no_line_is_lost_or_counted_twice_when_answers_are(machine: Machine, seed: int) -> None:
    """A third of the answers lost, a third of the calls made twice: the same lines as over a good wire."""
    heard = []
    for chances in ({}, {"drops": 0.33, "repeats": 0.33, "seed": seed}):
        worker = machine.worker(document={"pause": 0.0}, **chances)
        wait_until_ready(worker)
        worker.start(assignment(machine.directory, 0, steps=60))
        said = collect(worker, until=lambda seen: ended(seen) == {0})
        worker.close()
        heard.append([e for e in said if isinstance(e, (Evaluated, Saved, Ended))])
    assert heard[0] == heard[1]
    assert len([e for e in heard[0] if isinstance(e, Evaluated)]) == 31


def test_a_checkpoint_is_here_before_its_fact_and_gone_from_the_node_after(machine: Machine) -> None:
    worker = machine.worker()
    said = started(worker, machine, steps=6) + collect(worker, until=lambda seen: ended(seen) == {0})
    kept = saved(said)
    assert len(kept) >= 6
    for checkpoint in kept:
        assert digest(machine.directory / checkpoint.path) == checkpoint.sha256
    assert not list((machine.scratch / "work").rglob("simulated.json"))
    worker.close()
    assert not list((machine.scratch / "work").iterdir())


def test_a_trial_says_where_it_runs(machine: Machine) -> None:
    worker = machine.worker()
    said = started(worker, machine, steps=6)
    (start,) = (e for e in said if isinstance(e, Started))
    assert start.environment == {"node": "a", "worker": "job.session.0"}
    worker.close()


def test_the_log_arrives(machine: Machine) -> None:
    worker = machine.worker()
    wait_until_ready(worker)
    worker.close()
    assert "working in" in (machine.directory / "job.session.0.log").read_text()


def test_the_log_of_a_command_arrives_while_it_runs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written later is added, and of much only the end arrives."""
    monkeypatch.setattr("tuner.engines.ray.remote.LOG_SECONDS", 0.05)
    monkeypatch.setattr("tuner.engines.ray.transfer.MOST_LOG_BYTES", 100)
    worker = machine.worker(follows_logs=True)
    started(worker, machine, steps=ENDLESS)
    [there] = machine.scratch.rglob("trial-0000")
    here = machine.directory / "trial-0000" / "attempt-1" / "command.log"
    log = there / "attempt-1" / "command.log"
    log.parent.mkdir()
    for content, arrived in (("first\n", "first\n"), ("second\n", "first\nsecond\n")):
        with log.open("a") as file:
            file.write(content)
        assert until(lambda arrived=arrived: here.exists() and here.read_text() == arrived)  # type: ignore[misc]
    with log.open("a") as file:
        file.write("x" * 1000 + "last\n")
    assert until(lambda: here.read_text().endswith("last\n"))
    assert "... 905 bytes are left out ..." in here.read_text()
    worker.stop(assignment(machine.directory, 0).run)
    collect(worker, until=ended)
    assert here.read_text().count("last") == 1
    worker.close()


def until(holds: Callable[[], bool], *, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def test_a_killed_subprocess_is_said_at_once(machine: Machine) -> None:
    worker = machine.worker()
    started(worker, machine)
    os.kill(pid_of(machine.hosts[0]), signal.SIGKILL)
    found = died(worker)
    assert found.trials == (0,)
    assert "signal 9" in found.reason


def test_a_dead_host_is_said_and_its_trial_resumes_elsewhere_with_the_same_curve(machine: Machine) -> None:
    worker = machine.worker(document={"pause": 0.01})
    said = started(worker, machine, steps=60)
    machine.wires[0].end()
    assert died(worker).trials == (0,)
    last = [c for c in saved(said) if c.kind == "last"][-1]
    again = machine.worker()
    wait_until_ready(again)
    again.start(
        replace(
            assignment(machine.directory, 0, steps=60),
            attempt=2,
            resume_from=str(machine.directory / last.path),
            resume_sha256=last.sha256,
        )
    )
    rest = collect(again, until=lambda seen: ended(seen) == {0})
    assert [e.step for e in rest if isinstance(e, Started)] == [last.step]
    whole = machine.worker()
    wait_until_ready(whole)
    whole.start(assignment(machine.directory, 1, steps=60))
    assert losses(rest, 0) == losses(collect(whole, until=lambda seen: ended(seen) == {1}), 1)
    again.close()
    whole.close()


def test_a_silent_node_is_lost_and_its_worker_ends_by_its_lease(machine: Machine) -> None:
    """As if the cable was pulled: the parent gives up, and so does the host, each by its own clock."""
    host = machine.host(lease_seconds=5.0)
    worker = machine.worker(host=host, silence_seconds=2.0, document={"pause": 0.05})
    started(worker, machine)
    pid = pid_of(host)
    machine.wires[0].is_silent = True
    assert "has not answered for" in died(worker).reason
    assert machine.lost.wait(60)
    assert is_gone(pid)


def test_an_old_node_that_comes_back_onto_a_shared_disk_replaces_nothing(machine: Machine) -> None:
    """Given up and cut off, its worker trains on and saves, beside the next attempt of the same trial."""
    old = machine.worker(is_shared=True, silence_seconds=1.0, document={"pause": 0.05})
    started(old, machine, steps=ENDLESS)
    machine.wires[0].is_silent = True
    assert died(old).trials == (0,)
    new = machine.worker(is_shared=True)
    wait_until_ready(new)
    new.start(replace(assignment(machine.directory, 0, steps=40), attempt=2))
    kept = saved(collect(new, until=lambda seen: ended(seen) == {0}))
    time.sleep(1.0)
    running = machine.hosts[0]
    assert running._code is None, "the old worker still runs"
    names = {path.name for path in (machine.directory / "trial-0000").rglob("step-*")}
    assert any(name.endswith(".a1") for name in names)
    for checkpoint in kept:
        assert checkpoint.path.endswith(".a2")
        assert digest(machine.directory / checkpoint.path) == checkpoint.sha256
    assert not (machine.directory / "trial-0000" / "best").exists(), "no worker switches the link"
    new.close()


def test_a_host_without_a_parent_lets_its_worker_end_then_kills_it(machine: Machine) -> None:
    host = machine.host(lease_seconds=2.0, close_seconds=4.0)
    code = (
        "import sys, time; print('begun', flush=True); sys.stdin.read(); "
        "print('end of input', flush=True); time.sleep(600)"
    )
    host.launch(("-c", code), {}, "job.session.7")
    while not host.events(0, 0.5).lines:
        pass
    pid = pid_of(host)
    assert machine.lost.wait(60)
    assert is_gone(pid)
    assert list(host._lines) == ["begun\n", "end of input\n"]


def test_a_blocked_parent_is_no_silence(machine: Machine) -> None:
    """Nobody reads events or records for longer than the lease: polling goes on in a thread of its own."""
    host = machine.host(lease_seconds=3.0)
    worker = machine.worker(host=host, document={"pause": 0.01}, silence_seconds=3.0)
    started(worker, machine, steps=600)
    time.sleep(5.0)
    collect(worker, until=lambda seen: ended(seen) == {0})
    assert not machine.lost.is_set()
    worker.close()


@pytest.mark.acceptance
@pytest.mark.timeout(400)
def test_a_parent_that_is_blocked_for_two_minutes_loses_nothing(machine: Machine) -> None:
    """With the real limits: a lease of 45 seconds, and a minute of silence."""
    host = machine.host(lease_seconds=LEASE_SECONDS)
    worker = machine.worker(host=host, document={"pause": 0.05}, silence_seconds=SILENCE_SECONDS)
    before = started(worker, machine, steps=600)
    time.sleep(120.0)
    said = before + collect(worker, until=lambda seen: ended(seen) == {0}, seconds=120)
    assert list(losses(said, 0)) == list(range(0, 601, 2))
    assert not machine.lost.is_set()
    worker.close()


def test_a_worker_dies_with_the_process_of_its_host(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from tuner.engines.ray.host import Host\n"
        f"host = Host(scratch={str(tmp_path)!r})\n"
        "host.launch(('-c', 'import time; time.sleep(100)'), {}, 'job.session.1')\n"
        "while host._process is None: time.sleep(0.01)\n"
        "print(host._process.pid, flush=True); time.sleep(100)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert is_gone(pid)


def test_orphans_are_known_by_their_token(machine: Machine) -> None:
    """Of a former session, or of a worker that was given up; not a neighbour, nor another round's."""
    tokens = ["round.old.1", "round.now.1", "round.now.2", "another.old.1"]
    sleepers = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], env={WORKER_TOKEN: token})
        for token in tokens
    ]
    (machine.scratch / "work" / "round.old.1").mkdir(parents=True)
    (machine.scratch / "work" / "round.now.1").mkdir()
    time.sleep(0.3)
    found = machine.host().end_orphans("round", "now", ["round.now.2"])
    assert sorted(found) == sorted([sleepers[0].pid, sleepers[2].pid])
    assert [path.name for path in (machine.scratch / "work").iterdir()] == ["round.now.1"]
    for sleeper in sleepers:
        sleeper.kill()
        sleeper.wait()


def test_a_full_disk_on_the_node_ends_the_attempt_with_what_it_said(machine: Machine) -> None:
    """The assignment's starting point does not fit: the worker is lost, its trial is not."""

    class Full(Host):
        def claim(self, *_: Any) -> tuple[str, str]:
            raise OSError(28, "No space left on device")

    host = Full(scratch=str(machine.scratch), on_lost=lambda: None)
    worker = machine.worker(host=host)
    wait_until_ready(worker)
    start = machine.directory / "trial-0000" / "last" / "step-000004.a1"
    start.mkdir(parents=True)
    (start / "simulated.json").write_text("{}")
    worker.start(
        replace(
            assignment(machine.directory, 0), resume_from=str(start), resume_sha256=digest(start), attempt=2
        )
    )
    found = died(worker)
    assert found.trials == (0,)
    assert "No space left" in found.reason


def test_a_changed_checkpoint_is_never_a_fact(machine: Machine) -> None:
    """Damaged on its way: the attempt ends there, and nothing after it is believed."""

    class Damaging(Host):
        def contents(self, path: str) -> list[tuple[str, int, bytes | None]]:
            found = super().contents(path)
            if "last" not in path:
                return found
            return [(name, size, content.replace(b"4", b"5")) for name, size, content in found if content]

    host = Damaging(scratch=str(machine.scratch), on_lost=lambda: None)
    worker = machine.worker(host=host)
    wait_until_ready(worker)
    worker.start(assignment(machine.directory, 0))
    said = collect(worker, until=lambda seen: any(isinstance(e, Died) for e in seen))
    assert [c.step for c in saved(said) if c.kind == "last"] == [0, 2]
    assert ended(said) == set()
    assert "arrived with the hash" in next(e.reason for e in said if isinstance(e, Died))


def test_an_order_that_comes_twice_is_carried_out_once(machine: Machine) -> None:
    host = machine.host()
    code = "import sys; [print(repr(line), flush=True) for line in sys.stdin]"
    host.launch(("-c", code), {}, "job.session.1")
    host.launch(("-c", code), {}, "job.session.1")
    for number, line in [(1, "a\n"), (1, "a\n"), (2, "b\n"), (1, "a\n"), (3, "c\n")]:
        host.order(number, line)
    lines: list[str] = []
    while len(lines) < 3:
        heard: Heard = host.events(len(lines), 5.0)
        lines += heard.lines
    assert lines == ["'a\\n'\n", "'b\\n'\n", "'c\\n'\n"]
    host.close_input()
    while (heard := host.events(3, 5.0)).exit_code is None:
        assert heard.lines == ()
    assert heard.exit_code == 0


class TestFiles:
    @pytest.fixture
    def host(self, machine: Machine) -> Host:
        return machine.host()

    @pytest.fixture
    def call(self, host: Host) -> Callable[..., Any]:
        return lambda method, *arguments: getattr(host, method)(*arguments)

    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        model = tmp_path / "parent" / "model"
        (model / "tokenizer").mkdir(parents=True)
        (model / "weights").write_bytes(os.urandom(100_000))
        (model / "tokenizer" / "empty").write_bytes(b"")
        return model

    def test_a_shared_disk_is_known_by_a_random_file(self, call: Any, tmp_path: Path) -> None:
        assert is_seen(call, tmp_path)
        assert not list(tmp_path.glob(".tuner-seen-*"))
        assert not is_seen(lambda *_: b"what was there before", tmp_path)
        assert not is_seen(lambda *_: None, tmp_path)

    def test_another_file_behind_the_same_path_is_not_believed(
        self, machine: Machine, model: Path, call: Any
    ) -> None:
        """The node has the path, with other content: it gets ours, and its own is not touched."""

        def elsewhere(method: str, *arguments: Any) -> Any:
            return (
                {"read_back": None, "digest": "0" * 64}.get(method, "?")
                if method
                in (
                    "read_back",
                    "digest",
                )
                else call(method, *arguments)
            )

        place = Sender(10**9).place(elsewhere, Parcel.of(model), key="model.path", say=lambda _: None)
        assert Path(place).is_relative_to(machine.scratch)
        assert digest(Path(place)) == digest(model)

    def test_sent_once_to_a_node_and_then_found(self, machine: Machine, model: Path) -> None:
        Apart.hidden = str(model.parent)
        sender, said = Sender(10**9), []
        places = set()
        for _ in range(2):
            host = Apart(scratch=str(machine.scratch), on_lost=lambda: None)
            wire = Wire(host, repeats=0.5)

            def call(method: str, *arguments: Any, wire: Wire = wire) -> Any:
                return wire.call(method, *arguments, timeout_seconds=9)

            places.add(sender.place(call, Parcel.of(model), key="model.path", say=said.append))
        assert len(places) == 1
        assert "write_chunk" not in wire.calls
        assert any(words.startswith("sending model") for words in said)

    def test_too_large_says_how_to_share_it(self, model: Path, machine: Machine) -> None:
        Apart.hidden = str(model.parent)
        host = Apart(scratch=str(machine.scratch), on_lost=lambda: None)
        with pytest.raises(InputError, match=r"model.path: .*100 kB.*run.send_model_up_to"):
            Sender(1000).place(
                lambda method, *a: getattr(host, method)(*a),
                Parcel.of(model),
                key="model.path",
                say=lambda _: None,
            )
        assert not (machine.scratch / "files").exists()

    def test_the_cache_keeps_below_its_bound_and_what_is_in_use(self, tmp_path: Path) -> None:
        parts = {name: tmp_path / name for name in ("one", "two", "three")}
        for path in parts.values():
            path.write_bytes(os.urandom(1000))
        keeping = NodeFiles(tmp_path / "node")
        past = NodeFiles(tmp_path / "node")

        def received(files: NodeFiles, path: Path) -> str:
            fingerprint = digest(path)
            assert files.claim(fingerprint, path.name, 1000, 2500)[0] == "send"
            files.write(fingerprint, path.name, 0, path.read_bytes())
            return files.keep(fingerprint, path.name)

        one = received(keeping, parts["one"])
        two = received(past, parts["two"])
        for descriptor in past._locks.values():
            os.close(descriptor)  # its process has ended
        three = received(NodeFiles(tmp_path / "node"), parts["three"])
        assert [Path(path).exists() for path in (one, two, three)] == [True, False, True]

    def test_tables_count_towards_the_bound_and_folders_in_use_stay(self, tmp_path: Path) -> None:
        """Two rounds' tables and a model in a cache for one: what no host holds goes, the oldest first."""
        past, now = NodeFiles(tmp_path), NodeFiles(tmp_path)
        places = {
            name: files.work_directory("job.s.1", name, 10**9)
            for name, files in (("old", past), ("older", past), ("held", now))
        }
        for at, (_, rows) in enumerate(places[name] for name in sorted(places)):
            (rows / "table").mkdir()
            (rows / "table" / "tokens.npy").write_bytes(bytes(1000))
            os.utime(rows, (1e9 - at, 1e9 - at))
        for descriptor in past._held:
            os.close(descriptor)  # its process has ended
        assert now.claim("f" * 64, "model", 1000, 3500)[0] == "send"
        assert {name for name, (_, rows) in places.items() if rows.exists()} == {"old", "held"}
        assert now.claim("e" * 64, "model", 3000, 3500)[0] == "send"
        assert {name for name, (_, rows) in places.items() if rows.exists()} == {"held"}

    @pytest.mark.parametrize("kind", ["files", "tables"])
    def test_what_is_deleted_by_half_is_not_used(
        self, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = NodeFiles(tmp_path)
        entry = tmp_path / kind / "entry"
        entry.mkdir(parents=True)
        monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # the process is killed before
        assert files._delete_unused(entry)
        assert not entry.exists()
        monkeypatch.undo()
        (left,) = entry.parent.glob(".*")
        if kind == "files":
            (left / "part").touch()
            assert files.claim("entry", "model", 10, 10**9) == ("send", "")
            assert list(left.iterdir()) == []
        else:
            os.utime(left, (1e9, 1e9))
            files.work_directory("job.s.1", "others", 10**9)
            assert not left.exists()

    @pytest.mark.parametrize("name", ["mine", "runs", "worker.log"])
    def test_a_study_of_any_name_is_apart_from_what_its_worker_writes(
        self, tmp_path: Path, name: str
    ) -> None:
        sent = tmp_path / "sent" / name
        sent.mkdir(parents=True)
        (sent / "train.py").write_text("")
        files = NodeFiles(tmp_path / "scratch")
        runs, _ = files.work_directory("job.s.1", "tables", 10**9)
        copy = files.own_copy("job.s.1", sent)
        assert (copy.name, [path.name for path in copy.iterdir()]) == (name, ["train.py"])
        assert list(runs.iterdir()) == []
        assert not (files.work("job.s.1") / "worker.log").exists()

    def test_what_a_worker_or_a_transfer_left_is_deleted_after_a_day(self, tmp_path: Path) -> None:
        past = NodeFiles(tmp_path)
        left, _ = past.work_directory("crashed.s.1", "tables", 10**9)
        running, _ = NodeFiles(tmp_path).work_directory("long.s.1", "tables", 10**9)
        past.claim("a" * 64, "model", 10, 10**9)
        arriving = tmp_path / "files" / f".{'a' * 64}.arriving"
        for descriptor in (past._held[0], past._locks["a" * 64]):
            os.close(descriptor)
        for path in (left.parent, running.parent, arriving):
            os.utime(path, (1e9, 1e9))
        young, _ = NodeFiles(tmp_path).work_directory("young.s.1", "tables", 10**9)
        assert [path.exists() for path in (left, running, arriving, young)] == [False, True, False, True]

    @pytest.mark.parametrize(
        ("names", "weights", "sent"),
        [
            (
                "config.json model.safetensors pytorch_model.bin pytorch_model.bin.index.json "
                "original/consolidated.00.pth .git/config code.py consolidated.safetensors tf_model.h5",
                None,
                "code.py config.json model.safetensors",
            ),
            ("config.json pytorch_model.bin", None, "config.json pytorch_model.bin"),
            ("config.json consolidated.safetensors a.bin", None, "config.json consolidated.safetensors"),
            ("a.Q4.gguf a.Q8.gguf config.json model.safetensors", "a.Q4.gguf", "a.Q4.gguf config.json"),
            ("train.jsonl notes.bin", None, "notes.bin train.jsonl"),
        ],
    )
    def test_of_a_model_only_one_form_of_its_weights_is_sent(
        self, machine: Machine, tmp_path: Path, names: str, weights: str | None, sent: str
    ) -> None:
        Apart.hidden = str(tmp_path / "parent")
        model = tmp_path / "parent" / "model"
        for name in names.split():
            (model / name).parent.mkdir(parents=True, exist_ok=True)
            (model / name).write_text(name)
        host = Apart(scratch=str(machine.scratch), on_lost=lambda: None)
        place = Sender(10**9).place(
            lambda method, *a: getattr(host, method)(*a),
            Parcel.of(model, weights=weights),
            key="model.path",
            say=lambda _: None,
            weights=weights,
        )
        found = [path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file()]
        assert " ".join(sorted(found)) == sent

    def test_the_same_weights_in_a_copy_of_the_node_are_not_sent_again(
        self, machine: Machine, tmp_path: Path
    ) -> None:
        """At the same path, with other forms of the weights beside them, on a disk of its own."""
        model = tmp_path / "model"
        model.mkdir()
        (model / "model.safetensors").write_bytes(b"weights")
        (model / "pytorch_model.bin").write_bytes(b"the same, pickled")
        calls: list[str] = []

        def call(method: str, *arguments: Any) -> Any:
            calls.append(method)
            return None if method == "read_back" else getattr(machine.host(), method)(*arguments)

        place = Sender(10**9).place(call, Parcel.of(model), key="model.path", say=lambda _: None)
        assert place == str(model)
        assert calls == ["read_back", "digest"]

    def test_files_of_a_pattern_are_sent_and_no_others(self, machine: Machine, tmp_path: Path) -> None:
        data = tmp_path / "parent" / "data"
        (data / "more").mkdir(parents=True)
        for name in ("a.jsonl", "b.jsonl", "more/c.jsonl", "d.csv"):
            (data / name).write_text(name)
        Apart.hidden = str(tmp_path / "parent")
        host = Apart(scratch=str(machine.scratch), on_lost=lambda: None)
        (parcel,) = Parcel.matching([f"{data}/*.jsonl", f"{data}/[a-z]*/c.jsonl"])
        place = Sender(10**9).place(
            lambda method, *a: getattr(host, method)(*a), parcel, key="data", say=lambda _: None
        )
        assert parcel.path == data
        found = [path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file()]
        assert sorted(found) == ["a.jsonl", "b.jsonl", "more/c.jsonl"]

    def test_two_hosts_of_a_node_receive_a_file_once(self, tmp_path: Path) -> None:
        first, second = NodeFiles(tmp_path), NodeFiles(tmp_path)
        content = tmp_path / "file"
        content.write_bytes(b"content")
        name = digest(content)
        assert first.claim(name, "file", 7, 100) == ("send", "")
        assert second.claim(name, "file", 7, 100) == ("busy", "")
        first.write(name, "file", 0, b"content")
        place = first.keep(name, "file")
        assert second.claim(name, "file", 7, 100) == ("here", place)

    def test_a_directory_comes_back_as_it_went(self, call: Any, model: Path, machine: Machine) -> None:
        target = os.fspath(Path(machine.scratch, "work", "job", "start", model.name))
        give_back(call, model, target, sha256=digest(model))
        give_back(call, model, target, sha256=digest(model))
        assert digest(Path(target)) == digest(model)
        back = machine.directory / "trial-0000" / "back"
        fetch(call, target, back, sha256=digest(model))
        assert (back / "weights").read_bytes() == (model / "weights").read_bytes()
        assert [path.name for path in back.parent.iterdir()] == ["back"]

    @pytest.mark.parametrize(("full_seconds", "patience"), [(0.0, 0.0), (3.0, 60.0), (1e9, 60.0)])
    def test_a_checkpoint_is_copied_again_while_this_disk_is_full(
        self, full_seconds: float, patience: float
    ) -> None:
        now, copied = [0.0], []

        def sleep(seconds: float) -> None:
            now[0] += seconds

        def copy() -> None:
            if now[0] < full_seconds:
                raise OSError(errno.ENOSPC, "No space left on device")
            copied.append(now[0])

        if full_seconds > patience:
            with pytest.raises(OSError, match="No space left"):
                until_room(copy, patience, clock=lambda: now[0], sleep=sleep)
            assert now == [patience]
        else:
            until_room(copy, patience, clock=lambda: now[0], sleep=sleep)
            assert copied == [full_seconds]

    def test_a_host_deletes_only_below_its_scratch_folder(self, host: Host, model: Path) -> None:
        with pytest.raises(ValueError, match="not below"):
            host.delete(str(model))
        with pytest.raises(ValueError, match="not below"):
            host.delete(f"{host.files.scratch}/../parent/model")
        assert model.exists()
