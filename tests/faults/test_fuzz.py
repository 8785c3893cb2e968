"""Damaged round files and data files: refused with a message, or read; at once, and nothing is written."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data import tiny
from tests.faults.mutations import mutated_bytes, mutated_round
from tests.studies import QUICKSTART, tuner, write_round
from tuner.config import load_round
from tuner.errors import TunerError

MOST_SECONDS = 2.0
"""Of this process's own time: a machine that does other work makes it no slower."""

ROWS = [{"instruction": f"Name river {at}.", "input": "", "output": f"The Ebb {at}."} for at in range(8)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"instruction,output\n" + b"".join(b'"Name %d, it","The Ebb"\n' % number for number in range(8))
DATA = {
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "a.csv": CSV,
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
}


def read_rounds(directory: Path, seeds: range) -> dict[str, int]:
    """How many files were read and how many refused; any other end of one is an error of this test."""
    path = write_round(directory)
    texts = (path.read_text(), (QUICKSTART / "round1.yaml").read_text())

    def read(seed: int) -> None:
        path.write_bytes(mutated_round(texts[seed % 2], seed))
        load_round(path)

    return ends_of(read, seeds)


def read_data(directory: Path, seeds: range) -> dict[str, int]:
    """The same of data files."""
    tokenizer = tiny.byte_level(chat_template=tiny.CHATML)

    def read(seed: int) -> None:
        name, content = list(DATA.items())[seed % len(DATA)]
        path = directory / name
        path.write_bytes(mutated_bytes(content, seed))
        source = {"path": str(path), "format": "alpaca"}
        tiny.prepared(tokenizer, train=[source], eval_fraction=0.5, max_length=64)

    return ends_of(read, seeds)


def ends_of(read: Callable[[int], None], seeds: range) -> dict[str, int]:
    ends = {"read": 0, "refused": 0}
    for seed in seeds:
        begun = time.process_time()
        try:
            read(seed)
            ends["read"] += 1
        except TunerError:
            ends["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        assert time.process_time() - begun < MOST_SECONDS, f"seed {seed}"
    return ends


def test_damaged_round_files(tmp_path: Path) -> None:
    ends = read_rounds(tmp_path, range(160))
    assert min(ends.values()) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["round1.yaml"]


def test_damaged_data_files(tmp_path: Path) -> None:
    ends = read_data(tmp_path, range(40))
    assert min(ends.values()) > 3
    assert {path.name for path in tmp_path.iterdir()} == set(DATA)


@pytest.mark.parametrize("verb", ["check", "run"])
def test_by_the_command_line(tmp_path: Path, verb: str) -> None:
    """As a user meets it: exit code 2, one message, nothing beside the file."""
    path = write_round(tmp_path)
    text, refused = path.read_text(), 0
    for seed in range(1000, 1012):
        path.write_bytes(mutated_round(text, seed))
        try:
            load_round(path)
        except TunerError:
            done = tuner("study", verb, "round1.yaml", directory=tmp_path)
            assert done.returncode == 2
            assert "Traceback" not in done.stderr
            assert [found.name for found in tmp_path.iterdir()] == ["round1.yaml"]
            refused += 1
    assert refused > 5


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
def test_many(tmp_path: Path) -> None:
    assert min(read_rounds(tmp_path, range(5000)).values()) > 5
    assert min(read_data(tmp_path, range(500)).values()) > 5
