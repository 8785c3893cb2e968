"""A node's scratch folder: what was sent to it and what its workers write, with locks and bounds."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from tuner.report.format import size as readable
from tuner.whole import digest, digest_of, synced

SMALL_BYTES = 256 * 1024
"""Up to so many bytes of a directory come with its listing."""
SPARE_BYTES = 1024**3
"""Free bytes that a node keeps beside what is sent to it."""
LEFT_SECONDS = 24 * 3600.0
"""A worker's folder that no host holds is deleted when it is so old, whichever round it was of."""

_OTHER_WEIGHTS = re.compile(
    r".*\.(bin|bin\.index\.json|pth|pt|ckpt|h5|msgpack|ot|onnx|onnx_data|gguf)|consolidated.*\.safetensors"
)
"""Names of files with the same weights as `*.safetensors`, in other forms."""


def needed_files(directory: Path, *, weights: str | None = None) -> dict[str, Path]:
    """Return the files of a directory by name: of a model's without copies of its weights in other formats.

    `weights` names the one file of weights to use, such as a GGUF file; None means `*.safetensors`. A
    directory without either keeps all its files.
    """
    found = sorted(each for each in directory.rglob("*") if each.is_file())
    named = {each.relative_to(directory).as_posix(): each for each in found}
    if weights is not None and weights in named:
        others = re.compile(rf"(?!{re.escape(weights)}$)({_OTHER_WEIGHTS.pattern}|.*\.safetensors)")
    elif any("/" not in name and name.endswith(".safetensors") for name in named):
        plain = any(name.endswith(".safetensors") and not _OTHER_WEIGHTS.fullmatch(name) for name in named)
        others = _OTHER_WEIGHTS if plain else re.compile(r".*\.(bin|bin\.index\.json|pth|pt)")
    else:
        return named
    return {
        name: each
        for name, each in named.items()
        if not others.fullmatch(name) and not name.startswith((".git/", ".cache/"))
    }


def needed_digest(path: Path, *, weights: str | None = None) -> str:
    """Return the hash of a file, or of a directory's `needed_files`."""
    if path.is_file():
        return digest(path)
    return digest_of(needed_files(path, weights=weights).values(), path)


class NodeFiles:
    """A node's scratch folder: a cache of what was sent, by fingerprint, and the workers' directories."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._locks: dict[str, int] = {}
        """Fingerprint -> descriptor of its lock: exclusive while it arrives, then shared while in use."""
        self._held: list[int] = []
        """Descriptors of the locks of folders that this host's worker uses, until its process ends."""

    def work(self, token: str) -> Path:
        """Return a worker's folder on this node."""
        return self.scratch / "work" / token

    def work_directory(self, token: str, tables: str, bound_bytes: int) -> tuple[Path, Path]:
        """Make a worker's folder, and the one of tokenised rows, and hold both; delete what nobody uses."""
        work, rows = self.work(token), self.scratch / "tables" / tables
        for path in (work, rows):
            self._held.append(_held_folder(path))
        (work / "runs").mkdir(exist_ok=True)
        os.utime(rows)
        self._delete_left()
        self._make_room(0, bound_bytes)
        return work / "runs", rows

    def own_copy(self, token: str, path: Path) -> Path:
        """As `Host.own_copy`."""
        copy = self.work(token) / "study" / path.name
        shutil.copytree(path, copy, dirs_exist_ok=True)
        return copy

    def _delete_left(self) -> None:
        """Delete what workers and transfers that ended without cleaning up left here, of any round."""
        left = [
            *(self.scratch / "work").glob("*"),
            *(self.scratch / "files").glob(".*.arriving"),
            *(self.scratch / "tables").glob(".*"),
        ]
        for path in left:
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFT_SECONDS:
                    self._delete_unused(path)

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
            descriptor = os.open(_lock_of(entry), os.O_RDWR | os.O_CREAT, 0o600)
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
        try:
            path.unlink(missing_ok=True)
        except (IsADirectoryError, PermissionError):  # macOS says the second of a directory
            if not path.is_dir():
                raise
            shutil.rmtree(path, ignore_errors=True)

    def _verify(self, fingerprint: str, name: str) -> None:
        arrived = self._arriving(fingerprint) / name
        found = digest(arrived) if arrived.exists() else "nothing"
        if found != fingerprint:
            raise ValueError(f"{name}: arrived with the hash {found} instead of {fingerprint}")
        for path in [*arrived.rglob("*"), arrived]:
            synced(path)

    def _make_room(self, size_bytes: int, bound_bytes: int) -> None:
        """Delete the least recently used models, files and tables until there is room for so many bytes.

        Those in use stay. Raises OSError if the disk is too full, unless nothing is to arrive.
        """
        entries = [
            path
            for kind in ("files", "tables")
            for path in (self.scratch / kind).glob("*")
            if path.is_dir() and not path.name.startswith(".")
        ]
        sizes = {path: sum(size for _, size in self.listing(path)) for path in entries}
        taken = sum(sizes.values())
        for entry in sorted(entries, key=_used_at):
            if taken + size_bytes <= bound_bytes and self._fits(size_bytes):
                break
            if self._delete_unused(entry):
                taken -= sizes[entry]
        if size_bytes and not self._fits(size_bytes):
            free = shutil.disk_usage(self.scratch).free
            raise OSError(
                errno.ENOSPC,
                f"{readable(size_bytes)} are to be sent, and {self.scratch} has {readable(free)} free",
            )

    def _fits(self, size_bytes: int) -> bool:
        return size_bytes + SPARE_BYTES <= shutil.disk_usage(self.scratch).free

    @staticmethod
    def _delete_unused(entry: Path) -> bool:
        """Delete a folder that no host holds; return whether it was deleted."""
        try:
            if entry.parent.name == "files":
                descriptor = os.open(_lock_of(entry), os.O_RDWR | os.O_CREAT, 0o600)
            else:
                descriptor = os.open(entry, os.O_RDONLY)
        except FileNotFoundError:  # another host has deleted it
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            _delete_whole(entry)
            return True
        finally:
            os.close(descriptor)

    def _entry(self, fingerprint: str) -> Path:
        return self.scratch / "files" / fingerprint

    def _arriving(self, fingerprint: str) -> Path:
        return self.scratch / "files" / f".{fingerprint}.arriving"


def _delete_whole(folder: Path) -> None:
    """Take a folder its name first: of what is deleted by half, others would use the rest."""
    doomed = folder if folder.name.startswith(".") else folder.with_name(f".{folder.name}.arriving")
    if doomed != folder:
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(FileNotFoundError):  # another host has deleted it
            folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _lock_of(entry: Path) -> Path:
    """Return the lock of an entry of `files`, also while it arrives."""
    return entry.with_name(f"{entry.name.removeprefix('.').removesuffix('.arriving')}.lock")


def _held_folder(path: Path) -> int:
    """Make a folder and return a descriptor that holds it until it is closed."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
            os.close(descriptor)  # deleted before it was held


def _used_at(entry: Path) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:  # another host has deleted it
        return 0.0


def hub_commit(model: str, revision: str | None) -> str | None:
    """Return the commit of a model in this machine's Hub cache; None if it is not there."""
    snapshot = hub_snapshot(model, revision)
    return None if snapshot is None else snapshot.name


def hub_snapshot(model: str, revision: str | None) -> Path | None:
    """Return the folder of a model in this machine's Hub cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
