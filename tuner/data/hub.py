"""Data sets that `datasets` reads: those of the Hub, and folders laid out like them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tuner.data.files import LocalFile, content_hash
from tuner.errors import DataError


def load_rows(path: str, *, config: str | None, split: str, cache: Path | None) -> Any:
    """A `datasets.Dataset`, memory-mapped; in the user's own Hub cache where `cache` is None.

    Raises DataError.
    """
    import datasets

    try:
        return datasets.load_dataset(path, name=config, split=split, cache_dir=cache and str(cache))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"{path}: neither a local file nor a data set of the Hub that can be seen: {error} "
            "If it is gated, ask for access on its page and log in with `hf auth login`"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{path}: no local file has this name and the Hub cannot be reached: {error}; "
            "check the path, or go online once so that the data set is cached"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise DataError(f"{path}: cannot be loaded (config {config}, split {split}): {reason}") from error


def rows_hash(rows: Any) -> str:
    """A hash of the files that the data set is mapped from."""
    names = [file["filename"] for file in rows.cache_files]
    hashes = [content_hash(LocalFile(Path(name), name)) for name in names]
    return hashlib.sha256(f"{hashes} {rows.num_rows}".encode()).hexdigest()
