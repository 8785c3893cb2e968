"""Both workers keep the contract; the process dies and comes back as the loop expects."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.contracts.worker import ENDLESS, WorkerContract, assignment, collect, ended, wait_until_ready
from tests.studies import QUICKSTART, formula, round_file
from tuner.api.run import TRAINING
from tuner.engines import LocalProcess, Program, ProgramWorker, SimulatedWorker
from tuner.records import Died, Ended, Evaluated, Preparing, Ready, Saved

pytestmark = pytest.mark.slow


def local_worker(directory: Path, **changes: object) -> ProgramWorker:
    file = round_file(directory, **changes)
    document = {
        "spec": file.spec.absolute(directory).model_dump(mode="json"),
        "slots": 2,
        "cache": str(directory / "cache"),
        "lock": str(directory / "worker.lock"),
    }
    return process_worker(directory, document, {"OMP_NUM_THREADS": "1"})


def process_worker(
    directory: Path, document: Mapping[str, object], environment: Mapping[str, str]
) -> ProgramWorker:
    program = Program(TRAINING, lambda: document)
    log = directory / "worker.log"
    return ProgramWorker(program, lambda: LocalProcess(TRAINING, log=log, environment=environment))


def popen(worker: ProgramWorker) -> subprocess.Popen[str]:
    """The subprocess behind a worker."""
    assert isinstance(worker.process, LocalProcess)
    return worker.process.popen


class TestProgramWorker(WorkerContract):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path / "runs"

    @pytest.fixture
    def worker(self, tmp_path: Path) -> Iterator[ProgramWorker]:
        worker = local_worker(tmp_path)
        yield worker
        worker.close()

    @pytest.fixture(scope="class")
    def ready_worker(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProgramWorker]:
        worker = local_worker(tmp_path_factory.mktemp("worker"))
        wait_until_ready(worker)
        yield worker
        worker.close()

    def test_a_killed_process_is_said_and_replaced(self, worker: ProgramWorker, directory: Path) -> None:
        wait_until_ready(worker)
        worker.start(assignment(directory, 0, steps=ENDLESS))
        collect(worker, until=lambda events: any(isinstance(e, Saved) for e in events))
        popen(worker).send_signal(signal.SIGKILL)
        events = collect(worker, until=lambda seen: any(isinstance(e, Died) for e in seen))
        died = next(e for e in events if isinstance(e, Died))
        assert "signal 9" in died.reason
        assert worker.capacity() == 2
        worker.start(assignment(directory, 1, steps=2))
        again = collect(worker, until=lambda seen: ended(seen) == {1})
        assert any(isinstance(e, Ready) for e in again)
        doing = [e.doing for e in again if isinstance(e, Preparing)]
        assert [words.split()[0] for words in doing] == ["loading", "evaluating"]

    def test_the_process_ends_when_its_parent_is_gone(self, worker: ProgramWorker, directory: Path) -> None:
        wait_until_ready(worker)
        worker.start(assignment(directory, 0, steps=ENDLESS))
        process = popen(worker)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(120) == 1


class TestSimulatedWorker(WorkerContract):
    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path

    @pytest.fixture
    def worker(self) -> SimulatedWorker:
        return SimulatedWorker(formula, slots=2)

    @pytest.fixture
    def ready_worker(self, worker: SimulatedWorker) -> SimulatedWorker:
        wait_until_ready(worker)
        return worker

    def test_time_is_counted_in_steps(self, directory: Path) -> None:
        worker = SimulatedWorker(formula, slots=2, seconds_per_step=0.5)
        worker.start(assignment(directory, 0, steps=6))
        worker.start(assignment(directory, 1, steps=4))
        collect(worker, until=lambda events: ended(events) == {0, 1})
        assert worker.seconds == pytest.approx(0.5 * 10)

    def test_a_diverging_trial_is_infeasible(self, directory: Path) -> None:
        worker = SimulatedWorker(formula, slots=1)
        start = assignment(directory, 0)
        worker.start(replace(start, hyperparameters={**start.hyperparameters, "learning_rate": 0.1}))
        events = collect(worker, until=lambda seen: ended(seen) == {0})
        last = events[-1]
        assert isinstance(last, Ended)
        assert last.outcome == "infeasible"
        assert "nan" in str(last.reason)


def test_a_model_that_cannot_be_loaded_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    worker = local_worker(tmp_path, base=tmp_path / "empty")
    events = collect(worker, until=lambda seen: any(isinstance(e, Died) for e in seen))
    worker.close()
    died = next(e for e in events if isinstance(e, Died))
    assert died.is_input_error
    assert "empty" in died.reason
    assert not any(isinstance(e, Evaluated) for e in events)


def test_a_worker_that_is_closed_while_it_prepares_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(QUICKSTART / "data", data)
    rows = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(rows * (5_000_000 // len(rows)))
    worker = local_worker(tmp_path, data=data)
    collect(worker, until=lambda seen: any(isinstance(e, Preparing) for e in seen))
    worker.close()
    assert worker.process is None
    assert not any((tmp_path / "cache").iterdir())


def test_a_worker_of_another_version_is_ended(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(  # runs as the process starts, in place of ours
        """print('{"event": "ended", "trial": 0, "mood": "fine"}', flush=True); input(); input()"""
    )
    worker = process_worker(tmp_path, {}, {"PYTHONPATH": str(tmp_path)})
    [died] = worker.events(timeout_seconds=120.0)
    assert isinstance(died, Died)
    assert "mood" in died.reason
    assert "upgraded" in died.reason
    assert worker.capacity() == 1, "a pool whose other workers are gone must not wait for ever"
