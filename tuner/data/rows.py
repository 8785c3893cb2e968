"""A source's rows, rendered, tokenised and kept as a table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from tuner.data.cache import cached_table
from tuner.data.formats import RowFormat, require_columns
from tuner.data.segments import Row, Segment
from tuner.data.sources import Source
from tuner.data.table import RowTable, TableWriter
from tuner.data.tokenise import Tokeniser
from tuner.errors import DataError

_TABLE_VERSION = 1
"""Raise it when the same rows give another table."""
_BATCH_ROWS = 512
_BATCH_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class Recipe:
    """How rows become tokens."""

    tokeniser: Tokeniser
    loss_on: Literal["completion", "all"]
    max_length: int
    cache: Path | None


def tokenised(source: Source, row_format: RowFormat, recipe: Recipe) -> RowTable:
    """The table of a source. Raises DataError, for a source without rows too, and StorageError."""
    made_from = {
        "version": _TABLE_VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers")},
        "source": source.identity,
        "format": row_format.name,
        "tokenizer": recipe.tokeniser.fingerprint,
        "loss_on": recipe.loss_on,
        "max_length": recipe.max_length,
    }
    table = cached_table(recipe.cache, made_from, lambda writer: _write(source, row_format, recipe, writer))
    if not len(table.fates):
        raise DataError(f"{source.name}: has no rows")
    return table


def _write(source: Source, row_format: RowFormat, recipe: Recipe, writer: TableWriter) -> None:
    for batch in _batches(source.rows(row_format), row_format):
        digests = [_digest(row, segments) for row, segments in batch]
        rows = recipe.tokeniser.rows(
            [segments for _, segments in batch],
            starts_plain=row_format.starts_plain,
            loss_on=recipe.loss_on,
            max_length=recipe.max_length,
        )
        for (row, _), tokens, digest in zip(batch, rows, digests, strict=True):
            writer.append(tokens, digest=digest, number=row.number)


def _batches(rows: Iterator[Row], row_format: RowFormat) -> Iterator[list[tuple[Row, tuple[Segment, ...]]]]:
    batch: list[tuple[Row, tuple[Segment, ...]]] = []
    characters = 0
    for row in rows:
        require_columns(row, row_format)
        segments = row_format.segments(row)
        batch.append((row, segments))
        characters += sum(len(segment.text) for segment in segments)
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _digest(row: Row, segments: tuple[Segment, ...]) -> bytes:
    text = "".join(segment.text for segment in segments)
    try:
        return hashlib.blake2b(text.encode(), digest_size=16).digest()
    except UnicodeEncodeError as error:
        character = f"\\u{ord(text[error.start]):04x}"
        raise DataError(f"{row.place}: has half a character ({character}), which is not text") from error
