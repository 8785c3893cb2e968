"""The faults: each happens to a running round, by the dice; the round may end by it, or get over it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
import psutil
import pytest
from optuna.trial import TrialState
from sqlalchemy import Engine, make_url, text
from sqlalchemy.exc import OperationalError

from tests.faults.harness import RUN, SECONDS, STEPS, Case
from tests.faults.warm import Trap, Wish
from tuner.store.database import open_engine

_BEFORE = ("", "loading ")
_BEGUN = ("trial 0  starts", f"step 2/{STEPS}", f"step 6/{STEPS}", "trial 1  starts", "comparison run")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a round, and when."""

    name: str
    strike: Callable[[Case], None]
    moments: tuple[str, ...] = _BEGUN
    """One of these has been said when it strikes."""
    wish: Callable[[Case], Wish] = lambda case: Wish()
    """How the run is started."""
    repair: Callable[[Case], None] = lambda case: None
    """What a user does, once the round has ended."""
    is_small: bool = False
    """The folder is a small file system of its own."""


def disturb(case: Case, fault: Fault) -> None:
    """Run a round with a fault, then to its end, and check all that has to hold but its curves."""
    case.start(fault.wish(case))
    try:
        moment = case.dice.choice(fault.moments)
        case.wait_for(moment)
        time.sleep(case.dice.uniform(0.0, 0.4))
        fault.strike(case)
        case.refuse_half_made()
    finally:
        case.clean()
    case.finish()
    fault.repair(case)
    case.refuse_leftovers()


# --- ends of processes ---------------------------------------------------------------------------------


def _kill_parent(case: Case) -> None:
    case.process.kill()
    case.process.wait(60)


def _kill_worker(case: Case) -> None:
    for worker in case.workers:
        worker.kill()
    case.end()


def _kill_both(case: Case) -> None:
    found = case.workers
    case.dice.shuffle(found)
    for each in (case.process, *found) if case.dice.random() < 0.5 else (*found, case.process):
        with suppress(psutil.NoSuchProcess):
            each.kill()
    case.process.wait(60)


def _leave_a_stopped_worker(case: Case) -> None:
    """The worker never notices that its parent is gone: the next run ends it."""
    for worker in case.workers:
        worker.suspend()
    _kill_parent(case)


def _stop_a_worker_for_a_second(case: Case) -> None:
    found = case.workers
    for worker in found:
        worker.suspend()
    time.sleep(1)
    for worker in found:
        worker.resume()
    case.end()


def _signal(number: signal.Signals) -> Fault:
    def strike(case: Case) -> None:
        case.process.send_signal(number)
        case.process.wait(SECONDS)
        is_over = "next: tuner study" in case.said  # nobody waits for signals any more
        case.end(130, 0, *([-number] if is_over else []))

    return Fault(number.name, strike)


def _interrupt_twice(case: Case) -> None:
    """A worker hangs, so that saving would take for ever."""
    found = case.workers
    for worker in found:
        worker.suspend()
    case.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begun = time.monotonic()
    case.process.send_signal(signal.SIGINT)
    case.end(130, 0)
    assert time.monotonic() - begun < 5 + 30  # five seconds, on a machine that does other work
    _, alive = psutil.wait_procs(found, timeout=30)
    assert not alive


def _seam(process: str, seam: str) -> Fault:
    """The process kills itself before or after one of its renames, syncs, deletions or commits."""

    def wish(case: Case) -> Wish:
        number = case.dice.randint(1, case.seams[f"{process} {seam}"])
        return Wish(Trap(process, seam, number, after=case.dice.random() < 0.5))

    # The parent is killed; or it gets over a killed worker.
    codes = (0, -signal.SIGKILL) if process == "parent" else (0,)
    return Fault(f"{process}-{seam}", lambda case: case.end(*codes), ("",), wish)


# --- two at once, and the clock ----------------------------------------------------------------------------


def _run_beside(case: Case) -> None:
    """A second run of the study is refused, and changes nothing."""
    second = case.runs.start(case.directory, *RUN, log="second.log")
    code = second.wait(120)
    if case.process.poll() is None:
        assert code == 2
        assert f"process {case.process.pid}" in (case.directory / "second.log").read_text()
    case.end()


