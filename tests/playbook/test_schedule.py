import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import InputError
from tuner.methods.schedules import rescaled_decay
from tuner.playbook.comparison_runs import ComparisonRun, decay_branches, trunk_steps
from tuner.playbook.schedule import (
    evaluation_steps,
    multiplier,
    step_at_rate_share,
    tiny_rate_share,
    trunk_end,
)

SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")


def rate(i: int, schedule: str, *, warmup: int = 4, decay: int = 8, horizon: int = 20) -> float:
    return multiplier(i, {"schedule": schedule, "warmup_steps": warmup, "decay_steps": decay}, horizon)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_counts_the_updates_done(schedule):
    assert [rate(i, schedule) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_where_a_share_of_the_summed_rate_is_spent():
    def at(schedule: str, share: float = 0.75) -> float:
        names = {"schedule": schedule, "warmup_steps": 0, "decay_steps": 400}
        return step_at_rate_share(names, 1000, share)

    assert at("constant") == 750
    assert at("linear") == pytest.approx(600, abs=1)
    assert at("cosine") == pytest.approx(438, abs=2), "t + sin(pi t) / pi = 0.75"
    assert at("constant", 1.0) == at("linear", 1.0) == at("cosine", 1.0) == 1000
    assert step_at_rate_share({"schedule": "constant", "warmup_steps": 1}, 1, 0.75) == 1
    short = {"schedule": "cosine", "warmup_steps": 1}
    assert step_at_rate_share(short, 8, 0.75) == pytest.approx(4.39, abs=0.01), "not 5, where 84% are spent"


def test_linear_is_constant_then_falls_to_its_last_update():
    assert [rate(i, "linear") for i in (4, 11, 12, 13, 19, 20)] == [1, 1, 1, 7 / 8, 1 / 8, 0]


def test_constant_and_a_decay_of_nothing_stay_at_the_peak():
    assert {rate(i, "constant") for i in range(4, 20)} == {1.0}
    assert {rate(i, "linear", decay=0) for i in range(4, 20)} == {1.0}


def test_cosine_halves_in_the_middle_of_what_the_warmup_leaves():
    assert rate(12, "cosine") == pytest.approx(0.5)
    assert rate(20, "cosine") == pytest.approx(0.0)
    assert rate(8, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_unknown_schedule_is_refused():
    with pytest.raises(InputError, match="schedule sqrt: expects one of constant, linear, cosine, "):
        rate(10, "sqrt")


@given(
    schedule=st.sampled_from(SCHEDULES),
    horizon=st.integers(1, 300),
    data=st.data(),
)
def test_multiplier_stays_within_bounds_and_falls_after_warmup(schedule, horizon, data):
    warmup = data.draw(st.integers(0, horizon))
    decay = data.draw(st.integers(0, horizon - warmup))
    rates = [rate(i, schedule, warmup=warmup, decay=decay, horizon=horizon) for i in range(horizon + 3)]
    assert all(0.0 <= r <= 1.0 for r in rates)
    after = rates[warmup:]
    assert all(later <= sooner + 1e-12 for sooner, later in itertools.pairwise(after))


@given(horizon=st.integers(1, 200), longer=st.integers(0, 200), data=st.data())
def test_trunks_of_two_horizons_have_the_same_rates(horizon, longer, data):
    warmup = data.draw(st.integers(0, horizon))
    decay = data.draw(st.integers(0, horizon - warmup))
    hyperparameters = {"schedule": "linear", "warmup_steps": warmup, "decay_steps": decay}
    for i in range(trunk_end(hyperparameters, horizon)):
        short = rate(i, "linear", warmup=warmup, decay=decay, horizon=horizon)
        assert short == rate(i, "linear", warmup=warmup, decay=decay, horizon=horizon + longer)


@given(horizon=st.integers(1, 500), every=st.integers(1, 600))
def test_evaluations_start_at_zero_and_end_at_the_horizon(horizon, every):
    steps = evaluation_steps(horizon, every)
    assert steps[0] == 0
    assert steps[-1] == horizon
    assert list(steps) == sorted(set(steps))
    assert all(step % every == 0 for step in steps[:-1])


def test_evaluation_steps_of_a_horizon_off_the_grid():
    assert evaluation_steps(23, 10) == (0, 10, 20, 23)
    assert evaluation_steps(20, 10) == (0, 10, 20)


def test_trunk_ends_where_the_decay_begins():
    assert trunk_end({"schedule": "linear", "decay_steps": 24}, 60) == 36
    assert trunk_end({"schedule": "constant", "decay_steps": 24}, 60) == 60
    assert trunk_end({"schedule": "cosine"}, 60) is None
    assert trunk_end({}, 60) == 60


def test_branches_end_at_the_half_and_at_the_root_with_the_same_share():
    hyperparameters = {"schedule": "linear", "warmup_steps": 5, "decay_steps": 40}
    assert decay_branches(hyperparameters, 100) == (ComparisonRun(30, 50), ComparisonRun(43, 71))
    assert trunk_steps(hyperparameters, 100, branches=True) == (30, 43, 60)
    assert trunk_steps(hyperparameters, 100, branches="auto") == (30, 60)
    assert trunk_steps(hyperparameters, 100, branches=False) == (60,)


def test_a_branch_that_starts_within_the_warmup_is_left_out():
    hyperparameters = {"schedule": "linear", "warmup_steps": 35, "decay_steps": 40}
    assert [branch.from_step for branch in decay_branches(hyperparameters, 100)] == [43]


def test_two_branches_of_one_length_are_one():
    assert decay_branches({"schedule": "linear", "decay_steps": 1}, 3) == (ComparisonRun(1, 2),)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_only_a_linear_decay_has_branches(schedule):
    assert decay_branches({"schedule": schedule, "decay_steps": 40}, 100) == ()


def test_no_trunk_is_kept_where_the_warmup_outlasts_it():
    assert (
        trunk_steps({"schedule": "linear", "warmup_steps": 50, "decay_steps": 60}, 100, branches=True) == ()
    )
    assert trunk_steps({"schedule": "cosine"}, 100, branches=True) == ()


@given(horizon=st.integers(2, 1000), data=st.data())
def test_branches_stay_on_the_trunk(horizon, data):
    warmup = data.draw(st.integers(0, horizon - 1))
    decay = data.draw(st.integers(0, horizon - warmup))
    hyperparameters = {"schedule": "linear", "warmup_steps": warmup, "decay_steps": decay}
    for branch in decay_branches(hyperparameters, horizon):
        assert warmup <= branch.from_step <= horizon - decay
        assert branch.from_step < branch.max_train_steps <= horizon


@pytest.mark.parametrize(
    ("new_horizon", "keep", "expected"),
    [
        (120, "steps", 24),
        (180, "steps", 36),
        (120, "share", 48),
        (30, "share", 12),
        (30, "steps", 24),
        (60, "steps", 24),
        (26, "steps", 21),
    ],
)
def test_decay_of_24_steps_in_60_is_rescaled(new_horizon, keep, expected):
    assert (
        rescaled_decay(24, old_horizon=60, new_horizon=new_horizon, room=new_horizon - 5, keep=keep)
        == expected
    )


def test_decay_shorter_than_a_fifth_stays_where_the_horizon_does():
    assert rescaled_decay(3, old_horizon=60, new_horizon=60, room=55, keep="steps") == 3
    assert rescaled_decay(0, old_horizon=60, new_horizon=600, room=595, keep="steps") == 0


@given(
    decay=st.integers(1, 200),
    old=st.integers(200, 400),
    new=st.integers(20, 1200),
    warmup=st.integers(0, 10),
    keep=st.sampled_from(["steps", "share"]),
)
def test_a_rescaled_decay_fits_and_is_a_fifth_where_its_length_is_kept(decay, old, new, warmup, keep):
    rescaled = rescaled_decay(decay, old_horizon=old, new_horizon=new, room=new - warmup, keep=keep)
    assert 0 <= rescaled <= new - warmup
    if keep == "steps" and new != old:
        assert rescaled >= min(new / 5, new - warmup)


COSINE = {"schedule": "cosine"}


def tiny_share(old: dict, new: dict, *, horizon: int) -> float:
    return tiny_rate_share(new, old=old, old_horizon=100, new_horizon=horizon)


def test_a_stretched_cosine_spends_few_new_steps_of_a_double_horizon_at_a_tiny_rate():
    assert tiny_share(COSINE, COSINE, horizon=200) == pytest.approx(0.41, abs=0.01)
    assert tiny_share(COSINE, COSINE, horizon=120) == 1.0
    assert tiny_share(COSINE, COSINE, horizon=90) == 0.0


@given(horizon=st.integers(101, 400), decay=st.integers(0, 100))
def test_a_longer_trunk_spends_its_steps_at_the_peak(horizon, decay):
    kept = {"schedule": "linear", "decay_steps": decay}
    assert tiny_share(kept, kept, horizon=horizon) == 0.0


def test_a_decay_that_takes_all_new_steps_spends_them_at_its_end():
    whole = {"schedule": "linear", "decay_steps": 100}
    assert tiny_share(whole, {**whole, "decay_steps": 110}, horizon=110) == 1.0
    # Of 200 steps of decay the last 19 run below a tenth of the peak.
    assert tiny_share(whole, {**whole, "decay_steps": 200}, horizon=200) == pytest.approx(0.19)


def test_a_tiny_rate_is_below_a_tenth_of_the_peak():
    # Ten steps of decay from the peak: the last one runs at exactly a tenth, no step below it.
    old, new = {"schedule": "linear", "decay_steps": 0}, {"schedule": "linear", "decay_steps": 10}
    assert tiny_share(old, new, horizon=110) == 0.0
    assert tiny_share(old, {**new, "decay_steps": 20}, horizon=120) == pytest.approx(0.05)
