"""Dropout's masks written out in 64-bit integers, trial by trial."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def dropout_mask(keys: Tensor, *, module: int, length: int, width: int, rate: float) -> Tensor:
    """Which inputs are kept: bool [rows, length, width]. `keys` are of `row_keys`."""
    per_module = _hash(keys.to(torch.int64) ^ _hash(torch.tensor(module)))
    per_token = _hash(per_module[:, None] ^ torch.arange(length))
    return _hash(per_token[:, :, None] ^ torch.arange(width)) >= round(rate * 2**32)


def _hash(value: Tensor) -> Tensor:
    value = value & _MASK
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK
    return value ^ (value >> 16)
