"""AdamW with 32-bit states, from torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuner.methods.optimizers import ADAM, Optimizer, adam_arguments, trainer_adam
from tuner.records import Hyperparameters

if TYPE_CHECKING:
    import torch


def _build(groups: Sequence[dict[str, Any]], values: Hyperparameters) -> torch.optim.Optimizer:
    from torch.optim import AdamW

    return AdamW(groups, fused=True, **adam_arguments(values))


ADAMW = Optimizer(
    name="adamw",
    hyperparameters=ADAM,
    state_bytes=8,
    build=_build,
    is_elementwise=True,
    skips_on_device=True,
    trainer_arguments=trainer_adam("adamw_torch"),
    aliases=("adam", "adamw_torch", "adamw_hf", "adamw_torch_fused"),
)
