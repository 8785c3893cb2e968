"""Damaged round files and data files by the command line: refused with one message, or read.

Each takes less than 2 seconds of this process's time and 200 MB, and writes nothing outside the folder.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.mutations import mutated_bytes, mutated_round, mutated_rows
from tests.studies import QUICKSTART, tuner, write_round

MOST_SECONDS, MOST_SECONDS_TRACED = 2.0, 8.0
"""Of CPU; coverage makes each line of Python several times as long."""
"""Of this process's own time: a machine that does other work makes it no slower."""
MOST_BYTES = 200_000_000

ROWS = [{"instruction": f"Name river {at}.", "input": "", "output": f"The Ebb {at}."} for at in range(8)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
DATA = {
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "a.csv": b"instruction,output\n" + b"".join(b'"Name %d, it","The Ebb"\n' % at for at in range(8)),
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
}
Damage = Callable[[Path, int], None]
"""Writes what a seed makes of a study's round file or data."""


def damaged_round(folder: Path, seed: int) -> None:
    for name in ("base", "data"):
        if not (folder / name).exists():
            (folder / name).symlink_to(QUICKSTART / name)
    path = write_round(folder)
    text = path.read_text() if seed % 2 else (QUICKSTART / "round1.yaml").read_text()
    path.write_bytes(mutated_round(text, seed))


def damaged_data(folder: Path, seed: int) -> None:
    """Of bytes by an even seed, of values by an odd one."""
    name, content = list(DATA.items())[seed // 2 % len(DATA)]
    if seed % 2:
        name = ("a.jsonl", "a.json")[seed // 2 % 2]
        rows = mutated_rows(ROWS, seed)
        text = "".join(json.dumps(row) + "\n" for row in rows) if name == "a.jsonl" else json.dumps(rows)
        content = text.encode()
    (folder / name).write_bytes(content if seed % 2 else mutated_bytes(content, seed))
    path = write_round(folder, trials=1)
    text, _, rest = path.read_text().partition("data:\n")
    data = f"data: {{train: [{{path: {name}, format: alpaca}}], eval_fraction: 0.5, max_length: 64}}\n"
    path.write_text(text + data + rest[rest.index("max_train_steps") :])


def ends(folder: Path, damage: Damage, seeds: range, *, verb: str = "check") -> Counter[int]:
    """Count exit codes of a verb; any other end than a message is an error of this test."""
    found = Counter[int]()
    folder.mkdir()
    for seed in seeds:
        damage(folder, seed)
        before, begun = _peak_anew(), time.process_time()
        with written_elsewhere(folder) as elsewhere:
            done = tuner("study", verb, "round1.yaml", directory=folder)
        where = f"seed {seed}: {done.stderr[-2000:]}"
        took = time.process_time() - begun
        assert took < (MOST_SECONDS if sys.gettrace() is None else MOST_SECONDS_TRACED), where
        assert _memory("VmHWM") - before < MOST_BYTES, where
        assert done.returncode in (0, 2), where
        assert "Traceback" not in done.stderr, where
        assert elsewhere == [], where
        assert not (folder / "tuner.db").exists(), where
        found[done.returncode] += 1
    return found


def _memory(name: str) -> int:
    """This process's memory now, or the most since `_peak_anew`; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)


def _peak_anew() -> int:
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        peak.write_text("5")
    return _memory("VmRSS")


_listening: list[tuple[Path, list[str]]] = []
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _listening or (event != "open" and event not in _CHANGES):
        return
    folder, found = _listening[-1]
    if event == "open" and not arguments[2] & _WRITES:
        return
    for path in arguments[: 2 if event in ("os.rename", "os.symlink", "os.link") else 1]:
        if isinstance(path, (str, bytes)):
            whole = (folder / os.fsdecode(path)).resolve()
            if not whole.is_relative_to(folder) and whole != Path(os.devnull):
                found.append(f"{event} {whole}")


@pytest.fixture(scope="module", autouse=True)
def audited(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The libraries, which a command loads once, are not what a file costs."""
    folder = tmp_path_factory.mktemp("whole")
    write_round(folder)
    assert tuner("study", "check", "round1.yaml", directory=folder).returncode == 0
    sys.addaudithook(_audit)


@contextmanager
def written_elsewhere(folder: Path) -> Iterator[list[str]]:
    """What Python wrote, renamed or deleted outside of a folder within the block."""
    found: list[str] = []
    _listening.append((folder.resolve(), found))
    yield found
    _listening.pop()


def test_what_is_written_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    with written_elsewhere(tmp_path / "study") as found:
        (tmp_path / "study" / "within").write_text("")
        assert found == []
        (tmp_path / "outside").write_text("")
    assert found == [f"open {tmp_path / 'outside'}"]


def test_damaged_round_files(tmp_path: Path) -> None:
    assert min(ends(tmp_path / "study", damaged_round, range(140)).values()) > 5


def test_damaged_data_files(tmp_path: Path) -> None:
    found = ends(tmp_path / "study", damaged_data, range(50))
    assert min(found[0], found[2]) > 3


def test_a_run_refuses_as_check_does(tmp_path: Path) -> None:
    """Each of these is refused, or the whole round would run."""
    refused = 0
    for seed in range(1000, 1016):
        if ends(tmp_path / f"check-{seed}", damaged_round, range(seed, seed + 1))[2]:
            run = ends(tmp_path / f"run-{seed}", damaged_round, range(seed, seed + 1), verb="run")
            assert run == {2: 1}
            refused += 1
    assert refused > 9


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(0, 5000, 1000))
def test_a_thousand_of_5000_damaged_round_files(tmp_path: Path, first: int) -> None:
    found = ends(tmp_path / "study", damaged_round, range(first, first + 1000))
    assert min(found[0], found[2]) > 20


@pytest.mark.acceptance
@pytest.mark.timeout(1800)
def test_500_damaged_data_files(tmp_path: Path) -> None:
    found = ends(tmp_path / "study", damaged_data, range(500))
    assert min(found[0], found[2]) > 50
