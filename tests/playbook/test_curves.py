import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.rounds import noisy_trial
from tests.playbook.rows import exact
from tests.playbook.strategies import curves
from tuner.playbook.curves import (
    may_rise_after_best,
    periodicity,
    plateau_step,
    restless_changes,
    rise_after_best,
    train_loss_rise,
    train_loss_still_falls,
)
from tuner.playbook.noise import is_number, smoothed
from tuner.records import Evaluation

GRID = tuple(range(0, 401, 10))


def curve(losses, trains=None) -> list[Evaluation]:
    trains = trains if trains is not None else [None] * len(losses)
    return [
        Evaluation(10 * i, float(loss), train_loss=train)
        for i, (loss, train) in enumerate(zip(losses, trains, strict=True))
    ]


def noisy(formula, seed=0, noise=0.001, train_slope=-1.0):
    rng = np.random.default_rng(seed)
    return noisy_trial(0, formula, GRID, rng, noise=noise, train_slope=train_slope).evaluations


def up_again(t):
    return 1.0 + 0.5 * np.exp(-t / 30) + 0.02 * np.maximum(0, t - 150) / 250


def level(t):
    return 1.0 + 0.5 * np.exp(-t / 30)


def test_a_lasting_rise_is_overfitting():
    rise = rise_after_best(noisy(up_again))
    assert rise is not None
    assert 100 <= rise.best_step <= 200
    assert rise.amount == pytest.approx(0.02, rel=0.25)
    assert rise.is_overfitting


@given(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=14), st.floats(1e-4, 0.5))
def test_only_curves_that_may_rise_do(losses, spread):
    """So that `study status` reads the losses of single examples of these alone."""
    evaluations = [exact(10 * at, loss, spread=spread) for at, loss in enumerate(losses)]
    if not may_rise_after_best(evaluations):
        assert rise_after_best(evaluations) is None
    bare = [replace(e, example_nll=(), example_tokens=()) for e in evaluations]
    assert may_rise_after_best(bare) == may_rise_after_best(evaluations)


def test_a_rise_with_the_train_loss_is_none():
    rise = rise_after_best(noisy(up_again, train_slope=1.0))
    assert rise is not None
    assert rise.train_loss_falls is False
    assert not rise.is_overfitting


def test_noise_on_a_level_curve_is_no_rise():
    assert sum(rise_after_best(noisy(level, seed=seed)) is not None for seed in range(100)) <= 2


def test_the_rise_is_judged_at_the_last_evaluation():
    assert rise_after_best(curve([3, 2, 1, 2, 3, 2, 1.001, 1.0])) is None
    rise = rise_after_best(curve([3, 2, 1, 1.1, 1.2, 1.3, 1.4, 1.5]))
    assert (rise.best_step, rise.last_step, rise.amount) == (20, 70, 0.5)
    assert rise.train_loss_falls is None
    assert rise.is_overfitting


@pytest.mark.parametrize(("amount", "is_rise"), [(0.0195, False), (0.0205, True)])
def test_a_rise_is_more_than_two_standard_errors(amount, is_rise):
    # Four examples whose differences are plus or minus the spread: its standard error is spread / sqrt(3).
    last = exact(80, 1.0 + amount, spread=0.01 * math.sqrt(3))
    rise = rise_after_best([exact(5, 3.0), exact(10, 2.0), exact(20, 1.0), exact(40, 1.0), last])
    assert (rise is not None) == is_rise


def test_a_last_evaluation_near_the_best_is_no_rise_whatever_came_before():
    losses = [3, 2, *np.linspace(1, 1.2, 20)]
    rising = [exact(10 * i, float(loss)) for i, loss in enumerate(losses)]
    assert rise_after_best(rising) is not None
    assert rise_after_best([*rising, exact(220, 1.02, spread=0.03)]) is None


def test_the_train_loss_is_compared_with_that_before_the_best_step():
    evaluations = curve([3, 2, 1, 1.1, 1.2, 1.3, 1.4, 1.5], [None, 3.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5])
    assert rise_after_best(evaluations).train_loss_falls is True


@given(curves(GRID))
def test_a_rise_is_significant_and_after_the_best(evaluations):
    rise = rise_after_best(evaluations)
    if rise is not None:
        assert rise.best_step < rise.last_step
        assert rise.amount > 2 * rise.standard_error


