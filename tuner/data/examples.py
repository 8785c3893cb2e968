"""Data types between file and batch: rows, segments of text, examples, and the order of training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class Opening(Enum):
    """What stands before a row's text."""

    TEXT = auto()
    """Return what the tokenizer itself puts before a text, such as BOS."""
    TEMPLATE = auto()
    """The same, written out as a chat template has it: some tokenizers then put no space before the text."""
    WRITTEN = auto()
    """Nothing: the text brings its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it was read."""

    number: int
    """1-based line of the file where it begins, or 1-based row where the file has no lines of its own."""
    place: str
    """File and number as messages show them: `train.jsonl:12` or `train.json: row 12`."""
    values: Mapping[str, Any]
    """By column."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a row's text."""

    text: str
    is_target: bool
    """Whether a model that learns completions alone has its loss on these tokens."""
    is_masked: bool = False
    """Whether no loss sees these tokens, that on all tokens neither."""


def kind_of(value: Any) -> str:
    """Return the everyday name of a JSON value's type, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            digits = repr(value)
            return f"the number {digits if len(digits) <= 20 else digits[:20] + '...'}"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


def agreeing(text: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    differing = (at for at, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    return next(differing, min(len(text), len(other)))


_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row, as the model sees it."""

    input_ids: NDArray[np.int32]
    """Token ids, at least one."""
    is_target: NDArray[np.bool_]
    """is_target[i]: token i is one to be predicted, from those before it; is_target[0] is always False."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenTable:
    """Many examples end to end in flat arrays, which may be memory-mapped files."""

    tokens: NDArray[np.int32]
    targets: NDArray[np.bool_]
    """For each token, whether it is a target."""
    offsets: NDArray[np.int64]
    """Row r is tokens[offsets[r]:offsets[r + 1]]."""
    num_targets: NDArray[np.int64]
    """Targets of each row."""
    written: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Ascending positions in `tokens` of special tokens that the row says, not its template."""


