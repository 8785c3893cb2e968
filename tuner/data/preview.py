"""Prepared rows shown to a reader and written for other tools, with the licences that cards state."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tuner.data.examples import Example, Examples, Row, agreeing
from tuner.data.files import downloads
from tuner.data.formats import RowFormat
from tuner.data.sources import open_sources
from tuner.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tuner.config import SourceSpec


_COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Columns by which a format is recognised, the most telling first."""


def recognise(columns: tuple[str, ...]) -> str | None:
    """Return the format of rows with these columns; None if no format has them."""
    return next((name for name, needed in _COLUMNS.items() if set(needed) <= set(columns)), None)


_SYNONYMS = (
    ("prompt", "instruction", "question", "query", "problem", "request", "input"),
    ("completion", "output", "answer", "response", "solution", "target", "reply"),
    ("messages", "conversations", "conversation", "dialog", "dialogue", "chat"),
    ("text", "content", "document", "body"),
)
"""Names of one thing in datasets of other tools, the most usual first."""


def matching_columns(source: SourceSpec) -> dict[str, str]:
    """Return the `columns` of a source whose first row has other column names than its format.

    Raises DataError when there is no row, or a column has no match.
    """
    with downloads(None) as copies:
        rows = chain.from_iterable(each.rows(_every_row()) for each in open_sources(source, None, copies))
        row = next(rows, None)
    if row is None:
        raise DataError(f"{source.path}: has no rows")
    found: dict[str, str] = {}
    needed = _COLUMNS[source.format]
    for column in (column for column in needed if column not in {**row.values, **source.columns}):
        taken = {*needed, *source.columns.values(), *found.values()}
        names = next((names for names in _SYNONYMS if column in names), ())
        match = next((name for name in names if name in row.values and name not in taken), None)
        if match is None:
            listed = ", ".join(map(repr, row.values)) or "none"
            raise DataError(
                f"{row.place}: no column {column!r}; columns found: {listed}; format {source.format} needs "
                f"{' and '.join(map(repr, needed))}; map it with --columns {column}=NAME"
            )
        found[column] = match
    return {**found, **source.columns}


def _every_row() -> RowFormat:
    """Return a format that reads each column that any format recognises, or all."""
    every = tuple(column for columns in _COLUMNS.values() for column in columns)
    return RowFormat("any", every, (), lambda _: (), (), lambda _: (), _nothing)


def survey(source: SourceSpec, *, recognised: bool) -> tuple[str, int]:
    """Return the format of a source, by its first row, and its number of rows.

    With `recognised` false the format is the source's own word. Raises DataError when there is no
    row, or one whose columns no format has.
    """
    found: str = source.format
    count = 0
    with downloads(None) as copies:
        for row in chain.from_iterable(
            each.rows(_every_row()) for each in open_sources(source, None, copies)
        ):
            if not count and recognised:
                found = _recognised(row)
            count += 1
    if not count:
        raise DataError(f"{source.path}: has no rows")
    return found, count


def _recognised(row: Row) -> str:
    name = recognise(tuple(row.values))
    if name is None:
        listed = ", ".join(map(repr, row.values)) or "none"
        formats = "; ".join(f"{f} has {' and '.join(c)}" for f, c in _COLUMNS.items())
        raise DataError(
            f"{row.place}: no format has the columns {listed}: {formats}; columns with other names "
            "can be mapped with --columns once --format is given"
        )
    return name


def _nothing(instruction: str, input: str) -> Mapping[str, str]:
    return {}


WRITTEN = ("{!", "!}")
"""What is put around a special token that a row says itself."""


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row as the model sees it."""

    place: str
    """Where it was read."""
    num_tokens: int
    num_targets: int
    pieces: list[tuple[str, bool]]
    """Its text in pieces, each with whether its tokens are targets; `WRITTEN` is around the special tokens
    that the row says itself, not its template."""
    num_written: int = 0
    """How many those are."""


def show_rows(examples: Examples, tokenizer: PreTrainedTokenizerBase, count: int) -> list[ShownRow]:
    """Return the first rows of each file, decoded from the training tokens, with special tokens visible."""
    shown = []
    for index in examples.from_each(count):
        example, written = examples[index], examples.written(index)
        num_tokens, num_targets = len(example.input_ids), int(example.is_target.sum())
        pieces = _pieces(example, written, tokenizer)
        shown.append(ShownRow(examples.place(index), num_tokens, num_targets, pieces, len(written)))
    return shown


def printable(text: str) -> str:
    """Return the text with control characters escaped, since a terminal would execute them."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _pieces(
    example: Example, written: list[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Return each piece as decoded after those before it: alone, some tokenizers drop its first space."""
    breaks = {int(at) + 1 for at in np.flatnonzero(np.diff(example.is_target))}
    around = {at + side for at in written for side in (0, 1)} - {0}
    ends = sorted(breaks | around | {len(example.input_ids)})
    texts = [_decoded(example.input_ids[:end].tolist(), tokenizer) for end in ends]
    # Where a piece ends within a character, the character is shown with the next one.
    cuts = [0, *(agreeing(*pair) for pair in pairwise(texts)), len(texts[-1])]
    pieces: list[tuple[str, bool]] = []
    for (start, end), last in zip(pairwise(cuts), ends, strict=True):
        text, is_target = texts[-1][start:end], bool(example.is_target[last - 1])
        if last - 1 in written:
            text = text.join(WRITTEN)
        if pieces and last - 1 not in breaks and pieces[-1][1] == is_target:
            text = pieces.pop()[0] + text
        pieces.append((text, is_target))
    return pieces


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


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
    """Write a `datasets.DatasetDict`, which `load_from_disk` loads."""
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
    """Return the `license` in the README.md of a directory, or of a cached Hub id; else None."""
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
