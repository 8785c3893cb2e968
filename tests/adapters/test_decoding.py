"""Draws are those of the model's probabilities, and depend on seed and row alone."""

from __future__ import annotations

import math

import pytest
import torch

from tuner.adapters.generation import Decoding

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
NUM_ROWS = 4_000


def drawn(decoding: Decoding, rows: range, *, steps: int = 1) -> torch.Tensor:
    """Tokens that would be taken, [rows, steps]."""
    processors = decoding.processors(list(rows))
    ids = torch.zeros(len(rows), 1, dtype=torch.long)
    taken = [processors(ids, LOGITS.repeat(len(rows), 1)).argmax(-1) for _ in range(steps)]
    return torch.stack(taken, dim=1)


def shares(decoding: Decoding) -> torch.Tensor:
    return torch.bincount(drawn(decoding, range(NUM_ROWS)).flatten(), minlength=5) / NUM_ROWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_by_their_probabilities(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, 0)
    # Four standard errors of a share of 1/2.
    assert torch.allclose(shares(Decoding(temperature=temperature)), expected, atol=2 / NUM_ROWS**0.5)


def test_only_among_the_likeliest() -> None:
    assert (shares(Decoding(temperature=1.0, top_k=2)) > 0).tolist() == [True, True, False, False, False]
    assert (shares(Decoding(temperature=1.0, top_p=0.9)) > 0).tolist() == [True, True, True, False, False]
    first = float(shares(Decoding(temperature=1.0, top_k=2))[0])
    assert first == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


def test_without_temperature_nothing_is_drawn() -> None:
    assert not Decoding().processors([1, 2])
    assert drawn(Decoding(), range(9)).unique().tolist() == [0]


def test_draws_depend_on_seed_and_row_alone() -> None:
    decoding = Decoding(temperature=1.0, seed=7)
    together = drawn(decoding, range(50), steps=8)
    assert torch.equal(drawn(decoding, range(20, 30), steps=8), together[20:30])
    assert not torch.equal(drawn(Decoding(temperature=1.0, seed=8), range(50), steps=8), together)
    assert len(together.unique(dim=0)) > 40