def _start_together(case: Case) -> None:
    """One of two that start at once runs the round; the other is refused, or finds it run."""
    second = case.runs.start(case.directory, *RUN)
    codes = {case.process.wait(240), second.wait(240)}
    assert codes in ({0}, {0, 2}), case.said


def _clock(case: Case) -> Wish:
    """Backwards and forwards by up to years."""
    spans = (1.0, 3600.0, 86400.0, 3e8)
    return Wish(clock_jumps=tuple(case.dice.choice(spans) * case.dice.choice((-1, 1)) for _ in range(7)))


# --- Optuna's rows -----------------------------------------------------------------------------------------


def _tell_optuna(case: Case) -> None:
    rows = case.rows
    with suppress(optuna.exceptions.OptunaError, KeyError):  # told, or set aside, a moment ago
        for trial in rows.get_all_trials(case.optuna_study):
            if not trial.state.is_finished():
                rows.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [case.dice.random()])
    case.end()


def _delete_a_trial_of_optuna(case: Case) -> None:
    study = case.optuna_study
    found = case.rows.get_all_trials(study, deepcopy=False)
    trial = case.dice.choice(found)._trial_id
    for table in (
        "trial_params",
        "trial_values",
        "trial_user_attributes",
        "trial_system_attributes",
        "trial_intermediate_values",
        "trial_heartbeats",
        "trials",
    ):
        case.execute(f"DELETE FROM {table} WHERE trial_id = :trial", trial=trial)
    case.end()


def _rename_optuna(case: Case) -> None:
    case.execute("UPDATE studies SET study_name = 'mine' WHERE study_id = :study", study=case.optuna_study)
    case.end()


def _delete_optuna(case: Case) -> None:
    case.rows.delete_study(case.optuna_study)
    case.end()


# --- damaged files, and a disk that is full --------------------------------------------------------------


