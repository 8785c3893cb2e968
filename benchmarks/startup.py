"""What `study check` costs beside the libraries that it needs: CPU of processes that take turns.

    OMP_NUM_THREADS=1 python benchmarks/startup.py --pairs 5

The other process imports AutoTokenizer and datasets and loads the tokenizer. Each check is that of a new copy
of studies/quickstart, so nothing is prepared; CPU is user and system time, until the process has ended.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUDY = ROOT / "studies" / "quickstart"
LIBRARIES = """\
from transformers import AutoTokenizer
import datasets
AutoTokenizer.from_pretrained("base")
"""


def cpu_seconds(arguments: Sequence[str], directory: Path) -> float:
    """Return the user and system seconds of a process of this Python. Raises CalledProcessError."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=directory, env=environment, stdout=said, stderr=said
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise subprocess.CalledProcessError(process.returncode, list(arguments), said.read())
    return used.ru_utime + used.ru_stime


def measured(pairs: int) -> list[tuple[float, float]]:
    """Return the seconds of libraries and of check, in turns; a first pair that fills caches is left out."""
    found = []
    for _ in range(pairs + 1):
        with tempfile.TemporaryDirectory() as directory:
            study = Path(shutil.copytree(STUDY, Path(directory) / "study", ignore=_made_by_a_run))
            libraries = cpu_seconds(["-c", LIBRARIES], study)
            found.append(
                (libraries, cpu_seconds(["-m", "tuner.cli", "study", "check", "round1.yaml"], study))
            )
    return found[1:]


def _made_by_a_run(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(".tuner") or name in ("runs", "tuner.db")]


def main() -> None:
    """Print the pairs, the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = measured(parser.parse_args().pairs)
    for libraries, check in pairs:
        print(f"libraries {libraries:.2f} s   study check {check:.2f} s")
    libraries, check = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"medians: {libraries:.2f} s and {check:.2f} s of CPU: {check / libraries:.2f} times")


if __name__ == "__main__":
    main()
