"""What a worker does while the disk of its checkpoints is full: training pauses until there is room."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from tuner.errors import TunerError
from tuner.records import Assignment, Event, Remarked

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
"""How often free space is looked at, while there is some and while there is none."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MORE_BYTES = 2**20
"""Room that has to be made before what did not fit is written again."""
_LIBRARY_SAYS = "os error 28"
"""How safetensors quotes ENOSPC."""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"


class NoRoom(TunerError):
    """The disk stayed full for longer than the round waits."""


def free_bytes(directory: Path) -> int:
    """Return the bytes that this user may still write at a path, which may not exist yet."""
    place = next(place for place in (directory, *directory.parents) if place.exists())
    return shutil.disk_usage(place).free


class DiskRoom:
    """Waits between micro-steps, and before a checkpoint is written again, until there is room."""

    def __init__(
        self,
        say: Callable[[Event], None] = lambda _: None,
        *,
        patience_seconds: float = 600.0,
        grace_seconds: float = 0.0,
        beat: Callable[[str], None] = lambda _: None,
        is_closed: Callable[[], bool] = lambda: False,
        free: Callable[[Path], int] = free_bytes,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`grace_seconds` are waited in addition, for a parent that gives up first.

        `beat` says that the worker is alive; once it `is_closed`, it does not wait any more.
        """
        self._say, self._beat, self._is_closed = say, beat, is_closed
        self._patience_seconds = patience_seconds
        self._limit_seconds = patience_seconds + grace_seconds
        self._free, self._clock, self._sleep = free, clock, sleep
        self._looked_at = -_LOOK_SECONDS

    def wait(self, assignments: Iterable[Assignment]) -> None:
        """Return once there is room to save all of these trials, or the worker is closed. Raises NoRoom."""
        if self._clock() - self._looked_at < _LOOK_SECONDS:
            return
        needed = [(each.room_bytes, Path(each.directory)) for each in assignments if each.room_bytes]
        if needed:
            self._until_room(*max(needed))
        self._looked_at = self._clock()

    def written(self, directory: Path, write: Callable[[], T]) -> T:
        """Return what `write` does, which is done again where the disk was full.

        Raises NoRoom if it stays full, or if the worker is closed.
        """
        begun = self._clock()
        while True:
            try:
                return write()
            except (OSError, SafetensorError) as error:
                if getattr(error, "errno", None) not in _FULL and _LIBRARY_SAYS not in str(error):
                    raise
                _log.warning("%s: %s", directory, error)
                free = self._free(directory)
                if self._is_closed() or self._clock() - begun > self._limit_seconds:
                    raise NoRoom(f"no disk: {directory} has {_size(free)} free. Free some space") from error
            self._until_room(free + _MORE_BYTES, directory)
            self._sleep(_LOOK_SECONDS)

    def _until_room(self, needed: int, directory: Path) -> None:
        begun, has_said = self._clock(), False
        while (free := self._free(directory)) < needed and not self._is_closed():
            if not has_said:
                has_said = True
                self._tell(
                    f"warning: no disk: {directory} has {_size(free)} free, and at least {_size(needed)} is "
                    f"needed: training pauses until there is room, for up to {self._patience_seconds:.0f} s "
                    "(run.storage_patience). Free some space"
                )
            if self._clock() - begun > self._limit_seconds:
                raise NoRoom(
                    f"no disk: {directory} has {_size(free)} free, and at least {_size(needed)} is needed. "
                    "Free some space"
                )
            self._beat("waiting for room on the disk")
            self._sleep(_LOOK_SECONDS)
        if has_said and not self._is_closed():
            self._tell(f"there is room again: training resumes after {self._clock() - begun:.0f} s")

    def _tell(self, text: str) -> None:
        _log.warning("%s", text)
        self._say(Remarked(text))
