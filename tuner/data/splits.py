"""Which rows train, which are held out: a function of each row's text, so that equal rows stay together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tuner.data.examples import Examples
from tuner.data.row_table import RowTable
from tuner.data.sources import Source
from tuner.data.tokenise import Fate
from tuner.errors import DataError

_ROWS_AT_ONCE = 65_536
_MOST_HELD_OUT = 0.3
"""Of few rows: the others are for training."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some rows of one source."""

    source: Source
    table: RowTable
    rows: NDArray[np.int64]
    """Positions in the table, in file order."""
    path: str
    """What the round file calls the source, of which this is all or one file."""
    weight: float
    """The source's."""
    format: str = ""
    """The source's."""
    turns: RowTable | None = None
    """The same rows with targets on completions alone, where `table` has them on all tokens and these are
    asked for."""

    def kept(self) -> Part:
        """Return the part without rows that were dropped."""
        fates = self.table.fates[self.rows]
        return replace(self, rows=self.rows[(fates == Fate.KEPT) | (fates == Fate.TRUNCATED)])

    def digests(self) -> NDArray[np.uint64]:
        """Return [rows, 2] of the rows' text hashes."""
        return self.table.digests[self.rows]

    def place(self, index: int) -> str:
        """Return where a row was read."""
        return self.source.place(int(self.table.numbers[self.rows[index]]))


Parts = Sequence[Part]


def divide(parts: Parts, eval_fraction: float) -> tuple[list[Part], list[Part]]:
    """Divide rows into training and held-out ones, by the hash of their texts.

    Of rows that are alike but not equal, the hash of one speaks for all, so that they stay together.
    """
    held_out = places(parts) < eval_fraction
    ends = np.cumsum([len(part.rows) for part in parts])
    out = np.split(held_out, ends[:-1])
    train = [replace(part, rows=part.rows[~is_out]) for part, is_out in zip(parts, out, strict=True)]
    evaluation = [replace(part, rows=part.rows[is_out]) for part, is_out in zip(parts, out, strict=True)]
    return train, evaluation


