"""Data sets that `datasets` reads: those of the Hub, and folders laid out like them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from tuner.data.files import LocalFile, content_hash
from tuner.data.reachable import is_out_of_reach
from tuner.errors import DataError

_MOST_ENTRIES = 10_000
"""Of a folder, folders in it included: `datasets` looks at every one, of a home folder for minutes."""
_KINDS = {
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".parquet": "Parquet",
}


def load_folder(folder: str, *, config: str | None, split: str | None, cache: Path | None) -> Any:
    """What `load_rows` gives for a folder of files of one kind, or whose README.md says what to read.

    A folder that `save_to_disk` wrote is mapped where it lies. Raises DataError, for a folder too that is
    anything else, such as a home folder.
    """
    if _is_saved(folder):
        return _load_saved(folder, config=config, split=split)
    pattern = f"name the files by a pattern, as {Path(folder) / '*.jsonl'}"
    examples: dict[str, str] = {}
    try:
        for number, entry in enumerate(_entries(folder)):
            if number == _MOST_ENTRIES:
                raise DataError(f"{folder}: is a folder with more than {_MOST_ENTRIES:,} files; {pattern}")
            name = entry.name.lower().removesuffix(".gz")
            if (kind := _KINDS.get(Path(name).suffix)) and entry.is_file():
                examples.setdefault(kind, os.path.relpath(entry, folder))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from error
    if not examples:
        raise DataError(
            f"{folder}: is a folder without files that have rows ({', '.join(_KINDS)}); "
            "name a file, or a pattern"
        )
    if len(examples) > 1 and not (Path(folder) / "README.md").exists():
        found = " and ".join(examples.values())
        raise DataError(f"{folder}: is a folder with files of several kinds, such as {found}; {pattern}")
    return load_rows(folder, config=config, split=split, cache=cache)


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote it, as one data set or as its splits."""
    files = ("state.json", "dataset_info.json"), ("dataset_dict.json",)
    return any(all((Path(folder) / name).is_file() for name in names) for names in files)


def _load_saved(folder: str, *, config: str | None, split: str | None) -> Any:
    import datasets

    if config is not None:
        raise DataError(f"{folder}: was written by save_to_disk, which keeps no config; take `config` out")
    try:
        saved = datasets.load_from_disk(folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder}: was written by save_to_disk and cannot be read: {error}") from error
    rows = _chosen(saved, split, folder) if isinstance(saved, datasets.DatasetDict) else saved
    if rows is saved and split is not None and split != str(saved.split):
        own = f", {saved.split}" if saved.split else ""
        raise DataError(
            f"{folder}: holds one split{own}, as save_to_disk wrote it, and not {split!r}; take `split` out"
        )
    return rows.with_format(None)  # else values may be arrays of numpy or torch


def _chosen(splits: Mapping[str, Any], split: str | None, folder: str) -> Any:
    """The split that is named, or the only one."""
    names = [str(name) for name in splits]
    if split is None and len(names) == 1:
        return splits[names[0]]
    if split in names:
        return splits[split]
    wanted = "" if split is None else f", and not {split!r}"
    raise DataError(
        f"{folder}: holds the splits {', '.join(names) or '(none)'}, as save_to_disk wrote them{wanted}; "
        f"name one of them, as `split: {(names or ['train'])[0]}`"
    )


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """All that can be seen in a folder: `datasets` leaves hidden names out too."""
    with os.scandir(folder) as found:
        listed = list(islice((entry for entry in found if not entry.name.startswith(".")), _MOST_ENTRIES + 1))
    yield from sorted(listed, key=lambda entry: entry.name)
    for entry in listed:
        with suppress(OSError):  # what cannot be looked into
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)


def load_rows(path: str, *, config: str | None, split: str | None, cache: Path | None) -> Any:
    """A `datasets.Dataset`, memory-mapped; in the user's own Hub cache where `cache` is None.

    No split is `train`. Raises DataError.
    """
    import datasets

    split = split or "train"
    try:
        with _the_cache_alone() if is_out_of_reach(path) else nullcontext():
            return datasets.load_dataset(path, name=config, split=split, cache_dir=cache and str(cache))
    except datasets.exceptions.DatasetNotFoundError as error:
        if "is a gated dataset" in str(error):
            raise DataError(
                f"{path}: is gated: ask for access on its page on the Hub, then log in with `hf auth login`"
            ) from error
        raise DataError(
            f"{path}: neither a local file nor a data set of the Hub that can be seen: {error} "
            "If it is private, log in with `hf auth login`"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{path}: no local file has this name and the Hub cannot be reached: {error}; "
            "check the path, or go online once so that the data set is cached"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise DataError(f"{path}: cannot be loaded (config {config}, split {split}): {reason}") from error


@contextmanager
def _the_cache_alone() -> Iterator[None]:
    """`datasets` as with HF_HUB_OFFLINE, which it reads when it is imported."""
    import datasets

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def rows_hash(rows: Any) -> str:
    """A hash of the files that the data set is mapped from."""
    names = [file["filename"] for file in rows.cache_files]
    hashes = [content_hash(LocalFile(Path(name), name)) for name in names]
    return hashlib.sha256(f"{hashes} {rows.num_rows}".encode()).hexdigest()
