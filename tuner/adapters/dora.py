"""DoRA (arXiv:2402.09353) of one layer, in PEFT's formula: a learned magnitude for each output's weights."""

from __future__ import annotations

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tuner.errors import ModelError
from tuner.methods.variants.dora import DORA

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class DoraUpdate:
    """Turns a layer's output into magnitude / norm(W + scale B A) * (W x + scale B A x) + bias.

    The norm counts as a constant, as in section 4.3 of the paper. Ordinary autograd goes through it: such a
    trial has the pass to itself.
    """

    def __init__(
        self,
        inner: nn.Module,
        *,
        weights: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor],
        scale: float,
    ) -> None:
        """`weights` are A [rank, in] and B [out, rank]; `gradients`, in the same shapes, are added to.

        The magnitude is the value copied into it before `measure`.
        """
        self._inner = inner
        self._a, self._b = (_leaf(weight, grad) for weight, grad in zip(weights, gradients, strict=True))
        self._scale = scale
        self.norm = torch.ones(self._b.shape[0], device=self._b.device)
        """Of each output's weights, float32."""
        # In float32 for any dtype: its updates are too small for bfloat16.
        self.magnitude = _leaf(torch.ones_like(self.norm), torch.zeros_like(self.norm))
        """[out]"""

    @property
    def magnitude_gradient(self) -> Tensor:
        """[out], added to by a backward pass."""
        assert self.magnitude.grad is not None
        return self.magnitude.grad

    def measure(self) -> None:
        """Compute the norm again after A or B have changed."""
        self.norm = weight_norm(self._inner, self._a, self._b, scale=self._scale)

    def apply(self, x: Tensor, dropped: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]. As in PEFT's DoRA, with dropout the magnitude scales the base layer's
        output for the dropped inputs, and its output for the full inputs stays unchanged.
        """
        y: Tensor = self._inner(x)
        kept, product = (x, y) if dropped is None else (dropped, self._inner(dropped))
        if (bias := self._inner.bias) is not None:
            product = product - bias  # type: ignore[operator]
        update = nn.functional.linear(nn.functional.linear(kept.to(self._a.dtype), self._a), self._b)
        ratio = self.magnitude / self.norm
        return y + ((ratio - 1) * product + ratio * self._scale * update).to(y.dtype)


@torch.no_grad()
def weight_norm(linear: nn.Module, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """Return the norm of each output's weights in W + scale B A: [out], float32.

    Raises ModelError for a layer whose weight cannot be read.
    """
    held = linear.weight
    weight = dequantize_module_weight(linear)
    linear.weight = held  # on a CPU, PEFT replaces 8-bit weights by a copy without their scales
    weight = weight.t() if isinstance(linear, Conv1D) else weight
    if weight.dtype not in _DTYPES or weight.shape != (b.shape[0], a.shape[1]):
        raise ModelError(
            f"hyperparameters.{DORA.switch}: DoRA reads the base model's weights, which PEFT cannot provide "
            f"for a {type(linear).__name__} of {weight.dtype}; set {DORA.switch}: false, or "
            "model.quantization: none"
        )
    adapted = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    norm: Tensor = torch.linalg.vector_norm(adapted, dim=1)
    return norm


def _leaf(values: Tensor, gradient: Tensor) -> Tensor:
    """Return a leaf whose gradients autograd adds to the given tensor; both share memory with it."""
    leaf = values.detach().requires_grad_()
    leaf.grad = gradient
    return leaf
