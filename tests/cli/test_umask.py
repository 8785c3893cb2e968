"""With any umask nothing that a run makes is writable by everyone."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.studies import ENVIRONMENT, write_round


@pytest.mark.parametrize(("umask", "forbidden"), [(0o000, 0o002), (0o077, 0o077)])
def test_what_a_run_makes(tmp_path: Path, umask: int, forbidden: int) -> None:
    write_round(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml", "--engine", "simulated"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        umask=umask,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    made = [path for path in (tmp_path / "dry-run").rglob("*") if not path.is_symlink()]
    assert len(made) > 10
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in made}
    assert [path for path, mode in modes.items() if mode & forbidden] == []
    if not umask:
        directories = {mode for path, mode in modes.items() if path.is_dir()}
        assert directories == {0o775}  # the group's rights are as the umask says
