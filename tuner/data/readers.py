"""Readers of rows: one generator per kind of file, whose errors name the file and the line or row."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from tuner.data.examples import Row
from tuner.data.files import MAX_ROW_BYTES, DataFile, LocalFile, most_unpacked_bytes, unpacks_too_far
from tuner.data.formats import RowFormat
from tuner.data.json_rows import DECODER, RepeatedKey, json_objects, not_a_row, over_lines
from tuner.errors import DataError

Reader: TypeAlias = Callable[[LocalFile, RowFormat], Iterator[Row]]
"""Reads a file for a format; only the columns that the format reads need be there."""

_PARQUET_BATCH_ROWS = 256


def reader_of(file: LocalFile) -> Reader:
    """Return the reader of a file, by its suffix. Raises DataError for an unknown one."""
    name = file.path.name.lower()
    packed = name.endswith(".gz")
    ending = name.removesuffix(".gz").rpartition(".")[2]
    match ending:
        case "jsonl" | "ndjson":
            return _json_lines
        case "json":
            return _json
        case "csv" | "tsv":
            return _csv
        case "parquet" if not packed:
            return _parquet
    raise DataError(
        f"{file.name}: unknown kind of file; allowed are .json, .jsonl, .ndjson, .csv, .tsv "
        "(each also with .gz) and .parquet; plain text, such as a log, is read with "
        "`format: text, split_on: line` (or blank, bytes)"
    )


def has_lines(file: LocalFile) -> bool:
    """Whether the numbers of its rows are lines of the file."""
    reader = reader_of(file)
    return reader in (_json_lines, _csv) or (reader is _json and _is_json_lines(file))


def columns_to_read(found: list[str], row_format: RowFormat) -> list[str]:
    """Return the columns that the format reads; all if a required one is missing, for the message."""
    if any(column not in found for column in row_format.needed):
        return found
    wanted = row_format.needed + row_format.optional + row_format.unread
    return [column for column in found if column in wanted]


def _json_lines(file: LocalFile, row_format: RowFormat) -> Iterator[Row]:
    with DataFile(file) as opened:
        lines = opened.lines()
        for number, line in lines:
            if not line.strip():
                continue
            place = f"{file.name}:{number}"
            try:
                value = DECODER.decode(line)
            except json.JSONDecodeError as error:
                cut = "" if line.endswith("\n") else "; is the file cut off?"
                wrong = f"not one JSON object a line: {error.msg} at column {error.colno}{cut}"
                raise DataError(f"{place}: {over_lines(line, lines) or wrong}") from error
            except RepeatedKey as error:
                raise DataError(f"{place}: {error}") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON that can be read: {error}") from error
            if not isinstance(value, dict):
                raise DataError(f"{place}: {not_a_row(value, lines)}")
            yield Row(number, place, value)


def _json(file: LocalFile, row_format: RowFormat) -> Iterator[Row]:
    if _is_json_lines(file):
        yield from _json_lines(file, row_format)
        return
    with DataFile(file) as opened:
        for number, values in enumerate(json_objects(opened), start=1):
            yield Row(number, f"{file.name}: row {number}", values)


def _is_json_lines(file: LocalFile) -> bool:
    with DataFile(file) as opened:
        return opened.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")


def _csv(file: LocalFile, row_format: RowFormat) -> Iterator[Row]:
    csv.field_size_limit(MAX_ROW_BYTES)
    delimiter = "\t" if ".tsv" in file.path.name.lower() else ","
    with DataFile(file) as opened:
        reader = csv.reader(_without_nul(opened), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        begins = 1
        try:
            for fields in reader:
                place = f"{file.name}:{begins}"
                if header is None:
                    header = _header(fields, place)
                elif fields:
                    yield Row(begins, place, _record(header, fields, place))
                begins = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{file.name}:{begins}: not CSV: {error}") from error


def _without_nul(file: DataFile) -> Iterator[str]:
    for number, line in file.lines():
        if "\0" in line:
            raise DataError(f"{file.name}:{number}: has a NUL byte, which CSV cannot hold")
        yield line


def _header(fields: list[str], place: str) -> list[str]:
    if len(set(fields)) < len(fields):
        raise DataError(f"{place}: two columns have the same name: {', '.join(map(repr, fields))}")
    return fields


def _record(header: list[str], fields: list[str], place: str) -> dict[str, str]:
    if len(fields) != len(header):
        raise DataError(f"{place}: {len(fields)} fields, but the first line names {len(header)} columns")
    return dict(zip(header, fields, strict=True))


def _parquet(file: LocalFile, row_format: RowFormat) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    most_bytes = most_unpacked_bytes(file)
    try:
        with parquet.ParquetFile(file.path) as opened:
            columns = columns_to_read(_header(opened.schema_arrow.names, file.name), row_format)
            if _announced_bytes(opened.metadata) > most_bytes:
                raise unpacks_too_far(file)
            number = read_bytes = 0
            for batch in opened.iter_batches(_PARQUET_BATCH_ROWS, columns=columns):
                read_bytes += batch.nbytes
                if read_bytes > most_bytes:
                    raise unpacks_too_far(file)
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, f"{file.name}: row {number}", values)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.name}: not a Parquet file that can be read: {error}") from error


def _announced_bytes(metadata: Any) -> int:
    """Return the unpacked size of a Parquet file's pages by its own index; equal values may repeat."""
    return sum(metadata.row_group(at).total_byte_size for at in range(metadata.num_row_groups))
