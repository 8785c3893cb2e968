import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.rows import exact, round_of, trial_of
from tuner.playbook.gain import (
    DEFAULT_RATIO,
    Gain,
    GainSource,
    measured_gain,
    seed_spread,
    wants_comparison,
)
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


def log_ratio(*losses: float) -> float:
    first, second, third = losses
    return math.log(second / third) / math.log(first / second)


def test_stable_phase_of_a_constant_rate_is_the_whole_run():
    gain = gain_of(round_of(at_100()))
    half, whole, quarter = power(50), power(100), power(25)
    assert gain.source == GainSource.STABLE_PHASE
    assert (gain.from_steps, gain.to_steps) == (50, 100)
    assert gain.relative == pytest.approx((half - whole) / half)
    assert gain.ratio == pytest.approx(log_ratio(quarter, half, whole))


def test_gain_before_a_decay_is_that_of_the_stable_phase_and_not_carried_on():
    steps = (0, 15, 30, 60, 100)
    gain = gain_of(round_of(trial_of(0, power, steps=steps, schedule="linear", decay_steps=40)))
    assert gain.source == GainSource.BEFORE_DECAY
    assert (gain.from_steps, gain.to_steps) == (30, 60)
    assert gain.relative == pytest.approx((power(30) - power(60)) / power(30))
    assert gain.ratio == pytest.approx(log_ratio(power(15), power(30), power(60)))


def test_the_decay_does_not_touch_the_stable_phase():
    steps = tuple(range(0, 101, 2))
    plain = trial_of(0, power, steps=steps, schedule="linear", decay_steps=40)
    decayed = trial_of(
        0, lambda s: power(s) - 0.5 * max(0, s - 60) / 40, steps=steps, schedule="linear", decay_steps=40
    )
    assert gain_of(round_of(plain)) == gain_of(round_of(decayed))


@pytest.mark.parametrize(
    ("hyperparameters", "is_known"),
    [
        ({"schedule": "cosine"}, False),
        ({"schedule": "linear", "decay_steps": 41}, False),
        ({"schedule": "linear", "decay_steps": 40}, True),
        ({"schedule": "linear", "decay_steps": 40, "warmup_steps": 55}, False),
        ({"schedule": "linear", "decay_steps": 0}, True),
    ],
)
def test_what_lies_within_a_decay_gives_no_number(hyperparameters, is_known):
    trial = trial_of(0, power, steps=tuple(range(0, 101, 2)), **hyperparameters)
    assert (gain_of(round_of(trial)) is not None) is is_known


def test_forty_percent_are_meant_to_the_rounding_of_whole_steps():
    trial = trial_of(0, power, steps=tuple(range(0, 46, 3)), schedule="linear", decay_steps=18)
    longer = replace(trial, hyperparameters={**trial.hyperparameters, "decay_steps": 19})
    assert gain_of(round_of(trial, max_train_steps=45)) is not None
    assert gain_of(round_of(longer, max_train_steps=45)) is None


def test_a_comparison_run_comes_first():
    trial = at_100(schedule="linear", decay_steps=40)
    half = replace(trial, hyperparameters={**trial.hyperparameters, "decay_steps": 20})
    now = round_of(trial, branches=(BranchResult(0, 50, (exact(50, 2.5),)),))
    gain = gain_of(now, earlier_round(50, 2.4, half))
    assert gain.source == GainSource.COMPARISON
    assert gain.relative == pytest.approx((2.5 - power(100)) / 2.5)
    assert gain.ratio == DEFAULT_RATIO
    assert gain_of(round_of(trial), earlier_round(50, 2.4, half)).source == GainSource.EARLIER_ROUND


def test_one_evaluation_that_both_runs_have_is_not_certain():
    """The shorter run handed the best one on: what came after it tells how certain the gain of 0 is."""

    def after(spread: float) -> Gain:
        best, end = exact(20, 2.0), exact(100, 2.1, spread=spread)
        trial = replace(at_100(schedule="cosine"), evaluations=(exact(0, 4.0), best, end))
        return gain_of(round_of(trial, branches=(BranchResult(0, 50, (best, exact(50, 2.2))),)))

    assert after(0.2).relative == after(0.0).relative == 0.0
    assert after(0.2).standard_error == pytest.approx(0.2 / math.sqrt(3) / 2.0)
    assert after(0.0).standard_error is None


