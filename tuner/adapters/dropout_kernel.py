"""Dropout as one Triton kernel, with the bits of `frozen_linear.dropout`. Importing it needs Triton."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
"""Elements of a program."""


@triton.jit
def _mixed(value):  # type: ignore[no-untyped-def]
    """`frozen_linear._hash` in int32, whose products wrap."""
    value ^= (value >> 16) & 0xFFFF
    value *= 0x7FEB352D
    value ^= (value >> 15) & 0x1FFFF
    value *= -0x7B935975
    return value ^ ((value >> 16) & 0xFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    x,
    into,
    keys,
    thresholds,
    kept_shares,
    size,
    width,
    length,
    BLOCK: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
):
    """bfloat16 comes as its bits: Triton's interpreter cuts what a GPU rounds."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    token = at // width
    slot = token // length
    key = tl.load(keys + token, mask=inside, other=0)
    draw = _mixed(key ^ (at - token * width)) ^ -2147483648
    is_kept = draw >= tl.load(thresholds + slot, mask=inside, other=0)
    share = tl.load(kept_shares + slot, mask=inside, other=1.0)
    value = tl.load(x + at, mask=inside, other=0)
    if HALF:
        value = (value.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    value = tl.div_rn(value, share)  # as torch divides: the plain `/` is an approximation on a GPU
    if HALF:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)
        tl.store(into + at, tl.where(is_kept, rounded, 0).to(tl.int16), mask=inside)
    else:
        tl.store(into + at, tl.where(is_kept, value, 0.0), mask=inside)


def dropped(x: Tensor, keys: Tensor, thresholds: Tensor, kept_shares: Tensor) -> Tensor:
    """Return `frozen_linear.dropout` of the same arguments, for x in float32 or bfloat16 whose elements
    32 bits can count.

    The gradient of a loss by x is the same function of its gradient by the result.
    """
    x, keys = x.contiguous(), keys.contiguous()
    into = torch.empty_like(x)
    is_half = x.dtype == torch.bfloat16
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _kernel[(triton.cdiv(x.numel(), _BLOCK),)](
            x.view(torch.int16) if is_half else x,
            into.view(torch.int16) if is_half else into,
            keys,
            thresholds.contiguous(),
            kept_shares.contiguous(),
            x.numel(),
            x.shape[-1],
            keys.shape[1],
            BLOCK=_BLOCK,
            HALF=is_half,
        )
    return into
