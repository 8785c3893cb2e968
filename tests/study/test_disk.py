"""A round without room is not begun; one that runs out of room stops, saved, and goes on later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path

import pytest

from tests.studies import formula, round_file, silent_view
from tests.study.simulation import trials
from tuner.engines import SimulatedWorker
from tuner.errors import InputError, Interrupted, RoundStopped, StorageError
from tuner.records import Attempt, Checkpoint, CheckpointKind, Ready, Trial, TrialState
from tuner.report.format import size
from tuner.study.disk import (
    SAVING_BYTES,
    WORKING_BYTES,
    RoundDisk,
    checkpoint_bytes,
    free_bytes,
    least_trial_bytes,
    taken_back,
)
from tuner.study.plan import RoundPlan
from tuner.study.run import run_round

PLENTY = 10**12


def listing(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def run_with(
    directory: Path,
    free: Callable[[Path], int],
    *,
    stopping: Callable[[], bool] = lambda: False,
    patience: str = "1s",
) -> None:
    run_round(
        round_file(directory, run=f"run: {{storage_patience: {patience}}}"),
        make_worker=lambda plan, base: SimulatedWorker(formula, slots=2),
        view=silent_view(),
        stopping=stopping,
        free=free,
    )


def test_without_room_to_work_nothing_is_begun(tmp_path: Path) -> None:
    round_file(tmp_path)
    before = listing(tmp_path)
    with pytest.raises(StorageError, match=r"no disk: .*runs/round1 has 1\.0 kB free, .*17 MB is needed"):
        run_with(tmp_path, lambda _: 1000)
    assert listing(tmp_path) == before


def test_room_that_goes_while_base_and_data_are_loaded(tmp_path: Path) -> None:
    round_file(tmp_path)
    before = listing(tmp_path)
    free = chain(repeat(PLENTY, 2), repeat(WORKING_BYTES - 1))
    with pytest.raises(StorageError, match=r"no disk: .*3 trials"):
        run_with(tmp_path, lambda _: next(free))
    assert listing(tmp_path) == before


def test_a_disk_that_fills_stops_the_round_which_goes_on_later(tmp_path: Path) -> None:
    free: Iterator[int] = chain(repeat(PLENTY, 12), repeat(SAVING_BYTES - 1))
    with pytest.raises(RoundStopped, match=r"no disk: .*has 8\.4 MB free.*all progress is saved") as stopped:
        run_with(tmp_path, lambda _: next(free))
    assert stopped.value.exit_code == 1
    halfway = trials(tmp_path)
    assert {t.state for t in halfway} <= {TrialState.WAITING, TrialState.COMPLETE, TrialState.INFEASIBLE}
    assert TrialState.WAITING in {t.state for t in halfway}
    run_with(tmp_path, lambda _: PLENTY)
    assert all(t.state in (TrialState.COMPLETE, TrialState.INFEASIBLE) for t in trials(tmp_path))
    assert len(trials(tmp_path)) == 3


def test_a_disk_that_fills_is_waited_for(tmp_path: Path) -> None:
    """Trials that do not pause by themselves train on; nothing is asked and recorded meanwhile."""
    recorded: list[int] = []
    free: Iterator[int] = chain(repeat(PLENTY, 12), repeat(SAVING_BYTES - 1, 2), repeat(PLENTY))

    def looked(_: Path) -> int:
        found = next(free)
        if found < SAVING_BYTES:
            recorded.append((tmp_path / "tuner.db-wal").stat().st_size)
        return found

    run_with(tmp_path, looked, patience="1m")
    assert len(set(recorded)) == 1
    assert len(recorded) == 2
    assert len(trials(tmp_path)) == 3
    assert all(len(trial.attempts) == 1 for trial in trials(tmp_path))


def test_a_stop_is_heard_while_a_disk_is_full(tmp_path: Path) -> None:
    full = [False]

    def looked(_: Path) -> int:
        return SAVING_BYTES - 1 if full[0] else PLENTY

    asked = chain([False] * 5, repeat(True))

    def stopping() -> bool:
        full[0] = True
        return next(asked)

    with pytest.raises(Interrupted):
        run_with(tmp_path, looked, stopping=stopping, patience="1h")


def test_a_stop_that_was_asked_for_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        run_with(tmp_path, lambda _: PLENTY, stopping=chain([False] * 3, repeat(True)).__next__)


@pytest.fixture
def plan(tmp_path: Path) -> RoundPlan:
    return RoundPlan(round_file(tmp_path, trials=10))


READY = Ready(2, "cpu", smallest_adapter=1_000_000, largest_adapter=2_000_000)


def test_what_a_round_needs_at_the_least(plan: RoundPlan) -> None:
    """Ten trials of the smallest adapter, one checkpoint before the last of it in each slot, and the largest
    once more there."""
    ten = 10 * 1_000_000 * (4 + 4 + 8)
    in_flight = 2 * 2_000_000 * (4 + 8 + 4 + 4)
    before_last = 2 * 1_000_000 * (4 + 8 + 4)
    needed = ten + before_last + in_flight + WORKING_BYTES
    RoundDisk(plan, lambda _: needed).refuse_too_small(READY, ())
    with pytest.raises(StorageError, match=r"10 trials of at least 16 MB each") as refused:
        RoundDisk(plan, lambda _: needed - 1).refuse_too_small(READY, ())
    assert size(needed) in str(refused.value)
    assert "search.trials" in str(refused.value)


def test_what_is_there_already_is_not_needed_again(plan: RoundPlan) -> None:
    """Trials that have ended need nothing more, a waiting one what it has not yet written."""
    values = {"learning_rate": 1e-3}
    there = (Checkpoint(CheckpointKind.LAST, 4, "trial-0009/last/step-000004.a1", 3_000_000, "0"),)
    ended = [Trial("round1", n, values, state=TrialState.COMPLETE) for n in range(9)]
    waiting = Trial(
        "round1", 9, values, checkpoints=there, attempts=(Attempt(1, 0, 4, 1.0, 2.0, "interrupted"),)
    )
    before_last = 16_000_000
    needed = 16_000_000 - 3_000_000 + before_last + 2 * 2_000_000 * 20 + WORKING_BYTES
    RoundDisk(plan, lambda _: needed).refuse_too_small(READY, (*ended, waiting))
    with pytest.raises(StorageError, match="1 trial of at least"):
        RoundDisk(plan, lambda _: needed - 1).refuse_too_small(READY, (*ended, waiting))
    RoundDisk(plan, lambda _: 0).refuse_too_small(
        READY, (*ended, Trial("round1", 9, values, state=TrialState.INFEASIBLE))
    )


def test_the_least_is_no_more_than_what_check_announces(plan: RoundPlan) -> None:
    assert plan.spec.search.trials * least_trial_bytes(plan.spec, 1000) <= checkpoint_bytes(plan.spec, 1000)


def test_a_database_on_another_disk_needs_room_there(tmp_path: Path) -> None:
    """What is beside the round file and what is under the system's temporary memory are two devices."""
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    plan = RoundPlan(round_file(tmp_path, storage=f"sqlite:///{elsewhere}/tuner-test-never-made.db"))
    full = RoundDisk(plan, lambda path: 0 if path == elsewhere else PLENTY)
    with pytest.raises(StorageError, match=f"no disk: {elsewhere} has 0 B free"):
        full.refuse_full()
    assert full.shortage(READY) is not None
    assert RoundDisk(plan, lambda _: PLENTY).shortage(READY) is None


def test_free_bytes_of_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") > 0


def make(directory: Path) -> None:
    """What a run leaves before it knows whether its input is good."""
    for name in ("runs/round1/sub", "old/sub"):
        (directory / name).mkdir(parents=True)
    (directory / "runs" / "round1" / "worker.log").touch()


def fail(error: Exception, directory: Path, *watched: str) -> None:
    with taken_back(*(directory / name for name in watched)):
        make(directory)
        raise error


def test_bad_input_takes_back_what_was_made_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    before = listing(tmp_path)
    with pytest.raises(InputError):
        fail(InputError("no"), tmp_path, "runs/round1", "old/sub")
    assert listing(tmp_path) == before
    with pytest.raises(InputError):
        fail(InputError("no"), tmp_path, "runs/round2", "old")
    assert listing(tmp_path) - before == {
        "old/sub", "runs", "runs/round1", "runs/round1/sub", "runs/round1/worker.log"
    }  # fmt: skip


def test_other_errors_take_nothing_back(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(RuntimeError):
        fail(RuntimeError(), tmp_path, "runs")
    assert (tmp_path / "runs" / "round1" / "sub").is_dir()