def places(parts: Parts) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each row: rows below `eval_fraction` are held out."""
    found = np.concatenate([_position(part.digests()[:, 0]) for part in parts])
    likenesses = _halves(parts, "likenesses", 0)
    order = np.lexsort((_halves(parts, "digests", 1), likenesses))
    opens = np.diff(likenesses[order], prepend=~likenesses[order[:1]]) != 0
    del likenesses
    speaks = np.where(opens, np.arange(len(order)), 0)
    np.maximum.accumulate(speaks, out=speaks)
    found[order] = found[order[speaks]]
    return found


def share_to_hold_out(places: NDArray[np.float64], *, least: float, wanted_rows: int) -> float | None:
    """Return the smallest share, at least `least`, that holds out this many rows, or 30% of too few.

    Fewer rows, or a smaller share, where else none would be left; None where all rows stand in one place.
    """
    ordered = np.sort(places)
    wanted = max(1, min(wanted_rows, int(_MOST_HELD_OUT * len(ordered))))
    for num_rows, lowest in ((wanted, least), (1, least), (1, 0.0)):
        for digits in range(2, 17):
            share = max(lowest, (math.floor(ordered[num_rows - 1] * 10**digits) + 1) / 10**digits)
            if num_rows <= (ordered < share).sum() < len(ordered) and share < 1:
                return float(share)
    return None


def sample(parts: Parts, max_examples: int | None) -> list[Part]:
    """Return at most this many rows, those with the smallest hashes, in file order.

    So a larger sample contains a smaller one, and a row added to the file displaces one at most.
    """
    if max_examples is None:
        return list(parts)
    owner = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    chosen = np.sort(np.argsort(_halves(parts, "digests", 0), kind="stable")[:max_examples])
    starts = np.searchsorted(owner, np.arange(len(parts)))
    return [
        replace(part, rows=part.rows[chosen[owner[chosen] == index] - starts[index]])
        for index, part in enumerate(parts)
    ]


def weigh(part: Part, weight: float) -> Part:
    """Repeat rows per epoch by their weight.

    Of a fraction, the rows whose hash falls in it have one more: 2 is every row twice, 0.25 a fixed
    quarter of the rows, 1.5 every row once and half of them again.
    """
    if weight == 1:
        return part
    whole, fraction = divmod(weight, 1)
    times = int(whole) + (_position(part.digests()[:, 1]) < fraction)
    return replace(part, rows=np.repeat(part.rows, times))


@dataclass(frozen=True, slots=True)
class Overlap:
    """Rows that are in two of train, eval and test."""

    num_rows: int = 0
    """Of the first of the two."""
    explanation: str = ""
    """Which two, how many rows, and where the first one stands twice; empty when there is none."""


def overlap(name: str, parts: Parts, other_name: str, others: Parts) -> Overlap:
    """Return the rows of `parts` that are like a row of `others`."""
    likenesses = _both_halves(parts, "likenesses")
    shared = _among(likenesses, others, "likenesses")
    if not shared.any():
        return Overlap()
    equal = shared & _among(_both_halves(parts, "digests"), others, "digests")
    first = int(np.argmax(equal if equal.any() else shared))
    other = int(np.argmax((_both_halves(others, "likenesses") == likenesses[first]).all(axis=1)))
    num_shared, num_equal = int(shared.sum()), int(equal.sum())
    how = "word for word" if num_equal else "but for format, case, white space or Unicode form"
    more = f" ({num_equal} of them word for word)" if 0 < num_equal < num_shared else ""
    return Overlap(
        num_shared,
        f"{num_shared} of {len(shared)} {name} rows are {other_name} rows too"
        + (f"{more}; the first is " if more else f", {how}; the first is ")
        + f"{_place(parts, first)}, which equals {_place(others, other)}",
    )


def refuse_overlap(found: Overlap, *, has_test: bool) -> None:
    """Raise DataError if there is an overlap."""
    if not found.num_rows:
        return
    advice = "" if has_test else ", or give eval_fraction and no eval"
    raise DataError(
        f"{found.explanation}. A loss measured on training rows is not meaningful: remove these rows from "
        f"one of the two{advice}; or write `allow_overlap: true` under data to allow them"
    )


def duplicates(parts: Parts) -> int:
    """Count rows with the text of an earlier row; the examples of one long text are not duplicates."""
    first_halves = _halves(parts, "digests", 0)
    first_halves.sort()
    return int((np.diff(first_halves) == 0).sum()) - pieces(parts)


def pieces(parts: Parts) -> int:
    """Count the examples that continue the text of the previous one."""
    return sum(int(_goes_on(part.table)[part.rows].sum()) for part in parts)


def _goes_on(table: RowTable) -> NDArray[np.bool_]:
    same = np.zeros(len(table.fates), bool)
    same[1:] = table.numbers[1:] == table.numbers[:-1]
    same[1:] &= table.digests[1:, 0] == table.digests[:-1, 0]
    return same


def examples(parts: Parts) -> Examples:
    """Return the parts' rows, one part after the other."""
    return Examples([(part.table.tokens, part.rows) for part in parts], [part.place for part in parts])


_Kind = Literal["digests", "likenesses"]


def _halves(parts: Parts, kind: _Kind, half: int) -> NDArray[np.uint64]:
    """Return [rows] of one half of each hash: halves of two rows are equal by chance once in 2**64."""
    return np.concatenate([np.zeros(0, np.uint64), *(block[:, half] for block in _blocks(parts, kind))])


def _both_halves(parts: Parts, kind: _Kind) -> NDArray[np.uint64]:
    return np.concatenate([np.zeros((0, 2), np.uint64), *_blocks(parts, kind)])


def _blocks(parts: Parts, kind: _Kind) -> Iterator[NDArray[np.uint64]]:
    """Yield [rows, 2] of the hashes, some rows at a time, since they are memory-mapped."""
    for part in parts:
        hashes: NDArray[np.uint64] = getattr(part.table, kind)
        for begin in range(0, len(part.rows), _ROWS_AT_ONCE):
            yield hashes[part.rows[begin : begin + _ROWS_AT_ONCE]]


def _among(hashes: NDArray[np.uint64], others: Parts, kind: _Kind) -> NDArray[np.bool_]:
    """Whether each hash is one of the others."""
    ordered = np.sort(hashes[:, 0])
    found = [np.zeros((0, 2), np.uint64)]
    for block in _blocks(others, kind) if len(ordered) else ():
        nearest = np.searchsorted(ordered, block[:, 0]).clip(max=len(ordered) - 1)
        found.append(block[ordered[nearest] == block[:, 0]])
    return np.asarray(np.isin(hashes, np.concatenate(found)).all(axis=1), dtype=bool)


def _place(parts: Parts, index: int) -> str:
    for part in parts:
        if index < len(part.rows):
            return part.place(index)
        index -= len(part.rows)
    raise IndexError(index)


def _position(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Hashes as numbers from 0 to 1."""
    return hashes.astype(np.float64) * 2.0**-64
