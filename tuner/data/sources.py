"""Where rows come from: a local file, a folder, or a data set on the Hub, each with a hash of its content."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.data.files import LocalFile, content_hash
from tuner.data.formats import RowFormat
from tuner.data.hub import load_folder, load_rows, rows_hash
from tuner.data.locations import located
from tuner.data.plain_text import has_lines as has_line_records
from tuner.data.plain_text import plain_text_rows
from tuner.data.readers import columns_to_read, has_lines, reader_of
from tuner.data.segments import Row
from tuner.errors import DataError

if TYPE_CHECKING:
    from tuner.spec import SourceSpec

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILE_ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".gz", ".txt", ".log")


@dataclass(frozen=True, slots=True)
class Source:
    """Rows that can be read, more than once."""

    name: str
    """Path or Hub id, as messages show it."""
    identity: str
    """What the rows come of, the content of their files included: changes when the rows do."""
    has_lines: bool
    """Whether a row's number is a line of the file."""
    rows: Callable[[RowFormat], Iterator[Row]]
    """The rows in order. Raises DataError."""

    def place(self, number: int) -> str:
        """A row's place as messages show it."""
        return f"{self.name}:{number}" if self.has_lines else f"{self.name}: row {number}"


def open_sources(spec: SourceSpec, cache: Path | None, copies: Path) -> list[Source]:
    """What a round file's source names: one data set, or files in the order of their names. Raises DataError.

    Files are read here, row by row, so that a mistake can name its line and memory stays flat; those
    behind URLs are copied into `copies` first. Folders and Hub ids go through `datasets`, whose files for
    folders lie in the cache.
    """
    if spec.split_on is None and "://" not in spec.path:
        if os.path.isdir(spec.path):  # noqa: PTH112  Path raises for a name that is too long
            return [_dataset(spec, load_folder, cache and cache / "datasets")]
        if _is_hub_id(spec.path) and not os.path.exists(spec.path):  # noqa: PTH110
            return [_dataset(spec, load_rows, None)]
    if spec.split or spec.config:
        raise DataError(
            f"{spec.path}: split and config are for data sets on the Hub and folders; a file has neither"
        )
    open_one = _table if spec.split_on is None else _plain_text
    return [open_one(file, spec) for file in located(spec.path, copies)]


def _is_hub_id(path: str) -> bool:
    return _HUB_ID.fullmatch(path) is not None and not path.lower().endswith(_FILE_ENDINGS)


def _table(file: LocalFile, spec: SourceSpec) -> Source:
    reader = reader_of(file)
    return Source(
        name=file.name,
        identity=f"{reader.__name__} {content_hash(file)}",
        has_lines=has_lines(file),
        rows=lambda row_format: reader(file, row_format),
    )


def _plain_text(file: LocalFile, spec: SourceSpec) -> Source:
    return Source(
        name=file.name,
        identity=f"{spec.split_on} {spec.record_bytes} {spec.group_records} {content_hash(file)}",
        has_lines=has_line_records(spec),
        rows=lambda row_format: plain_text_rows(file, spec),
    )


def _dataset(spec: SourceSpec, load: Callable[..., Any], cache: Path | None) -> Source:
    rows = load(spec.path, config=spec.config, split=spec.split, cache=cache)

    def read(row_format: RowFormat) -> Iterator[Row]:
        columns = columns_to_read(rows.column_names, row_format)
        for number, values in enumerate(rows.select_columns(columns), start=1):
            yield Row(number, f"{spec.path}: row {number}", values)

    return Source(spec.path, f"{spec.split} {rows_hash(rows)}", has_lines=False, rows=read)
