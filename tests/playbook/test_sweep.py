import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.playbook.sweep import (
    ComputeBound,
    FirstHorizon,
    FitPoint,
    LongerSweep,
    SweepProblem,
    SweepTrial,
    WiderSweep,
    answer_without_a_sweep,
    decide_sweep,
    default_grid,
    perfect_fit_step,
    widened_grid,
)


def sweep_trial(rate: float, *losses: float, infeasible: bool = False) -> SweepTrial:
    return SweepTrial(rate, tuple(FitPoint(10 * i, loss) for i, loss in enumerate(losses)), infeasible)


def decide(*trials, horizon=30, production=None, widenings=0):
    return decide_sweep(trials, max_train_steps=horizon, production_steps=production, widenings=widenings)


SLOW, FAST = sweep_trial(1e-4, 3, 1, 0.2, 0.04), sweep_trial(3e-4, 3, 1, 0.04, 0.01)
TOO_FAST = sweep_trial(1e-3, 3, 2, 2, 2)


def test_default_grid_is_eight_rates_at_equal_factors():
    grid = default_grid()
    assert (len(grid), grid[0], grid[-1]) == (8, 1e-5, 3e-3)
    factors = [later / sooner for sooner, later in itertools.pairwise(grid)]
    assert factors == pytest.approx([300 ** (1 / 7)] * 7, rel=0.01)


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([FitPoint(0, 3.0), FitPoint(10, 0.051), FitPoint(20, 0.05)], 20),
        ([FitPoint(0, 3.0, 0.2), FitPoint(10, 0.2, 0.99), FitPoint(20, 0.05, 1.0)], 10),
        ([FitPoint(10, 0.2, 0.989), FitPoint(20, 0.1, 0.99)], 20),
        ([FitPoint(0, 3.0), FitPoint(10, math.nan, None)], None),
        ([], None),
    ],
)
def test_perfect_fit_is_whichever_comes_first(points, expected):
    assert perfect_fit_step(points) == expected


def test_perfect_fit_can_be_set():
    points = [FitPoint(10, 0.5, 0.9)]
    assert perfect_fit_step(points, loss=0.5) == 10
    assert perfect_fit_step(points, accuracy=0.9) == 10


def test_the_fastest_fit_is_the_first_horizon():
    assert decide(SLOW, FAST, TOO_FAST) == FirstHorizon(20, 3e-4)
    deeper = sweep_trial(2e-4, 3, 1, 0.2, 0.0001)
    assert decide(SLOW, deeper, FAST, TOO_FAST) == FirstHorizon(20, 3e-4), "not the lowest loss"


def test_no_fit_doubles_the_steps_up_to_the_production_length():
    middle = sweep_trial(3e-4, 3, 1, 0.5, 0.2)
    trials = (sweep_trial(1e-4, 3, 2, 1, 0.5), middle, TOO_FAST)
    assert decide(*trials) == LongerSweep(60)
    assert decide(*trials, production=50) == LongerSweep(50)
    answer = decide(*trials, horizon=50, production=50)
    assert isinstance(answer, ComputeBound)
    assert answer.max_train_steps == 5


def test_a_set_that_cannot_be_seen_twice_needs_no_sweep():
    answer = answer_without_a_sweep(production_steps=200, batch_size=8, train_rows=801)
    assert answer is not None
    assert answer.max_train_steps == 20
    assert answer_without_a_sweep(production_steps=200, batch_size=8, train_rows=800) is None
    assert answer_without_a_sweep(production_steps=None, batch_size=8, train_rows=800) is None


def test_the_best_rate_on_the_edge_widens_the_grid_there():
    upper = decide(sweep_trial(1e-5, 3, 2, 1), SLOW, FAST)
    assert isinstance(upper, WiderSweep)
    assert min(upper.learning_rates) > 3e-4
    assert max(upper.learning_rates) == pytest.approx(3e-3)
    lower = decide(SLOW, sweep_trial(3e-4, 3, 2, 2, 2), TOO_FAST)
    assert isinstance(lower, WiderSweep)
    assert max(lower.learning_rates) < 1e-4
    assert min(lower.learning_rates) == pytest.approx(1e-5)


def test_an_edge_is_widened_before_the_steps_are_doubled():
    slow = [sweep_trial(rate, 3, 2, 1 - rate) for rate in (1e-6, 1e-5, 1e-4)]
    assert isinstance(decide(*slow), WiderSweep)


def test_infeasible_rates_above_the_best_make_it_no_edge():
    diverged = sweep_trial(1e-3, 3, 0.001, infeasible=True)
    assert decide(SLOW, FAST, diverged) == FirstHorizon(20, 3e-4)


def test_twice_widened_is_enough():
    assert isinstance(decide(sweep_trial(1e-5, 3, 2, 1), SLOW, FAST, widenings=1), WiderSweep)
    assert isinstance(decide(sweep_trial(1e-5, 3, 2, 1), SLOW, FAST, widenings=2), SweepProblem)


def test_all_infeasible_asks_for_lower_rates():
    answer = decide(sweep_trial(1e-4, infeasible=True), sweep_trial(1e-3, math.nan))
    assert isinstance(answer, WiderSweep)
    assert max(answer.learning_rates) < 1e-4
    assert isinstance(decide(), SweepProblem)


def test_a_widened_grid_is_as_dense():
    grid = default_grid()
    assert widened_grid(grid, at_top=True) == pytest.approx((6.46e-3, 1.39e-2, 3e-2), rel=0.01)
    assert widened_grid(grid, at_top=False) == pytest.approx((1e-6, 2.15e-6, 4.64e-6), rel=0.01)
    assert widened_grid([1e-4], at_top=True) == pytest.approx((1e-3,))


@given(
    curves=st.lists(st.lists(st.floats(0, 5) | st.just(math.nan), max_size=5), min_size=1, max_size=8),
    horizon=st.integers(1, 1000),
    production=st.none() | st.integers(1, 3000),
    widenings=st.integers(0, 2),
    random=st.randoms(),
)
def test_a_decision_is_bounded_and_does_not_depend_on_the_order(
    curves, horizon, production, widenings, random
):
    trials = [sweep_trial(1e-5 * 2**i, *losses) for i, losses in enumerate(curves)]
    decision = decide(*trials, horizon=horizon, production=production, widenings=widenings)
    shuffled = random.sample(trials, len(trials))
    assert decide(*shuffled, horizon=horizon, production=production, widenings=widenings) == decision
    match decision:
        case LongerSweep(steps):
            assert horizon < steps <= min(2 * horizon, production or math.inf)
        case FirstHorizon(steps, rate):
            assert steps >= 1
            assert min(t.learning_rate for t in trials) < rate < max(t.learning_rate for t in trials)
        case WiderSweep(rates):
            assert widenings < 2
            assert not {t.learning_rate for t in trials} & set(rates)
        case ComputeBound(steps):
            assert 1 <= steps <= max(1, production)
