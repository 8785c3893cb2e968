from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tuner.data import Example, Examples

ROWS = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=6), max_size=6)


def example(row: list[tuple[int, bool]]) -> Example:
    return Example(
        np.array([token for token, _ in row], np.int32), np.array([target for _, target in row], bool)
    )


@given(ROWS)
def test_examples_hold_what_they_were_made_of(rows: list[list[tuple[int, bool]]]) -> None:
    examples = Examples.of(example(row) for row in rows)
    assert len(examples) == len(rows)
    read = [list(zip(e.input_ids.tolist(), e.is_target.tolist(), strict=True)) for e in examples]
    assert read == rows
    assert examples.num_tokens.tolist() == [len(row) for row in rows]
    assert examples.num_targets.tolist() == [sum(target for _, target in row) for row in rows]


@given(ROWS, st.data())
def test_picked_rows_equal_the_same_rows_copied(
    rows: list[list[tuple[int, bool]]], data: st.DataObject
) -> None:
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8)) if rows else []
    whole = Examples.of(example(row) for row in rows)
    picked = Examples([(whole._picks[0][0], np.array(picks, np.int64))])
    copied = Examples.of(example(rows[pick]) for pick in picks)
    assert picked.content_hash() == copied.content_hash()
    assert picked.num_tokens.tolist() == copied.num_tokens.tolist()


@given(ROWS, ROWS)
def test_different_examples_have_different_hashes(
    rows: list[list[tuple[int, bool]]], others: list[list[tuple[int, bool]]]
) -> None:
    hashes = [Examples.of(example(row) for row in r).content_hash() for r in (rows, others)]
    assert (hashes[0] == hashes[1]) == (rows == others)


def test_slices_and_negative_indices() -> None:
    examples = Examples.of([example([(1, False)]), example([(2, False), (3, True)])])
    assert [e.input_ids.tolist() for e in examples[0:2]] == [[1], [2, 3]]
    assert examples[-1].input_ids.tolist() == [2, 3]
