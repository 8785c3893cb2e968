"""`kill -9` of parent and worker, at each seam and at random: nothing is lost, nothing counted twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.studies import trials_of, tuner, write_round
from tuner.store import open_store

DYING = Path(__file__).parent / "dying"
PARENT, WORKER = "tuner.cli", "tuner.training"
TUNER = (sys.executable, "-m", "tuner.cli")
RUN = ("study", "run", "round1.yaml")
RUN_SIMULATED = (*RUN, "--engine", "simulated")
CHANGES: dict[str, Any] = {"trials": 2, "steps": 10, "every": 2, "decay_steps": 3}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_dying(directory: Path, at: str, process: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`tuner ARGUMENTS`, by default `study run`, with a process that dies at a seam."""
    marker = directory / f"died-{at.replace('/', '-')}"
    done = subprocess.run(
        [*TUNER, *(arguments or RUN)],
        cwd=directory,
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
        env={
            **ENVIRONMENT,
            "PYTHONPATH": os.pathsep.join([str(DYING), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "TUNER_DIE_AT": at,
            "TUNER_DIE_IN": process,
            "TUNER_DIE_MARKER": str(marker),
        },
    )
    assert marker.exists(), f"nothing died at {at}: {done.stderr}"
    return done


@contextmanager
def running(directory: Path, *, until: Callable[[str], bool]) -> Iterator[subprocess.Popen[str]]:
    """`tuner study run`, once a line of standard error is as wanted; standard error is a pipe."""
    process = subprocess.Popen(
        [*TUNER, *RUN], cwd=directory, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stderr is not None
    with process, process.stderr as said:
        try:
            for line in said:
                if until(line):
                    break
            yield process
        finally:
            process.kill()


def run_and_kill(directory: Path, seconds: float) -> None:
    """`tuner study run`, killed from outside after some time in training."""
    with running(directory, until=lambda line: "step" in line or "resumes" in line):
        time.sleep(seconds)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("undisturbed")
    write_round(directory, **CHANGES)
    done = tuner(*RUN, directory=directory)
    assert done.returncode == 0, done.stderr
    return trials_of(directory)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("simulated")
    write_round(directory, **CHANGES)
    done = tuner(*RUN_SIMULATED, directory=directory)
    assert done.returncode == 0, done.stderr
    trials = trials_of(directory / "dry-run")
    assert len(trials) == CHANGES["trials"]
    return trials


def curves(trials: list[dict[str, Any]]) -> list[Any]:
    return [(t["number"], t["state"], t["hyperparameters"], t["best_step"], t["evaluations"]) for t in trials]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "process"),
    [
        # tests/faults kills at commits and renames in every run of the tests.
        pytest.param("tuner.store.sql.SqlStore.record:9", PARENT, marks=pytest.mark.acceptance),
        pytest.param("rename:6", WORKER, marks=pytest.mark.acceptance),
        ("symlink:3", PARENT),  # the best adapter recorded, its link not yet switched
    ],
)
def test_a_round_killed_at_a_seam_equals_the_undisturbed_one(
    tmp_path: Path, undisturbed: list[dict[str, Any]], at: str, process: str
) -> None:
    write_round(tmp_path, **CHANGES)
    done = run_dying(tmp_path, at, process)
    if process == PARENT:
        assert done.returncode == -signal.SIGKILL
        done = tuner(*RUN, directory=tmp_path)
    # A worker's death the parent itself gets over.
    assert done.returncode == 0, done.stderr
    assert curves(trials_of(tmp_path)) == curves(undisturbed)
    nothing_half_made(tmp_path)


@pytest.mark.parametrize(
    "at",
    [
        "tuner.study.sampling.RoundStudy.propose+:2",  # after ask, before its fact
        "tuner.store.sql.SqlStore.record:4",  # of a trial that has begun
        "tuner.study.sampling.RoundStudy.tell:1",  # after the fact, before tell
    ],
)
def test_a_parent_killed_at_a_seam_loses_and_doubles_nothing(
    tmp_path: Path, simulated: list[dict[str, Any]], at: str
) -> None:
    """The same parent over simulated trials."""
    write_round(tmp_path, **CHANGES)
    died = run_dying(tmp_path, at, PARENT, *RUN_SIMULATED)
    assert died.returncode == -signal.SIGKILL
    done = tuner(*RUN_SIMULATED, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    assert curves(trials_of(tmp_path / "dry-run")) == curves(simulated)


@pytest.mark.acceptance  # tests/faults kills the parent at random in every run of the tests
@pytest.mark.slow
def test_a_round_killed_at_random_goes_on_from_its_checkpoints(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    write_round(tmp_path, **CHANGES)
    dice = random.Random(7)
    for _ in range(3):
        run_and_kill(tmp_path, dice.uniform(0.0, 0.4))
    done = tuner(*RUN, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    found = trials_of(tmp_path)
    assert curves(found) == curves(undisturbed)
    nothing_half_made(tmp_path)
    # Steps run again lie between checkpoints, an evaluation interval apart: nobody started over.
    for trial in found:
        assert 10 <= trial["executed_steps"] <= 10 + 2 * trial["attempts"]


@pytest.mark.slow
def test_sigterm_saves_and_names_the_command_that_goes_on(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    for number in range(3):  # on a busy machine a round may be over before it hears the signal
        study = tmp_path / str(number)
        write_round(study, **CHANGES)
        with running(study, until=lambda line: "step 2/" in line) as process:
            assert process.stderr is not None
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.read()
            code = process.wait()
        if code != 0:
            break
    assert code == 130
    assert "tuner study run round1.yaml" in rest
    status = json.loads(tuner("study", "status", "--json", directory=study).stdout)
    assert status["rounds"][0]["state"] == "open"
    assert status["rounds"][0]["trials"]["running"] == 0
    done = tuner(*RUN, directory=study)
    assert done.returncode == 0, done.stderr
    found = trials_of(study)
    assert curves(found) == curves(undisturbed)
    assert [trial["executed_steps"] for trial in found] == [10, 10]


def test_promote_killed_between_file_and_fact_is_finished_by_promoting_again(tmp_path: Path) -> None:
    write_round(tmp_path, **CHANGES)
    assert tuner(*RUN, "--engine", "simulated", directory=tmp_path).returncode == 0
    directory = tmp_path / "dry-run"
    command = ("study", "promote", "--to", "round2", "--max-train-steps", "20")
    died = run_dying(directory, "tuner.store.sql.SqlStore.record:1", PARENT, *command)
    assert died.returncode == -signal.SIGKILL
    written = (directory / "round2.yaml").read_text()
    again = tuner(*command, directory=directory)
    assert again.returncode == 0, again.stderr
    assert (directory / "round2.yaml").read_text() == written
    store = open_store(f"sqlite:///{directory / 'tuner.db'}", study="tiny")
    assert [p.file_text for p in store.promotions()] == [written]
    store.close()


def nothing_half_made(directory: Path) -> None:
    """No temporary names, no directory without a fact, `best` where the fact says."""
    runs = directory / "runs" / "round1"
    assert not [path for path in runs.rglob("*") if path.name.endswith(".tmp")]
    store = open_store(f"sqlite:///{directory / 'tuner.db'}", study="tiny")
    try:
        for trial in store.trials("round1"):
            place = runs / f"trial-{trial.number:04d}"
            recorded = {runs / checkpoint.path for checkpoint in trial.checkpoints}
            found = {path for kind in ("best-steps", "last", "trunk") for path in (place / kind).iterdir()}
            assert found == recorded
            best = trial.checkpoint("best")  # type: ignore[arg-type]
            assert best is not None
            assert (place / "best").resolve() == (runs / best.path).resolve()
    finally:
        store.close()
