"""Which names in a round file are paths, and where they lead from the file's directory."""

from __future__ import annotations

import os
import re
from pathlib import Path

_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_PATTERN = re.compile(r"[*?\[]")
_SQLITE_FILE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]+)(.*)", re.DOTALL)


def absolute_model(path: str, directory: Path) -> str:
    """The model's directory, or the id on the Hub untouched: a name is a path when it exists or begins so."""
    is_path = _begins_like_a_path(path) or _exists(directory / path)
    return absolute_path(path, directory) if is_path else path


def absolute_source(path: str, directory: Path, *, is_plain_text: bool = False) -> str:
    """The data file or pattern of files, or the Hub's id or the URL untouched.

    A name that ends like a data file, has a character of patterns, or is of plain text, is a path.
    """
    if "://" in path:
        return path
    is_path = (
        is_plain_text
        or _begins_like_a_path(path)
        or path.lower().endswith(_DATA_SUFFIXES)
        or _PATTERN.search(path) is not None
        or _exists(directory / path)
    )
    return absolute_path(path, directory) if is_path else path


def absolute_metric(metric: str, directory: Path) -> str:
    """`file.py:function` with the file made absolute; a module of a file that is there is that file."""
    place, colon, function = metric.rpartition(":")
    if not colon:
        return metric
    if not place.endswith(".py"):
        file = f"{place.replace('.', '/')}.py"
        if not _exists(directory / file):
            return metric
        place = file
    return f"{absolute_path(place, directory)}:{function}"


def absolute_storage(url: str, directory: Path) -> str:
    """The URL with SQLite's file made absolute; any other URL untouched."""
    found = _SQLITE_FILE.fullmatch(url)
    if found is None or found[2].startswith("file:"):
        return url
    scheme, path, query = found.groups()
    return f"{scheme}{absolute_path(path, directory)}{query}"


def absolute_path(path: str, directory: Path) -> str:
    """`~` expanded, `..` resolved by name, links left alone."""
    return os.path.normpath(directory.absolute() / Path(path).expanduser())


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  Path.exists raises for a name that is too long


def _begins_like_a_path(path: str) -> bool:
    return path.startswith(("/", "~", "./", "../")) or path in (".", "..")
