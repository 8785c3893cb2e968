"""The bytes and lines of a local file, unpacked where it is gzip, and every way that can fail."""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import DataError

MAX_ROW_BYTES = 64 * 1024 * 1024
"""A longer line or record is refused: it would be held in memory whole."""
_MAX_EXPANSION = 200
_EXPANSION_CHECKED_FROM_BYTES = 16 * 1024 * 1024
"""Text packs to about a fifth; beyond 200 to one, and not just a small file, it is a bomb."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on this machine."""

    path: Path
    name: str
    """What messages call it: the path, or the URL that it is a copy of."""


class DataFile:
    """A local file, open for reading once from the front. Every method raises DataError."""

    def __init__(self, file: LocalFile) -> None:
        self.name = file.name
        self._read_bytes = 0
        self._most_bytes = most_unpacked_bytes(file)
        with explained(file):
            is_packed = file.path.suffix.lower() == ".gz"
            # Lines of a GzipFile are cut in Python, those of a reader around it in C.
            self._stream: io.BufferedIOBase = (
                io.BufferedReader(gzip.GzipFile(file.path)) if is_packed else file.path.open("rb")
            )
        self._file = file

    def __enter__(self) -> DataFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, num_bytes: int) -> bytes:
        """At most that many bytes; none at the end."""
        with explained(self._file):
            return self._counted(self._stream.read(num_bytes))

    def lines(self) -> Iterator[tuple[int, str]]:
        """Lines with their 1-based numbers, the line end (only LF counts) included."""
        number = 0
        with explained(self._file):
            while raw := self._counted(self._stream.readline(MAX_ROW_BYTES + 1)):
                number += 1
                if len(raw) > MAX_ROW_BYTES:
                    raise DataError(f"{self.name}:{number}: the line is longer than {MAX_ROW_BYTES:,} bytes")
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{self.name}:{number}: {not_utf8(error)}") from error
                yield number, line

    def _counted(self, data: bytes) -> bytes:
        self._read_bytes += len(data)
        if self._read_bytes > self._most_bytes:
            raise unpacks_too_far(self._file)
        return data


def most_unpacked_bytes(file: LocalFile) -> int:
    """What a file may unpack to: more is a bomb, not text. Raises DataError."""
    return max(_EXPANSION_CHECKED_FROM_BYTES, _MAX_EXPANSION * file_size(file))


def unpacks_too_far(file: LocalFile) -> DataError:
    """The error of a file that unpacks to more than `most_unpacked_bytes`."""
    return DataError(
        f"{file.name}: unpacks to more than {_MAX_EXPANSION} times its size, as text does not; "
        "if it is meant to, unpack it first"
    )


def file_size(file: LocalFile) -> int:
    """Bytes on disk. Raises DataError for what is no file: a pipe would wait, a device never end."""
    with explained(file):
        about = file.path.stat()
    if not stat.S_ISREG(about.st_mode):
        kind = "a directory" if stat.S_ISDIR(about.st_mode) else "a pipe or a device"
        raise DataError(f"{file.name}: is {kind}; data is read from a file, more than once")
    return about.st_size


def content_hash(file: LocalFile) -> str:
    """SHA-256 of the file's bytes as they lie on disk. Raises DataError."""
    file_size(file)
    with explained(file), file.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def not_utf8(error: UnicodeDecodeError) -> str:
    """What to say of bytes that are not UTF-8."""
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"


@contextmanager
def explained(file: LocalFile) -> Iterator[None]:
    """Failures of the disk, and names that none can have, as DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{file.name}: there is no such file") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file.name}: cannot be read: {reason}") from error
