from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tuner.training.trial_run import MicroBatch, cut, cut_joined

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=12).map(np.array)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], np.ndarray]:
    """Rows of a batch, some of them twice, and all rows' lengths."""
    lengths = draw(LENGTHS)
    return draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=16)), lengths


class TestCut:
    @given(batch=batches(), micro_tokens=st.integers(1, 200))
    def test_every_place_once_within_the_limit(
        self, batch: tuple[list[int], np.ndarray], micro_tokens: int
    ) -> None:
        chosen, lengths = batch
        parts = cut(chosen, lengths, micro_tokens=micro_tokens)
        places = [place for part in parts for place in part.places]
        assert sorted(places) == list(range(len(chosen)))
        for part in parts:
            assert part.rows == tuple(chosen[place] for place in part.places)
            padded = len(part.rows) * max(lengths[list(part.rows)])
            assert padded <= micro_tokens or len(part.rows) == 1

    @given(batch=batches(), micro_tokens=st.integers(1, 200))
    def test_longest_first(self, batch: tuple[list[int], np.ndarray], micro_tokens: int) -> None:
        """The first pass takes the most memory: what does not fit fails early."""
        chosen, lengths = batch
        sizes = [
            lengths[row] for part in cut(chosen, lengths, micro_tokens=micro_tokens) for row in part.rows
        ]
        assert sizes == sorted(sizes, reverse=True)

    @given(batch=batches(), micro_tokens=st.integers(1, 200))
    def test_joined(self, batch: tuple[list[int], np.ndarray], micro_tokens: int) -> None:
        chosen, lengths = batch
        parts = cut_joined(chosen, lengths, micro_tokens=micro_tokens)
        assert sorted(place for part in parts for place in part.places) == list(range(len(chosen)))
        tokens = [int(lengths[list(part.rows)].sum()) for part in parts]
        assert tokens == sorted(tokens, reverse=True)
        for part, count in zip(parts, tokens, strict=True):
            assert part.rows == tuple(chosen[place] for place in part.places)
            assert count <= micro_tokens or len(part.rows) == 1

    @pytest.mark.parametrize(("num_trials", "most"), [(1, 0.001), (4, 0.22), (8, 0.25)])
    def test_padding_of_joined_rows_of_unlike_lengths(self, num_trials: int, most: float) -> None:
        """Lengths as Alpaca's at max_length 512, of which a grid has more padding than tokens."""
        draw = np.random.default_rng(0)
        lengths = np.clip(draw.lognormal(5.2, 0.7, 2000), 20, 512).astype(int)
        tokens = padded = 0
        waiting: list[list[int]] = [[] for _ in range(num_trials)]
        for _ in range(200):
            for queue in waiting:
                if not queue:
                    rows = draw.integers(0, len(lengths), 8).tolist()
                    parts = cut_joined(rows, lengths, micro_tokens=16_384 // num_trials)
                    queue += [int(lengths[list(part.rows)].sum()) for part in parts]
            sizes = [queue.pop(0) for queue in waiting]
            tokens, padded = tokens + sum(sizes), padded + num_trials * max(sizes)
        assert 1 - tokens / padded <= most

    @given(size=st.integers(2, 20))
    def test_halves(self, size: int) -> None:
        whole = MicroBatch(tuple(range(100, 100 + size)), tuple(range(size)))
        first, second = whole.halves()
        assert first.rows + second.rows == whole.rows
        assert first.places + second.places == whole.places
        assert 0 <= len(first.rows) - len(second.rows) <= 1


def test_rows_of_the_tests_have_targets() -> None:
    assert (tiny.examples(20).num_targets > 0).all()
