"""Which files a path of a round file means: one file, the matches of a pattern, or what a URL leads to."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuner.data.files import LocalFile
from tuner.errors import DataError
from tuner.installation import installation

_PATTERN = re.compile(r"[*?\[]")
_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "sftp": "sftp"}
_EXTRAS |= {"abfs": "abfs", "abfss": "abfs", "az": "abfs", "smb": "smb", "ssh": "ssh", "hdfs": "hdfs"}
"""fsspec's extra that brings what a kind of URL needs."""


@contextmanager
def downloads(cache: Path | None) -> Iterator[Path]:
    """Where copies of files behind URLs lie: in the cache, or for as long as this is open."""
    if cache is not None:
        yield cache / "downloads"
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def located(path: str, copies: Path) -> list[LocalFile]:
    """The files in the order of their names.

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
    with _explained(url):
        matches = sorted(files.glob(path))
    if not matches:
        raise DataError(f"{url}: no file matches this pattern")
    return [_copied(files, match, files.unstrip_protocol(match), copies) for match in matches]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = url.partition("://")[0]
    with _explained(url):  # some connect at once
        try:
            files, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            extra = _EXTRAS.get(scheme)
            remedy = f"; install it by `{installation().with_packages(f'fsspec[{extra}]')}`" if extra else ""
            raise DataError(
                f"{url}: {scheme}:// needs a package that is not installed: {error}{remedy}"
            ) from error
        except ValueError as error:
            raise DataError(f"{url}: no file system of fsspec reads {scheme}:// ({error})") from error
    return files, str(path)


def _copied(files: Any, path: str, name: str, copies: Path) -> LocalFile:
    """The local copy, made under another name and renamed when it is whole."""
    with _explained(name):
        about = files.info(path)
        if about.get("type") in ("directory", "other"):
            raise DataError(f"{name}: is a directory, a pipe or a device; name the files in it, as *.jsonl")
        version = hashlib.sha256(json.dumps([name, about], sort_keys=True, default=str).encode()).hexdigest()
        copy = copies / version[:32] / (path.split("?")[0].rpartition("/")[2] or "data")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            descriptor, unfinished = tempfile.mkstemp(dir=copy.parent)
            os.close(descriptor)
            try:
                files.get_file(path, unfinished)
                _require_all(Path(unfinished), about.get("size"), name)
                Path(unfinished).rename(copy)
            finally:
                Path(unfinished).unlink(missing_ok=True)
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
    """What is meant: packages say that nothing was found of a server that does not answer, too."""
    cause = error.__cause__
    refused = getattr(cause, "status", 404) != 404
    if refused or (isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)):
        return f"cannot be read: {_reason(cause)}"
    said = str(error)
    return "there is no such file" + (f": {said}" if error.errno is None and said not in name else "")


def _reason(error: BaseException | None) -> str:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if "credentials" in reason.lower():
        reason += "; give them as its own tools take them (docs/how-to/bring-your-data.md, Where rows are)"
    return reason
