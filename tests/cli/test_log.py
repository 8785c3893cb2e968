"""One log a process, each line with round and trial; a bug is one line, and its trace is in a file."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.studies import QUICKSTART, tuner, write_round
from tuner.engines import LocalProcess
from tuner.process_log import harmless
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
    assert line.startswith("error: a bug in tuner: ZeroDivisionError: of ours (")
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://ann:pa/s@w@host/db failed", "postgresql+psycopg://ann:***@host/db failed"),
        ("storage: 'postgresql://ann:it''s@host/db', 5", "storage: 'postgresql://ann:***@host/db', 5"),
        ("connection to host=x password=hunter2 user=ann", "connection to host=x password=*** user=ann"),
        (
            "GET https://b.s3.amazonaws.com/k.jsonl?X-Amz-Credential=AKIA%2F2&X-Amz-Signature=a1b2&X-Amz-Date=5",
            "GET https://b.s3.amazonaws.com/k.jsonl?X-Amz-Credential=***&X-Amz-Signature=***&X-Amz-Date=5",
        ),
        ("https://x.net/a.jsonl?sv=2020&sig=Zz%3D: gone", "https://x.net/a.jsonl?sv=2020&sig=*** gone"),
        ("https://x.net/a?Policy=eyJ&Key-Pair-Id=K1", "https://x.net/a?Policy=***&Key-Pair-Id=***"),
        ("Authorization: Bearer abcdefghijklmn", "Authorization: Bearer ***"),
        ("logged in with hf_abcdefghijklmnopqrst", "logged in with hf_***"),
        ("{'token': 'a b', \"api_key\": \"c d\"}", "{'token': ***, \"api_key\": ***}"),
    ],
)
def test_what_is_kept_has_no_secret(text: str, shown: str) -> None:
    assert harmless(text) == shown
    assert harmless(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-28 10:00:00 round1 trial 3 tuner.study.loop: complete at step 8",
        "12 tokens: 3.4 a second; num_tokens=5, max_new_tokens: 6",
        "https://user@host/x?revision=main&key_frames",
        "File '/x.py', line 3: KeyError: 'a'",
        "http://host:8080/x and user@host, 'https://host/y' and 'user@host'",
        "storage: postgresql+psycopg://u:***@host/db?password=***: connection failed",
    ],
)
def test_what_is_no_secret_is_kept(text: str) -> None:
    assert harmless(text) == text


def test_a_trace_and_a_worker_tell_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("postgresql://ann:hunter2@host/db")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tuner.process_log._file", None)
    monkeypatch.setattr(importlib.import_module("tuner.api.doctor"), "examine", broken)
    done = tuner("--verbose", "doctor", directory=tmp_path)
    [file] = tmp_path.glob("tuner-*.log")
    program = (
        "import logging, sys\n"
        "from tuner.process_log import begin_worker\n"
        "begin_worker('round1')\n"
        "logging.getLogger('of.a.library').warning('GET https://x/a?sig=hunter2')\n"
        "print('https://x/a?sig=hunter2', file=sys.stderr)\n"
        "raise ValueError('https://x/a?sig=hunter2')\n"
    )
    worker = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert worker.stderr.count("sig=***") == 3
    for said in (file.read_text(), done.stderr, worker.stderr):
        assert "***" in said
        assert "hunter2" not in said


@pytest.mark.parametrize("scheme", ["nosuch", "memory"])
def test_an_error_names_the_line_of_a_signed_url_without_its_signature(tmp_path: Path, scheme: str) -> None:
    path = write_round(tmp_path)
    signed = "'SCHEME://bucket/rows.jsonl?sv=1&sig=hunter2'".replace("SCHEME", scheme)
    path.write_text(path.read_text().replace(f"{QUICKSTART}/data/train.jsonl", signed))
    for verb in ("check", "run"):
        done = tuner("study", verb, "round1.yaml", directory=tmp_path)
        assert done.returncode == 2
        shown = f"round1.yaml:6: data.train[0].path: {scheme}://bucket/rows.jsonl?sv=1&sig=***"
        assert shown in done.stderr
        assert "hunter2" not in done.stdout + done.stderr


def test_a_long_log_keeps_its_newer_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.process_log._MOST_BYTES", 100)
    monkeypatch.setattr("tuner.engines.local._LOOK_SECONDS", 0.0)
    log, older = tmp_path / "worker.log", tmp_path / "worker.log.1"
    program = (
        "import sys\nfor n in range(50): print(n, 'x' * 20, file=sys.stderr); print(n, flush=True); input()"
    )
    process = LocalProcess(["-c", program], log=log)
    lines = []
    for line in process.lines():
        lines.append(line)
        time.sleep(0.002)
        process.write("\n")
    assert process.wait(60) == 0
    assert len(lines) == 50
    assert older.exists()
    assert log.stat().st_size + older.stat().st_size < 50 * 23
    kept = (older.read_text() + log.read_text()).splitlines()
    assert kept[-1] == "49 " + "x" * 20
