"""A worker that is kept for the next round trains it as a new one would, and is replaced where it cannot."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.contracts.worker import assignment, collect, ended, losses
from tests.studies import round_file
from tuner.api.run import Where, round_job
from tuner.config import load_round
from tuner.engines import Job, LocalEngine, LocalProcess, ProgramWorker, Worker, WorkerPool
from tuner.records import Event, Measured, Ready
from tuner.study.plan import RoundPlan

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Ran:
    """What a round of one trial came to."""

    process: LocalProcess
    ready: Ready
    losses: dict[int, float]
    remaining: list[Event]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalEngine]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = LocalEngine(keeps_workers=True)
    yield engine
    engine.end_workers()


def job(directory: Path, name: str, **changes: str) -> Job:
    """The job of a round; `changes` are texts of its file and what they become."""
    text = round_file(directory, lora_r="[2, 4]", evaluation="", run="run: {slots: 1}").path.read_text()
    for before, after in {"round: round1": f"round: {name}", **changes}.items():
        assert before in text
        text = text.replace(before, after)
    (directory / f"{name}.yaml").write_text(text)
    return round_job(RoundPlan(load_round(directory / f"{name}.yaml")), lambda: None, Where())


def process_of(worker: Worker) -> LocalProcess:
    assert isinstance(worker, WorkerPool)
    (only,) = worker._workers
    assert isinstance(only, ProgramWorker)
    assert isinstance(only.process, LocalProcess)
    return only.process


def ran(engine: LocalEngine, job: Job, *, trial: int) -> Ran:
    worker = engine.start(job)
    try:
        seen = collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
        process = process_of(worker)
        worker.start(replace(assignment(job.directory, trial, steps=8), round=job.spec.round))
        curve = losses(collect(worker, until=lambda seen: ended(seen) == {trial}), trial)
    finally:
        worker.close()
        worker.close()
    (ready,) = (event for event in seen if isinstance(event, Ready))
    return Ran(process, ready, curve, worker.events(0.0))


def is_locked(path: Path) -> bool:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_kept_worker_trains_the_next_round_to_the_digit(engine: LocalEngine, tmp_path: Path) -> None:
    first = ran(engine, job(tmp_path, "round1"), trial=0)
    assert any(isinstance(event, Measured) for event in first.remaining)
    second_job = job(tmp_path, "round2", **{"lora_r: [2, 4]": "lora_r: [2, 8]"})
    assert not is_locked(tmp_path / "runs" / "round1" / "worker.lock")

    worker = engine.start(second_job)
    assert process_of(worker) is first.process
    collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
    assert is_locked(second_job.directory / "worker.lock")
    assert (second_job.directory / "worker.pid").exists()
    assert not (tmp_path / "runs" / "round1" / "worker.pid").exists()
    worker.close()
    second = ran(engine, second_job, trial=1)
    assert second.process is first.process
    assert "round2 trial 1 tuner.training" in (second_job.directory / "worker.log").read_text()
    assert "trial 1" not in (tmp_path / "runs" / "round1" / "worker.log").read_text()

    # One that has died while it rested is replaced, and what it comes to is the same.
    first.process.kill()
    first.process.wait(60)
    shutil.rmtree(second_job.directory)
    fresh = ran(engine, second_job, trial=1)
    assert fresh.process is not first.process
    assert fresh.losses == second.losses
    assert len(fresh.losses) > 2
    assert fresh.ready.base == second.ready.base
    assert replace(fresh.ready, remarks=()) == replace(second.ready, remarks=())

    # Another base model is loaded by a new process, and the one that rested has ended.
    other = engine.start(job(tmp_path, "round3", **{"dtype: float32": "dtype: bfloat16"}))
    assert process_of(other) is not fresh.process
    assert fresh.process.wait(60) == 0
    other.close()


def test_the_workers_end_with_the_engine(engine: LocalEngine, tmp_path: Path) -> None:
    worker = engine.start(job(tmp_path, "round1"))
    collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
    process = process_of(worker)
    worker.close()
    with pytest.raises(TimeoutError):
        process.wait(0.5)
    engine.end_workers()
    assert process.wait(60) == 0
    assert not (tmp_path / "runs" / "round1" / "worker.pid").exists()
