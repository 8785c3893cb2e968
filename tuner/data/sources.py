"""Sources of rows: files, folders and datasets on the Hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.data.examples import Row
from tuner.data.files import LocalFile, content_hash, located
from tuner.data.formats import RowFormat
from tuner.data.plain_text import has_lines as has_line_records
from tuner.data.plain_text import plain_text_rows
from tuner.data.pretrained import is_out_of_reach
from tuner.data.readers import columns_to_read, has_lines, reader_of
from tuner.errors import DataError
from tuner.whole import written_whole

if TYPE_CHECKING:
    from tuner.config import SourceSpec

_log = logging.getLogger(__name__)

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
    """Load the rows of a folder with files of one kind, or whose README.md says what to read.

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
            f"{folder}: is a folder without data files ({', '.join(_KINDS)}); name a file, or a pattern"
        )
    if len(examples) > 1 and not (Path(folder) / "README.md").exists():
        found = " and ".join(examples.values())
        raise DataError(f"{folder}: is a folder with files of several kinds, such as {found}; {pattern}")
    return load_rows(folder, config=config, split=split, cache=cache)


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote it, as one dataset or as its splits."""
    files = ("state.json", "dataset_info.json"), ("dataset_dict.json",)
    return any(all((Path(folder) / name).is_file() for name in names) for names in files)


def _load_saved(folder: str, *, config: str | None, split: str | None) -> Any:
    import datasets

    if config is not None:
        raise DataError(f"{folder}: was written by save_to_disk, which stores no config; remove `config`")
    try:
        saved = datasets.load_from_disk(folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder}: was written by save_to_disk and cannot be read: {error}") from error
    rows = _chosen(saved, split, folder) if isinstance(saved, datasets.DatasetDict) else saved
    if rows is saved and split is not None and split != str(saved.split):
        own = f", {saved.split}" if saved.split else ""
        raise DataError(
            f"{folder}: contains one split{own}, written by save_to_disk, not {split!r}; remove `split`"
        )
    return rows.with_format(None)  # else values may be arrays of numpy or torch


def _chosen(splits: Mapping[str, Any], split: str | None, folder: str) -> Any:
    """Return the named split, or the only one."""
    names = [str(name) for name in splits]
    if split is None and len(names) == 1:
        return splits[names[0]]
    if split in names:
        return splits[split]
    wanted = "" if split is None else f", and not {split!r}"
    raise DataError(
        f"{folder}: contains the splits {', '.join(names) or '(none)'}, written by save_to_disk{wanted}; "
        f"name one of them, as `split: {(names or ['train'])[0]}`"
    )


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """Return the visible entries of a folder: `datasets` ignores hidden ones, too."""
    with os.scandir(folder) as found:
        listed = list(islice((entry for entry in found if not entry.name.startswith(".")), _MOST_ENTRIES + 1))
    yield from sorted(listed, key=lambda entry: entry.name)
    for entry in listed:
        with suppress(OSError):  # what cannot be looked into
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)


def load_rows(
    path: str, *, config: str | None, split: str | None, cache: Path | None, revision: str | None = None
) -> Any:
    """Load a memory-mapped `datasets.Dataset`; it is cached in the user's Hub cache if `cache` is None.

    No split is `train`. `revision` is a commit of the Hub. Raises DataError.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # they would fill a log
    split = split or "train"
    try:
        with _the_cache_alone() if is_out_of_reach(path) else nullcontext():
            return datasets.load_dataset(
                path, name=config, split=split, cache_dir=cache and str(cache), revision=revision
            )
    except datasets.exceptions.DatasetNotFoundError as error:
        if "is a gated dataset" in str(error):
            raise DataError(
                f"{path}: is gated: request access on its page on the Hub, then log in with `hf auth login`"
            ) from error
        raise DataError(
            f"{path}: neither a local file nor a dataset on the Hub that you can access: {error} "
            "If it is private, log in with `hf auth login`"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{path}: no local file has this name and the Hub cannot be reached: {error}; "
            "check the path, or go online once to cache the dataset"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, LookupError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise DataError(f"{path}: cannot be loaded (config {config}, split {split}): {reason}") from error


@contextmanager
def _the_cache_alone() -> Iterator[None]:
    """Set `datasets` offline, as HF_HUB_OFFLINE does when it is imported."""
    import datasets

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def rows_hash(rows: Any) -> str:
    """Return a hash of the files that the dataset is mapped from."""
    names = [file["filename"] for file in rows.cache_files]
    hashes = [content_hash(LocalFile(Path(name), name)) for name in names]
    return hashlib.sha256(f"{hashes} {rows.num_rows}".encode()).hexdigest()


def commit_of(rows: Any) -> str | None:
    """Return the commit of the Hub that a dataset is of; None if its files do not say so."""
    folders = {Path(file["filename"]).parent.name for file in rows.cache_files}
    found = folders.pop() if len(folders) == 1 else ""
    return found if _COMMIT.fullmatch(found) else None


_COMMIT = re.compile(r"[0-9a-f]{40}")
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
    commit: str | None = None
    """Of the Hub, by which the rows can be found again."""

    def place(self, number: int) -> str:
        """Return a row's place as messages show it."""
        return f"{self.name}:{number}" if self.has_lines else f"{self.name}: row {number}"


REMEMBERED = "sources"
"""Folder of the cache: what sources elsewhere were when they were opened last."""


def open_sources(
    spec: SourceSpec, cache: Path | None, copies: Path, *, as_before: bool = False
) -> list[Source]:
    """Open what a source names: one dataset, or files in the order of their names. Raises DataError.

    Files are read here, row by row, so that a mistake can name its line and memory stays flat; those
    behind URLs are copied into `copies` first. Folders and Hub ids go through `datasets`, whose files for
    folders lie in the cache. If a Hub id or a URL cannot be opened now, its rows can still be used that are
    in the cache already. With `as_before` they are those that were opened last, whatever is there now.
    """
    if cache is None or not is_elsewhere(spec):
        return _opened(spec, cache, copies)
    said = json.dumps(
        [spec.path, spec.split, spec.config, spec.split_on, spec.record_bytes, spec.group_records]
    )
    card = cache / REMEMBERED / f"{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    if as_before and (known := _remembered(card, partial(_as_before, spec, cache, copies))) is not None:
        return known
    try:
        sources = _opened(spec, cache, copies)
    except DataError as error:
        if (known := _remembered(card, partial(_raise, error))) is None:
            raise
        _log.warning("%s: cannot be opened now; using its rows in %s: %s", spec.path, cache, error)
        return known
    with suppress(OSError):
        card.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(card) as unnamed:
            unnamed.write_text(json.dumps([[s.name, s.identity, s.has_lines, s.commit] for s in sources]))
    return sources


def is_elsewhere(spec: SourceSpec) -> bool:
    """Return whether a source is on the Hub or behind a URL, where others may change it."""
    return "://" in spec.path or (_is_hub_id(spec.path) and not os.path.exists(spec.path))  # noqa: PTH110


def _remembered(card: Path, rows_of: Callable[[Source, RowFormat], Iterator[Row]]) -> list[Source] | None:
    """Return the sources of a card, whose rows may be in the cache, or else are what `rows_of` returns.

    None if they were never opened.
    """
    try:
        known = json.loads(card.read_text())
        return [_card_source(rows_of, *each) for each in known]
    except (OSError, ValueError, TypeError):
        return None


def _card_source(
    rows_of: Callable[[Source, RowFormat], Iterator[Row]],
    name: str,
    identity: str,
    lines: bool,
    commit: str | None = None,
) -> Source:
    source = Source(name, identity, lines, lambda row_format: rows_of(source, row_format), commit)
    return source


def _raise(error: DataError, source: Source, row_format: RowFormat) -> Iterator[Row]:
    raise error


def _as_before(
    spec: SourceSpec, cache: Path | None, copies: Path, source: Source, row_format: RowFormat
) -> Iterator[Row]:
    """Return the rows of a source that was opened before. Raises DataError if they are others now."""
    now = _opened(spec, cache, copies, revision=source.commit)
    same = next((each for each in now if each.identity == source.identity), None)
    if same is None:
        raise DataError(f"{source.name}: has changed since it was opened first")
    return same.rows(row_format)


def _opened(
    spec: SourceSpec, cache: Path | None, copies: Path, *, revision: str | None = None
) -> list[Source]:
    if spec.split_on is None and "://" not in spec.path:
        if os.path.isdir(spec.path):  # noqa: PTH112  Path raises for a name that is too long
            return [_dataset(spec, load_folder, cache and cache / "datasets")]
        if _is_hub_id(spec.path) and not os.path.exists(spec.path):  # noqa: PTH110
            return [_dataset(spec, partial(load_rows, revision=revision), None)]
    if spec.split or spec.config:
        raise DataError(
            f"{spec.path}: split and config apply only to datasets on the Hub and folders, not to a file"
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

    return Source(spec.path, f"{spec.split} {rows_hash(rows)}", False, read, commit_of(rows))
