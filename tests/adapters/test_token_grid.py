from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tuner.adapters.evaluation import grid, rows_by_length
from tuner.data import Example, Examples

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=12).map(np.array)


@st.composite
def rows(draw: st.DrawFn) -> Example:
    size = draw(st.integers(1, 9))
    is_target = [False, *draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1))]
    tokens = draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
    return Example(np.array(tokens, np.int32), np.array(is_target))


class TestGrid:
    @given(slots=st.lists(st.lists(rows(), min_size=1, max_size=4), min_size=1, max_size=4))
    def test_holds_every_row_and_every_target(self, slots: list[list[Example]]) -> None:
        laid = grid(slots, device=CPU, pad=77)
        height = max(len(part) for part in slots)
        assert laid.input_ids.shape[0] == len(slots) * height
        assert laid.input_ids.shape[1] == max(len(e.input_ids) for part in slots for e in part)
        targets = set(zip(laid.rows.tolist(), laid.columns.tolist(), strict=True))
        assert len(targets) == len(laid.rows)
        expected = set()
        for slot, part in enumerate(slots):
            for place, example in enumerate(part):
                row, size = slot * height + place, len(example.input_ids)
                assert laid.input_ids[row, :size].tolist() == example.input_ids.tolist()
                assert (laid.input_ids[row, size:] == 77).all()
                expected |= {(row, int(column)) for column in np.flatnonzero(example.is_target)}
            assert (laid.input_ids[slot * height + len(part) : (slot + 1) * height] == 77).all()
        assert targets == expected
        assert all(column >= 1 for _, column in targets)

    @given(slots=st.lists(st.lists(rows(), min_size=1, max_size=4), min_size=1, max_size=4))
    def test_sums_by_row(self, slots: list[list[Example]]) -> None:
        laid = grid(slots, device=CPU)
        counted = laid.sum_by_row(torch.ones(len(laid.rows)))
        assert counted.dtype == torch.float64
        height = max(len(part) for part in slots)
        targets = [[int(example.is_target.sum()) for example in part] for part in slots]
        assert counted.tolist() == [n for part in targets for n in [*part, *[0] * (height - len(part))]]

    def test_sums_do_not_lose_small_values(self) -> None:
        example = Example(np.arange(3, dtype=np.int32), np.array([False, True, True]))
        laid = grid([[example]], device=CPU)
        assert laid.sum_by_row(torch.tensor([1e8, 1.0])).tolist() == [1e8 + 1.0]


@given(lengths=LENGTHS, size=st.integers(1, 5))
def test_evaluation_batches(lengths: np.ndarray, size: int) -> None:
    examples = Examples.of(Example(np.zeros(n, np.int32), np.arange(n) > 0) for n in lengths)
    groups = rows_by_length(examples, rows=size)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(len(group) == size for group in groups[:-1])
    assert [lengths[row] for group in groups for row in group] == sorted(lengths, reverse=True)
