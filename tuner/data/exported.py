"""What an export says of its data: tokenised rows as files for other tools, and licences that cards state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from tuner.data.examples import Example, Examples

_ROWS_AT_ONCE = 1000
_NO_TARGET = -100
"""A label that every trainer around transformers leaves out of the loss."""


def write_parquet(splits: Mapping[str, Examples], directory: Path) -> None:
    """Write `SPLIT.parquet` for each into a new directory: `input_ids`, `attention_mask` and `labels`."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    directory.mkdir()
    kinds = {"input_ids": pa.int32(), "attention_mask": pa.int8(), "labels": pa.int32()}
    schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
    for name, examples in splits.items():
        with ParquetWriter(directory / f"{name}.parquet", schema) as writer:
            for start in range(0, len(examples), _ROWS_AT_ONCE):
                rows = examples[start : start + _ROWS_AT_ONCE]
                writer.write_table(pa.table(_columns(rows), schema=schema))


def write_to_disk(splits: Mapping[str, Examples], directory: Path) -> None:
    """The same as a `datasets.DatasetDict` that `load_from_disk` loads."""
    from datasets import disable_progress_bars, load_dataset

    disable_progress_bars()
    with TemporaryDirectory(dir=directory.parent) as temporary:
        files = Path(temporary) / "parquet"
        write_parquet(splits, files)
        loaded = load_dataset(
            "parquet",
            data_files={name: str(files / f"{name}.parquet") for name in splits},
            cache_dir=f"{temporary}/cache",
        )
        loaded.save_to_disk(str(directory))


def _columns(rows: Sequence[Example]) -> Mapping[str, list[Any]]:
    return {
        "input_ids": [row.input_ids for row in rows],
        "attention_mask": [np.ones(len(row.input_ids), np.int8) for row in rows],
        "labels": [np.where(row.is_target, row.input_ids, _NO_TARGET).astype(np.int32) for row in rows],
    }


def stated_licence(path: str, *, kind: Literal["model", "dataset"]) -> str | None:
    """The `license` in a directory's README.md, or in that of a Hub id in the local cache; else None."""
    from huggingface_hub import ModelCard, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError
    from yaml import YAMLError

    found: object = Path(path) / "README.md"
    try:
        if not Path(path).is_absolute():
            found = try_to_load_from_cache(path, "README.md", repo_type=kind)
        if not isinstance(found, (str, Path)) or not Path(found).is_file():
            return None
        stated = ModelCard.load(found, ignore_metadata_errors=True).data.to_dict().get("license")
    except (HFValidationError, OSError, ValueError, YAMLError):
        return None
    return str(stated) if stated else None
