"""Cases in a process of their own, since torch counts its devices when it first goes backward."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CASES = [Path(__file__).with_name(name) for name in ("accelerator_cases.py", "spread_cases.py")]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("which", "num_cases"),
    [("not acceptance", 38), pytest.param("acceptance", 7, marks=pytest.mark.acceptance)],
)
def test_on_devices_that_are_not_there(which: str, num_cases: int) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"),
            *("-m", which, "--durations=10", *map(str, CASES)),
        ],
        cwd=CASES[0].parents[2],
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) == num_cases, done.stdout[-1000:]
