"""Files between a parent and the nodes: checkpoints one way, models, rows and starting points the other.

A file travels in chunks from disk to disk. What arrives gets its name once it is whole and its hash is right.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.errors import InputError
from tuner.report.format import size as readable
from tuner.whole import digest, synced

CHUNK_BYTES = 16 * 1024**2
SMALL_BYTES = 256 * 1024
"""Up to so many bytes of a directory come with its listing."""
SPARE_BYTES = 1024**3
"""Free bytes that a node keeps beside what is sent to it."""

Call = Callable[..., Any]
"""Calls a method of a host, by name, with its arguments; repeats it until it is answered."""


# --- on a node ----------------------------------------------------------------------------------------


class NodeFiles:
    """A node's scratch folder: a cache of what was sent, by fingerprint, and the workers' directories."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._locks: dict[str, int] = {}
        """Fingerprint -> descriptor of its lock: exclusive while it arrives, then shared while in use."""

    def work(self, token: str) -> Path:
        """Return a worker's folder on this node."""
        return self.scratch / "work" / token

    def end_orphans(self, variable: str, job: str, session: str, lost: frozenset[str]) -> list[int]:
        """As `Host.end_orphans`; they are found by the token in their environment."""
        import psutil

        def is_orphan(token: str) -> bool:
            return token in lost or (
                token.startswith(f"{job}.") and not token.startswith(f"{job}.{session}.")
            )

        ended = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and is_orphan(process.environ().get(variable, "")):
                    process.kill()
                    ended.append(process.pid)
        for path in (self.scratch / "work").glob(f"{job}.*"):
            if is_orphan(path.name):
                shutil.rmtree(path, ignore_errors=True)
        return ended

    def listing(self, directory: Path) -> list[tuple[str, int]]:
        """As `Host.listing`."""
        found = sorted(path for path in directory.rglob("*") if path.is_file())
        return [(path.relative_to(directory).as_posix(), path.stat().st_size) for path in found]

    def contents(self, directory: Path) -> list[tuple[str, int, bytes | None]]:
        """Return the files under a directory with their sizes, and the content of the small ones.

        So a checkpoint's JSON files come with its listing.
        """
        found: list[tuple[str, int, bytes | None]] = []
        left = SMALL_BYTES
        for name, size in self.listing(directory):
            fits = size <= left
            left -= size if fits else 0
            found.append((name, size, (directory / name).read_bytes() if fits else None))
        return found

    def claim(self, fingerprint: str, name: str, size_bytes: int, bound_bytes: int) -> tuple[str, str]:
        """Return `("here", PATH)` if the cache has it, `("busy", "")` while another host receives it, or
        `("send", "")`: this host is to receive it.

        Older entries are deleted to stay below `bound_bytes`. Raises OSError if the disk is too full.
        """
        entry = self._entry(fingerprint)
        (self.scratch / "files").mkdir(parents=True, exist_ok=True)
        if fingerprint not in self._locks:
            descriptor = os.open(entry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not self._is_shared_lock(descriptor, entry):
                    os.close(descriptor)
                    return "busy", ""
            self._locks[fingerprint] = descriptor
        if entry.is_dir():
            os.utime(entry)
            fcntl.flock(self._locks[fingerprint], fcntl.LOCK_SH)
            return "here", str(entry / name)
        self._make_room(size_bytes, bound_bytes)
        shutil.rmtree(self._arriving(fingerprint), ignore_errors=True)
        self._arriving(fingerprint).mkdir(parents=True)
        return "send", ""

    @staticmethod
    def _is_shared_lock(descriptor: int, entry: Path) -> bool:
        """Take the lock of an entry that is whole and that others use as well."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return entry.is_dir()

    def write(self, fingerprint: str, name: str, offset: int, content: bytes) -> None:
        """Write a chunk of an arriving file straight to disk."""
        path = self._arriving(fingerprint) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, content, offset)
        finally:
            os.close(descriptor)

    def keep(self, fingerprint: str, name: str) -> str:
        """Name what has arrived, once its hash is right; return its path. Raises ValueError otherwise."""
        entry, arriving = self._entry(fingerprint), self._arriving(fingerprint)
        if not entry.is_dir():
            self._verify(fingerprint, name)
            arriving.rename(entry)
            synced(entry.parent)
        if fingerprint in self._locks:
            fcntl.flock(self._locks[fingerprint], fcntl.LOCK_SH)
        return str(entry / name)

    def adopt(self, fingerprint: str, name: str, target: Path) -> None:
        """Move what has arrived to `target` below the scratch folder, unless something is there."""
        if not target.exists():
            self._verify(fingerprint, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            (self._arriving(fingerprint) / name).rename(target)
        shutil.rmtree(self._arriving(fingerprint), ignore_errors=True)
        if (descriptor := self._locks.pop(fingerprint, None)) is not None:
            os.close(descriptor)

    def delete(self, path: Path) -> None:
        """As `Host.delete`."""
        if self.scratch.resolve() not in path.resolve().parents:
            raise ValueError(f"{path}: not below {self.scratch}, so it is not deleted")
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _verify(self, fingerprint: str, name: str) -> None:
        arrived = self._arriving(fingerprint) / name
        found = digest(arrived) if arrived.exists() else "nothing"
        if found != fingerprint:
            raise ValueError(f"{name}: arrived with the hash {found} instead of {fingerprint}")
        for path in [*arrived.rglob("*"), arrived]:
            synced(path)

    def _make_room(self, size_bytes: int, bound_bytes: int) -> None:
        entries = [path for path in (self.scratch / "files").iterdir() if path.is_dir()]
        sizes = {path: sum(size for _, size in self.listing(path)) for path in entries}
        taken = sum(sizes.values())
        for entry in sorted(entries, key=lambda path: path.stat().st_mtime):
            short = size_bytes + SPARE_BYTES > shutil.disk_usage(self.scratch).free
            if taken + size_bytes <= bound_bytes and not short:
                break
            if self._is_unused(entry):
                shutil.rmtree(entry, ignore_errors=True)
                taken -= sizes[entry]
        free = shutil.disk_usage(self.scratch).free
        if size_bytes + SPARE_BYTES > free:
            raise OSError(
                errno.ENOSPC,
                f"{readable(size_bytes)} are to be sent, and {self.scratch} has {readable(free)} free",
            )

    @staticmethod
    def _is_unused(entry: Path) -> bool:
        try:
            descriptor = os.open(entry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True

    def _entry(self, fingerprint: str) -> Path:
        return self.scratch / "files" / fingerprint

    def _arriving(self, fingerprint: str) -> Path:
        return self.scratch / "files" / f".{fingerprint}.arriving"


def hub_commit(model: str, revision: str | None) -> str | None:
    """Return the commit of a model in this machine's Hub cache; None if it is not there."""
    snapshot = hub_snapshot(model, revision)
    return None if snapshot is None else snapshot.name


def hub_snapshot(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model in this machine's Hub cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


# --- in the parent ------------------------------------------------------------------------------------


def fetch(call: Call, source: str, target: Path, *, sha256: str) -> None:
    """Copy a node's directory to `target`, whole or not at all. Raises ValueError for another hash."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        for name, size, content in call("contents", source):
            if content is None:
                _fetch_file(call, f"{source}/{name}", temporary / name, size)
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


def _fetch_file(call: Call, source: str, target: Path, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        while (offset := file.tell()) < size:
            chunk = call("read_chunk", source, offset, CHUNK_BYTES)
            if not chunk:
                raise ValueError(f"{source}: became shorter while it was read")
            file.write(chunk)


@dataclass(frozen=True)
class Sender:
    """Sends files of this machine to nodes that do not see them. One for each run, used by many threads."""

    up_to_bytes: int
    """The largest file or directory to send."""
    _known: dict[tuple[str, int, int], str] = field(default_factory=dict)
    """Path, size and time of change -> hash: a model is hashed once."""

    def fingerprint(self, path: Path) -> str:
        """Return the hash of a file or directory of this machine."""
        stats = [each.stat() for each in _files(path).values()]
        newest = max((stat.st_mtime_ns for stat in stats), default=0)
        key = (str(path), sum(stat.st_size for stat in stats), newest)
        if key not in self._known:
            self._known[key] = digest(path)
        return self._known[key]

    def place(self, call: Call, path: Path, *, key: str, say: Callable[[str], None]) -> str:
        """Return where a node has this machine's file or directory, after sending it if it has it nowhere.

        Raises InputError if it is larger than may be sent.
        """
        if is_seen(call, path) or call("digest", str(path)) == self.fingerprint(path):
            return str(path)
        size = sum(each.stat().st_size for each in _files(path).values())
        if size > self.up_to_bytes:
            raise InputError(
                f"{key}: {path} has {readable(size)}, and a node does not see it. Put it on a disk that all "
                "nodes share under this path, copy it to the same path on each node, name a model of the "
                f"Hub, or raise run.send_model_up_to ({readable(self.up_to_bytes)})"
            )
        fingerprint = self.fingerprint(path)
        while True:
            answer, where = call("claim", fingerprint, path.name, size, 2 * self.up_to_bytes)
            if answer == "here":
                return str(where)
            if answer == "send":
                _send(call, path, fingerprint, size, say)
                return str(call("keep", fingerprint, path.name))
            say(f"waiting for {path.name}, which another worker of the node receives")
            time.sleep(1.0)


def give_back(call: Call, path: Path, target: str, *, sha256: str) -> None:
    """Send a checkpoint to a node, where it becomes `target`."""
    size = sum(each.stat().st_size for each in _files(path).values())
    answer = ""
    while answer != "send":
        answer, _ = call("claim", sha256, path.name, size, 1 << 62)
        if answer == "busy":
            time.sleep(0.2)
        elif answer == "here":
            raise ValueError(f"{path}: the node has it as a file to read")
    _send(call, path, sha256, size, lambda _: None)
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


def _send(call: Call, path: Path, fingerprint: str, size: int, say: Callable[[str], None]) -> None:
    sent, said_at = 0, 0.0
    for name, file in _files(path).items():
        full = path.name if path.is_file() else f"{path.name}/{name}"
        call("write_chunk", fingerprint, full, 0, b"")
        for offset, chunk in _chunks(file):
            call("write_chunk", fingerprint, full, offset, chunk)
            sent += len(chunk)
            if (now := time.monotonic()) - said_at >= 1.0:
                said_at = now
                say(f"sending {path.name}: {readable(sent)} of {readable(size)}")


def _files(path: Path) -> Mapping[str, Path]:
    """Return the files of a directory by their names in it, or the file itself."""
    if path.is_file():
        return {path.name: path}
    found = sorted(each for each in path.rglob("*") if each.is_file())
    return {each.relative_to(path).as_posix(): each for each in found}


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield file.tell() - len(chunk), chunk