class Examples(Sequence[Example]):
    """Rows picked from tables, in order; a row may be picked twice. Nothing is copied."""

    def __init__(
        self,
        picks: Sequence[tuple[TokenTable, NDArray[np.int64]]],
        places: Sequence[Callable[[int], str]] = (),
    ) -> None:
        """`places` has, for each table, what says where the n-th row picked from it was read."""
        self._picks = tuple(picks)
        self._places = tuple(places)
        self._ends = np.cumsum([len(rows) for _, rows in picks], dtype=np.int64)
        self.num_tokens: NDArray[np.int32] = _per_row(
            picks, lambda table, rows: table.offsets[rows + 1] - table.offsets[rows]
        )
        """Tokens of each row."""
        self.num_targets: NDArray[np.int32] = _per_row(picks, lambda table, rows: table.num_targets[rows])
        """Target tokens of each row."""

    @classmethod
    def of(cls, rows: Iterable[Example]) -> Examples:
        """Create examples held in memory."""
        rows = list(rows)
        tokens = np.concatenate([np.zeros(0, np.int32), *(row.input_ids for row in rows)]).astype(np.int32)
        targets = np.concatenate([np.zeros(0, bool), *(row.is_target for row in rows)]).astype(bool)
        offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int64)
        num_targets = np.array([row.is_target.sum() for row in rows], dtype=np.int64)
        return cls([(TokenTable(tokens, targets, offsets, num_targets), np.arange(len(rows)))])

    def content_hash(self) -> str:
        """Return a hash of all tokens and target masks, in order."""
        tokens, targets = hashlib.sha256(), hashlib.sha256()
        for table, rows in self._picks:
            is_last = np.append(np.diff(rows) != 1, True)[: len(rows)]
            runs = zip(rows[np.roll(is_last, 1)], rows[is_last], strict=True)
            for first, last in runs:
                start, end = table.offsets[first], table.offsets[last + 1]
                tokens.update(table.tokens[start:end].data)
                targets.update(table.targets[start:end].data)
        whole = hashlib.sha256(self.num_tokens.astype(np.int64).data)
        whole.update(tokens.digest() + targets.digest())
        return whole.hexdigest()

    def first_beyond(self, num_embeddings: int) -> tuple[int, int] | None:
        """Return the first row with a token id of at least the bound, and that id; None if there is none."""
        start = 0
        for table, rows in self._picks:
            has_none = not len(table.tokens) or int(table.tokens.max()) < num_embeddings
            for at, row in enumerate([] if has_none else rows.tolist()):
                ids = table.tokens[table.offsets[row] : table.offsets[row + 1]]
                if (beyond := ids[ids >= num_embeddings]).size:
                    return start + at, int(beyond[0])
            start += len(rows)
        return None

    def __len__(self) -> int:
        return len(self.num_tokens)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        table, start, end = self._span(index)
        return Example(table.tokens[start:end], table.targets[start:end])

    def written(self, index: int) -> list[int]:
        """Return the positions of special tokens in the row's own text, not those of its template."""
        table, start, end = self._span(index)
        first, last = np.searchsorted(table.written, [start, end])
        found: list[int] = (table.written[first:last] - start).tolist()
        return found

    def place(self, index: int) -> str:
        """Return where a row was read; empty if unknown."""
        pick, at = self._at(index)
        return self._places[pick](at) if self._places else ""

    def from_each(self, count: int) -> list[int]:
        """Return indices of rows: the first of each table, then the second of each, and so on."""
        starts = np.concatenate([[0], self._ends[:-1]]).tolist() if self._picks else []
        in_turn = [
            (nth, start + nth)
            for start, end in zip(starts, self._ends.tolist(), strict=True)
            for nth in range(min(count, end - start))
        ]
        return sorted(index for _, index in sorted(in_turn)[:count])

    def _span(self, index: int) -> tuple[TokenTable, int, int]:
        """Return a row's table, and the start and end of the row's tokens in it."""
        pick, at = self._at(index)
        table, rows = self._picks[pick]
        return table, int(table.offsets[rows[at]]), int(table.offsets[rows[at] + 1])

    def _at(self, index: int) -> tuple[int, int]:
        """Return the number of the table, and the row's number among those picked from it."""
        index = range(len(self))[index]
        pick = int(np.searchsorted(self._ends, index, side="right"))
        return pick, index - int(self._ends[pick]) + len(self._picks[pick][1])


def _per_row(
    picks: Sequence[tuple[TokenTable, NDArray[np.int64]]],
    measure: Callable[[TokenTable, NDArray[np.int64]], NDArray[np.int64]],
) -> NDArray[np.int32]:
    found = np.zeros(sum(len(rows) for _, rows in picks), np.int32)
    at = 0
    for table, rows in picks:
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[begin : begin + _ROWS_AT_ONCE]
            found[at : at + len(some)] = measure(table, some)
            at += len(some)
    return found


def batch_rows(num_rows: int, *, batch_size: int, seed: int, step: int) -> tuple[int, ...]:
    """Return the rows of update `step` (1-based), in order.

    They are positions (step - 1) * batch_size to step * batch_size of an endless stream: every
    epoch is a permutation of all rows drawn from (seed, epoch), one epoch follows the other without
    a gap. So batches are always full, straddle epochs, and a longer horizon repeats a shorter one.
    Raises ValueError for a number of rows, batch size or step below 1, or a negative seed.
    """
    if num_rows < 1 or batch_size < 1 or step < 1:
        raise ValueError(f"rows, batch size and step are at least 1: {num_rows}, {batch_size}, {step}")
    position, end = (step - 1) * batch_size, step * batch_size
    rows: list[int] = []
    while position < end:
        epoch, first = divmod(position, num_rows)
        last = min(num_rows, first + end - position)
        rows.extend(_permutation(num_rows, seed, epoch)[first:last].tolist())
        position += last - first
    return tuple(rows)


@lru_cache(maxsize=16)
def _permutation(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return a permutation of the rows.

    Sorting raw output of the bit generator, and not `Generator.permutation`: numpy promises the
    same stream for ever only for bit generators (NEP 19), and a resumed trial may meet a newer numpy.
    """
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_rows)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order
