"""Dimensions hold what they say, and a trial's hyperparameters are complete."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.records import (
    Choices,
    Condition,
    Dimension,
    Fixed,
    Range,
    Space,
    TimesSqrtRank,
    active,
    complete_hyperparameters,
    num_points,
    possible,
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


LION = Condition("optimizer", ("lion", "lion_8bit"))
CONDITIONAL: Space = {
    "optimizer": Choices(("adamw", "lion", "lion_8bit")),
    "lion_beta1": Choices((0.9, 0.95), only_with=LION),
    "adam_beta1": Choices((0.8, 0.9, 0.95), only_with=Condition("optimizer", ("adamw",))),
    "adam_epsilon": Fixed(1e-8, only_with=Condition("optimizer", ("adamw",))),
    "lora_r": Choices((8, 16)),
}


def test_a_trial_has_what_counts_with_what_it_chose() -> None:
    chosen = {"optimizer": "lion", "lion_beta1": 0.95, "lora_r": 8}
    assert complete_hyperparameters(CONDITIONAL, chosen) == chosen
    assert complete_hyperparameters(CONDITIONAL, {**chosen, "adam_beta1": 0.8}) == chosen
    with pytest.raises(KeyError, match="lion_beta1"):
        complete_hyperparameters(CONDITIONAL, {"optimizer": "lion", "lora_r": 8})
    adamw = {"optimizer": "adamw", "adam_beta1": 0.9, "lora_r": 8}
    assert complete_hyperparameters(CONDITIONAL, adamw) == {**adamw, "adam_epsilon": 1e-8}


def test_what_no_value_decides_comes_first() -> None:
    assert list(active(CONDITIONAL, {})) == ["optimizer", "lora_r"]
    assert list(active(CONDITIONAL, {"optimizer": "lion"})) == ["optimizer", "lion_beta1", "lora_r"]
    left = {name: d for name, d in CONDITIONAL.items() if name != "optimizer"}
    assert active(left, {}) == left, "what decides is not in the space"


def test_points_that_differ_in_what_does_not_count_are_one() -> None:
    assert num_points(CONDITIONAL) == (3 + 2 + 2) * 2
    fixed = {**CONDITIONAL, "optimizer": Fixed("adamw")}
    assert num_points(fixed) == num_points(possible(fixed)) == 3 * 2
    assert set(possible(fixed)) == set(CONDITIONAL) - {"lion_beta1"}
    chain = {**CONDITIONAL, "deeper": Choices((1, 2), only_with=Condition("lion_beta1", (0.95,)))}
    assert num_points(chain) == (3 + 2 * (1 + 2)) * 2
    assert "deeper" not in possible({**chain, "optimizer": Fixed("adamw")})


@given(st.data())
def test_points_are_counted_as_they_are(data: st.DataObject) -> None:
    """Against all combinations, each completed."""
    names = ["a", "b", "c", "d"]
    space: dict[str, Dimension] = {}
    for place, name in enumerate(names):
        values = tuple(range(data.draw(st.integers(1, 3))))
        condition = None
        if place and data.draw(st.booleans()):
            chosen_by = data.draw(st.sampled_from(names[:place]))
            condition = Condition(chosen_by, tuple(data.draw(st.sets(st.integers(0, 2), min_size=1))))
        space[name] = Choices(values, only_with=condition)
    combinations = itertools.product(*(d.values for d in searched(space).values() if isinstance(d, Choices)))
    points = [complete_hyperparameters(space, dict(zip(names, each, strict=True))) for each in combinations]
    assert num_points(space) == len({tuple(point.items()) for point in points})


def test_dimensions_of_the_same_values_are_equal() -> None:
    assert Fixed(1, only_with=LION) == Fixed(1)
    assert Range(0, 1, only_with=LION) != Range(0, 2, only_with=LION)
