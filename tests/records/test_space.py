"""Dimensions hold what they say, and a trial's hyperparameters are complete."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.records import (
    Choices,
    Fixed,
    Range,
    Space,
    TimesSqrtRank,
    complete_hyperparameters,
    searched,
)

_SPACE: Space = {
    "learning_rate": Range(1e-5, 1e-3, log=True),
    "lora_r": Choices((8, 16)),
    "lora_alpha": TimesSqrtRank(4.0),
    "optimizer": Fixed("adamw"),
}


@given(st.floats(1e-5, 1e-3))
def test_a_range_holds_what_lies_between_its_ends(value: float) -> None:
    assert Range(1e-5, 1e-3).contains(value)


@pytest.mark.parametrize("value", [0.9, 4.1, "2", True, 1.5, math.nan])
def test_a_whole_range_holds_no_other_value(value: float | str | bool) -> None:
    assert not Range(1, 4, integer=True).contains(value)
    assert Range(1, 4, integer=True).contains(4.0)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (0.0, math.inf)])
def test_a_range_that_holds_nothing_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low < high"):
        Range(low, high)


def test_a_logarithm_needs_a_positive_end_and_choices_a_value() -> None:
    with pytest.raises(ValueError, match="low > 0"):
        Range(0.0, 1.0, log=True)
    with pytest.raises(ValueError, match="must not be empty"):
        Choices(())


def test_a_derived_value_is_nobodys_to_choose() -> None:
    assert list(searched(_SPACE)) == ["learning_rate", "lora_r"]
    assert not TimesSqrtRank(4.0).contains(16.0)


def test_hyperparameters_are_what_was_chosen_what_is_fixed_and_what_follows() -> None:
    assert complete_hyperparameters(_SPACE, {"learning_rate": 1e-4, "lora_r": 16}) == {
        "learning_rate": 1e-4,
        "lora_r": 16,
        "optimizer": "adamw",
        "lora_alpha": 16.0,
    }
    with pytest.raises(KeyError, match="lora_r"):
        complete_hyperparameters(_SPACE, {"learning_rate": 1e-4})