def _flip(path: Path, dice: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(20 if content else 0):
        content[dice.randrange(len(content))] ^= dice.randrange(1, 256)
    path.write_bytes(content)


def _flip_checkpoints(kind: str) -> Fault:
    """After a kill, bytes of a kind's newest checkpoints are others."""

    def strike(case: Case) -> None:
        _kill_both(case)
        folders = sorted(case.rounds_folder.glob(f"trial-*/{kind}/step-*"))
        for folder in folders[-2:]:
            case.damaged.add(folder)
            for path in case.dice.sample(found := sorted(folder.iterdir()), case.dice.randint(1, len(found))):
                _flip(path, case.dice)

    return Fault(f"flip-{kind}", strike)


def _flip_best(case: Case) -> None:
    _kill_both(case)
    for path in sorted(case.rounds_folder.glob("trial-*/best-steps/step-*/*")):
        case.damaged.add(path.parent)
        _flip(path, case.dice)


def _restore_best(case: Case) -> None:
    """Do what a user is told to where an adapter is damaged."""
    for trial in case.trials:
        case.run = case.runs.start(case.directory, "trial", "reproduce", trial.name, "--restore")
        case.end()


def _flip_table(case: Case) -> None:
    """The tokenised rows."""
    _kill_both(case)
    for path in case.dice.sample(
        found := sorted((case.directory / ".tuner-cache").glob("*/*")), len(found) // 2
    ):
        _flip(path, case.dice)


def _flip_database(case: Case) -> None:
    """Pages of the database are others: the run says so, and goes on from a copy that is put back."""
    _kill_both(case)
    file, copy = case.directory / "tuner.db", case.directory.with_name(f"{case.directory.name}-copy.db")
    if not file.exists():
        return
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(file, copy)
    content, size = bytearray(file.read_bytes()), 4096
    for page in case.dice.sample(range(1, len(content) // size), 5):
        content[page * size : page * size + 64] = case.dice.randbytes(64)
    file.write_bytes(content)
    case.start()
    case.end(0, 1, 2)
    for path in case.directory.glob("tuner.db*"):
        path.unlink()
    shutil.copy(copy, file)


def _fill_the_disk(case: Case) -> None:
    filler = case.directory / "filler"
    free = shutil.disk_usage(case.directory).free
    with suppress(OSError), filler.open("wb") as file:
        file.write(b"\0" * max(0, free - case.dice.choice((0, 4096, 40_000, 200_000))))
    with suppress(TimeoutError):
        case.process.wait(case.dice.uniform(1, 4))
    filler.unlink()
    case.end()


def mounted(directory: Path) -> None:
    """Make the folder a file system of 32 MB; skip where that is not allowed."""
    directory.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(directory)]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")


# --- a database on a server --------------------------------------------------------------------------------


def _drop_connections(case: Case) -> None:
    """The server ends each connection to the database, up to four times."""
    for _ in range(case.dice.randint(1, 4)):
        _end_connections(case, crash=False)
        time.sleep(case.dice.uniform(0, 0.3))
    case.end()


def _crash_the_server(case: Case) -> None:
    """A process of the server is killed, so that it ends every connection and recovers from its log."""
    _end_connections(case, crash=True)
    case.end()


def _end_connections(case: Case, *, crash: bool) -> None:
    url = make_url(case.url)
    engine = open_engine(url.set(database="postgres"))
    with suppress(OperationalError), engine.connect() as connection:
        rows = connection.execute(
            text("SELECT pid FROM pg_stat_activity WHERE datname = :name"), {"name": url.database}
        )
        pids = [row.pid for row in rows]
        for pid in pids[:1] if crash else pids:
            if crash:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            else:
                connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    engine.dispose()
    _wait_for_the_server(engine)


def _wait_for_the_server(engine: Engine) -> None:
    """The next run's own patience is tested elsewhere."""
    until = time.monotonic() + 60
    while True:
        try:
            with engine.connect() as connection:
                connection.execute(text("SELECT 1"))
            break
        except OperationalError:
            assert time.monotonic() < until
            time.sleep(0.1)
    engine.dispose()


# --- which happen where ----------------------------------------------------------------------------------

_ALL = (*_BEFORE, *_BEGUN)
_KILLS = (
    Fault("kill-parent", _kill_parent, _ALL),
    Fault("kill-worker", _kill_worker, _ALL),
    Fault("kill-both", _kill_both, _ALL),
    _signal(signal.SIGTERM),
    _signal(signal.SIGHUP),
    _signal(signal.SIGINT),
)
_PARENT_SEAMS = tuple(_seam("parent", seam) for seam in ("commit", "rename", "sync", "delete"))
_WORKER_SEAMS = tuple(_seam("worker", seam) for seam in ("rename", "sync", "delete"))
_HANGS = (
    Fault("leave-a-stopped-worker", _leave_a_stopped_worker),
    Fault("stop-a-worker-for-a-second", _stop_a_worker_for_a_second, _ALL),
    Fault("interrupt-twice", _interrupt_twice),
)
_TWO = (Fault("run-beside", _run_beside), Fault("start-together", _start_together, ("",)))
_CLOCK = Fault("clock", lambda case: case.end(), ("",), _clock)
_ROWS = (
    Fault("tell-optuna", _tell_optuna),
    Fault("delete-a-trial-of-optuna", _delete_a_trial_of_optuna),
    Fault("rename-optuna", _rename_optuna),
    Fault("delete-optuna", _delete_optuna),
)
_FILES = (
    _flip_checkpoints("last"),
    _flip_checkpoints("trunk"),
    Fault("flip-best", _flip_best, repair=_restore_best),
    Fault("flip-table", _flip_table),
    Fault("flip-database", _flip_database),
    Fault("full-disk", _fill_the_disk, is_small=True),
)
_SERVER = (Fault("drop-connections", _drop_connections), Fault("crash-the-server", _crash_the_server))

ON_THIS_MACHINE = (*_KILLS, *_PARENT_SEAMS, *_WORKER_SEAMS, *_HANGS, *_TWO, _CLOCK, *_ROWS, *_FILES)
ON_COMMANDS = (*_KILLS, *_PARENT_SEAMS, *_HANGS, *_TWO, _CLOCK, *_ROWS[:2])
ON_A_SERVER = (*_SERVER, *_KILLS[:3], _PARENT_SEAMS[0], *_TWO, *_ROWS)
ON_RAY = (*_KILLS, *_PARENT_SEAMS[:2], *_TWO, _ROWS[0])
SCHEDULE = tuple(
    (setting, fault)
    for setting, faults in (
        ("local", ON_THIS_MACHINE),
        ("command", ON_COMMANDS),
        ("postgres", ON_A_SERVER),
        ("ray", ON_RAY),
    )
    for fault in faults
)
