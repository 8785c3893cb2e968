import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tuner.playbook.noise import (
    difference_error,
    loss_error,
    majority_probability,
    paired_standard_error,
    residual_spread,
)
from tuner.records import Direction, Evaluation, Objective


def evaluation(step: int, nll: np.ndarray, tokens: np.ndarray) -> Evaluation:
    return Evaluation(
        step,
        float(nll.sum() / tokens.sum()),
        example_nll=tuple(nll.tolist()),
        example_tokens=tuple(tokens.tolist()),
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [1e307, math.inf, math.nan])
def test_a_loss_that_is_no_number_has_no_standard_error(loss):
    tokens = np.array([1, 3, 2])
    huge = Evaluation(0, loss, example_nll=(loss, 1.0, 1.0), example_tokens=(1, 3, 2))
    sane = evaluation(10, np.array([2.0, 7.0, 3.0]), tokens)
    assert paired_standard_error(huge, sane) is None
    assert paired_standard_error(sane, huge) is None


def test_standard_error_agrees_with_the_bootstrap():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 80, 400)
    first = tokens * rng.normal(2.0, 0.5, 400)
    second = first + tokens * rng.normal(-0.1, 0.2, 400)
    rows = rng.integers(0, 400, (4000, 400))
    drawn = (first - second)[rows].sum(axis=1) / tokens[rows].sum(axis=1)
    error = paired_standard_error(evaluation(0, first, tokens), evaluation(5, second, tokens))
    assert error == pytest.approx(drawn.std(), rel=0.05)


def test_standard_error_of_equal_lengths_is_that_of_a_mean():
    tokens = np.full(50, 10)
    differences = np.random.default_rng(1).normal(0, 1, 50)
    error = paired_standard_error(evaluation(0, differences, tokens), evaluation(5, np.zeros(50), tokens))
    assert error == pytest.approx(stats.sem(differences / 10))


def test_a_change_common_to_every_token_has_no_error():
    tokens = np.array([3, 10, 200])
    nll = np.array([7.0, 11.0, 300.0])
    error = paired_standard_error(evaluation(0, nll, tokens), evaluation(5, nll - 0.25 * tokens, tokens))
    assert error == pytest.approx(0.0, abs=1e-12)


def test_only_the_same_two_or_more_examples_are_pairs():
    one = Evaluation(0, 1.0, example_nll=(1.0, 2.0), example_tokens=(1, 2))
    assert (
        paired_standard_error(one, Evaluation(5, 1.0, example_nll=(1.0, 2.0), example_tokens=(2, 1))) is None
    )
    assert paired_standard_error(Evaluation(0, 1.0), Evaluation(5, 1.0)) is None
    single = Evaluation(0, 1.0, example_nll=(1.0,), example_tokens=(1,))
    assert paired_standard_error(single, single) is None
    broken = Evaluation(5, math.nan, example_nll=(math.nan, 2.0), example_tokens=(1, 2))
    assert paired_standard_error(one, broken) is None


@given(shift=st.floats(-3, 3), seed=st.integers(0, 99))
def test_standard_error_ignores_a_shift_of_the_loss(shift, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 50, 20)
    one, other = tokens * rng.normal(2, 1, 20), tokens * rng.normal(2, 1, 20)
    before = paired_standard_error(evaluation(0, one, tokens), evaluation(5, other, tokens))
    moved = paired_standard_error(
        evaluation(0, one + shift * tokens, tokens), evaluation(5, other + shift * tokens, tokens)
    )
    assert moved == pytest.approx(before, rel=1e-6, abs=1e-9)


def test_residual_spread_takes_the_last_quarter_around_its_line():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 40)
    steps = np.arange(40)
    losses = 3.0 - 0.02 * steps + noise
    curve = [Evaluation(int(s), float(x)) for s, x in zip(steps, losses, strict=True)]
    fit = np.polyfit(steps[-10:], losses[-10:], 1)
    expected = math.sqrt(((losses[-10:] - np.polyval(fit, steps[-10:])) ** 2).sum() / 8)
    assert residual_spread(curve) == pytest.approx(expected)


def test_residual_spread_needs_four_finite_evaluations():
    curve = [Evaluation(step, loss) for step, loss in enumerate((3.0, 1.0, 2.0))]
    assert residual_spread(curve) is None
    assert residual_spread([*curve, Evaluation(3, math.nan)]) is None
    assert residual_spread([*curve, Evaluation(3, 5.0)]) > 0


def test_residual_spread_is_over_six_evaluations_where_there_are_as_many():
    line = [Evaluation(step, 9.0 - step) for step in range(1, 7)]
    assert residual_spread([Evaluation(0, 50.0), *line]) == pytest.approx(0.0, abs=1e-12)
    assert residual_spread([Evaluation(0, 50.0), *line[:4]]) > 1


def test_difference_error_falls_back_on_the_spread():
    curve = [Evaluation(i, loss) for i, loss in enumerate([3.0, 1.0, 2.0, 5.0])]
    assert difference_error(curve, curve[0], curve[1]) == residual_spread(curve)


def test_a_short_curve_has_the_errors_that_a_command_reported():
    curve = [Evaluation(i, 2.0 - i / 10, metrics={"eval_loss_se": 0.03 + i / 100}) for i in range(3)]
    assert difference_error(curve, curve[0], curve[1]) == pytest.approx(math.hypot(0.03, 0.04))
    assert loss_error(curve[1]) == 0.04
    longer = [*curve, Evaluation(3, 1.9, metrics={"eval_loss_se": 0.05})]
    assert difference_error(longer, longer[0], longer[1]) == residual_spread(longer)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        broken = Evaluation(1, 1.0, metrics={"eval_loss_se": wrong})
        assert loss_error(broken) is None
        assert difference_error(curve, curve[0], broken) is None
    accuracy = Objective("accuracy", Direction.MAXIMIZE)
    by_accuracy = [
        Evaluation(i, 1.0, metrics={"accuracy": 0.5, "accuracy_se": 0.1}, objective=accuracy) for i in (1, 2)
    ]
    assert difference_error(by_accuracy, *by_accuracy) == pytest.approx(math.hypot(0.1, 0.1))


@pytest.mark.parametrize(("count", "threshold"), [(5, 4), (8, 6), (10, 8), (20, 13)])
def test_consistently_means_these_shares(count, threshold):
    assert majority_probability(threshold, count) >= 0.9 > majority_probability(threshold - 1, count)


def test_majority_probability_is_that_of_jeffreys_prior():
    assert majority_probability(1, 1) == pytest.approx(0.5 + 1 / math.pi, abs=1e-14)
    assert majority_probability(2, 4) == pytest.approx(0.5, abs=1e-14)


@given(count=st.integers(0, 60), data=st.data())
def test_majority_grows_with_the_hits(count, data):
    hits = data.draw(st.integers(0, count))
    assert 0 <= majority_probability(hits, count) <= 1
    assert majority_probability(hits, count) + majority_probability(count - hits, count) == pytest.approx(1)
    if hits:
        assert majority_probability(hits, count) >= majority_probability(hits - 1, count)