def test_a_round_of_the_same_horizon_hands_its_comparison_run_on():
    """Rates were widened at the same horizon, and the best trial is still the same."""
    trial = at_100(schedule="linear", decay_steps=40)
    before = round_of(trial, name="round0", branches=(BranchResult(0, 50, (exact(50, 2.5),)),))
    number_3 = replace(trial, number=3)
    now = round_of(number_3)
    gain = gain_of(now, before)
    assert (gain.source, gain.trial, gain.from_steps) == (GainSource.COMPARISON, 3, 50)
    assert gain.relative == pytest.approx((2.5 - power(100)) / 2.5)
    leading = leading_trials(now.trials, 100)
    assert wants_comparison(now, leading)
    assert not wants_comparison(now, leading, [before])
    for other in (
        replace(before, workload="v"),
        replace(before, max_train_steps=90),
        replace(before, branches=()),
    ):
        assert wants_comparison(now, leading, [other])
    reseeded = round_of(replace(trial, hyperparameters={**trial.hyperparameters, "training_seed": 1}))
    assert wants_comparison(reseeded, leading_trials(reseeded.trials, 100), [before])


def test_an_earlier_round_gives_a_comparison_run_the_gain_before():
    trial = at_100(schedule="cosine")
    now = round_of(trial, branches=(BranchResult(0, 50, (exact(50, 2.5),)),))
    gain = gain_of(now, earlier_round(25, 3.5, trial))
    assert (gain.source, gain.from_steps) == (GainSource.COMPARISON, 50)
    assert gain.ratio == pytest.approx(log_ratio(3.5, 2.5, power(100)))


def test_the_stable_phase_of_a_constant_rate_comes_before_an_earlier_round():
    assert gain_of(round_of(at_100()), earlier_round(50, 2.4, at_100())).source == GainSource.STABLE_PHASE


def test_an_earlier_round_needs_the_same_hyperparameters_share_and_workload():
    trial = at_100(schedule="linear", decay_steps=60)

    def changed(**values) -> Trial:
        return replace(trial, hyperparameters={**trial.hyperparameters, "decay_steps": 30, **values})

    now = round_of(trial)
    assert gain_of(now, earlier_round(50, 2.4, changed())).source == GainSource.EARLIER_ROUND
    assert gain_of(now, earlier_round(50, 2.4, changed(decay_steps=29))).source == GainSource.EARLIER_ROUND
    assert gain_of(now, earlier_round(50, 2.4, changed(decay_steps=20))) is None
    assert gain_of(now, earlier_round(50, 2.4, changed(decay_steps=60))) is None
    assert gain_of(now, earlier_round(50, 2.4, changed(learning_rate=1.0))) is None
    assert gain_of(now, earlier_round(50, 2.4, changed(training_seed=1))) is None
    assert gain_of(now, earlier_round(50, 2.4, changed(), workload="v")) is None
    assert gain_of(now, earlier_round(100, 2.4, trial)) is None


def test_two_earlier_rounds_give_the_gain_before():
    trial = at_100(schedule="cosine")
    gain = gain_of(round_of(trial), earlier_round(50, 2.5, trial), earlier_round(25, 3.2, trial))
    assert gain.ratio == pytest.approx(log_ratio(3.2, 2.5, power(100)))


def test_the_best_trial_that_was_run_before_is_compared():
    best = at_100(schedule="cosine")
    second = trial_of(1, lambda s: 1.01 * power(s), steps=SPARSE, schedule="cosine")
    gain = gain_of(round_of(best, second), earlier_round(50, 2.4, second))
    assert (gain.source, gain.trial) == (GainSource.EARLIER_ROUND, 1)


@pytest.mark.parametrize(
    ("schedule", "earlier_horizon", "expected"),
    [("constant", None, False), ("cosine", None, True), ("cosine", 50, False), ("cosine", 41, False),
     ("cosine", 39, True), ("cosine", 62, False), ("cosine", 64, True)],
)  # fmt: skip
def test_a_decayed_round_wants_a_comparison_unless_an_earlier_one_stands_for_half(
    schedule, earlier_horizon, expected
):
    results = round_of(at_100(schedule=schedule))
    earlier = [earlier_round(earlier_horizon, 2.4, at_100(schedule=schedule))] if earlier_horizon else []
    assert wants_comparison(results, leading_trials(results.trials, 100), earlier) is expected


