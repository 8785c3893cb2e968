from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.data import batch_rows, examples

NUM_ROWS = st.integers(1, 60)
BATCH_SIZES = st.integers(1, 70)
SEEDS = st.integers(0, 2**40)
STEPS = st.integers(1, 40)


@given(NUM_ROWS, BATCH_SIZES, SEEDS, STEPS)
def test_batches_are_full_and_of_rows_that_exist(rows: int, size: int, seed: int, step: int) -> None:
    batch = batch_rows(rows, batch_size=size, seed=seed, step=step)
    assert len(batch) == size
    assert all(0 <= row < rows for row in batch)


@given(NUM_ROWS, BATCH_SIZES, SEEDS, st.integers(1, 4))
def test_every_row_comes_once_an_epoch(rows: int, size: int, seed: int, epochs: int) -> None:
    steps = -(-epochs * rows // size)
    stream = [
        r for step in range(1, steps + 1) for r in batch_rows(rows, batch_size=size, seed=seed, step=step)
    ]
    for epoch in range(epochs):
        assert Counter(stream[epoch * rows : (epoch + 1) * rows]) == Counter(range(rows))


@given(NUM_ROWS, st.integers(1, 12), st.integers(1, 4), SEEDS, STEPS)
def test_the_stream_does_not_depend_on_how_it_is_cut(
    rows: int, size: int, factor: int, seed: int, step: int
) -> None:
    whole = batch_rows(rows, batch_size=size * factor, seed=seed, step=step)
    first = (step - 1) * factor + 1
    pieces = [batch_rows(rows, batch_size=size, seed=seed, step=first + i) for i in range(factor)]
    assert whole == tuple(row for piece in pieces for row in piece)


@given(NUM_ROWS, BATCH_SIZES, SEEDS, STEPS)
def test_what_was_asked_before_changes_nothing(rows: int, size: int, seed: int, step: int) -> None:
    expected = batch_rows(rows, batch_size=size, seed=seed, step=step)
    np.random.seed(step)
    batch_rows(rows + 1, batch_size=size, seed=seed + 1, step=step)
    examples._permutation.cache_clear()
    assert batch_rows(rows, batch_size=size, seed=seed, step=step) == expected


def test_seeds_and_epochs_draw_different_orders() -> None:
    def epoch(seed: int, number: int) -> tuple[int, ...]:
        return batch_rows(1000, batch_size=1000, seed=seed, step=number)

    assert len({epoch(0, 1), epoch(0, 2), epoch(1, 1), epoch(1, 2)}) == 4


def test_the_order_is_the_one_that_finished_rounds_had() -> None:
    assert batch_rows(7, batch_size=10, seed=0, step=1) == (0, 3, 5, 1, 2, 6, 4, 3, 4, 2)
    assert batch_rows(7, batch_size=10, seed=0, step=2) == (1, 6, 5, 0, 4, 3, 6, 5, 2, 0)


@pytest.mark.parametrize(("rows", "size", "step"), [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_impossible_batches_are_refused(rows: int, size: int, step: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        batch_rows(rows, batch_size=size, seed=0, step=step)
