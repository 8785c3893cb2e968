"""Files that a parent sends to nodes and fetches from them, in chunks from disk to disk.

What arrives gets its name once it is whole and its hash is right: see `node_files.py` for the nodes' side.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.engines.ray.node_files import needed_files
from tuner.errors import InputError
from tuner.process_log import halved
from tuner.report.format import size as readable
from tuner.whole import digest, digest_of, synced

CHUNK_BYTES = 16 * 1024**2
MOST_LOG_BYTES = 4 * 1024**2
"""Of a node's log at once."""
_MAGIC = re.compile(r"[*?\[]")

Call = Callable[..., Any]
"""Calls a method of a host, by name, with its arguments; repeats it until it is answered."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Parcel:
    """Files of this machine that travel together."""

    path: Path
    """A file, or the directory that they are in."""
    files: Mapping[str, Path]
    """By their names in the directory; of a file, by its own."""
    is_whole: bool = True
    """Whether the directory has no other files that count."""

    @property
    def size_bytes(self) -> int:
        """Return the sum of their sizes."""
        return sum(each.stat().st_size for each in self.files.values())

    @classmethod
    def of(cls, path: Path, *, weights: str | None = None) -> Parcel:
        """Return a file, or a directory with what loading it needs; `weights` as in `needed_files`."""
        if path.is_file():
            return cls(path, {path.name: path})
        return cls(path, needed_files(path, weights=weights))

    @classmethod
    def matching(cls, patterns: Sequence[str]) -> Iterator[Parcel]:
        """Yield the files that match patterns, in a parcel for each directory that patterns begin with."""
        found: dict[Path, dict[str, Path]] = {}
        for pattern in patterns:
            root = Path(_MAGIC.split(pattern)[0] + "x").parent
            matches = glob.glob(pattern, recursive=True)  # noqa: PTH207  Path.glob takes no absolute pattern
            files = [Path(match) for match in matches if Path(match).is_file()]
            found.setdefault(root, {}).update({each.relative_to(root).as_posix(): each for each in files})
        for root, named in found.items():
            if named:
                yield cls(root, named, is_whole=False)

    @classmethod
    def code(cls, folder: Path) -> Parcel:
        """Return the Python files of a folder, and of the packages in it."""
        found = [*folder.glob("*.py")]
        found += [each for package in folder.glob("*/__init__.py") for each in package.parent.rglob("*.py")]
        return cls(folder, {each.relative_to(folder).as_posix(): each for each in found}, is_whole=False)


@dataclass(frozen=True)
class Sender:
    """Sends files of this machine to nodes that do not see them. One for each run, used by many threads."""

    up_to_bytes: int
    """The largest file or directory to send."""
    _known: dict[tuple[str, int, int, int], str] = field(default_factory=dict)
    """Path, number, size and time of change -> hash: a model is hashed once."""

    @property
    def bound_bytes(self) -> int:
        """Return how much a node keeps of what was sent."""
        return 2 * self.up_to_bytes

    def fingerprint(self, parcel: Parcel) -> str:
        """Return the hash of a file, or of a directory's files that travel."""
        stats = [each.stat() for each in parcel.files.values()]
        newest = max((stat.st_mtime_ns for stat in stats), default=0)
        key = (str(parcel.path), len(stats), sum(stat.st_size for stat in stats), newest)
        if key not in self._known:
            is_file = parcel.path.is_file()
            self._known[key] = (
                digest(parcel.path) if is_file else digest_of(parcel.files.values(), parcel.path)
            )
        return self._known[key]

    def place(self, call: Call, parcel: Parcel, *, key: str, say: Say, weights: str | None = None) -> str:
        """Return where a node has this machine's file or directory, after sending it if it has it nowhere.

        Raises InputError if it is larger than may be sent.
        """
        path = parcel.path
        if is_seen(call, path) or (
            parcel.is_whole and call("digest", str(path), weights) == self.fingerprint(parcel)
        ):
            return str(path)
        size = parcel.size_bytes
        if size > self.up_to_bytes:
            raise InputError(
                f"{key}: {path} has {readable(size)}, and a node does not see it. Put it on a disk that all "
                "nodes share under this path, copy it to the same path on each node, name a model of the "
                f"Hub, or raise run.send_model_up_to ({readable(self.up_to_bytes)})"
            )
        fingerprint = self.fingerprint(parcel)
        while True:
            answer, where = call("claim", fingerprint, path.name, size, self.bound_bytes)
            if answer == "here":
                return str(where)
            if answer == "send":
                _send(call, parcel, fingerprint, size, say)
                return str(call("keep", fingerprint, path.name))
            say(f"waiting for {path.name}, which another worker of the node receives")
            time.sleep(1.0)


