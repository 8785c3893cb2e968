"""Products with frozen weights are the same by either library, and have the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests import tiny
from tuner.adapters import frozen_linear, load_base
from tuner.adapters.frozen_linear import FrozenLinear, onednn_is_faster, product


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def always(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this processor is, and however small the product."""
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("needs a torch with oneDNN")
    monkeypatch.setattr(frozen_linear, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(frozen_linear, "MIN_OPERATIONS", 0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("shape", [(7, 12), (2, 5, 12), (1, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_product_is_torchs(shape: tuple[int, ...], bias: bool, transposed: bool) -> None:
    x, weight = torch.randn(*shape), torch.randn(9, 12)
    if transposed:
        weight = weight.t().contiguous().t()
    added = torch.randn(9) if bias else None
    assert torch.allclose(product(x, weight, added), nn.functional.linear(x, weight, added), atol=1e-5)


def test_a_torch_without_the_private_product_multiplies_by_the_public_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen_linear, "_onednn_linear", None)
    monkeypatch.setattr(frozen_linear, "MIN_OPERATIONS", 0)
    onednn_is_faster.cache_clear()
    try:
        x, weight = torch.randn(3, 12), torch.randn(9, 12)
        assert not onednn_is_faster()
        assert torch.equal(product(x, weight), nn.functional.linear(x, weight))
    finally:
        onednn_is_faster.cache_clear()


@pytest.mark.usefixtures("always")
def test_gradient_is_torchs() -> None:
    linear = nn.Linear(12, 9).requires_grad_(False)
    frozen = FrozenLinear(12, 9).requires_grad_(False)
    frozen.load_state_dict(linear.state_dict())
    inputs = [torch.randn(4, 6, 12).transpose(0, 1).clone().requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    for layer, x in zip((linear, frozen), inputs, strict=True):
        layer(x.transpose(0, 1)).square().sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.usefixtures("always")
def test_other_dtypes_are_left_alone() -> None:
    x, weight = torch.randn(3, 12, dtype=torch.bfloat16), torch.randn(9, 12, dtype=torch.bfloat16)
    assert torch.equal(product(x, weight), nn.functional.linear(x, weight))


def test_a_base_keeps_its_layers_names_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.save_model(tmp_path, tiny.config("llama"))
    losses = []
    for faster in (False, True):
        monkeypatch.setattr(frozen_linear, "onednn_is_faster", lambda faster=faster: faster)
        monkeypatch.setattr(frozen_linear, "MIN_OPERATIONS", 0)
        base = load_base(tiny.model_spec(path), device="cpu", max_length=tiny.MAX_LENGTH)
        frozen = [m for m in base.model.modules() if isinstance(m, FrozenLinear)]
        assert len(frozen) == (15 if faster else 0)  # seven in each of two layers, and the head
        losses.append(base.token_nll(torch.arange(8)[None], torch.zeros(7).long(), torch.arange(1, 8)))
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
