"""Small file systems of their own, for tests of full and of read-only disks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

MountTmpfs = Callable[[int], Path]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[MountTmpfs]:
    """Mounts a file system of so many megabytes (2**20); skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(megabytes: int) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        if os.geteuid() != 0:
            pytest.skip("needs root, to mount a small file system")
        done = _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(place))
        if done.returncode:
            pytest.skip(f"needs the right to mount a small file system: {done.stderr.strip()}")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        done = _run("umount", str(place))
        assert done.returncode == 0, done.stderr


def make_read_only(place: Path) -> None:
    """Remount what `small_disk` mounted."""
    done = _run("mount", "-o", "remount,ro", str(place))
    assert done.returncode == 0, done.stderr


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, check=False)
