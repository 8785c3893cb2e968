from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.adapters import plain_dropout
from tuner.adapters.frozen_linear import (
    dropout,
    dropout_threshold,
    module_keys,
    row_keys,
    runs,
    token_keys,
)

ROWS = torch.arange(6)
SEEDS = st.integers(0, 2**40)


def packed(x: Tensor, keys: Tensor, *, module: int, rates: list[float]) -> Tensor:
    """Dropout of x [rows, length, width] in one call, an equal number of rows for each rate."""
    modules = module_keys([5, module], device=x.device)
    of_tokens = token_keys(keys, modules, length=x.shape[1])[1]
    thresholds = torch.tensor([dropout_threshold(rate) for rate in rates], dtype=torch.int32)
    shares = torch.tensor([1 - rate for rate in rates])
    shaped = (each[:, None, None] for each in (thresholds, shares))
    return dropout(x, of_tokens.view(len(rates), -1), *shaped)


def dropout_mask(keys: Tensor, *, module: int, length: int, width: int, rate: float) -> Tensor:
    """Which inputs are kept, in a call for one rate."""
    ones = torch.ones(len(keys), length, width)
    return packed(ones, keys, module=module, rates=[rate]) != 0


@given(
    seed=SEEDS,
    step=st.integers(1, 10**6),
    module=st.integers(0, 2**32 - 1),
    rates=st.lists(st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 0.999]), min_size=1, max_size=4),
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
    width=st.sampled_from([1, 5, 16]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_all_slots_at_once_have_the_bits_of_each_alone(
    seed: int,
    step: int,
    module: int,
    rates: list[float],
    rows: int,
    length: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    """Outputs and gradients, also of infinities and of what is dropped: where(mask, x, 0) / (1 - rate)."""
    num_rows = rows * len(rates)
    keys = row_keys(
        torch.arange(num_rows) // rows + seed, torch.full((num_rows,), step), torch.arange(num_rows) % rows
    )
    draw = torch.Generator().manual_seed(seed)
    x, gradient = (torch.randn(num_rows, length, width, generator=draw).to(dtype) for _ in range(2))
    x.view(-1)[0], x.view(-1)[-1] = float("inf"), float("nan")
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs, parts = packed(mine, keys, module=module, rates=rates), []
    for number, rate in enumerate(rates):
        of_trial = row_keys(seed + number, step, torch.arange(rows))
        mask = plain_dropout.dropout_mask(of_trial, module=module, length=length, width=width, rate=rate)
        part = plain[number * rows : (number + 1) * rows]
        parts.append(torch.where(mask, part, part.new_zeros(())) / (1 - rate) if rate else part)
    expected = torch.cat(parts)
    outputs.backward(gradient)
    expected.backward(gradient)
    assert mine.grad is not None
    assert plain.grad is not None
    assert torch.equal(outputs.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(mine.grad, plain.grad)


@given(seed=SEEDS, step=st.integers(1, 10**6), rows=st.permutations(range(6)), length=st.integers(1, 9))
def test_mask_is_of_the_row_and_the_token(seed: int, step: int, rows: list[int], length: int) -> None:
    """Cutting a batch differently, or padding it to another length, draws the same masks."""
    whole = dropout_mask(row_keys(seed, step, ROWS), module=3, length=9, width=5, rate=0.5)
    part = dropout_mask(
        row_keys(seed, step, torch.tensor(rows[:2])), module=3, length=length, width=5, rate=0.5
    )
    assert torch.equal(part, whole[rows[:2], :length])


@given(seed=SEEDS, step=st.integers(1, 10**6), module=st.integers(0, 2**32 - 1))
def test_everything_counts(seed: int, step: int, module: int) -> None:
    """Another seed, step, module, row, token or channel is another mask."""
    settings = {"module": module, "length": 8, "width": 16, "rate": 0.5}
    mask = dropout_mask(row_keys(seed, step, ROWS), **settings)
    others = [
        dropout_mask(row_keys(seed + 1, step, ROWS), **settings),
        dropout_mask(row_keys(seed, step + 1, ROWS), **settings),
        dropout_mask(row_keys(seed, step, ROWS), **settings | {"module": module ^ 1}),
        mask.roll(1, 0),
        mask.roll(1, 1),
        mask.roll(1, 2),
    ]
    for other in others:
        assert 0.3 < float((mask == other).float().mean()) < 0.7


@given(seed=SEEDS, rate=st.floats(0.0, 0.99))
def test_share_that_is_kept(seed: int, rate: float) -> None:
    """Within five standard deviations over 100,000 draws; no channel, token or row is favoured."""
    mask = dropout_mask(row_keys(seed, 1, torch.arange(10)), module=1, length=50, width=200, rate=rate)
    kept = mask.float()
    deviation = max((rate * (1 - rate)) ** 0.5, 0.01)
    assert abs(float(kept.mean()) - (1 - rate)) < 5 * deviation / 100_000**0.5
    for dimensions, draws in (((0, 1), 500), ((0, 2), 2000), ((1, 2), 10_000)):
        assert float((kept.mean(dimensions) - (1 - rate)).abs().max()) < 6 * deviation / draws**0.5 + 0.01


def test_rate_zero_keeps_all() -> None:
    assert dropout_mask(row_keys(0, 1, ROWS), module=0, length=3, width=4, rate=0.0).all()


def test_higher_rates_drop_more_of_the_same() -> None:
    keys = row_keys(1, 1, ROWS)
    little, much = (dropout_mask(keys, module=2, length=20, width=30, rate=rate) for rate in (0.1, 0.6))
    assert not (much & ~little).any()


@pytest.mark.parametrize(
    ("seed", "tokens"),
    [
        (0, ["1010101101110000", "1110011000001000"]),
        (1, ["0100010110100111", "0000000101110110"]),
        (2**32 - 1, ["0001001111001001", "1000101011011000"]),
    ],
)
def test_draws_are_fixed_for_ever(seed: int, tokens: list[str]) -> None:
    """A resumed trial may meet a newer torch. The masks were worked out with Python's own integers."""
    mask = dropout_mask(row_keys(seed, 7, ROWS[:1]), module=11, length=2, width=16, rate=0.5)
    assert ["".join("01"[int(kept)] for kept in token) for token in mask[0]] == tokens


def test_a_kernel_that_cannot_be_compiled_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """Triton comes with torch, the C compiler that it calls does not. Too little memory is another matter."""

    def without_a_compiler(*_: Tensor) -> Tensor:
        raise RuntimeError("Failed to find C compiler")

    def without_memory(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert runs(dropout, dtype, cpu)
        assert not caplog.records
        assert not runs(without_a_compiler, dtype, cpu)
        assert "Failed to find C compiler" in caplog.records.pop().getMessage()
    with pytest.raises(torch.OutOfMemoryError):
        runs(without_memory, torch.float32, cpu)
