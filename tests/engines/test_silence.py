"""A worker that hangs is ended after the time that it may be silent for, and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.worker import assignment
from tuner.engines import (
    LocalProcess,
    Program,
    ProgramWorker,
    WorkerPool,
    _ForeignWorker,
    end_all_processes,
    end_at_once,
    wait_for_former_workers,
)
from tuner.engines.processes import Identity
from tuner.engines.program import Silence
from tuner.records import Beat, Died, Event, Preparing, Progressed, Ready
from tuner.training.worker_state import Pulse

PROGRAM = """
import sys, time
sys.stdin.readline()
ready = '{"event": "ready", "slots": 1, "device": "cpu"}'
beat = '{"event": "beat", "doing": "a pass", "allowed_seconds": 1.0}'
sys.stdout.write(ready + "\\n" + beat + "\\n")  # at once: a test stops it after the first
sys.stdout.flush()
sys.stdin.readline()
"""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def silence(*said: tuple[float, Event], loading_seconds: float = 100.0) -> tuple[Silence, Clock]:
    clock = Clock()
    found = Silence(loading_seconds, clock)
    for at, event in said:
        clock.now = at
        assert found.too_long() is None
        found.heard(event)
    return found, clock


def asked(found: Silence, clock: Clock, until: float) -> str | None:
    """Asked every second, as the loop does, until a time or an answer."""
    while clock.now < until:
        clock.now += 1.0
        if (why := found.too_long()) is not None:
            return why
    return None


READY = Ready(1, "cpu")


def test_loading_has_its_time_and_each_sign_of_life_begins_it_anew() -> None:
    found, clock = silence()
    assert asked(found, clock, 100.0) is None
    assert "101 seconds (loading)" in (asked(found, clock, 102.0) or "")
    found, clock = silence((20.0, Preparing("tokenising")))
    assert asked(found, clock, 120.0) is None
    assert "(tokenising)" in (asked(found, clock, 122.0) or "")


def test_a_program_without_heartbeats_has_all_the_time_once_it_is_ready() -> None:
    found, clock = silence((5.0, READY))
    assert asked(found, clock, 1e4) is None


def test_a_heartbeat_says_how_long_the_next_silence_may_be() -> None:
    found, clock = silence((5.0, READY), (6.0, Beat("a pass", 120.0)), (25.0, Progressed("r", 0, 1, 3)))
    assert asked(found, clock, 145.0) is None
    assert "(a pass)" in (asked(found, clock, 147.0) or "")
    found, clock = silence((5.0, READY), (6.0, Beat("a pass", 120.0)), (7.0, Beat("waiting", None)))
    assert asked(found, clock, 1e4) is None


def test_work_given_to_one_that_waits_has_to_be_begun() -> None:
    found, clock = silence((5.0, READY), (6.0, Beat("waiting", None)))
    assert asked(found, clock, 1e3) is None
    found.ordered()
    assert asked(found, clock, clock.now + 99.0) is None
    assert "(starting a trial)" in (asked(found, clock, clock.now + 3.0) or "")
    found, clock = silence((5.0, READY))
    found.ordered()
    assert asked(found, clock, 1e4) is None  # without heartbeats nothing is known of it


def test_the_time_in_which_this_process_itself_was_stopped_does_not_count() -> None:
    found, clock = silence((5.0, READY), (6.0, Beat("a pass", 120.0)))
    clock.now = 5000.0
    assert found.too_long() is None
    assert asked(found, clock, 5119.0) is None
    assert asked(found, clock, 5122.0) is not None


def test_a_pass_may_take_ten_times_the_slowest_and_two_minutes_at_least() -> None:
    clock, said = Clock(), []
    pulse = Pulse(said.append, loading_seconds=1800.0, clock=clock)
    for at, allowed in ((0.0, 1800.0), (3.0, 120.0), (33.0, 300.0), (34.0, 300.0)):
        clock.now = at
        pulse.on_pass()
        assert said[-1] == Beat("a pass", allowed)
    pulse.phase("saving")
    clock.now = 1000.0  # saving took long, which says nothing of a pass
    pulse.on_pass()
    assert said[-1] == Beat("a pass", 300.0)
    num_said = len(said)
    for _ in range(100):
        clock.now += 0.005
        pulse.on_pass()
    assert len(said) == num_said


def launched(tmp_path: Path, program: str = PROGRAM, **seconds: float) -> ProgramWorker:
    return ProgramWorker(
        Program((), dict),
        lambda: LocalProcess(["-c", program], log=tmp_path / "worker.log"),
        **seconds,
    )


def died(worker: ProgramWorker, seconds: float = 120.0) -> Died:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for event in worker.events(0.1):
            if isinstance(event, Died):
                return event
    raise AssertionError("it did not die")


def test_a_stopped_process_is_killed_and_said(tmp_path: Path) -> None:
    worker = launched(tmp_path)
    assert isinstance(worker.events(120.0)[0], Ready)
    process = worker.process
    assert isinstance(process, LocalProcess)
    os.kill(process.popen.pid, signal.SIGSTOP)
    event = died(worker)
    assert "said nothing for" in event.reason
    assert "(a pass)" in event.reason
    assert process.popen.returncode == -signal.SIGKILL
    assert worker.capacity() == 1  # the next trial starts another one
    worker.close()


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import pathlib, sys; pathlib.Path(sys.argv[1]).unlink(); sys.exit(3)", "No such file or directory"),
        (
            r"import sys; sys.stdout.buffer.write(b'\xff\n')",
            "reading the worker's events failed: UnicodeDecode",
        ),
    ],
)
def test_the_end_of_a_worker_is_said_whatever_is_gone(tmp_path: Path, program: str, words: str) -> None:
    """Its log, for one, with the folder of the round: the round would wait without end."""
    log = tmp_path / "worker.log"
    made = Program(("-c", program, str(log)), dict)
    worker = ProgramWorker(made, lambda: LocalProcess(made.arguments, log=log), silence_seconds=100.0)
    assert words in died(worker).reason
    worker.close()


class Dying:
    """A process whose output is given; after it, reading fails, or it is killed."""

    def __init__(self, *lines: str, breaks: bool = False) -> None:
        self._lines, self._breaks, self._killed = lines, breaks, threading.Event()

    def write(self, line: str) -> None:
        pass

    def lines(self) -> Iterator[str]:
        yield from self._lines
        if self._breaks:
            raise OSError("no more")

    def wait(self, timeout_seconds: float | None = None) -> int:
        if not self._killed.wait(timeout_seconds):
            raise TimeoutError
        return -9

    def kill(self) -> None:
        self._killed.set()

    def last_words(self) -> str:
        return ""


@pytest.mark.parametrize(
    "process",
    [
        Dying('{"event": "new"}', '{"event": "new"}'),
        Dying('{"event": "died", "reason": "no data"}', breaks=True),
    ],
)
def test_the_death_of_a_process_is_said_once(process: Dying) -> None:
    """A second one would be taken for that of the next process, whose end would then be waited for."""
    worker = ProgramWorker(Program((), dict), lambda: process)
    assert worker._reader is not None
    worker._reader.join(10.0)
    assert [type(event) for event in worker.events(0.0)] == [Died]


class Unending(Dying):
    """A process that waits for a GPU which has fallen off the bus: SIGKILL does not end it."""

    def __init__(self, *, allowed_seconds: float) -> None:
        super().__init__(
            '{"event": "ready", "slots": 1, "device": "cuda"}',
            f'{{"event": "beat", "doing": "a pass", "allowed_seconds": {allowed_seconds}}}',
        )
        self._ends = threading.Event()

    def lines(self) -> Iterator[str]:
        yield from super().lines()
        self._ends.wait()

    def wait(self, timeout_seconds: float | None = None) -> int:
        if not self._ends.wait(timeout_seconds):
            raise TimeoutError
        return -9

    def last_words(self) -> str:
        return "its log ends with Xid 79"


def test_one_that_sigkill_does_not_end_is_left_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tuner.engines.program._ENDS_WITHIN_SECONDS", 0.2)
    made = [Unending(allowed_seconds=0.05), Unending(allowed_seconds=3600.0)]
    waiting = iter(made)
    worker = ProgramWorker(Program((), dict), lambda: next(waiting), close_seconds=0.1)
    worker.start(assignment(tmp_path, 0))
    event = died(worker)
    assert event.trials == (0,)
    assert "(a pass) and was killed" in event.reason
    assert "a GPU or a disk that hangs (state D in `ps`)" in event.reason
    assert "Xid 79" in event.reason
    worker.start(assignment(tmp_path, 1))
    assert worker.process is made[1]
    made[0]._ends.set()  # at last: it is not the other one's death
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        assert not any(isinstance(event, Died) for event in worker.events(0.01))
    worker.close()
    assert "Xid 79" in caplog.text
    assert worker.process is None
    made[1]._ends.set()


def test_one_that_was_left_and_ends_keeps_the_record_of_its_successor(tmp_path: Path) -> None:
    left, successor = (LocalProcess(["-c", "input()"], log=tmp_path / "worker.log") for _ in range(2))
    for process in (left, successor):
        process.kill()
        assert (tmp_path / "worker.pid").exists()
        process.wait()
    assert not (tmp_path / "worker.pid").exists()


class Hanging(Unending):
    """A process that says its death, and then hangs in the driver of its GPU."""

    def __init__(self, *, ends_when_killed: bool) -> None:
        super().__init__(allowed_seconds=3600.0)
        self._lines = ('{"event": "died", "reason": "CUDA error"}',)
        self._ends_when_killed = ends_when_killed

    def kill(self) -> None:
        if self._ends_when_killed:
            self._ends.set()


@pytest.mark.parametrize("ends_when_killed", [True, False])
def test_one_that_says_its_death_and_hangs_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, *, ends_when_killed: bool
) -> None:
    monkeypatch.setattr("tuner.engines.program._EXITS_WITHIN_SECONDS", 0.1)
    monkeypatch.setattr("tuner.engines.program._ENDS_WITHIN_SECONDS", 0.1)
    process = Hanging(ends_when_killed=ends_when_killed)
    worker = ProgramWorker(Program((), dict), lambda: process)
    asked = threading.Thread(target=lambda: died(worker, 10.0), daemon=True)
    asked.start()
    asked.join(5.0)
    assert not asked.is_alive()
    assert worker.process is None
    assert worker.events(0.0) == []
    assert ("Xid 79" in caplog.text) is not ends_when_killed
    process._ends.set()


def test_a_process_that_ends_as_it_is_left_dies_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.engines.program._ENDS_WITHIN_SECONDS", 0.05)
    process = Unending(allowed_seconds=0.05)
    worker = ProgramWorker(Program((), dict), lambda: process)

    def ends_meanwhile() -> str:
        process._ends.set()
        if threading.current_thread() is not worker._reader:
            time.sleep(0.2)  # the reader says it first
        return ""

    monkeypatch.setattr(process, "last_words", ends_meanwhile)
    said = [event for _ in range(10) for event in worker.events(0.05)]
    assert [type(event) for event in said].count(Died) == 1


def test_closing_does_not_wait_for_one_that_hangs(tmp_path: Path) -> None:
    worker = launched(tmp_path, PROGRAM + "time.sleep(600)\n")
    assert isinstance(worker.events(120.0)[0], Ready)
    begun = time.monotonic()
    worker.close()
    assert time.monotonic() - begun < 120


def test_one_that_never_begins_to_load(tmp_path: Path) -> None:
    worker = launched(tmp_path, "import time; time.sleep(60)", silence_seconds=0.5)
    assert "(loading)" in died(worker).reason


def test_all_can_be_ended_at_once(tmp_path: Path) -> None:
    worker = launched(tmp_path, "import time; time.sleep(60)")
    end_all_processes()
    assert "signal 9" in died(worker).reason
    assert not list(tmp_path.glob("*.pid"))


def test_the_processes_of_one_worker_can_be_ended_at_once(tmp_path: Path) -> None:
    """A notebook may run two studies: what ends one leaves the other's workers alone."""
    first, second, third = (launched(tmp_path, "import time; time.sleep(60)") for _ in range(3))
    pool = _ForeignWorker(WorkerPool([lambda: first, lambda: second]), "an engine of the user's")
    end_at_once(pool)
    assert "signal 9" in died(first, 60.0).reason
    for running in (second, third):  # one has not been asked to start by its pool
        assert running.process is not None
        with pytest.raises(TimeoutError):
            running.process.wait(0.1)
        end_at_once(running)
        assert "signal 9" in died(running, 60.0).reason


HOLDER = """
import fcntl, sys, subprocess, os
from pathlib import Path
from tuner.engines.processes import record_worker
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_SH)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fileno()],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
record_worker(Path(sys.argv[1]).with_name("worker.pid"), child.pid)
os.kill(child.pid, 19)
print(child.pid, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_what_an_earlier_run_left_hanging_is_ended_by_the_next(tmp_path: Path) -> None:
    """Its parent was killed while it was stopped, so that it never noticed."""
    lock = tmp_path / "worker.lock"
    done = subprocess.run(
        [sys.executable, "-c", HOLDER, str(lock)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    wait_for_former_workers(lock)  # which is over when it has ended
    assert Identity.of(int(done.stdout)) is None