def test_plateau_of_a_noisy_curve_is_near_the_true_one():
    # 0.5 exp(-t / 30) is twice the standard error of 0.001 at t = 166.
    steps = [plateau_step(noisy(level, seed=seed)) for seed in range(30)]
    assert 150 <= np.median(steps) <= 180
    assert min(steps) >= 120
    assert max(steps) <= 230


@given(curves(GRID))
def test_plateau_is_an_evaluation(evaluations):
    step = plateau_step(evaluations)
    numbers = [e.step for e in evaluations if is_number(e.eval_loss)]
    assert (step is None) == (not numbers)
    assert step is None or step in numbers


def test_smoothing_keeps_lines_and_sparse_curves():
    line = curve([5 - math.log(max(1, 10 * i)) / 2 for i in range(20)])
    assert [e.eval_loss for e in smoothed(line)] == pytest.approx([e.eval_loss for e in line])
    sparse = curve([3, 1, 2])
    assert smoothed(sparse) == tuple(sparse)


def test_smoothing_takes_most_of_the_noise_and_leaves_out_what_is_not_finite():
    rough = noisy(level, noise=0.01)[20:]
    smooth = smoothed([*rough, Evaluation(410, math.nan)])
    assert len(smooth) == len(rough)
    assert np.std([e.eval_loss for e in smooth]) < 0.6 * np.std([e.eval_loss for e in rough])


def test_train_loss_that_still_falls():
    falling = curve([1.0] * 20, [None, *np.linspace(3, 1, 19)])
    rng = np.random.default_rng(0)
    flat = curve([1.0] * 20, [None, *np.linspace(3, 1, 9), *(1 + rng.normal(0, 0.1, 10))])
    assert train_loss_still_falls(falling) is True
    assert train_loss_still_falls(flat) is False
    assert train_loss_still_falls(curve([1.0, 1.0, 1.0])) is None


def trained(losses) -> list[Evaluation]:
    return curve([1.0] * (len(losses) + 1), [None, *losses])


def test_train_loss_rise_compares_the_quarters():
    assert train_loss_rise(trained([1, 2, 3, 4, 5, 6, 7, 8])) == pytest.approx(7.5 - 1.5)
    assert train_loss_rise(trained([8, 7, 6, 5, 4, 3, 2, 1])) == 0.0
    assert train_loss_rise(curve([1.0] * 3)) == 0.0


def test_the_scatter_of_batches_is_no_rise():
    rng = np.random.default_rng(0)
    level = [train_loss_rise(trained(rng.normal(2, 0.3, 12))) for _ in range(400)]
    doubling = [train_loss_rise(trained(rng.normal(2, 0.3, 12) + np.linspace(0, 2, 12))) for _ in range(400)]
    assert sum(rise > 0 for rise in level) < 0.06 * 400
    assert sum(rise > 0 for rise in doubling) > 0.98 * 400


def test_two_or_three_train_losses_cannot_show_a_rise():
    assert train_loss_rise(trained([1, 9])) == 0.0
    assert train_loss_rise(trained([1, 5, 9])) == 0.0
    assert train_loss_rise(trained([1, 3, 5, 7])) == 6.0


def test_restless_curves_go_significantly_up_and_down():
    calm, steep = noisy(level), noisy(lambda t: 3 - t / 200, noise=1e-6)
    wild = noisy(lambda t: 1 + 0.02 * (t / 10 % 2))
    assert restless_changes(calm)[0] <= 2
    assert restless_changes(steep) == (0, 11)
    assert restless_changes(noisy(lambda t: 1 + 3 * np.exp(-t / 100), noise=1e-6)) == (0, 11)
    assert restless_changes(noisy(lambda t: 1 + (t / 400) ** 4, noise=1e-6)) == (0, 11)
    assert restless_changes(wild) == (11, 11)
    assert restless_changes(curve([1.0])) == (0, 0)


def test_periodicity_finds_the_period_and_no_other():
    evaluations = noisy(lambda t: level(t) + 0.01 * np.sin(2 * np.pi * t / 60))
    assert periodicity(evaluations, 60) > 0.9
    assert periodicity(evaluations, 43) < 0.3
    assert periodicity(noisy(level), 60) < 0.5


def test_periodicity_is_unknown_where_evaluations_are_too_few():
    assert periodicity(noisy(level), 20) is None
    assert periodicity(noisy(level), 110) is None
    assert periodicity(curve([1.0] * 8), 30) is None


def test_a_curve_without_change_has_no_period():
    assert periodicity(curve([1.0] * 40), 60) == 0.0
