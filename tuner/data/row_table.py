"""Tokenised rows on disk: one memory-mapped table a dataset, cached by what it was made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from tuner.data.examples import TokenTable
from tuner.data.tokenise import TokenisedRow
from tuner.errors import StorageError
from tuner.whole import digest as file_digest

_COLUMNS: Mapping[str, DTypeLike] = {
    "tokens": np.dtype("<i4"),
    "targets": np.dtype("?"),
    "lengths": np.dtype("<i8"),
    "num_targets": np.dtype("<i8"),
    "full_lengths": np.dtype("<i8"),
    "fates": np.dtype("u1"),
    "digests": np.dtype("<u8"),
    "likenesses": np.dtype("<u8"),
    "numbers": np.dtype("<i8"),
    "written": np.dtype("<i8"),
}
_INDEX = "table.json"


@dataclass(frozen=True, slots=True)
class Remark:
    """Something of which there is to say that it is read otherwise than written, or not at all."""

    num_rows: int
    first: int
    """Line or row number of the first of the rows."""


@dataclass(frozen=True, slots=True, eq=False)
class RowTable:
    """Every row that was read from a source, those dropped included (they have no tokens)."""

    tokens: TokenTable
    full_lengths: NDArray[np.int64]
    """Tokens of each row before truncation."""
    fates: NDArray[np.uint8]
    """A `Fate` for each row."""
    digests: NDArray[np.uint64]
    """[rows, 2]: 128 bits of a hash of the row's text, equal for equal texts."""
    likenesses: NDArray[np.uint64]
    """[rows, 2]: the same of what the row says, without its format and what `likeness` leaves out."""
    numbers: NDArray[np.int64]
    """Line or row number of each row in its source."""
    remarks: Mapping[str, Remark]
    """By what there is to say."""


