import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.playbook.results import final_score, scored_before, scored_trials
from tuner.records import FinalScore, Trial

SCORE = FinalScore(
    step=20, loss=1.0, standard_error=0.1, num_examples=4, num_tokens=9, rows="abc", scored_at=1.0
)


def scored(number: int, at: float, rows: str = "abc", round: str = "round1") -> Trial:
    return Trial(round, number, {}, final_score=replace(SCORE, scored_at=at, rows=rows))


def test_the_loss_is_a_ratio_of_sums_and_its_error_that_of_a_mean_where_rows_are_equally_long():
    score = final_score((1.0, 3.0, 2.0, 6.0), (1, 1, 1, 1), step=20, rows="abc", scored_at=5.0)
    deviation = math.sqrt((4 + 0 + 1 + 9) / 3)
    assert score == FinalScore(20, 3.0, pytest.approx(deviation / 2), 4, 4, "abc", 5.0)
    assert final_score((2.0, 9.0), (1, 2), step=20, rows="abc", scored_at=5.0).loss == 11 / 3


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 90)), min_size=1, max_size=8), st.floats(0.5, 2))
def test_a_loss_that_is_the_same_in_every_token_has_no_error(rows, loss):
    tokens = [number for _, number in rows]
    same = final_score([loss * n for n in tokens], tokens, step=0, rows="", scored_at=0.0)
    assert same.loss == pytest.approx(loss)
    assert same.standard_error == (pytest.approx(0.0, abs=1e-9) if len(rows) > 1 else None)
    other = final_score([nll for nll, _ in rows], tokens, step=0, rows="", scored_at=0.0)
    assert (other.standard_error is None) == (len(rows) == 1)


def test_the_first_look_at_rows_is_unbiased_and_later_ones_name_those_before():
    first, other_rows, second = (
        scored(3, at=10.0),
        scored(1, at=20.0, rows="x"),
        scored(0, 30.0, round="round2"),
    )
    order = scored_trials([second, Trial("round1", 2, {}), other_rows, first])
    assert order == (first, other_rows, second)
    assert [scored_before(trial, order) for trial in order] == [(), (), (first,)]
    assert scored_before(Trial("round1", 2, {}), order) == ()
