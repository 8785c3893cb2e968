"""Which rows train, which are held out: a function of each row's text, so that equal rows stay together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tuner.data.examples import Examples
from tuner.data.sources import Source
from tuner.data.table import RowTable
from tuner.data.tokenise import Fate
from tuner.errors import DataError


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

    def kept(self) -> Part:
        """Without the rows that were dropped."""
        fates = self.table.fates[self.rows]
        return replace(self, rows=self.rows[(fates == Fate.KEPT) | (fates == Fate.TRUNCATED)])

    def digests(self) -> NDArray[np.uint64]:
        """[rows, 2] of the rows' text hashes."""
        return self.table.digests[self.rows]

    def likenesses(self) -> NDArray[np.uint64]:
        """[rows, 2] of the hashes of what makes texts alike."""
        return self.table.likenesses[self.rows]

    def place(self, index: int) -> str:
        """Where the index-th of the rows was read."""
        return self.source.place(int(self.table.numbers[self.rows[index]]))


Parts = Sequence[Part]


def divide(parts: Parts, eval_fraction: float) -> tuple[list[Part], list[Part]]:
    """Training rows and held-out rows: a row is held out when the hash of its text says so.

    Of rows that are alike but not equal, the hash of one speaks for all, so that they stay together.
    """
    digests, likenesses = _digests(parts), _likenesses(parts)[:, 0]
    held_out = _position(digests[:, 0]) < eval_fraction
    order = np.lexsort((digests[:, 1], likenesses))
    opens = np.diff(likenesses[order], prepend=~likenesses[order[:1]]) != 0
    speakers = order[np.maximum.accumulate(np.where(opens, np.arange(len(order)), 0))]
    held_out[order] = held_out[speakers]
    ends = np.cumsum([len(part.rows) for part in parts])
    out = np.split(held_out, ends[:-1])
    train = [replace(part, rows=part.rows[~is_out]) for part, is_out in zip(parts, out, strict=True)]
    evaluation = [replace(part, rows=part.rows[is_out]) for part, is_out in zip(parts, out, strict=True)]
    return train, evaluation


def sample(parts: Parts, max_examples: int | None) -> list[Part]:
    """At most that many rows, those with the smallest hashes, in file order.

    So a larger sample contains a smaller one, and a row added to the file displaces one at most.
    """
    if max_examples is None:
        return list(parts)
    owner = np.repeat(np.arange(len(parts)), [len(part.rows) for part in parts])
    chosen = np.sort(np.argsort(_digests(parts)[:, 0], kind="stable")[:max_examples])
    starts = np.searchsorted(owner, np.arange(len(parts)))
    return [
        replace(part, rows=part.rows[chosen[owner[chosen] == index] - starts[index]])
        for index, part in enumerate(parts)
    ]


def weigh(part: Part, weight: float) -> Part:
    """Each row as many times an epoch as the weight says.

    Of a fraction, the rows whose hash falls in it have one more: 2 is every row twice, 0.25 a fixed
    quarter of the rows, 1.5 every row once and half of them again.
    """
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
    """Rows of `parts` that are like a row of `others`."""
    likenesses, other_likenesses = _likenesses(parts), _likenesses(others)
    shared = _both_in(likenesses, other_likenesses)
    if not shared.any():
        return Overlap()
    equal = shared & _both_in(_digests(parts), _digests(others))
    first = int(np.argmax(equal if equal.any() else shared))
    other = int(np.argmax((other_likenesses == likenesses[first]).all(axis=1)))
    num_shared, num_equal = int(shared.sum()), int(equal.sum())
    how = "word for word" if num_equal else "but for case, white space or Unicode form"
    more = f" ({num_equal} of them word for word)" if 0 < num_equal < num_shared else ""
    return Overlap(
        num_shared,
        f"{num_shared} of {len(shared)} {name} rows are {other_name} rows too"
        + (f"{more}; the first is " if more else f", {how}; the first is ")
        + f"{_place(parts, first)}, which equals {_place(others, other)}",
    )


def refuse_overlap(found: Overlap, *, has_test: bool) -> None:
    """Raises DataError when there is one."""
    if not found.num_rows:
        return
    advice = "" if has_test else ", or give eval_fraction and no eval"
    raise DataError(
        f"{found.explanation}. A loss measured on what was trained on says nothing: take these rows out of "
        f"one of the two{advice}; or write `allow_overlap: true` under data to measure it all the same"
    )


def duplicates(parts: Parts) -> int:
    """Rows whose text another row before them has; the examples of one long text are no duplicates."""
    first_halves = _digests(parts)[:, 0]
    return len(first_halves) - len(np.unique(first_halves)) - pieces(parts)


def pieces(parts: Parts) -> int:
    """Examples that go on with the text of the one before."""
    return sum(int(_goes_on(part.table)[part.rows].sum()) for part in parts)


def _goes_on(table: RowTable) -> NDArray[np.bool_]:
    same = np.zeros(len(table.fates), bool)
    same[1:] = (np.diff(table.numbers) == 0) & (np.diff(table.digests[:, 0]) == 0)
    return same


def examples(parts: Parts) -> Examples:
    """The parts' rows, one part after the other."""
    return Examples([(part.table.tokens, part.rows) for part in parts])


def _digests(parts: Parts) -> NDArray[np.uint64]:
    return np.concatenate([np.zeros((0, 2), np.uint64), *(part.digests() for part in parts)])


def _likenesses(parts: Parts) -> NDArray[np.uint64]:
    return np.concatenate([np.zeros((0, 2), np.uint64), *(part.likenesses() for part in parts)])


def _both_in(hashes: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether each hash is among others, half by half: halves of two hashes make a third only by chance."""
    return np.asarray(np.isin(hashes, others).all(axis=1), dtype=bool)


def _place(parts: Parts, index: int) -> str:
    for part in parts:
        if index < len(part.rows):
            return part.place(index)
        index -= len(part.rows)
    raise IndexError(index)


def _position(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Hashes as numbers from 0 to 1."""
    return hashes.astype(np.float64) * 2.0**-64
