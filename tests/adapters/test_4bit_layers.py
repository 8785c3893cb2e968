"""In a 4-bit layer, too, the adapters' sum is added in place: to the output, and to the input's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.operators import operators_of
from tests.training.driving import begin, worker_state
from tuner.adapters import PackedRows
from tuner.adapters.packed_linear import PackedLinear


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_input_gradient(models: tiny.Models, dtype: str, rate: float) -> None:
    """As autograd through bitsandbytes' layer, which adds another tensor to its own."""
    base = models.base("llama", quantization="nf4", dtype=dtype, **tiny.WIDE)
    trials = [tiny.hyperparameters(training_seed=n, lora_dropout=rate) for n in range(2)]
    with worker_state(base, trials, slots=2) as state, torch.random.fork_rng():
        torch.manual_seed(0)
        for slot, trial in enumerate(trials):
            begin(state, slot, trial, max_train_steps=1)
        layer = next(module for module in base.model.modules() if isinstance(module, PackedLinear))
        assert layer.is_4bit
        for stacked in (layer.a, layer.b):
            stacked.copy_(torch.randn(stacked.shape) / 8)
        keys = None if rate == 0 else torch.arange(4, dtype=torch.int32)

        def gradient(is_4bit: bool) -> tuple[Tensor, Tensor, int]:
            layer.is_4bit = is_4bit
            torch.manual_seed(1)
            x = torch.randn(4, 5, layer.a.shape[-1], dtype=base.dtype, requires_grad=True)
            with state.pack.holding(PackedRows((0, 1), keys)):
                y = layer(x)
                counted = operators_of(lambda: y.square().sum().backward())
            assert x.grad is not None
            return y.detach(), x.grad, counted.of("add", "add_")

        (y, ours, adds), (y_there, theirs, adds_there) = gradient(is_4bit=True), gradient(is_4bit=False)
    assert torch.equal(y, y_there)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert float((ours - theirs).norm() / theirs.norm()) < tolerance
    assert adds == adds_there - (rate == 0)
