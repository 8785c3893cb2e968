"""One log a process, each line with round and trial; a bug is one line, and its trace is in a file."""

from __future__ import annotations

import importlib
import re
import tempfile
from pathlib import Path

import pytest

from tests.studies import tuner, write_round
from tuner.records import Fact, TrialAsked
from tuner.store import SqlStore

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d round1( trial \d+)? tuner[\w.]*: \S.*")
RATES = "[1e-3, 2e-3, 3e-3]"
RUN = ("study", "run", "round1.yaml", "--engine", "simulated")


def simulated(directory: Path, *before: str) -> str:
    write_round(directory, trials=2, learning_rate=RATES)
    done = tuner(*before, *RUN, directory=directory)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_each_line_names_its_round_and_trial(tmp_path: Path) -> None:
    said = simulated(tmp_path)
    lines = (tmp_path / "dry-run/runs/round1/tuner.log").read_text().splitlines()
    assert len(lines) > 10
    assert [line for line in lines if LINE.fullmatch(line) is None] == []
    for trial in range(2):
        assert any(f"round1 trial {trial} " in line and "attempt 1 starts" in line for line in lines)
        assert any(f"round1 trial {trial} " in line and "complete at step 8" in line for line in lines)
    assert "tuner.study" not in said


def test_verbose_shows_it_too(tmp_path: Path) -> None:
    said = simulated(tmp_path, "--verbose")
    for trial in range(2):
        assert re.search(rf"round1 trial {trial} tuner\.study\.loop: attempt 1 starts", said)


@pytest.mark.parametrize("is_verbose", [False, True])
def test_a_bug_is_one_line_and_its_trace_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_verbose: bool
) -> None:
    simulated(tmp_path)

    record = SqlStore.record

    def broken(self: SqlStore, *facts: Fact) -> None:
        if any(isinstance(fact, TrialAsked) for fact in facts):
            raise ZeroDivisionError("of ours")
        record(self, *facts)

    write_round(tmp_path, trials=3, learning_rate=RATES)
    monkeypatch.setattr(SqlStore, "record", broken)
    done = tuner(*(["--verbose"] if is_verbose else []), *RUN, directory=tmp_path)
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: a bug of tuner: ZeroDivisionError: of ours (")
    place = re.search(r"The whole trace is in (\S+);", line)
    assert place is not None
    assert "Traceback (most recent call last)" in Path(place[1]).read_text()
    assert ("Traceback" in done.stderr) == is_verbose


def test_a_bug_outside_a_round_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("of ours")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tuner.process_log._file", None)
    monkeypatch.setattr(importlib.import_module("tuner.api.doctor"), "examine", broken)
    done = tuner("doctor", directory=tmp_path)
    assert done.returncode == 1
    [file] = tmp_path.glob("tuner-*.log")
    assert f"The whole trace is in {file}" in done.stderr
    assert "KeyError: 'of ours'" in file.read_text()
