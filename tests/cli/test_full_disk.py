"""A disk that is full before a round, and one that fills while it runs."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import MountTmpfs
from tests.studies import trials_of, tuner, write_round
from tuner.cli import run


def fill(disk: Path) -> Path:
    """Take all the room there is."""
    path = disk / "somebody-elses-film"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


def test_a_disk_that_is_too_small(small_disk: MountTmpfs, capsys: pytest.CaptureFixture[str]) -> None:
    disk = small_disk(8)
    path = write_round(disk)
    assert run(["study", "run", str(path)]) == 2
    assert [found.name for found in disk.iterdir()] == ["round1.yaml"]
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"{disk}/runs/round1 has 8.4 MB free, and at least 17 MB is needed (8.4 MB more)" in message
    assert "Free some space" in message


def running_until_it_is_full(
    disk: Path, *, patience: str, trials: int = 2
) -> tuple[subprocess.Popen[bytes], Path, Path]:
    """A round whose disk is filled in the middle; its log, and the file that fills the disk."""
    write_round(
        disk,
        trials=trials,
        steps=60,
        every=5,
        learning_rate="1e-3",
        run=f"run: {{storage_patience: {patience}}}",
    )
    log = disk.parent / "log"
    with log.open("w") as file:
        running = subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"],
            cwd=disk,
            stdout=file,
            stderr=file,
        )
    wait_until(lambda: "trial 0  step 10/60" in log.read_text() or running.poll() is not None)
    return running, log, fill(disk)


PAUSES = ("training pauses until there is room", "what they report waits in memory; trying again for 10 min")
GOES_ON = ("there is room again: training resumes after", "the database is back after")


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 240
    while not is_so() and time.monotonic() < until:
        time.sleep(0.05)
    assert is_so()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_disk_that_fills_on_the_way(small_disk: MountTmpfs) -> None:
    """Exit 1 and the reason; after room was made the same command finishes, and no trial has failed."""
    disk = small_disk(32)
    running, log, film = running_until_it_is_full(disk, patience="1s")
    try:
        assert running.wait(120) == 1, log.read_text()
    finally:
        running.kill()
    last = log.read_text().splitlines()[-1]
    # Who says it first is chance: the parent, or the worker that could not write a trial's checkpoint.
    assert re.match(rf"error: no disk: {disk}/runs/round1(/trial-0000)? has ", last), last
    assert "Free some space" in last
    assert last.endswith("then resume with: tuner study run round1.yaml")
    again = tuner("study", "run", "round1.yaml", directory=disk)
    assert (again.returncode, again.stderr.count("error: no disk:")) == (2, 1)
    film.unlink()
    assert tuner("study", "run", "round1.yaml", directory=disk).returncode == 0
    listed = trials_of(disk)
    assert [trial["state"] for trial in listed] == ["complete", "complete"]
    assert listed[0]["attempts"] == 2
    assert 60 <= listed[0]["executed_steps"] <= 70


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_pauses_until_there_is_room(small_disk: MountTmpfs) -> None:
    """The same run goes on, in the same attempt, and says so; the database may notice it first."""
    disk = small_disk(32)
    running, log, film = running_until_it_is_full(disk, patience="10m", trials=1)
    try:
        wait_until(lambda: any(words in log.read_text() for words in PAUSES))
        before = log.read_text().count("step ")
        time.sleep(1.0)
        assert running.poll() is None
        film.unlink()
        assert running.wait(240) == 0, log.read_text()
    finally:
        running.kill()
    said = log.read_text()
    assert any(words in said for words in GOES_ON)
    assert said.count("step ") > before
    listed = trials_of(disk)
    assert [(trial["state"], trial["attempts"]) for trial in listed] == [("complete", 1)]
    assert listed[0]["executed_steps"] == 60
    left = [path.name for path in disk.rglob("*.tmp")]
    assert left == []
