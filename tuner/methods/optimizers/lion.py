"""Lion with 32-bit states, from bitsandbytes. The update is the sign of a mean of gradient and momentum.

Chen et al., "Symbolic Discovery of Optimization Algorithms" (arXiv:2302.06675), Program 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Number
from tuner.methods.optimizers import WEIGHT_DECAY, Optimizer
from tuner.methods.optimizers.adamw_8bit import without_waiting
from tuner.records import Hyperparameters

if TYPE_CHECKING:
    import torch

LION_BETA1 = Hyperparameter(
    "lion_beta1",
    0.9,
    Number(at_least=0, below=1),
    "Weight of the momentum in the update; the gradient has the rest (Lion, arXiv:2302.06675). Use a "
    "learning rate 3 to 10 times lower than for AdamW.",
)
LION_BETA2 = Hyperparameter("lion_beta2", 0.99, Number(at_least=0, below=1), "Decay rate of the momentum.")


def lion_arguments(values: Hyperparameters) -> dict[str, Any]:
    """Return the arguments of bitsandbytes' Lion and Lion8bit, besides parameters and rate."""
    return {
        "betas": (LION_BETA1.number(values), LION_BETA2.number(values)),
        "weight_decay": WEIGHT_DECAY.number(values),
    }


def trainer_lion(optim: str, values: Hyperparameters) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer, where Lion's betas have Adam's names."""
    return {
        "optim": optim,
        "weight_decay": WEIGHT_DECAY.number(values),
        "adam_beta1": LION_BETA1.number(values),
        "adam_beta2": LION_BETA2.number(values),
    }


def _build(groups: Sequence[dict[str, Any]], values: Hyperparameters) -> torch.optim.Optimizer:
    from bitsandbytes.optim import Lion

    return without_waiting(Lion)(groups, **lion_arguments(values))  # type: ignore[no-any-return]


LION = Optimizer(
    name="lion",
    hyperparameters=(WEIGHT_DECAY, LION_BETA1, LION_BETA2),
    state_bytes=4,
    build=_build,
    is_elementwise=True,
    amplifies_rounding=True,
    skips_on_device=True,
    counts_on_host=True,
    trainer_arguments=lambda values: trainer_lion("lion_32bit", values),
    aliases=("lion_32bit", "lion_pytorch", "paged_lion_32bit"),
)
