"""Tokenised examples: which tokens there are and which of them the loss sees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
from numpy.typing import NDArray

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
        """Examples held in memory."""
        rows = list(rows)
        tokens = np.concatenate([np.zeros(0, np.int32), *(row.input_ids for row in rows)]).astype(np.int32)
        targets = np.concatenate([np.zeros(0, bool), *(row.is_target for row in rows)]).astype(bool)
        offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int64)
        num_targets = np.array([row.is_target.sum() for row in rows], dtype=np.int64)
        return cls([(TokenTable(tokens, targets, offsets, num_targets), np.arange(len(rows)))])

    def content_hash(self) -> str:
        """Hash of all tokens and target masks, in order."""
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
        """Index of the first row with a token id of at least so many, and that id; None without one."""
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
        """Which tokens of a row are special ones that the row says itself, not its template."""
        table, start, end = self._span(index)
        first, last = np.searchsorted(table.written, [start, end])
        found: list[int] = (table.written[first:last] - start).tolist()
        return found

    def place(self, index: int) -> str:
        """Where a row was read; empty where nobody knows."""
        pick, at = self._at(index)
        return self._places[pick](at) if self._places else ""

    def from_each(self, count: int) -> list[int]:
        """Indices of so many rows: the first of each table, then the second of each, in their order."""
        starts = np.concatenate([[0], self._ends[:-1]]).tolist() if self._picks else []
        in_turn = [
            (nth, start + nth)
            for start, end in zip(starts, self._ends.tolist(), strict=True)
            for nth in range(min(count, end - start))
        ]
        return sorted(index for _, index in sorted(in_turn)[:count])

    def _span(self, index: int) -> tuple[TokenTable, int, int]:
        """A row's table, and where in it the row's tokens begin and end."""
        pick, at = self._at(index)
        table, rows = self._picks[pick]
        return table, int(table.offsets[rows[at]]), int(table.offsets[rows[at] + 1])

    def _at(self, index: int) -> tuple[int, int]:
        """Which table, and which of the rows picked from it."""
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
