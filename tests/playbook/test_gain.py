from dataclasses import replace

import pytest

from tests.playbook.rows import exact, round_of, trial_of
from tuner.playbook.gain import DEFAULT_RATIO, Gain, GainSource, measured_gain, seed_spread
from tuner.playbook.results import BranchResult, RoundResults
from tuner.playbook.selection import leading_trials
from tuner.records import Trial

SPARSE = (0, 25, 50, 100)


def power(step: int) -> float:
    return 2.0 + 1.0 * (step + 1e-9) ** -0.5 if step else 4.0


def gain_of(results: RoundResults, *earlier: RoundResults) -> Gain | None:
    return measured_gain(results, leading_trials(results.trials, results.max_train_steps), earlier)


def at_100(losses=power, **hyperparameters) -> Trial:
    return trial_of(0, losses, steps=SPARSE, **hyperparameters)


def earlier_round(horizon: int, loss: float, trial: Trial, **fields) -> RoundResults:
    run = replace(trial, evaluations=(exact(0, 4.0), exact(horizon, loss)), round="round0")
    return round_of(run, max_train_steps=horizon, name="round0", **fields)


def test_nothing_is_known_of_nothing():
    assert gain_of(round_of()) is None
    assert gain_of(round_of(trial_of(0, [3.0], steps=[100]))) is None


def test_trunk_of_a_constant_rate_is_the_whole_run():
    gain = gain_of(round_of(at_100()))
    half, whole, quarter = power(50), power(100), power(25)
    assert gain.source == GainSource.TRUNK
    assert (gain.from_steps, gain.to_steps) == (50, 100)
    assert gain.relative == pytest.approx((half - whole) / half)
    assert gain.previous == pytest.approx((quarter - half) / quarter)
    assert gain.ratio == pytest.approx(gain.relative / gain.previous)


def test_gain_of_a_trunk_is_carried_on_to_the_horizon():
    steps = (0, 15, 30, 60, 100)
    gain = gain_of(round_of(trial_of(0, power, steps=steps, schedule="linear", decay_steps=40)))
    measured = (power(30) - power(60)) / power(30)
    before = (power(15) - power(30)) / power(15)
    assert (gain.from_steps, gain.to_steps) == (30, 60)
    assert gain.relative == pytest.approx(measured * (measured / before) ** 0.737, rel=1e-3)
    assert gain.ratio == pytest.approx(measured / before)


def test_the_decay_does_not_touch_the_trunk():
    steps = tuple(range(0, 101, 2))
    plain = trial_of(0, power, steps=steps, schedule="linear", decay_steps=40)
    decayed = trial_of(
        0, lambda s: power(s) - 0.5 * max(0, s - 60) / 40, steps=steps, schedule="linear", decay_steps=40
    )
    assert gain_of(round_of(plain)) == gain_of(round_of(decayed))


def test_cosine_without_another_horizon_is_confounded():
    gain = gain_of(round_of(at_100(schedule="cosine")))
    assert gain.source == GainSource.CONFOUNDED
    assert gain.relative == pytest.approx((power(50) - power(100)) / power(50))


def test_a_warmup_beyond_half_the_trunk_leaves_the_whole_run():
    gain = gain_of(round_of(at_100(schedule="linear", decay_steps=50, warmup_steps=40)))
    assert gain.source == GainSource.CONFOUNDED


def test_an_earlier_round_comes_first():
    trial = at_100(schedule="linear", decay_steps=40)
    branch = BranchResult(0, 50, (exact(50, 2.5),))
    now = round_of(trial, branches=(branch,))
    gain = gain_of(now, earlier_round(50, 2.4, trial))
    assert gain.source == GainSource.EARLIER_ROUND
    assert gain.relative == pytest.approx((2.4 - power(100)) / 2.4)
    assert gain.previous is None
    assert gain.ratio == DEFAULT_RATIO
    assert gain_of(now).source == GainSource.DECAY_BRANCHES


