"""Files and links that appear whole or not at all, also after a power cut; and whether they still are."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write a file to, which gets its name when the block ends well; else nothing is left.

    Raises OSError where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def digest(directory: Path) -> str:
    """Return the SHA-256 of a directory, over its files' names and contents in the order of names."""
    total = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(directory).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


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
