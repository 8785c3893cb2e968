"""A worker whose disk is full pauses between micro-steps, and writes again what did not fit."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tuner.records import Assignment, Event, Remarked
from tuner.training.disk_room import DiskRoom, NoRoom

NEEDED = 2**21


class Disk:
    """A clock, and a disk that has room from some time on."""

    def __init__(self, *, full_from: float, until: float) -> None:
        self.now, self.full_from, self.until = 0.0, full_from, until
        self.said: list[str] = []
        self.beats = 0
        self.is_closed = False

    def free(self, _: Path) -> int:
        return 0 if self.full_from <= self.now < self.until else NEEDED

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def say(self, event: Event) -> None:
        assert isinstance(event, Remarked)
        self.said.append(event.text)

    def beat(self, _: str) -> None:
        self.beats += 1

    def room(self, patience: float = 600.0) -> DiskRoom:
        return DiskRoom(
            self.say,
            patience_seconds=patience,
            beat=self.beat,
            is_closed=lambda: self.is_closed,
            free=self.free,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


def assignment(directory: Path, needed: int = NEEDED) -> Assignment:
    return Assignment("round1", 0, 1, {}, 10, 5, str(directory), room_bytes=needed)


def test_it_waits_until_there_is_room_and_says_so_twice(tmp_path: Path) -> None:
    disk = Disk(full_from=0.0, until=90.0)
    disk.room().wait([assignment(tmp_path)])
    assert 90.0 <= disk.now < 92.0
    assert "training pauses" in disk.said[0]
    assert "training resumes" in disk.said[1]
    assert len(disk.said) == 2
    assert disk.beats >= 89  # nobody takes it for one that hangs


def test_it_gives_up_after_the_patience(tmp_path: Path) -> None:
    disk = Disk(full_from=0.0, until=1e9)
    with pytest.raises(NoRoom, match=r"no disk: .*0\.0 MB free"):
        disk.room(60.0).wait([assignment(tmp_path)])
    assert 60.0 <= disk.now < 63.0


def test_with_room_or_nothing_to_save_it_does_not_wait(tmp_path: Path) -> None:
    disk = Disk(full_from=0.0, until=1e9)
    disk.room().wait([])
    disk.room().wait([assignment(tmp_path, 0)])
    Disk(full_from=5.0, until=9.0).room().wait([assignment(tmp_path)])
    assert (disk.now, disk.said) == (0.0, [])


def test_one_that_is_closed_waits_no_more(tmp_path: Path) -> None:
    disk = Disk(full_from=0.0, until=1e9)
    disk.is_closed = True
    disk.room().wait([assignment(tmp_path)])
    assert disk.said == []


FULL = (OSError(errno.ENOSPC, "x"), SafetensorError("I/O error: No space left on device (os error 28)"))


@pytest.mark.parametrize("error", FULL)
def test_what_did_not_fit_is_written_again(tmp_path: Path, error: Exception) -> None:
    disk, tries = Disk(full_from=0.0, until=30.0), 0

    def write() -> str:
        nonlocal tries
        tries += 1
        if disk.now < 30.0:
            raise error
        return "written"

    assert disk.room().written(tmp_path, write) == "written"
    assert tries == 2
    assert "training pauses" in disk.said[0]


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (OSError(errno.EACCES, "x"), lambda disk: None),
        (FULL[0], lambda disk: setattr(disk, "is_closed", True)),
        (FULL[1], lambda disk: None),
    ],
)
def test_other_errors_pass_and_a_disk_that_stays_full_ends_it(
    tmp_path: Path, error: Exception, change: Callable[[Disk], None]
) -> None:
    disk = Disk(full_from=0.0, until=1e9)
    change(disk)

    def write() -> None:
        raise error

    with pytest.raises(OSError if isinstance(error, OSError) and error.errno == errno.EACCES else NoRoom):
        disk.room(60.0).written(tmp_path, write)
    assert disk.now < 70.0
