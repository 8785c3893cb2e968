"""Products with frozen float32 weights on a CPU, by the faster of the two libraries inside torch.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on processors that are not Intel's.
oneDNN, which torch has for bfloat16, takes AVX-512 wherever it is: 2.3 times as fast on a Zen 5
(docs/log.md). Both add up in float32; they differ by rounding.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MIN_OPERATIONS = 1 << 26
"""Of a product, from which oneDNN is asked. For each new shape it first writes a program, which takes 0.5 to
0.8 ms: a product of this size gains them back when the shape comes again (docs/log.md)."""


class FrozenLinear(nn.Linear):
    """An `nn.Linear` whose weights get no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        return _Product.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(outputs[0], weight.t()), None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, without a gradient of its own: [..., in], [out, in], [out] -> [..., out]."""
    if _is_exact(x) and _is_exact(weight) and onednn_is_faster() and _operations(x, weight) >= MIN_OPERATIONS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return nn.functional.linear(x, weight, bias)


def speed_up(model: nn.Module) -> None:
    """Make `FrozenLinear` of the model's linear layers, where that is faster."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear and _is_exact(module.weight):
            module.__class__ = FrozenLinear  # the same layer with the same hooks and names


@cache
def onednn_is_faster() -> bool:
    """Whether MKL would leave half of this processor idle. Decided by what it is, not by the clock:
    which library multiplies decides the last digits, and a trial that goes on has to find the same.
    """
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in _vendor()
    )


def _vendor() -> str:
    """What Linux says of the first core; empty elsewhere."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    return next((line for line in lines if line.startswith("vendor_id")), "")


def _operations(x: Tensor, weight: Tensor) -> int:
    return 2 * x.numel() * weight.shape[0]


def _is_exact(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
