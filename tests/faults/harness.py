"""A round on the quickstart's base under a seeded fault, then run to its end, and what has to hold then."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil

from tests.studies import write_round
from tuner.records import CheckpointKind
from tuner.store import is_held, open_store
from tuner.study.sampling import optuna_storage
from tuner.whole import digest

CHANGES: dict[str, Any] = {"trials": 2, "steps": 10, "every": 2, "decay_steps": 3}
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
TUNER = (sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml")
SECONDS = 180
"""At most, for one run of a round on a machine that does other work."""


def start(directory: Path) -> subprocess.Popen[bytes]:
    """`tuner study run`, in a session of its own, its output in a file."""
    with (directory / "said.log").open("ab") as log:
        options: dict[str, Any] = {"cwd": directory, "env": ENVIRONMENT, "start_new_session": True}
        return subprocess.Popen(TUNER, stdout=log, stderr=log, **options)


def finish(directory: Path) -> str:
    """Run the round to its end, and return what this run said."""
    before = (directory / "said.log").stat().st_size if (directory / "said.log").exists() else 0
    process = start(directory)
    assert process.wait(SECONDS) == 0, said(directory)
    return said(directory)[before:]


def said(directory: Path) -> str:
    return (directory / "said.log").read_text(errors="replace")


def wait_for(directory: Path, process: subprocess.Popen[bytes], words: str) -> None:
    """Wait until a run has said something, or has ended."""
    until = time.monotonic() + SECONDS
    while words not in said(directory) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def storage(directory: Path) -> optuna.storages.RDBStorage:
    return optuna_storage(f"sqlite:///{directory}/tuner.db")


# --- faults: each gets a running round, and the dice ---------------------------------------------------

Fault = Callable[[Path, subprocess.Popen[bytes], random.Random], None]


def kill_parent(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
    process.kill()
    process.wait()


def kill_worker(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
    """The parent gets over it by itself."""
    for worker in workers(process):
        worker.kill()
    assert process.wait(SECONDS) == 0, said(directory)


def kill_both(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
    found = workers(process)
    dice.shuffle(found)
    for each in (process, *found) if dice.random() < 0.5 else (*found, process):
        each.kill()
    process.wait()


def leave_a_stopped_worker(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
    """The worker never notices that its parent is gone: the next run ends it."""
    for worker in workers(process):
        worker.suspend()
    process.kill()
    process.wait()


def ask_to_stop(number: signal.Signals) -> Fault:
    def fault(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
        process.send_signal(number)
        assert process.wait(SECONDS) in (130, 0), said(directory)

    fault.__name__ = number.name
    return fault


def interrupt_twice(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
    """A worker that hangs, so that saving would take for ever."""
    found = workers(process)
    for worker in found:
        worker.suspend()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(SECONDS) == 130, said(directory)
    assert time.monotonic() - begun < 5 + 5  # five seconds, on a machine that does other work
    psutil.wait_procs(found, timeout=5)
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in found)


def run_beside(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
    """A second run of the study is refused, and changes nothing."""
    options: dict[str, Any] = {"cwd": directory, "env": ENVIRONMENT, "check": False}
    second = subprocess.run(TUNER, capture_output=True, text=True, **options)
    if process.poll() is None:
        assert second.returncode == 2, second.stderr
        assert f"process {process.pid}" in second.stderr
    assert process.wait(SECONDS) == 0, said(directory)


def tell_optuna(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
    rows = storage(directory)
    for trial in rows.get_all_trials(rows.get_study_id_from_name("tiny/round1")):
        if not trial.state.is_finished():
            rows.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.COMPLETE, [dice.random()])
    assert process.wait(SECONDS) == 0, said(directory)


def delete_optuna(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
    rows = storage(directory)
    rows.delete_study(rows.get_study_id_from_name("tiny/round1"))
    assert process.wait(SECONDS) == 0, said(directory)


def flip(kind: str) -> Fault:
    def fault(directory: Path, process: subprocess.Popen[bytes], dice: random.Random) -> None:
        """After a kill, bytes of the newest checkpoint of a kind are others."""
        kill_both(directory, process, dice)
        found = sorted(path for path in (directory / "runs").rglob(f"{kind}/step-*/*") if path.is_file())
        for path in found[-3:]:
            content = bytearray(path.read_bytes())
            for _ in range(20):
                content[dice.randrange(len(content))] ^= dice.randrange(1, 256)
            path.write_bytes(content)

    fault.__name__ = f"flip_{kind}"
    return fault


FAULTS: tuple[Fault, ...] = (
    kill_parent,
    kill_worker,
    kill_both,
    leave_a_stopped_worker,
    ask_to_stop(signal.SIGTERM),
    ask_to_stop(signal.SIGHUP),
    interrupt_twice,
    run_beside,
    tell_optuna,
    delete_optuna,
    flip("last"),
    flip("trunk"),
)


def disturbed(directory: Path, seed: int) -> str:
    """Run a round with the fault of a seed, then to its end; return the fault's name."""
    dice = random.Random(seed)
    fault = FAULTS[seed % len(FAULTS)]
    write_round(directory, **CHANGES)
    process = start(directory)
    try:
        moments = ("trial 0  starts", "step 2/10", "step 6/10", "trial 1  starts")
        wait_for(directory, process, dice.choice(moments))
        time.sleep(dice.uniform(0.0, 0.4))
        fault(directory, process, dice)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    finish(directory)
    return fault.__name__


