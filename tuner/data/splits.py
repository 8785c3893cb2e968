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

    def kept(self) -> Part:
        """Without the rows that were dropped."""
        fates = self.table.fates[self.rows]
        return replace(self, rows=self.rows[(fates == Fate.KEPT) | (fates == Fate.TRUNCATED)])

    def digests(self) -> NDArray[np.uint64]:
        """[rows, 2] of the rows' text hashes."""
        return self.table.digests[self.rows]

    def place(self, index: int) -> str:
        """Where the index-th of the rows was read."""
        return self.source.place(int(self.table.numbers[self.rows[index]]))


Parts = Sequence[Part]


def divide(parts: Parts, eval_fraction: float) -> tuple[list[Part], list[Part]]:
    """Training rows and held-out rows: a row is held out when the hash of its text says so."""
    held_out = [_position(part.digests()[:, 0]) < eval_fraction for part in parts]
    train = [replace(part, rows=part.rows[~out]) for part, out in zip(parts, held_out, strict=True)]
    evaluation = [replace(part, rows=part.rows[out]) for part, out in zip(parts, held_out, strict=True)]
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


def refuse_overlap(name: str, parts: Parts, other_name: str, others: Parts) -> None:
    """Raises DataError when a row's text is in both; counts them and shows the first."""
    digests, other_digests = _digests(parts), _digests(others)
    shared: NDArray[np.bool_] = np.asarray(np.isin(digests, other_digests).all(axis=1))
    if not shared.any():
        return
    first = int(np.argmax(shared))
    other = int(np.argmax((other_digests == digests[first]).all(axis=1)))
    advice = "" if "test" in (name, other_name) else ", or give eval_fraction and no eval"
    raise DataError(
        f"{int(shared.sum())} of {len(shared)} {name} rows are {other_name} rows too, word for word; the "
        f"first is {_place(parts, first)}, which equals {_place(others, other)}. A loss measured on what "
        f"was trained on says nothing: take these rows out of one of the two{advice}"
    )


def duplicates(parts: Parts) -> int:
    """Rows whose text another row before them has."""
    first_halves = _digests(parts)[:, 0]
    return len(first_halves) - len(np.unique(first_halves))


def examples(parts: Parts) -> Examples:
    """The parts' rows, one part after the other."""
    return Examples([(part.table.tokens, part.rows) for part in parts])


def _digests(parts: Parts) -> NDArray[np.uint64]:
    return np.concatenate([np.zeros((0, 2), np.uint64), *(part.digests() for part in parts)])


def _place(parts: Parts, index: int) -> str:
    for part in parts:
        if index < len(part.rows):
            return part.place(index)
        index -= len(part.rows)
    raise IndexError(index)


def _position(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Hashes as numbers from 0 to 1."""
    return hashes.astype(np.float64) * 2.0**-64
