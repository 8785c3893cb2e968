"""Which rows an update trains on: a function of the seed and the step, and of nothing else."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def batch_rows(num_rows: int, *, batch_size: int, seed: int, step: int) -> tuple[int, ...]:
    """The rows of update `step` (1-based), in order.

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
    """A permutation of the rows.

    Sorting raw output of the bit generator, and not `Generator.permutation`: numpy promises the
    same stream for ever only for bit generators (NEP 19), and a resumed trial may meet a newer numpy.
    """
    keys = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(num_rows)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order