# --- what has to hold ------------------------------------------------------------------------------------


def curves(directory: Path) -> list[str]:
    """Trials and curves as text, in which NaN equals NaN."""
    store = open_store(f"sqlite:///{directory}/tuner.db", study="tiny")
    try:
        return [repr((t.number, t.state, t.hyperparameters, t.evaluations)) for t in store.trials("round1")]
    finally:
        store.close()


def refuse_leftovers(directory: Path) -> None:
    """No process, no temporary file, no lock, and every checkpoint, `best` among them, as it was recorded."""
    names = [path.name for path in directory.rglob("*")]
    assert [name for name in names if name.endswith((".tmp", ".pid"))] == []
    url = f"sqlite:///{directory}/tuner.db"
    assert not is_held(directory, url, "tiny")
    here = [
        each.pid
        for each in psutil.process_iter()
        if each.pid != os.getpid() and _cwd(each) == str(directory) and each.status() != psutil.STATUS_ZOMBIE
    ]
    assert here == []
    store = open_store(url, study="tiny")
    runs = directory / "runs" / "round1"
    try:
        for trial in store.trials("round1"):
            place = runs / f"trial-{trial.number:04d}"
            recorded = {runs / checkpoint.path: checkpoint for checkpoint in trial.checkpoints}
            found = {path for kind in ("best-steps", "last", "trunk") for path in (place / kind).glob("*")}
            assert found == set(recorded)
            best = trial.checkpoint(CheckpointKind.BEST)
            assert best is not None
            assert (place / "best").resolve() == (runs / best.path).resolve()
            assert digest(place / "best") == best.sha256
            assert trial.executed_steps >= CHANGES["steps"]
            assert [attempt.ended_at is None for attempt in trial.attempts].count(True) == 0
    finally:
        store.close()
    rows = storage(directory)
    told = rows.get_all_trials(rows.get_study_id_from_name("tiny/round1"))
    assert sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in told) == CHANGES["trials"]


def _cwd(process: psutil.Process) -> str | None:
    try:
        found: str = process.cwd()
    except (psutil.Error, OSError):
        return None
    return found


def report(seeds: range, directory: Path) -> dict[str, Any]:
    """Run the faults of seeds; return how many held, and what did not."""
    undisturbed = directory / "undisturbed"
    write_round(undisturbed, **CHANGES)
    finish(undisturbed)
    expected, failed = curves(undisturbed), {}
    for seed in seeds:
        place = directory / f"seed-{seed}"
        try:
            name = disturbed(place, seed)
            assert curves(place) == expected
            refuse_leftovers(place)
        except AssertionError as error:
            failed[seed] = str(error)[-400:]
        else:
            print(seed, name, "held", flush=True)
    return {"faults": len(seeds), "held": len(seeds) - len(failed), "failed": failed}


if __name__ == "__main__":
    first, last = int(sys.argv[1]), int(sys.argv[2])
    print(json.dumps(report(range(first, last), Path(sys.argv[3])), indent=2))
