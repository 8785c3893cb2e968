"""Several workers heard as one, and which devices they get."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.contracts.worker import assignment, collect, ended, wait_until_ready
from tests.studies import formula
from tuner.engines import SimulatedWorker, WorkerPool, wait_for_former_workers, worker_environments
from tuner.engines.devices import visible_devices
from tuner.engines.program import MAX_DEATHS
from tuner.errors import InputError, WorkerError
from tuner.records import (
    Checkpoint,
    CheckpointKind,
    Died,
    Ended,
    Event,
    Ready,
    Remarked,
    RunId,
    Saved,
    Started,
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
    deaths = [event for _ in range(5) for event in pool.events(0.0) if isinstance(event, Died)]
    assert [event.is_input_error for event in deaths] == [False, False, False, True, False, False]


class Failing(SimulatedWorker):
    """Has the failures of a list, one at a time, while the trials that it holds go on."""

    def __init__(self, *failures: Event) -> None:
        super().__init__(formula, slots=1)
        self.failures = list(failures)
        self.is_closed = False

    def events(self, timeout_seconds: float) -> list[Event]:
        said = super().events(timeout_seconds)
        if self.failures:
            said += [Ready(1, "replaced"), self.failures.pop(0)]
        return said

    def close(self) -> None:
        self.is_closed = True
        super().close()


def crash(pid: int, error: str = "RuntimeError: CUDA error") -> Died:
    return Died(
        f"the worker ended with exit code 1; its log, /x/worker.log, ends with:\n    {pid}\n    {error}"
    )


def saved(kind: CheckpointKind) -> Saved:
    return Saved("round1", 5, 1, Checkpoint(kind, 3, "x", 1, "x"))


def told(pool: WorkerPool, times: int = 8) -> list[Event]:
    return [event for _ in range(times) for event in pool.events(0.0)]


def test_three_failures_with_one_cause_stop_the_worker_and_the_others_go_on(tmp_path: Path) -> None:
    bad = Failing(crash(11), crash(12), crash(13))
    pool = WorkerPool([Made(), lambda: bad])
    pool.start(assignment(tmp_path, 0, steps=6))
    events = told(pool)
    [remark] = [event for event in events if isinstance(event, Remarked)]
    assert "3 failures in a row with one cause" in remark.text
    assert "RuntimeError: CUDA error" in remark.text
    assert "1 of 2 workers go on" in remark.text
    assert bad.is_closed
    assert sum(isinstance(event, Died) for event in events) == 3
    assert ended(events) == {0}
    assert pool.capacity() == 1


def test_three_failures_of_the_last_worker_stop_the_round_with_the_cause() -> None:
    pool = WorkerPool([lambda: Failing(crash(11), crash(12), crash(13))])
    died = [event for event in told(pool) if isinstance(event, Died)]
    assert [event.is_input_error for event in died] == [False, False, False, True]
    assert died[-1].reason.startswith("the round stops after 3 failures in a row with one cause: the worker")
    assert died[-1].reason.endswith("RuntimeError: CUDA error. Remove the cause")


@pytest.mark.parametrize(
    ("trials", "whose"),
    [
        ((4, 4, 4), ", all of trial 4, whose hyperparameters may be the cause: "),
        ((2, 4, 4), ", of the trials 2, 4: "),
    ],
)
def test_it_says_whose_failures_they_were(trials: tuple[int, ...], whose: str) -> None:
    failures = [replace(crash(at), runs=(RunId("round1", trial),)) for at, trial in enumerate(trials)]
    pool = WorkerPool([lambda: Failing(*failures)])
    died = [event for event in told(pool) if isinstance(event, Died)]
    assert whose in died[-1].reason


@pytest.mark.parametrize(
    "between",
    [crash(1, "OSError: no such file"), saved(CheckpointKind.LAST), saved(CheckpointKind.TRUNK)],
)
def test_another_cause_or_a_new_checkpoint_begins_the_count_anew(between: Event) -> None:
    pool = WorkerPool([lambda: Failing(crash(11), crash(12), between, crash(13), crash(14))])
    assert not any(event.is_input_error for event in told(pool) if isinstance(event, Died))


def test_the_best_adapter_that_is_said_again_at_a_resume_is_no_progress() -> None:
    best = saved(CheckpointKind.BEST)
    pool = WorkerPool([lambda: Failing(crash(11), best, crash(12), best, crash(13))])
    assert [event.is_input_error for event in told(pool) if isinstance(event, Died)][-1]


@pytest.mark.parametrize("error", ["RuntimeError: cuDNN", "OSError: no such file"])
def test_causes_differ_although_the_log_ends_with_the_same_line(error: str) -> None:
    """As trackers and torchrun print after an exception."""
    after = "\n    wandb: You can sync this run to the cloud by running:"
    failures = [crash(11, f"{said}{after}") for said in (error, "RuntimeError: cuDNN", error)]
    died = [e for e in told(WorkerPool([lambda: Failing(*failures)])) if isinstance(e, Died)]
    assert any(event.is_input_error for event in died) == error.startswith("RuntimeError")


@pytest.mark.parametrize("has_started", [True, False])
def test_trials_that_fail_alike_count_and_checkpoints_that_cannot_be_read_do_not(has_started: bool) -> None:
    failures: list[Event] = []
    for number in range(4):
        failures += [Started("round1", number, 1, 0)] if has_started else []
        failures.append(Ended("round1", number, 1, 0, "failed", f"trial {number}: no such program"))
    pool = WorkerPool([lambda: Failing(*failures)])
    assert any(isinstance(event, Died) for event in told(pool, 10)) == has_started


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
