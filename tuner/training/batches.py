"""How the rows of an update are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of one trial's update, with what each is in the whole batch."""

    rows: tuple[int, ...]
    """Numbers of the training examples."""
    places: tuple[int, ...]
    """Place of each row in the update's batch: the counter of its dropout."""

    def halves(self) -> tuple[MicroBatch, MicroBatch]:
        """The same rows in two micro-batches."""
        middle = (len(self.rows) + 1) // 2
        return (
            MicroBatch(self.rows[:middle], self.places[:middle]),
            MicroBatch(self.rows[middle:], self.places[middle:]),
        )


def cut(rows: Sequence[int], lengths: np.ndarray, *, micro_tokens: int) -> list[MicroBatch]:
    """Cut a batch into micro-batches of rows of similar length, longest first.

    A micro-batch has at most `micro_tokens` tokens, padding included, but always at least one row.
    """
    order = sorted(range(len(rows)), key=lambda place: (-int(lengths[rows[place]]), place))
    parts: list[MicroBatch] = []
    while order:
        longest = max(1, int(lengths[rows[order[0]]]))
        part = order[: max(1, micro_tokens // longest)]
        order = order[len(part) :]
        parts.append(MicroBatch(tuple(rows[place] for place in part), tuple(part)))
    return parts