def give_back(
    call: Call, path: Path, target: str, *, sha256: str, bound_bytes: int = 1 << 62, say: Say = lambda _: None
) -> None:
    """Send a checkpoint, or a table, to a node, where it becomes `target`."""
    files = {each.relative_to(path).as_posix(): each for each in path.rglob("*") if each.is_file()}
    parcel = Parcel(path, files or {path.name: path})
    size = parcel.size_bytes
    answer = ""
    while answer != "send":
        answer, _ = call("claim", sha256, path.name, size, bound_bytes)
        if answer == "busy":
            time.sleep(0.2)
            if call("listing", target):
                return  # another worker of the node has received it
        elif answer == "here":
            raise ValueError(f"{path}: the node has it as a file to read")
    _send(call, parcel, sha256, size, say)
    call("adopt", sha256, path.name, target)


def is_seen(call: Call, path: Path) -> bool:
    """Return whether a node sees this machine's directory (or a file's), by a random file that it reads back.

    A path that exists on the node proves nothing. False where this machine may not write.
    """
    directory = path if path.is_dir() else path.parent
    probe, content = directory / f".tuner-seen-{secrets.token_hex(8)}", secrets.token_bytes(32)
    try:
        probe.write_bytes(content)
    except OSError:
        return False
    try:
        return bool(call("read_back", str(probe)) == content)
    finally:
        with suppress(OSError):
            probe.unlink()


def _send(call: Call, parcel: Parcel, fingerprint: str, size: int, say: Say) -> None:
    path, sent, said_at = parcel.path, 0, 0.0
    for name, file in parcel.files.items():
        full = path.name if path.is_file() else f"{path.name}/{name}"
        call("write_chunk", fingerprint, full, 0, b"")
        for offset, chunk in _chunks(file):
            call("write_chunk", fingerprint, full, offset, chunk)
            sent += len(chunk)
            if (now := time.monotonic()) - said_at >= 1.0:
                said_at = now
                say(f"sending {path.name}: {readable(sent)} of {readable(size)}")


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield file.tell() - len(chunk), chunk


# --- from a node --------------------------------------------------------------------------------------


def fetch(call: Call, source: str, target: Path, *, sha256: str) -> None:
    """Copy a node's directory to `target`, whole or not at all. Raises ValueError for another hash."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, size, content in call("contents", source):
            if content is None:
                fetch_file(call, f"{source}/{name}", temporary / name, size)
            else:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
        if (found := digest(temporary)) != sha256:
            raise ValueError(f"{target}: arrived with the hash {found} instead of {sha256}")
        for path in [*temporary.rglob("*"), temporary]:
            synced(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        synced(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing, once it has its name


def until_room(
    copy: Callable[[], None],
    patience_seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Copy, and again while this machine's disk is full; the round says meanwhile what it waits for.

    Raises OSError once that has lasted too long.
    """
    until = clock() + patience_seconds
    while True:
        try:
            return copy()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or clock() >= until:
                raise
        sleep(1.0)


def fetch_more(call: Call, source: str, target: Path, size: int, taken: int) -> int:
    """Add to a log what a node's has more than `taken` bytes; return how much of it is taken now.

    Of much at once, the beginning is left out.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    halved(target)
    with target.open("wb" if taken == 0 else "ab") as file:
        if size - taken > MOST_LOG_BYTES:
            file.write(f"... {size - taken - MOST_LOG_BYTES} bytes are left out ...\n".encode())
            taken = size - MOST_LOG_BYTES
        while taken < size and (chunk := call("read_chunk", source, taken, min(CHUNK_BYTES, size - taken))):
            file.write(chunk)
            taken += len(chunk)
    return taken


def fetch_file(call: Call, source: str, target: Path, size: int) -> None:
    """Copy a node's file. Raises ValueError if it ends early."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        while (offset := file.tell()) < size:
            chunk = call("read_chunk", source, offset, CHUNK_BYTES)
            if not chunk:
                raise ValueError(f"{source}: became shorter while it was read")
            file.write(chunk)
