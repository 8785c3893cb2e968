from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.report import format

from . import synthetic


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1.23456, "1.2346"),
        (None, "-"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (123456.0, "1.23e+05"),
        (0.0, "0.0000"),
    ],
)
def test_losses(number: float | None, text: str) -> None:
    assert format.loss(number) == text


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (1e-5, "1e-5"),
        (0.00032, "0.00032"),
        (True, "true"),
        (16, "16"),
        (("q", "v"), "q,v"),
        (("h.0.q", "h.0.v", "h.1.q", "h.1.v"), "q,v (4 layers)"),
        ("adamw", "adamw"),
    ],
)
def test_values_of_hyperparameters(setting: bool | float | str | tuple[str, ...], text: str) -> None:
    assert format.value(setting) == text


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_a_number_reads_back_within_its_digits(quantity: float) -> None:
    assert float(format.number(quantity)) == pytest.approx(quantity, rel=5.01e-3)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (250, "4 min 10 s"),
        (725, "12 min"),
        (2520.4, "42 min"),
        (3599.9, "1 h 00 min"),
        (11_100, "3 h 05 min"),
        (-5, "0 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format.duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1_400_000_000, "1.4 GB"), (98e6, "98 MB")]
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert format.size(num_bytes) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.12, "12%"), (0.003, "0.3%"), (0, "0%"), (1, "100%"), (math.nan, "-")]
)
def test_percentages(share: float, text: str) -> None:
    assert format.percent(share) == text


def test_only_hyperparameters_that_differ_are_said_to_vary() -> None:
    assert format.varying(synthetic.trials()) == ("learning_rate", "lora_r")
    assert format.varying(synthetic.trials()[:1]) == ()
