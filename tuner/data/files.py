"""Data files: locating them, locally or at a URL, and opening them."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import DataError
from tuner.installation import installation
from tuner.process_log import harmless
from tuner.whole import written_whole

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
        """Return at most that many bytes; none at the end."""
        with explained(self._file):
            return self._counted(self._stream.read(num_bytes))

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield lines with their 1-based numbers, including the line end (only LF)."""
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
    """Return the size that a file may unpack to; a larger one is a bomb. Raises DataError."""
    return max(_EXPANSION_CHECKED_FROM_BYTES, _MAX_EXPANSION * file_size(file))


def unpacks_too_far(file: LocalFile) -> DataError:
    """Return the error for a file that unpacks to more than `most_unpacked_bytes`."""
    return DataError(
        f"{file.name}: unpacks to more than {_MAX_EXPANSION} times its size, as text does not; "
        "if it is meant to, unpack it first"
    )


def file_size(file: LocalFile) -> int:
    """Return the bytes on disk. Raises DataError for a pipe or a device, which may never end."""
    with explained(file):
        about = file.path.stat()
    if not stat.S_ISREG(about.st_mode):
        kind = "a directory" if stat.S_ISDIR(about.st_mode) else "a pipe or a device"
        raise DataError(f"{file.name}: is {kind}; use a regular file, since data is read more than once")
    return about.st_size


def content_hash(file: LocalFile) -> str:
    """Return the SHA-256 of the file's bytes on disk. Raises DataError."""
    file_size(file)
    with explained(file), file.path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def not_utf8(error: UnicodeDecodeError) -> str:
    """Return the message for bytes that are not UTF-8."""
    byte = error.object[error.start]
    return f"byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"


@contextmanager
def explained(file: LocalFile) -> Iterator[None]:
    """Convert disk errors and impossible names to DataError."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{file.name}: there is no such file") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{file.name}: cannot be read: {reason}") from error


_PATTERN = re.compile(r"[*?\[]")
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "sftp": "sftp"}
_EXTRAS |= {"abfs": "abfs", "abfss": "abfs", "az": "abfs", "smb": "smb", "ssh": "ssh", "hdfs": "hdfs"}
"""fsspec's extra that brings what a kind of URL needs."""


@contextmanager
def downloads(cache: Path | None) -> Iterator[Path]:
    """Open the directory for copies of remote files: in the cache, or temporary."""
    if cache is not None:
        yield cache / "downloads"
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def located(path: str, copies: Path) -> list[LocalFile]:
    """Return the files sorted by name.

    A file behind a URL is copied into `copies` once, and again when the server says that it has changed.
    Raises DataError, for a pattern without a match too.
    """
    if "://" in path:
        return _remote(path, copies)
    if os.path.exists(path) or not _PATTERN.search(path):  # noqa: PTH110  Path raises for long names
        return [LocalFile(Path(path), path)]
    matches = glob.glob(path, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
    found = sorted(match for match in matches if Path(match).is_file())
    if not found:
        raise DataError(f"{path}: no file matches this pattern")
    return [LocalFile(Path(match), match) for match in found]


def _remote(url: str, copies: Path) -> list[LocalFile]:
    files, path = _filesystem(url)
    if "*" not in path:
        return [_copied(files, path, url, copies)]
    with _explained(harmless(url)):
        matches = sorted(files.glob(path))
    if not matches:
        raise DataError(f"{harmless(url)}: no file matches this pattern")
    return [_copied(files, match, files.unstrip_protocol(match), copies) for match in matches]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    scheme, shown = url.partition("://")[0], harmless(url)
    with _explained(shown):  # some connect at once
        try:
            files, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            remedy = f"; install it by `{installation().with_packages(f'fsspec[{extra}]')}`" if extra else ""
            raise DataError(
                f"{shown}: {scheme}:// needs a package that is not installed: {error}{remedy}"
            ) from error
        except ValueError as error:
            raise DataError(f"{shown}: no file system of fsspec reads {scheme}:// ({error})") from error
    return files, str(path)


def _copied(files: Any, path: str, url: str, copies: Path) -> LocalFile:
    """Return the local copy, which is renamed into place once it is complete; its name has no secret."""
    name = harmless(url)
    with _explained(name):
        about = files.info(path)
        if about.get("type") in ("directory", "other"):
            raise DataError(f"{name}: is a directory, a pipe or a device; name the files in it, as *.jsonl")
        version = hashlib.sha256(json.dumps([url, about], sort_keys=True, default=str).encode()).hexdigest()
        copy = copies / version[:32] / (path.split("?")[0].rpartition("/")[2] or "data")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(copy) as unfinished:
                files.get_file(path, str(unfinished))
                _require_all(unfinished, about.get("size"), name)
    return LocalFile(copy, name)


def _require_all(copy: Path, num_bytes: object, name: str) -> None:
    found = copy.stat().st_size
    if isinstance(num_bytes, int) and found != num_bytes:
        raise DataError(f"{name}: {found:,} of {num_bytes:,} bytes arrived; try again")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: {_not_found(name, error)}") from error
    except Exception as error:  # each package behind fsspec has exceptions of its own
        raise DataError(f"{name}: cannot be read: {_reason(error)}") from error


def _not_found(name: str, error: FileNotFoundError) -> str:
    """Return the right error: packages report `not found` for a server that does not answer, too."""
    cause = error.__cause__
    refused = getattr(cause, "status", 404) != 404
    if refused or (isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)):
        return f"cannot be read: {_reason(cause)}"
    said = harmless(str(error))
    return "there is no such file" + (f": {said}" if error.errno is None and said not in name else "")


def _reason(error: BaseException | None) -> str:
    reason = harmless(str(error) or type(error).__name__).splitlines()[0]
    if "credentials" in reason.lower():
        reason += "; give them as its own tools take them (docs/how-to/bring-your-data.md, Where rows are)"
    return reason
