"""Choose the number of trials in a worker and of tokens in a pass, predicted from a few probe passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tuner.errors import ModelError

MAX_SLOTS = 16
"""More slots have shown no gain: a pass is full long before."""
KNEE_SHARE = 0.1
"""A pass is full when its fixed costs are at most this share of it."""
MIN_KNEE_TOKENS, MAX_KNEE_TOKENS = 1024, 32_768
MARGIN = 0.92
"""Share of the free memory that a prediction may use."""
BYTES_PER_SLOT_WEIGHT = 28
"""Per adapter weight in a slot. In float32: the stacked weight and its gradient, 8; the trial's master
weight, gradient, two moments and best weight, 20. In bfloat16 the stacked two take 4, and their sum 4."""


@dataclass(frozen=True)
class Probed:
    """The measured costs of passes of different sizes, with one trial in the slots."""

    tokens: tuple[int, ...]
    """Of each pass, including padding."""
    seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    """Peak memory during each, including the base model."""


@dataclass(frozen=True)
class PassCost:
    """A linear fit of the probe passes: cost = fixed + per_token * tokens of a pass."""

    fixed_seconds: float
    seconds_per_token: float
    fixed_bytes: float
    bytes_per_token: float

    @property
    def knee_tokens(self) -> int:
        """Return the tokens from which a pass is full because its fixed costs have become small."""
        if self.seconds_per_token <= 0:
            return MIN_KNEE_TOKENS
        tokens = (1 / KNEE_SHARE - 1) * self.fixed_seconds / self.seconds_per_token
        return int(min(max(tokens, MIN_KNEE_TOKENS), MAX_KNEE_TOKENS))

    def peak_bytes(self, *, slots: int, slot_weights: int, pass_tokens: int) -> float:
        """Return the peak memory of training."""
        adapters = slots * slot_weights * BYTES_PER_SLOT_WEIGHT
        return self.fixed_bytes + adapters + self.bytes_per_token * pass_tokens


@dataclass(frozen=True)
class Packing:
    """The slots and tokens of a worker."""

    slots: int
    pass_tokens: int
    """Of all trials in one pass."""


def fit_pass_cost(probed: Probed) -> PassCost:
    """Fit by least squares; costs that fall with the tokens, which is noise, count as constant."""
    fixed_seconds, seconds = _line(probed.tokens, probed.seconds)
    fixed_bytes, per_token = _line(probed.tokens, probed.peak_bytes)
    return PassCost(fixed_seconds, seconds, fixed_bytes, per_token)


def choose_packing(
    cost: PassCost, *, limit_bytes: int, slot_weights: int, update_tokens: int, longest_row: int, trials: int
) -> Packing:
    """Return as many trials as fill a pass and fit into memory; at least one.

    `slot_weights` counts the weights of a slot, `update_tokens` the tokens of a typical update of one trial.
    Memory goes to the slots first, since the tokens of a pass can be reduced and slots cannot; but a pass
    always has space for one row of each.
    """
    wanted = min(trials, MAX_SLOTS, math.ceil(cost.knee_tokens / max(1, update_tokens)))
    for slots in range(max(1, wanted), 0, -1):
        left = limit_bytes - cost.peak_bytes(slots=slots, slot_weights=slot_weights, pass_tokens=0)
        fitting = left / cost.bytes_per_token if cost.bytes_per_token > 0 else math.copysign(math.inf, left)
        if fitting >= slots * longest_row or slots == 1:
            full = max(cost.knee_tokens, slots * longest_row)
            return Packing(slots, int(max(longest_row, min(fitting, full))))
    raise AssertionError("one slot is always chosen")


def out_of_memory(slots: int | Literal["auto"]) -> ModelError:
    """Return the error for a round whose smallest pass does not fit into memory."""
    return ModelError(
        f"run.slots: with {slots} slot(s), memory has no room for a pass of even one row; lower run.slots, "
        "data.max_length or hyperparameters.lora_r, or set model.quantization: nf4"
    )


@contextmanager
def explain_out_of_memory(slots: int | Literal["auto"]) -> Iterator[None]:
    """Raise `out_of_memory` if memory runs out within the block."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(slots) from error


def free_device_bytes(device: torch.device) -> int:
    """Return the GPU memory that this process holds or may take."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return (value at 0, slope), neither below 0; a constant for a single point."""
    if len(set(x)) < 2:
        return float(np.mean(y)), 0.0
    slope, start = np.polyfit(x, y, 1)
    if slope <= 0:
        return float(np.mean(y)), 0.0
    if start < 0:
        return 0.0, float(np.dot(x, y) / np.dot(x, x))
    return float(start), float(slope)
