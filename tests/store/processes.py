"""Programs that tests run in processes of their own: one records without end, one reads, one holds."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tuner.records import (
    AttemptStarted,
    Checkpoint,
    CheckpointKind,
    Evaluated,
    Evaluation,
    Fact,
    Progressed,
    RoundBegun,
    RoundRecord,
    Saved,
    Trial,
    TrialAsked,
)
from tuner.store import SqlStore, hold_study, open_store

NUM_EXAMPLES = 50


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Run `python -m tests.store.processes PROGRAM ARGUMENTS`, its standard output on a pipe."""
    command = [sys.executable, "-m", "tests.store.processes", program, *map(str, arguments)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


def beginning() -> list[Fact]:
    trial = Trial("round1", 0, {"lora_r": 8})
    return [
        RoundBegun(RoundRecord("round1", 60, {}, 0.0)),
        TrialAsked(trial),
        AttemptStarted("round1", 0, 1, 0, 0.0),
    ]


def step(number: int) -> list[Fact]:
    """What is said of a step, in one transaction."""
    made = Evaluation(
        number, float(number), example_nll=(1.5,) * NUM_EXAMPLES, example_tokens=(3,) * NUM_EXAMPLES
    )
    saved = Checkpoint(CheckpointKind.LAST, number, f"last-{number}", number, "hash")
    return [
        Evaluated("round1", 0, 1, made),
        Progressed("round1", 0, 1, number),
        Saved("round1", 0, 1, saved),
    ]


def steps_known(store: SqlStore) -> int:
    """How many steps a store knows; they are a beginning of all, and each is known as a whole."""
    trials = store.trials("round1")
    if not trials:
        return 0
    (trial,) = trials
    (attempt,) = trial.attempts
    expected = list(range(1, attempt.to_step + 1))
    assert [evaluation.step for evaluation in trial.evaluations] == expected
    assert [checkpoint.step for checkpoint in trial.checkpoints] == expected
    return attempt.to_step


def record_forever(url: str) -> None:
    store = open_store(url, study="study")
    store.record(*beginning())
    number = 0
    while True:
        number += 1
        store.record(*step(number))
        print(number, flush=True)


def read_for(url: str, seconds: str) -> None:
    """Prints how often it read, at least three times, and how many steps it knew last."""
    store = open_store(url, study="study")
    until, reads, known = time.monotonic() + float(seconds), 0, 0
    while time.monotonic() < until or reads < 3:
        latest = steps_known(store)
        assert latest >= known
        reads, known = reads + 1, latest
    print(reads, known, flush=True)


def hold(directory: str, url: str, study: str = "study", fork: str = "") -> None:
    """Holds a study; with `fork` it leaves a child behind that does not run another program."""
    with hold_study(Path(directory), url, study):
        role = "child" if fork and os.fork() == 0 else "held"
        os.write(1, f"{role} {os.getpid()}\n".encode())
        time.sleep(30)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
