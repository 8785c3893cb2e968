"""What every Engine keeps its word on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.contracts.worker import assignment, collect, ended, losses
from tuner.engines import Engine, Job, Worker
from tuner.playbook.schedule import evaluation_steps
from tuner.records import Ended, Preparing, Ready
from tuner.report.format import GpuReading


class EngineContract:
    """Subclasses give fixtures: `engine`, a new one that the test closes, and `job`, for one worker."""

    def test_nothing_is_started_before_it_is_asked(self, engine: Engine, job: Job) -> None:
        assert list(engine.gpu_readings()) == []
        assert not job.directory.exists() or not any(job.directory.iterdir())

    def test_its_worker_is_ready_and_runs_a_trial(self, engine: Engine, job: Job) -> None:
        with started(engine, job) as worker:
            said = collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
            assert all(isinstance(event, (Preparing, Ready)) for event in said)
            slots = next(event.slots for event in said if isinstance(event, Ready))
            assert worker.capacity() == slots >= 1
            worker.start(assignment(job.directory, 0))
            said = collect(worker, until=lambda seen: ended(seen) == {0})
            assert list(losses(said, 0)) == list(evaluation_steps(6, 2))
            assert [e.outcome for e in said if isinstance(e, Ended)] == ["complete"]
            assert all(isinstance(reading, GpuReading) for reading in engine.gpu_readings())

    def test_what_a_trial_comes_to_does_not_depend_on_the_start(self, engine: Engine, job: Job) -> None:
        """As after a worker that died before it was ready: started again, once the former is closed."""
        curves = []
        for _ in range(2):
            with started(engine, job) as worker:
                collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
                worker.start(assignment(job.directory, 0))
                curves.append(losses(collect(worker, until=lambda seen: ended(seen) == {0}), 0))
        assert curves[0] == curves[1]

    def test_its_clock_never_goes_back(self, engine: Engine, job: Job) -> None:
        before = engine.now()
        with started(engine, job) as worker:
            collect(worker, until=lambda seen: any(isinstance(e, Ready) for e in seen))
            worker.start(assignment(job.directory, 0))
            collect(worker, until=lambda seen: ended(seen) == {0})
            assert engine.now() >= before > 1.7e9, "seconds since the epoch"

    def test_it_may_be_closed_twice_and_without_a_start(self, engine: Engine) -> None:
        engine.close()
        engine.close()


@contextmanager
def started(engine: Engine, job: Job) -> Iterator[Worker]:
    """The engine's worker, closed at the end."""
    worker = engine.start(job)
    try:
        yield worker
    finally:
        worker.close()
