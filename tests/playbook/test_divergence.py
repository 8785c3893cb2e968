import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.playbook.pruning import divergence_limit, is_diverged
from tuner.records import Evaluation

VOCABULARY = 32_000
BASE = 2.0


def curve(*losses: float) -> list[Evaluation]:
    return [Evaluation(10 * i, loss) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("base", "vocabulary", "expected"),
    [
        (2.0, 32_000, 4.0),  # half-way to ln V is 6.19, twice the base less
        (8.0, 32_000, (8.0 + math.log(32_000)) / 2),
        (10.0, 32_000, 11.0),  # half-way is 10.19, less than 1.1 of the base
        (4.0, 20, 4.4),  # worse than a guess from the start
    ],
)
def test_limit(base, vocabulary, expected):
    assert divergence_limit(base, vocabulary) == pytest.approx(expected)


def test_three_in_a_row_above_the_limit_are_infeasible():
    reason = is_diverged(curve(BASE, 4.01, 4.02, 4.03), VOCABULARY)
    assert reason is not None
    assert "step 30" in reason
    assert "4.000" in reason


def test_two_in_a_row_are_not():
    assert is_diverged(curve(BASE, 4.1, 4.2), VOCABULARY) is None
    assert is_diverged(curve(BASE, 4.1, 4.2, 3.0, 4.1, 4.2, 3.0), VOCABULARY) is None


def test_the_limit_itself_is_not_above():
    assert is_diverged(curve(BASE, 4.0, 4.0, 4.0, 4.0), VOCABULARY) is None


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_one_loss_that_is_not_finite_is_enough(loss):
    assert f"{loss} at step 10" in is_diverged(curve(BASE, loss), VOCABULARY)


def test_nothing_to_see_is_not_infeasible():
    assert is_diverged([], VOCABULARY) is None


@given(st.lists(st.floats(0.01, 20.0), min_size=1, max_size=12), st.floats(0.01, 20.0))
def test_once_infeasible_stays_infeasible(losses, later):
    if is_diverged(curve(*losses), VOCABULARY) is not None:
        assert is_diverged(curve(*losses, later), VOCABULARY) is not None


@given(st.floats(0.01, 20.0), st.integers(2, 200_000))
def test_the_untouched_model_is_feasible(base, vocabulary):
    assert is_diverged(curve(base, base, base, base), vocabulary) is None
    assert 1.1 * base <= divergence_limit(base, vocabulary) + 1e-12 <= 2 * base + 2e-12
