"""Where an export goes: a directory that appears whole, and never in the place of something else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner.errors import InputError, TunerError

_MARKS = ("adapter_config.json", "config.json", "axolotl.yaml", "llamafactory.yaml", "trl.yaml")
"""One of these is in every directory that an export wrote."""


def require_free(directory: Path, *, force: bool, keep: Path) -> None:
    """Raises InputError unless an export may become this directory.

    It has to be missing or empty, or with `force` an earlier export. `keep` is the study's folder, which is
    never replaced, and neither is what it lies in.
    """
    if keep.resolve().is_relative_to(directory.resolve()):
        raise InputError(f"--to {directory}: the study is in it; give a directory of its own")
    if directory.exists() and not directory.is_dir():
        raise InputError(f"--to {directory}: is a file; give a directory")
    if directory.is_symlink():
        raise InputError(f"--to {directory}: is a link; give the directory that it leads to")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not force:
        raise InputError(
            f"--to {directory}: is not empty; give another directory, or replace an earlier export by --force"
        )
    if not any((directory / mark).is_file() for mark in _MARKS):
        raise InputError(
            f"--to {directory}: holds no export (no {' or '.join(_MARKS[:2])}), and --force replaces nothing "
            "else; give another directory"
        )


@contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` at the end, or is gone on an error.

    Raises TunerError where it cannot be written.
    """
    absolute = Path(os.path.normpath(directory.absolute()))
    temporary, old = (absolute.with_name(f".{absolute.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if absolute.exists():
            absolute.rename(old)
        temporary.rename(absolute)
    except OSError as error:
        raise TunerError(f"--to {directory}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not absolute.exists():
            old.rename(absolute)
        shutil.rmtree(old, ignore_errors=True)
