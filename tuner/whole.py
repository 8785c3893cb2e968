"""Files, folders and links that appear whole or not at all, also after a power cut; are they intact?"""

from __future__ import annotations

import glob
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write a file to, which gets its name when the block ends well; else nothing is left.

    Raises OSError where it cannot be written.
    """
    # Processes in containers that share a disk have the same numbers.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        synced(temporary)
        temporary.replace(path)
        synced(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


def lead(link: Path, target: Path) -> None:
    """Make a relative link lead to its target, in one step."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.relative_to(link.parent))
    temporary.replace(link)
    synced(link.parent)


def replaced_whole(target: Path, new: Path) -> None:
    """Give a directory, built beside it under another name, its target's name; what was there is deleted.

    Killed between the two renames, both are there under names that begin with a dot.
    """
    for path in [*new.iterdir(), new]:
        synced(path)
    old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    if target.exists():
        target.rename(old)
    new.rename(target)
    synced(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of a directory over its files' names and contents by name."""
    if path.is_file():
        return _content(path)
    return digest_of((each for each in path.rglob("*") if each.is_file()), path)


def digest_of(files: Iterable[Path], directory: Path) -> str:
    """Return what `digest` returns of a directory that has these files of this one, and no others."""
    total = hashlib.sha256()
    for each in sorted(files):
        total.update(f"{each.relative_to(directory).as_posix()}\0{_content(each)}\n".encode())
    return total.hexdigest()


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def keep_others_out() -> int:
    """Let nothing that this process and its children make be writable by everyone; return the umask before.

    Groups keep the rights that the umask gives them.
    """
    before = os.umask(0o777)
    os.umask(before | 0o002)
    return before


def synced(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def published(target: Path, write: Callable[[Path], None]) -> None:
    """Write a directory that appears whole or not at all, replacing one of the same name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for path in temporary.rglob("*/*"):
            synced(path)
        replaced_whole(target, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing, once it has its name


def forget_unpublished(target: Path) -> None:
    """Delete what processes that were killed within `published` left; no other may be within it."""
    for unfinished in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