def test_an_earlier_round_needs_the_same_hyperparameters_and_workload():
    trial = at_100()
    other = replace(trial, hyperparameters={**trial.hyperparameters, "learning_rate": 1.0})
    reseeded = replace(trial, hyperparameters={**trial.hyperparameters, "training_seed": 1})
    recut = replace(trial, hyperparameters={**trial.hyperparameters, "decay_steps": 20})
    now = round_of(trial)
    assert gain_of(now, earlier_round(50, 2.4, other)).source == GainSource.TRUNK
    assert gain_of(now, earlier_round(50, 2.4, reseeded)).source == GainSource.TRUNK
    assert gain_of(now, earlier_round(50, 2.4, trial, workload="v")).source == GainSource.TRUNK
    assert gain_of(now, earlier_round(100, 2.4, trial)).source == GainSource.TRUNK
    assert gain_of(now, earlier_round(50, 2.4, recut)).source == GainSource.EARLIER_ROUND


def test_two_earlier_rounds_give_the_gain_before():
    trial = at_100()
    gain = gain_of(round_of(trial), earlier_round(50, 2.5, trial), earlier_round(25, 3.2, trial))
    assert gain.previous == pytest.approx(0.7 / 3.2)
    assert gain.ratio == pytest.approx(gain.relative / (0.7 / 3.2))


def test_the_best_trial_that_was_run_before_is_compared():
    best, second = at_100(), trial_of(1, lambda s: 1.01 * power(s), steps=SPARSE)
    gain = gain_of(round_of(best, second), earlier_round(50, 2.4, second))
    assert (gain.source, gain.trial) == (GainSource.EARLIER_ROUND, 1)


def test_a_third_of_the_horizon_is_brought_to_one_doubling():
    trial = at_100()
    gain = gain_of(round_of(trial), earlier_round(33, 2.4, trial))
    share = (1 / 0.7 - 1) / ((1 / 0.7) ** 1.599 - 1)
    assert gain.relative == pytest.approx(share * (2.4 - power(100)) / 2.4, rel=1e-3)


def test_a_horizon_of_a_tenth_says_nothing_of_the_last_doubling():
    trial = at_100()
    assert gain_of(round_of(trial), earlier_round(10, 2.4, trial)).source == GainSource.TRUNK


def test_branches_at_the_half_and_at_the_root_give_both_gains():
    branches = (BranchResult(0, 50, (exact(50, 2.28),)), BranchResult(0, 71, (exact(71, 2.18),)))
    trial = at_100(lambda s: 4.0 - 1.87 * s / 100, schedule="linear", decay_steps=40)
    gain = gain_of(round_of(trial, branches=branches))
    assert gain.source == GainSource.DECAY_BRANCHES
    assert gain.relative == pytest.approx((2.28 - 2.13) / 2.28)
    assert gain.ratio == pytest.approx(0.25)  # half the gain in half a doubling


@pytest.mark.parametrize(("shorter", "expected"), [(50, True), (48, True), (45, False), (40, False)])
def test_about_a_doubling_is_one(shorter, expected):
    assert Gain(0.02, 0.001, None, GainSource.EARLIER_ROUND, 0, shorter, 100).is_of_a_doubling == expected


def test_ratio_is_clipped():
    gain = Gain(0.02, 0.001, 0.01, GainSource.TRUNK, 0, 50, 100)
    assert gain.ratio == 0.9
    assert replace(gain, relative=-0.01).ratio == 0.0
    assert replace(gain, previous=None).ratio == 0.7
    assert replace(gain, previous=-0.01).ratio == 0.7
    assert replace(gain, previous=0.04).at(2) == pytest.approx(0.01)


def test_spread_between_seeds_is_pooled_and_relative():
    trials = [
        trial_of(i, [4.0, loss], steps=[0, 100], learning_rate=rate, training_seed=seed)
        for i, (loss, rate, seed) in enumerate(
            [(1.98, 1e-4, 0), (2.02, 1e-4, 1), (3.0, 1e-3, 0), (3.0, 1e-3, 1), (9.0, 1e-2, 0)]
        )
    ]
    # Relative deviations of -1% and 1%, and of 0 and 0, with two degrees of freedom.
    assert seed_spread(trials) == pytest.approx(0.01)
    assert seed_spread(trials[2:]) == 0.0
    assert seed_spread(trials[::2]) == 0.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [0.0, 5e-324, -1.0])
def test_nothing_is_relative_to_a_loss_of_nothing(loss):
    trials = [trial_of(i, [3.0, loss], steps=[0, 100], learning_rate=1e-4, training_seed=i) for i in range(3)]
    assert seed_spread(trials) == 0.0
    halves = trial_of(0, [3.0, loss, loss], steps=[0, 50, 100])
    assert gain_of(round_of(halves)) is None
