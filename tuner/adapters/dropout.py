"""LoRA dropout from a counter, so that a mask depends only on the trial and the token."""

from __future__ import annotations

import torch
from torch import Tensor

_MIX_1, _MIX_2 = 0x7FEB352D, 0x846CA68B
"""Multipliers of the `lowbias32` hash (C. Wellons, "Prospecting for Hash Functions", 2018; public domain)."""
_MASK = 0xFFFFFFFF


def row_keys(seed: int, step: int, rows: Tensor) -> Tensor:
    """Return a 32-bit key per row [rows], from the trial's seed, the step and the row's batch position."""
    key = _hash(torch.tensor(seed & _MASK, dtype=torch.int64, device=rows.device))
    key = _hash(key ^ (step & _MASK))
    return _hash(key ^ rows.to(torch.int64))


def dropout_mask(keys: Tensor, *, module: int, length: int, width: int, rate: float) -> Tensor:
    """Return which inputs of a module are kept: bool [rows, length, width], True with probability 1 - rate.

    `keys` are from `row_keys`; `module` is a 32-bit key of the module's path.
    """
    per_module = _hash(keys ^ _hash(torch.tensor(module, dtype=torch.int64, device=keys.device)))
    tokens = torch.arange(length, device=keys.device)
    per_token = _hash(per_module[:, None] ^ tokens[None, :])
    channels = torch.arange(width, device=keys.device)
    draws = _hash(per_token[:, :, None] ^ channels[None, None, :])
    return draws >= round(rate * 2**32)


def _hash(value: Tensor) -> Tensor:
    """Mix 32 bits in int64 arithmetic: products wrap, and the low 32 bits stay right."""
    value = value & _MASK
    value = ((value ^ (value >> 16)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 15)) * _MIX_2) & _MASK
    return value ^ (value >> 16)
