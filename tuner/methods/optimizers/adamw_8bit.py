"""AdamW with 8-bit states, from bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuner.methods.optimizers import ADAM, Optimizer, adam_arguments, trainer_adam
from tuner.records import Hyperparameters

if TYPE_CHECKING:
    import torch


def _build(groups: Sequence[dict[str, Any]], values: Hyperparameters) -> torch.optim.Optimizer:
    """Build per tensor: bitsandbytes quantises blocks of 256 in a tensor and keeps small tensors in 32
    bits."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(groups, **adam_arguments(values))  # type: ignore[no-any-return]


ADAMW_8BIT = Optimizer(
    name="adamw_8bit",
    hyperparameters=ADAM,
    state_bytes=2,
    build=_build,
    amplifies_rounding=True,
    trainer_arguments=trainer_adam("adamw_8bit"),
    aliases=("adamw_bnb_8bit", "paged_adamw_8bit", "adam_8bit", "adam8bit", "adamw8bit"),
)
