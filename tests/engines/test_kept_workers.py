"""A worker that is kept for the next round trains it as a new one would, and is replaced where it cannot."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.contracts.worker import assignment, collect, ended, losses
from tests.studies import QUICKSTART, round_file, write_round
from tuner.api.run import Where, round_job
from tuner.cli import run
from tuner.config import load_round
from tuner.engines import Job, LocalEngine, LocalProcess, ProgramWorker, Worker, WorkerPool
from tuner.engines.processes import recorded_workers
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


def until(is_so: Callable[[], bool], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so() and time.monotonic() < end:
        time.sleep(0.05)
    assert is_so()


def has_ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


SHORT: Mapping[str, Any] = {"steps": 4, "every": 2, "decay_steps": 2, "lora_r": 2}
ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def study_verb(directory: Path, verb: str, *, stdout: int, log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "study", verb, "round1.yaml"],
            cwd=directory,
            stdout=stdout,
            stderr=file,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )


def worker_of(round_directory: Path) -> psutil.Process:
    """The process of the only worker that a round has recorded."""
    (recorded,) = recorded_workers(round_directory).values()
    return psutil.Process(recorded.worker.pid)


def two_rounds(directory: Path) -> None:
    write_round(directory, trials=2, run="run: {slots: 1, production_steps: 40}\n", **SHORT)


def test_a_worker_at_rest_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """`study auto` has written the next round's file, and waits to print what it found: a full pipe."""
    two_rounds(tmp_path)
    reading, writing = os.pipe()
    os.write(writing, b" " * fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ))
    log = tmp_path / "auto.log"
    auto = study_verb(tmp_path, "auto", stdout=writing, log=log)
    os.close(writing)
    try:
        until(lambda: (tmp_path / "round2.yaml").exists() or auto.poll() is not None, seconds=240)
        assert auto.poll() is None, log.read_text()
        worker = worker_of(tmp_path / "runs" / "round1")
        assert not has_ended(worker)
    finally:
        auto.kill()
        auto.wait()
        os.close(reading)
    until(lambda: has_ended(worker))
    assert "Traceback" not in (tmp_path / "runs" / "round1" / "worker.log").read_text()


class Watching(io.StringIO):
    """Standard output that presses Ctrl-C when a line says what was written, and looks for the worker."""

    def __init__(self, round_directory: Path) -> None:
        super().__init__()
        self.round_directory = round_directory
        self.workers: list[psutil.Process] = []

    def write(self, text: str) -> int:
        if "wrote " in text:
            self.workers.append(worker_of(self.round_directory))
            signal.raise_signal(signal.SIGINT)
            assert not has_ended(self.workers[-1])
        return super().write(text)


def test_ctrl_c_while_workers_rest_begins_no_other_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_rounds(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with redirect_stdout(Watching(tmp_path / "runs" / "round1")) as said:
        assert run(["study", "auto", "round1.yaml"]) == 130
    assert (tmp_path / "round2.yaml").exists()
    log = capsys.readouterr().err
    assert "Ctrl-C again" in log
    assert "resume with: tuner study auto round1.yaml" in log
    (worker,) = said.workers
    until(lambda: has_ended(worker))
    assert not (tmp_path / "runs" / "round2").exists()


@pytest.mark.acceptance
def test_the_rounds_of_a_sweep_have_one_worker(tmp_path: Path) -> None:
    for name in ("train", "eval"):
        rows = (QUICKSTART / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(rows[:6]))
    write_round(tmp_path, data=tmp_path, run="run: {slots: 1, production_steps: 8}\n", **SHORT)
    log = tmp_path / "sweep.log"
    sweep = study_verb(tmp_path, "sweep", stdout=subprocess.DEVNULL, log=log)
    try:
        assert sweep.wait(240) == 0, log.read_text()
    finally:
        sweep.kill()
        sweep.wait()
    logs = sorted((tmp_path / "runs").glob("sweep-*/worker.log"))
    begun = [
        line.split(" ")[2] for path in logs for line in path.read_text().splitlines() if line[:3] == "---"
    ]
    assert len(logs) > 1
    assert sorted(begun) == ["goes"] * (len(logs) - 1) + ["starts"]
    assert not list((tmp_path / "runs").glob("*/worker.pid"))
