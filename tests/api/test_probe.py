"""The folder of a probe: what a killed one leaves goes with the next, and no other's does."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tests.studies import round_file
from tuner.api.probe import _folder
from tuner.study.plan import RoundPlan


def test_what_a_killed_probe_left_goes_with_the_next(tmp_path: Path) -> None:
    plan = RoundPlan(round_file(tmp_path))
    left, running, made = (tmp_path / f".tuner-probe-{name}" for name in ("left", "running", "made"))
    for folder in (left, running, made):
        (folder / "trial-0000").mkdir(parents=True)
    for folder in (left, running):
        os.utime(folder, (1e9, 1e9))
    held = os.open(running, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_SH)
    with _folder(plan) as own:
        assert own.parent == tmp_path
        assert [folder.exists() for folder in (left, running, made)] == [False, True, True]
    os.close(held)
    assert not own.exists()