@pytest.mark.parametrize("horizons", [(100, 150, 200), (50, 100, 200), (100, 141, 200), (90, 300, 600)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.8, 0.9, 0.97])
def test_the_ratio_of_an_exact_series_is_found_at_any_three_horizons(horizons, ratio):
    """Losses whose logarithm falls by a geometric series over the doublings."""

    def at(horizon: int) -> float:
        return 2.0 * math.exp(0.2 * ratio ** math.log2(horizon / horizons[0]))

    trial = trial_of(0, [4.0, at(horizons[2])], steps=[0, horizons[2]], schedule="cosine")
    earlier = [earlier_round(h, at(h), trial) for h in horizons[:2]]
    gain = gain_of(round_of(trial, max_train_steps=horizons[2]), *earlier)
    assert gain.ratio == pytest.approx(min(0.9, ratio), abs=1e-9)


@given(st.floats(0.02, 0.89), st.floats(0.001, 0.5), st.floats(1.2, 3.0))
def test_an_exact_series_is_carried_on_exactly(ratio, size, multiple):
    def at(horizon: float) -> float:
        return 2.0 * math.exp(size * ratio ** math.log2(horizon / 50))

    trial = trial_of(0, [9.0, at(200)], steps=[0, 200], schedule="cosine")
    gain = gain_of(round_of(trial, max_train_steps=200), *(earlier_round(h, at(h), trial) for h in (50, 100)))
    assert gain.to(multiple) == pytest.approx(1 - at(200 * multiple) / at(200), rel=1e-6, abs=1e-12)
    assert gain.at(multiple) == pytest.approx(
        1 - at(200 * multiple) / at(100 * multiple), rel=1e-6, abs=1e-12
    )


def test_a_third_of_the_horizon_is_brought_to_one_doubling():
    trial = at_100(schedule="cosine")
    gain = gain_of(round_of(trial), earlier_round(33, 2.4, trial))
    share = (1 / 0.7 - 1) / ((1 / 0.7) ** 1.599 - 1)
    assert gain.relative == pytest.approx(1 - (power(100) / 2.4) ** share, rel=1e-3)


def test_a_horizon_of_a_tenth_says_nothing_of_the_last_doubling():
    trial = at_100(schedule="cosine")
    assert gain_of(round_of(trial), earlier_round(10, 2.4, trial)) is None


def test_branches_at_the_half_and_at_the_root_give_both_gains():
    branches = (BranchResult(0, 50, (exact(50, 2.28),)), BranchResult(0, 71, (exact(71, 2.18),)))
    trial = at_100(lambda s: 4.0 - 1.87 * s / 100, schedule="linear", decay_steps=40)
    gain = gain_of(round_of(trial, branches=branches))
    assert gain.source == GainSource.COMPARISON
    assert gain.relative == pytest.approx((2.28 - 2.13) / 2.28)
    assert gain.ratio == pytest.approx(0.28, abs=0.02)  # half the drop in half a doubling


@pytest.mark.parametrize(("shorter", "expected"), [(50, True), (48, True), (45, False), (40, False)])
def test_about_a_doubling_is_one(shorter, expected):
    assert Gain(0.02, 0.001, GainSource.EARLIER_ROUND, 0, shorter, 100).is_of_a_doubling == expected


def test_a_loss_that_rose_before_leaves_the_usual_ratio_and_one_that_rises_now_stops_the_series():
    trial = at_100(schedule="cosine")
    rose = gain_of(round_of(trial), earlier_round(50, 3.0, trial), earlier_round(25, 2.5, trial))
    assert rose.ratio == DEFAULT_RATIO
    rises = gain_of(round_of(trial), earlier_round(50, 2.05, trial), earlier_round(25, 2.5, trial))
    assert (rises.relative < 0, rises.ratio) == (True, 0.0)
    assert replace(rises, ratio=0.7).to(2.0) < 0


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
    assert seed_spread(trials[::2]) is None
    copy = replace(trials[0], number=9)
    assert seed_spread([trials[0], copy]) is None, "copies of a seed measure nothing"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [0.0, 5e-324, -1.0])
def test_nothing_is_relative_to_a_loss_of_nothing(loss):
    trials = [trial_of(i, [3.0, loss], steps=[0, 100], learning_rate=1e-4, training_seed=i) for i in range(3)]
    assert seed_spread(trials) is None
    halves = trial_of(0, [3.0, loss, loss], steps=[0, 50, 100])
    assert gain_of(round_of(halves)) is None


def test_a_loss_that_explodes_is_a_finite_loss_of_gain():
    trial = trial_of(0, [1.0, 0.5, 1e99], steps=[0, 18, 22])
    gain = gain_of(round_of(trial, max_train_steps=22))
    assert math.isfinite(gain.relative)
    assert gain.relative < -1e99
