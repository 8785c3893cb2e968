from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tuner.adapters.generation import batches

ROWS = st.lists(st.tuples(st.integers(1, 60), st.sampled_from([4, 16])), min_size=1, max_size=40)


@given(ROWS, st.integers(1, 300), st.one_of(st.none(), st.integers(1, 9)))
def test_every_prompt_is_in_one_batch_that_keeps_to_the_limits(
    rows: list[tuple[int, int]], budget: int, most: int | None
) -> None:
    prompt_tokens, new_tokens = zip(*rows, strict=True)
    found = batches(prompt_tokens, new_tokens, budget_tokens=budget, most_rows=most)
    assert sorted(at for batch in found for at in batch) == list(range(len(rows)))
    for batch in found:
        assert len({new_tokens[at] for at in batch}) == 1
        width = max(prompt_tokens[at] for at in batch) + new_tokens[batch[0]]
        assert len(batch) == 1 or len(batch) <= (most or budget // width)
    lengths = [prompt_tokens[at] for batch in found for at in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_as_many_as_fit() -> None:
    assert batches([3, 9, 2, 8], [1] * 4, budget_tokens=20, most_rows=None) == [[1, 3], [0, 2]]
    assert batches([3, 9, 2, 8], [1] * 4, budget_tokens=1, most_rows=None) == [[1], [3], [0], [2]]
    assert batches([3, 9, 2, 8], [1] * 4, budget_tokens=1, most_rows=3) == [[1, 3, 0], [2]]
