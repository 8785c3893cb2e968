"""Several workers heard as one, and which devices they get."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.worker import assignment, collect, ended, wait_until_ready
from tests.studies import formula
from tuner.engines import SimulatedWorker, WorkerPool, wait_for_former_workers, worker_environments
from tuner.engines.devices import visible_devices
from tuner.engines.program import MAX_DEATHS
from tuner.errors import InputError, WorkerError
from tuner.records import (
    Died,
    Ended,
    Event,
    Ready,
    RunId,
)


class Made:
    """Simulated workers of one slot each, in the order in which the pool made them."""

    def __init__(self) -> None:
        self.workers: list[SimulatedWorker] = []

    def __call__(self) -> SimulatedWorker:
        self.workers.append(SimulatedWorker(formula, slots=1))
        return self.workers[-1]


class NeverReady(SimulatedWorker):
    """Dies whenever it is to begin."""

    def __init__(self) -> None:
        super().__init__(formula, slots=1)
        self._said = [Died("no such device")]

    def capacity(self) -> int:
        return 0

    def events(self, timeout_seconds: float) -> list[Event]:
        said, self._said = self._said, [Died("no such device")]
        return said


def test_the_others_start_with_the_first_trial(tmp_path: Path) -> None:
    made = Made()
    pool = WorkerPool([made, made, made])
    wait_until_ready(pool)
    assert (len(made.workers), pool.capacity()) == (1, 1)
    pool.start(assignment(tmp_path, 0, steps=6))
    assert (len(made.workers), pool.capacity()) == (3, 2)


def test_each_trial_runs_in_one_worker_and_all_are_heard(tmp_path: Path) -> None:
    made = Made()
    pool = WorkerPool([made, made])
    for number in range(2):
        pool.start(assignment(tmp_path, number, steps=6))
    assert [worker.capacity() for worker in made.workers] == [0, 0]
    events = collect(pool, until=lambda seen: ended(seen) == {0, 1})
    assert sum(isinstance(event, Ready) for event in events) == 2
    assert pool.capacity() == 2


def test_only_the_one_that_holds_a_trial_is_told_to_stop_it(tmp_path: Path) -> None:
    made = Made()
    pool = WorkerPool([made, made])
    pool.start(assignment(tmp_path, 0, steps=4))
    pool.start(assignment(tmp_path, 1, steps=400))
    pool.stop(RunId("round1", 1))
    pool.stop(RunId("round1", 7))
    events = collect(pool, until=lambda seen: ended(seen) == {0, 1})
    outcomes = {event.trial: event.outcome for event in events if isinstance(event, Ended)}
    assert outcomes == {0: "complete", 1: "stopped"}


def test_a_device_that_is_never_ready_is_left_out(tmp_path: Path) -> None:
    made = Made()
    pool = WorkerPool([made, NeverReady])
    pool.start(assignment(tmp_path, 0, steps=400))
    deaths = 0
    for _ in range(MAX_DEATHS + 3):
        deaths += sum(isinstance(event, Died) for event in pool.events(0.0))
    assert deaths == MAX_DEATHS
    pool.stop(RunId("round1", 0))
    assert ended(collect(pool, until=lambda seen: ended(seen) == {0})) == {0}


def test_the_last_worker_is_never_left_out() -> None:
    pool = WorkerPool([NeverReady])
    deaths = sum(isinstance(event, Died) for _ in range(5) for event in pool.events(0.0))
    assert deaths == 5


class TestEnvironments:
    def test_one_worker_a_gpu(self) -> None:
        gpus = ("GPU-a", "GPU-b")
        assert worker_environments("auto", gpus, cores=8) == [
            {"CUDA_VISIBLE_DEVICES": "GPU-a"},
            {"CUDA_VISIBLE_DEVICES": "GPU-b"},
        ]
        assert worker_environments(1, gpus, cores=8) == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}]

    def test_more_workers_than_gpus_are_refused(self) -> None:
        with pytest.raises(InputError, match=r"--workers 3: this machine has 2 GPU.*--slots"):
            worker_environments(3, ("0", "1"), cores=8)

    def test_processors_are_shared_out_unless_the_user_has_done_so(self) -> None:
        assert worker_environments("auto", (), cores=8, environment={}) == [{}]
        assert worker_environments(3, (), cores=8, environment={}) == [{"OMP_NUM_THREADS": "2"}] * 3
        assert worker_environments(9, (), cores=8, environment={})[0] == {"OMP_NUM_THREADS": "1"}
        assert worker_environments(2, (), cores=8, environment={"OMP_NUM_THREADS": "7"}) == [{}, {}]


@pytest.mark.parametrize(
    ("listed", "devices"),
    [("0,1", ("0", "1")), (" GPU-a , MIG-b", ("GPU-a", "MIG-b")), ("", ()), ("-1", ()), ("3", ("3",))],
)
def test_devices_are_those_that_the_environment_lists(listed: str, devices: tuple[str, ...]) -> None:
    assert visible_devices({"CUDA_VISIBLE_DEVICES": listed}) == devices


def test_a_worker_of_an_earlier_run_that_does_not_end_is_an_error(tmp_path: Path) -> None:
    import fcntl

    lock = tmp_path / "runs" / "worker.lock"
    wait_for_former_workers(lock)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(WorkerError, match=r"worker\.lock: a worker of an earlier run still holds"):
            wait_for_former_workers(lock, timeout_seconds=0.2)
    wait_for_former_workers(lock)
