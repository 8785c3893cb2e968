"""A source's rows, rendered, tokenised and kept as a table."""

from __future__ import annotations

import hashlib
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tuner.data.examples import Row, Segment
from tuner.data.formats import RowFormat, require_columns
from tuner.data.plain_text import Windows
from tuner.data.row_table import RowTable, TableWriter, cached_table
from tuner.data.sources import Source
from tuner.data.special_tokens import SpecialTokens
from tuner.data.tokenise import Tokeniser
from tuner.errors import DataError

TABLE_VERSION = 5
"""Raise it when the same rows give another table."""
_BATCH_ROWS = 512
_BATCH_CHARACTERS = 500_000
_SAY_EVERY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How rows become tokens."""

    tokeniser: Tokeniser
    loss_on: Literal["completion", "all"]
    max_length: int
    cache: Path | None
    say: Callable[[str], None] = lambda _: None
    """Hears how far it is, about once a second."""
    special: SpecialTokens | None = None
    """Finds those that rows say; None: they are not looked for."""


def tokenised(source: Source, row_format: RowFormat, recipe: Recipe) -> RowTable:
    """Return the table of a source. Raises StorageError, and DataError, also for a source without rows."""
    made_from = ingredients(source, row_format, recipe)
    table = cached_table(recipe.cache, made_from, lambda writer: _write(source, row_format, recipe, writer))
    if not len(table.fates):
        raise DataError(f"{source.name}: has no rows")
    return table


def ingredients(source: Source, row_format: RowFormat, recipe: Recipe) -> dict[str, Any]:
    """Return everything that determines the table, as JSON values: its cache key.

    What a source does not say is not in it, so that a key of the round file that is new leaves the tables of
    files without it where they are.
    """
    return {
        "version": TABLE_VERSION,
        "libraries": {name: version(name) for name in ("tokenizers", "transformers")},
        "source": source.identity,
        "format": row_format.name,
        "tokenizer": recipe.tokeniser.fingerprint,
        "loss_on": recipe.loss_on,
        "max_length": recipe.max_length,
        **row_format.more_identity,
    }


def _write(source: Source, row_format: RowFormat, recipe: Recipe, writer: TableWriter) -> None:
    batches = _counted(_batches(source.rows(row_format), row_format), source.name, recipe.say)
    if row_format.windows is not None:
        _write_windows(batches, row_format.windows, recipe, writer)
        return
    for batch in batches:
        rows = recipe.tokeniser.rows(
            [segments for _, segments in batch],
            row_format.opening,
            loss_on=recipe.loss_on,
            max_length=recipe.max_length,
        )
        for (row, segments), tokens in zip(batch, rows, strict=True):
            said = row_format.said(row) if row_format.said else " ".join(s.text for s in segments)
            digest, like = _hash(_text(segments)), _hash(likeness(said))
            remarks, written = set(row_format.remarks(row)), None
            if recipe.special is not None and tokens.fate.is_kept:
                found = recipe.special.written(row, row_format, segments)
                remarks.update(recipe.special.remarks(found))
                written = recipe.special.positions(tokens.tokens, found, row_format.opening)
            writer.append(tokens, digest=digest, likeness=like, number=row.number, written=written)
            for remark in sorted(remarks):
                writer.remark(remark, number=row.number)


def _write_windows(batches: Iterator[_Batch], windows: Windows, recipe: Recipe, writer: TableWriter) -> None:
    """Write the examples of long texts; those of one text share its hash, so they are held out together."""
    waiting: deque[tuple[int, str]] = deque()
    special = recipe.special

    def texts() -> Iterator[list[str]]:
        for batch in batches:
            added = [(row.number, _text(segments)) for row, segments in batch]
            waiting.extend(added)
            for number, text in added:
                for remark in special.remarks(special.written_in_plain(text)) if special else ():
                    writer.remark(remark, number=number)
            yield [text for _, text in added]

    for together, examples in recipe.tokeniser.windowed(texts(), windows, max_length=recipe.max_length):
        rows = [waiting.popleft() for _ in together]
        text = windows.separator.join(text for _, text in rows)
        digest, like = _hash(text), _hash(likeness(text))
        for example in examples:
            written = special.positions_in_plain(example.tokens) if special is not None else None
            writer.append(example, digest=digest, likeness=like, number=rows[0][0], written=written)


_Batch: TypeAlias = list[tuple[Row, tuple[Segment, ...]]]


def _batches(rows: Iterator[Row], row_format: RowFormat) -> Iterator[_Batch]:
    batch: _Batch = []
    characters = 0
    for row in rows:
        require_columns(row, row_format)
        segments = row_format.segments(row)
        refuse_half_characters(row, segments)
        batch.append((row, segments))
        characters += sum(len(segment.text) for segment in segments)
        if len(batch) == _BATCH_ROWS or characters > _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _counted(batches: Iterator[_Batch], name: str, say: Callable[[str], None]) -> Iterator[_Batch]:
    num_rows, said_at = 0, time.monotonic()
    for batch in batches:
        yield batch
        num_rows += len(batch)
        if (now := time.monotonic()) - said_at >= _SAY_EVERY_SECONDS:
            said_at = now
            say(f"tokenising: {num_rows:,} rows of {name}")


def refuse_half_characters(row: Row, segments: tuple[Segment, ...]) -> None:
    """Raises DataError for a lone surrogate, which JSON can say and UTF-8 cannot."""
    text = _text(segments)
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = f"\\u{ord(text[error.start]):04x}"
        raise DataError(
            f"{row.place}: contains a lone surrogate ({character}), which is not valid text"
        ) from error


def likeness(text: str) -> str:
    """Return the text without case, white space and differences of Unicode form."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def _text(segments: tuple[Segment, ...]) -> str:
    return "".join(segment.text for segment in segments)


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
