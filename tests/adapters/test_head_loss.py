from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from tuner.adapters import frozen_linear
from tuner.adapters.frozen_linear import chunk_elements, chunked_nll, head_nll, token_scores

TOKENS, WIDTH, VOCABULARY = 13, 8, 50


def made(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return hidden, weight, torch.randn(VOCABULARY, generator=generator).to(dtype) if bias else None, targets


@pytest.mark.parametrize("rows", [1, 4, 13, 1000])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_is_cross_entropy_of_the_logits(
    monkeypatch: pytest.MonkeyPatch, rows: int, bias: bool, dtype: torch.dtype, tolerance: float
) -> None:
    """Values and gradients, in chunks of so many rows; every token with a weight of its own.

    In bfloat16 both sides round probabilities to eight bits; values agree to float32.
    """
    monkeypatch.setattr(frozen_linear, "CHUNK_ELEMENTS", rows * VOCABULARY + 7)
    hidden, weight, offset, targets = made(dtype, bias=bias)
    weights = torch.linspace(0.1, 3, TOKENS)
    nll = head_nll(hidden, weight, offset, targets)
    (gradient,) = torch.autograd.grad((nll * weights).sum(), hidden)
    expected = cross_entropy(linear(hidden, weight, offset).float(), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    assert nll.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.allclose(nll, expected, rtol=1e-5, atol=1e-5)
    apart = (gradient - expected_gradient).float().norm()
    assert float(apart) < tolerance * float(expected_gradient.float().norm())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, targets = made(torch.float32, bias=False)
    whole = head_nll(hidden, weight, None, targets)
    monkeypatch.setattr(frozen_linear, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    assert torch.allclose(head_nll(hidden, weight, None, targets), whole, rtol=1e-6)


def test_a_head_of_any_kind_sees_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards, with the values and gradients of all at once."""
    monkeypatch.setattr(frozen_linear, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    hidden, weight, offset, targets = made(torch.float32, bias=True)
    seen: list[int] = []

    def logits(part: Tensor) -> Tensor:
        seen.append(len(part))
        return 30 * torch.tanh(linear(part, weight, offset) / 30)

    nll = chunked_nll(logits, hidden, targets, vocabulary_size=VOCABULARY)
    (gradient,) = torch.autograd.grad(nll.square().sum(), hidden)
    assert sorted(seen) == [1, 1, 4, 4, 4, 4, 4, 4]
    expected = cross_entropy(logits(hidden), targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), hidden)
    assert torch.allclose(nll, expected, rtol=1e-6)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)
    assert chunked_nll(logits, hidden[:0], targets[:0], vocabulary_size=VOCABULARY).shape == (0,)


def test_without_gradient() -> None:
    hidden, weight, _, targets = made(torch.float32, bias=False)
    with torch.no_grad():
        nll = head_nll(hidden, weight, None, targets)
    assert not nll.requires_grad
    assert torch.equal(nll, head_nll(hidden, weight, None, targets))


def test_no_tokens() -> None:
    hidden, weight, _, targets = made(torch.float32, bias=False)
    nll = head_nll(hidden[:0], weight, None, targets[:0])
    assert (nll.shape, nll.dtype) == ((0,), torch.float32)


def test_one_bad_row_stays_alone() -> None:
    hidden, weight, _, targets = made(torch.float32, bias=False)
    spoilt = hidden.detach().clone()
    spoilt[4] = float("nan")
    spoilt.requires_grad_()
    (gradient,) = torch.autograd.grad(head_nll(spoilt, weight, None, targets).sum(), spoilt)
    (expected,) = torch.autograd.grad(head_nll(hidden, weight, None, targets).sum(), hidden)
    sane = torch.arange(TOKENS) != 4
    assert torch.equal(gradient[sane], expected[sane])
    assert gradient[4].isnan().all()


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_scores_are_the_same_values_and_say_which_targets_come_first(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(frozen_linear, "CHUNK_ELEMENTS", rows * VOCABULARY + 7)
    hidden, weight, offset, targets = made(torch.float32, bias=True)
    logits = linear(hidden, weight, offset).detach()
    targets[::3] = logits[::3].argmax(dim=1)
    logits_of = functools.partial(linear, weight=weight, bias=offset)
    nll, is_first = token_scores(logits_of, hidden, targets, vocabulary_size=VOCABULARY)
    assert torch.allclose(nll, cross_entropy(logits, targets, reduction="none"), rtol=1e-5)
    assert not nll.requires_grad
    assert is_first.tolist() == (logits.argmax(dim=1) == targets).tolist()
    assert 0 < int(is_first.sum()) < TOKENS


def test_a_target_of_logits_that_are_no_numbers_is_not_first() -> None:
    hidden, weight, _, targets = made(torch.float32, bias=False)
    _, is_first = token_scores(
        lambda part: linear(part, weight) * torch.nan, hidden, targets, vocabulary_size=VOCABULARY
    )
    assert not is_first.any()


@pytest.mark.parametrize(
    ("gigabytes", "vocabulary", "rows"), [(0, 128_256, 130), (24, 128_256, 700), (80, 128_256, 1000)]
)
def test_a_gpu_computes_more_logits_at_once(gigabytes: int, vocabulary: int, rows: int) -> None:
    """Products of few rows leave it waiting for the head's weights; a small one has less room for logits."""
    elements = chunk_elements(gigabytes * 10**9)
    assert rows <= elements // vocabulary < 1.1 * rows
    assert 4 * elements <= max(1 << 26, gigabytes * 10**9 / 64)