class TableWriter:
    """Writes a table into an empty directory; reading it works once the `with` block has ended well."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._columns: dict[str, _Column] = {}
        self._remarks: dict[str, Remark] = {}
        self._files = ExitStack()

    def __enter__(self) -> TableWriter:
        for name, kind in _COLUMNS.items():
            stream = self._files.enter_context((self._directory / f"{name}.npy").open("wb+"))
            self._columns[name] = _Column(stream, np.dtype(kind))
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        with self._files:
            if kind is None:
                for column in self._columns.values():
                    column.finish()
        if kind is None:
            hashes = {name: file_digest(self._directory / f"{name}.npy") for name in _COLUMNS}
            remarks = {said: asdict(remark) for said, remark in self._remarks.items()}
            index = json.dumps({"sha256": hashes, "remarks": remarks})
            (self._directory / _INDEX).write_text(index, encoding="utf-8")

    def append(
        self,
        row: TokenisedRow,
        *,
        digest: bytes,
        likeness: bytes,
        number: int,
        written: NDArray[np.int64] | None = None,
    ) -> None:
        """Add a row; `digest` and `likeness` have 16 bytes.

        `written` has the positions of special tokens that the row says itself; None where there are none.
        """
        if written is not None:
            self._columns["written"].append(len(self._columns["tokens"]) + written)
        self._columns["tokens"].append(row.tokens)
        self._columns["targets"].append(row.targets)
        self._columns["lengths"].append(len(row.tokens))
        self._columns["num_targets"].append(row.targets.sum())
        self._columns["full_lengths"].append(row.full_length)
        self._columns["fates"].append(row.fate)
        self._columns["digests"].append(np.frombuffer(digest, "<u8"))
        self._columns["likenesses"].append(np.frombuffer(likeness, "<u8"))
        self._columns["numbers"].append(number)

    def remark(self, said: str, *, number: int) -> None:
        """Count a row for a remark."""
        before = self._remarks.get(said, Remark(0, number))
        self._remarks[said] = replace(before, num_rows=before.num_rows + 1)


def read_table(directory: Path, *, mapped: bool) -> RowTable | None:
    """Read the table in a directory; None if it is missing or not what was written."""
    try:
        index = json.loads((directory / _INDEX).read_text(encoding="utf-8"))
        hashes = index["sha256"]
        remarks = {said: Remark(**remark) for said, remark in index["remarks"].items()}
        if any(file_digest(directory / f"{name}.npy") != hashes[name] for name in _COLUMNS):
            return None
        columns = {name: _load(directory / f"{name}.npy", mapped=mapped) for name in _COLUMNS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    offsets = np.concatenate([[0], np.cumsum(columns["lengths"])]).astype(np.int64)
    return RowTable(
        tokens=TokenTable(
            columns["tokens"], columns["targets"], offsets, columns["num_targets"], columns["written"]
        ),
        full_lengths=columns["full_lengths"],
        fates=columns["fates"],
        digests=columns["digests"].reshape(-1, 2),
        likenesses=columns["likenesses"].reshape(-1, 2),
        numbers=columns["numbers"],
        remarks=remarks,
    )


class _Column:
    """A one-dimensional `.npy` file that grows.

    numpy leaves room in the header for the length to be filled in afterwards.
    """

    def __init__(self, stream: IO[bytes], kind: np.dtype[Any]) -> None:
        self._stream = stream
        self._kind = kind
        self._length = 0
        self._write_header()

    def __len__(self) -> int:
        return self._length

    def append(self, values: Any) -> None:
        array = np.asarray(values, dtype=self._kind).reshape(-1)
        self._stream.write(array.tobytes())
        self._length += array.size

    def finish(self) -> None:
        self._stream.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self._kind), "fortran_order": False, "shape": (self._length,)}
        npy.write_array_header_1_0(self._stream, header)


def _load(path: Path, *, mapped: bool) -> NDArray[Any]:
    mode: Literal["r"] | None = "r" if mapped else None
    array: NDArray[Any] = np.load(path, mmap_mode=mode, allow_pickle=False)
    return array


_UNFINISHED = "unfinished-"


def cached_table(
    cache: Path | None, made_from: Mapping[str, Any], build: Callable[[TableWriter], None]
) -> RowTable:
    """Return the table that `build` writes, or the cached one with the same ingredients.

    `made_from` holds everything that the table depends on, as JSON values. An entry appears under its
    name only when it is complete; one that is damaged is built again. Without a cache the table is in
    memory and nothing stays on disk. Raises what `build` raises, and StorageError.
    """
    entry = cache and cache / hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
    if cache is not None:
        _remove_abandoned(cache)
    found = read_table(entry, mapped=True) if entry else None
    if found is not None:
        return found
    try:
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
        with _unfinished(cache) as unnamed:
            table = _built(unnamed, build, mapped=entry is not None)
            if entry is not None:
                _name(unnamed, entry)
        return table
    except OSError as error:
        place = cache or tempfile.gettempdir()
        raise StorageError(f"{place}: cannot write tokenised data here: {error}") from error


@contextmanager
def _unfinished(cache: Path | None) -> Iterator[Path]:
    """Yield a temporary directory to build in, locked while it is in use."""
    directory, descriptor = _locked_directory(cache)
    try:
        unnamed = Path(directory) / "table"
        unnamed.mkdir()
        yield unnamed
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(descriptor)


def _locked_directory(cache: Path | None) -> tuple[str, int]:
    while True:
        directory = tempfile.mkdtemp(prefix=_UNFINISHED, dir=cache)
        with suppress(FileNotFoundError):  # taken for abandoned before it was locked
            descriptor = os.open(directory, os.O_RDONLY)
            with suppress(OSError):  # no locks on this disk: nothing is then taken for abandoned either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if Path(directory).exists():
                return directory, descriptor
            os.close(descriptor)


def _remove_abandoned(cache: Path) -> None:
    """Delete what processes that were killed had begun: their lock is gone."""
    for directory in cache.glob(f"{_UNFINISHED}*"):
        with suppress(OSError):  # locked, or gone meanwhile
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
            finally:
                os.close(descriptor)


def _built(directory: Path, build: Callable[[TableWriter], None], *, mapped: bool) -> RowTable:
    with TableWriter(directory) as writer:
        build(writer)
    table = read_table(directory, mapped=mapped)
    if table is None:
        raise OSError("what was written could not be read back")
    return table


def _name(unnamed: Path, entry: Path) -> None:
    """Give a complete table its name, unless another process was faster with the same one."""
    if entry.exists() and read_table(entry, mapped=True) is None:
        shutil.rmtree(entry)
    try:
        unnamed.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise
