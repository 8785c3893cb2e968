import math
from decimal import ROUND_CEILING, ROUND_FLOOR

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.methods.hyperparameters import Tier
from tuner.methods.table import tier_of
from tuner.playbook.spaces import as_listed, moved_rate, narrowed, rate_range, rounded, widened
from tuner.records import Choices, Fixed, Range, TimesSqrtRank

RATES = Range(1e-5, 3e-3, log=True)
positive = st.floats(1e-9, 1e6)


@pytest.mark.parametrize(
    ("number", "low", "high"),
    [(0.00034871, 0.00034, 0.00035), (0.00012, 0.00012, 0.00012), (1234.0, 1200.0, 1300.0), (0.0, 0.0, 0.0)],
)
def test_rounded_to_two_digits(number, low, high):
    assert rounded(number, ROUND_FLOOR) == low
    assert rounded(number, ROUND_CEILING) == high


@given(positive)
def test_rounding_goes_outwards_by_little(number):
    low, high = rounded(number, ROUND_FLOOR), rounded(number, ROUND_CEILING)
    assert low <= number <= high
    assert high / low <= 1.11


def test_the_rate_falls_with_the_fourth_root_of_the_horizon():
    assert moved_rate(3e-4, old_horizon=100, new_horizon=200) == pytest.approx(3e-4 * 2**-0.25)
    assert moved_rate(3e-4, old_horizon=100, new_horizon=100) == 3e-4


def test_rates_from_a_third_to_three_times_the_centre():
    assert rate_range(RATES, 3e-4) == Range(1e-4, 9e-4, log=True)
    assert rate_range(RATES, 2e-4) == Range(6.7e-5, 6e-4, log=True)


def test_rates_stop_where_everything_diverged_but_hold_the_centre():
    assert rate_range(RATES, 3e-4, ceiling=5e-4) == Range(1e-4, 5e-4, log=True)
    assert rate_range(RATES, 3e-4, ceiling=1e-4).high >= 3e-4


def test_narrowed_leaves_a_margin_around_the_values():
    # A quarter of their spread, 0.01, on both sides.
    assert narrowed(Range(0.0, 1.0), [0.4, 0.44]) == Range(0.35, 0.49)
    assert narrowed(Range(0.0, 1.0), [0.2, 0.6]) == Range(0.1, 0.7)
    assert narrowed(Range(0.0, 0.1), [0.001, 0.06]) == Range(0.0, 0.075)
    assert narrowed(Range(8, 64, integer=True), [16, 30]) == Range(12, 34, integer=True)


def test_narrowed_choices_are_those_used_in_the_files_order():
    old = Choices((32, 8, 16))
    assert narrowed(old, [16, 32, 16]) == Choices((32, 16))
    assert narrowed(old, [8, 8]) == Fixed(8)
    assert narrowed(Fixed(8), [8]) == Fixed(8)


def test_listed_values_that_are_no_numbers_keep_their_order():
    assert as_listed(Fixed("a"), ["b", "a", "b"]) == Choices(("b", "a"))
    assert as_listed(Range(0, 1), [0.5, 0.25]) == Choices((0.25, 0.5))
    assert as_listed(Choices((("q",), ("q", "v"))), [("q", "v")]) == Fixed(("q", "v"))


def test_widened_holds_what_it_did_not():
    assert widened(Fixed(8), [8, 16, 4]) == Choices((4, 8, 16))
    assert widened(Choices((8, 32)), [16]) == Choices((8, 16, 32)), "a list that rises goes on rising"
    assert widened(Choices((32, 8)), [16]) == Choices((32, 8, 16))
    assert widened(RATES, [4.1234e-3]) == Range(1e-5, 4.2e-3, log=True)
    assert widened(Range(1e-3, 0.1, log=True), [0.0]) == Range(0.0, 0.1)
    assert widened(TimesSqrtRank(4.0), [16.0]) == TimesSqrtRank(4.0)
    assert widened(RATES, [1e-4]) is RATES


@given(
    low=positive,
    factor=st.floats(1.5, 1e4),
    places=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    log=st.booleans(),
)
def test_a_narrowed_range_holds_its_values_and_lies_within_the_old_one(low, factor, places, log):
    old = Range(low, low * factor, log=log)
    values = [min(old.high, low * math.pow(factor, place)) for place in places]
    new = narrowed(old, values)
    assert isinstance(new, Range)
    assert new.log == log
    assert old.low <= new.low < new.high <= old.high
    assert all(new.contains(value) for value in values)


@given(
    dimension=st.sampled_from(
        [Fixed(8), Fixed(0.5), Choices((8, 16)), RATES, Range(1, 9, integer=True), Range(-1, 1)]
    ),
    values=st.lists(st.floats(-5, 100) | st.integers(-5, 100), max_size=4),
)
def test_a_widened_space_holds_everything(dimension, values):
    new = widened(dimension, values)
    assert all(new.contains(value) for value in values)
    if isinstance(dimension, Range):
        assert new.low <= dimension.low
        assert new.high >= dimension.high
    if isinstance(dimension, Choices):
        assert set(dimension.values) <= set(new.values)


@pytest.mark.parametrize(
    ("name", "tier"),
    [
        ("warmup_steps", Tier.VERY_LIKELY),
        ("lora_init", Tier.VERY_LIKELY),
        ("lora_r", Tier.LIKELY),
        ("target_modules", Tier.LIKELY),
        ("use_dora", Tier.LIKELY),
        ("learning_rate", Tier.MIGHT),
        ("weight_decay", Tier.MIGHT),
        ("adam_beta2", Tier.MIGHT),
        ("lora_alpha", Tier.MIGHT),
        ("lora_dropout", Tier.MIGHT),
        ("schedule", Tier.UNLIKELY),
        ("decay_steps", Tier.UNLIKELY),
        ("batch_size", Tier.KEPT),
        ("exponential_decay", Tier.MIGHT),
    ],
)
def test_tiers(name, tier):
    assert tier_of(name) == tier
