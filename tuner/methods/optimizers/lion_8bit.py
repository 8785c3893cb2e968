"""Lion with 8-bit states, from bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuner.methods.optimizers import WEIGHT_DECAY, Optimizer
from tuner.methods.optimizers.adamw_8bit import BLOCK_ELEMENTS, without_waiting
from tuner.methods.optimizers.lion import LION_BETA1, LION_BETA2, lion_arguments, trainer_lion
from tuner.records import Hyperparameters

if TYPE_CHECKING:
    import torch


def _build(groups: Sequence[dict[str, Any]], values: Hyperparameters) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion8bit

    return without_waiting(Lion8bit)(groups, **lion_arguments(values))  # type: ignore[no-any-return]


LION_8BIT = Optimizer(
    name="lion_8bit",
    hyperparameters=(WEIGHT_DECAY, LION_BETA1, LION_BETA2),
    state_bytes=1,
    block_elements=BLOCK_ELEMENTS,
    build=_build,
    amplifies_rounding=True,
    skips_on_device=True,
    counts_on_host=True,
    trainer_arguments=lambda values: trainer_lion("lion_8bit", values),
    aliases=("lion8bit", "paged_lion_8bit"),
)
