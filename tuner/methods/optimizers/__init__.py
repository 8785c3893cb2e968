"""The description of an optimizer, one file each, and the hyperparameters that several optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.kinds import Number
from tuner.methods.registry import described
from tuner.records import Hyperparameters

if TYPE_CHECKING:
    import torch

WEIGHT_DECAY = Hyperparameter(
    "weight_decay",
    0.0,
    Number(at_least=0),
    "Decoupled weight decay of the adapter: each update shrinks the weights by this factor times the rate.",
)
ADAM_BETA1 = Hyperparameter("adam_beta1", 0.9, Number(at_least=0, below=1), "Decay rate of the first moment.")
ADAM_BETA2 = Hyperparameter(
    "adam_beta2", 0.999, Number(at_least=0, below=1), "Decay rate of the second moment."
)
ADAM_EPSILON = Hyperparameter(
    "adam_epsilon",
    1e-8,
    Number(above=0),
    "Added to the square root of the second moment, to avoid division by zero.",
)
ADAM = (WEIGHT_DECAY, ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON)
"""The hyperparameters of AdamW, whatever the precision of its states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer that a round file may name."""

    name: str
    hyperparameters: tuple[Hyperparameter, ...]
    """Its own hyperparameters, besides those of every trial such as `learning_rate`."""
    state_bytes: int
    """Maximum bytes of state per weight of an adapter."""
    build: Callable[[Sequence[dict[str, Any]], Hyperparameters], torch.optim.Optimizer]
    """Create it from parameter groups (as in torch) and the trial's hyperparameters.

    A group has `params`, the `lr` of the first update, and `part`: `A`, `B`, or `magnitude` (DoRA). The
    optimizer's `param_groups` must keep `part`; their `lr` is set before each update. The parameters are
    float32 and have a `grad`.
    """
    is_elementwise: bool = False
    """Whether the update of each element depends only on that element's gradient.

    If so, it gets one flat vector each for all A's, all B's and all magnitudes, which is faster. Otherwise
    it gets one tensor per matrix, in PEFT's shapes: A [rank, in], B [out, rank], magnitude [out].
    """
    block_elements: int = 1
    """If above 1, the largest tensors come first in memory, and each begins at a multiple of this many
    elements, with zeros between."""
    amplifies_rounding: bool = False
    """Whether rounding differences between runs grow: the state has fewer than 32 bits per number, or the
    update is a sign or is computed in fewer bits."""
    skips_on_device: bool = False
    """Whether `step` leaves weights and state alone while the optimizer's attribute `found_inf` is a tensor
    of value 1, as torch's fused ones do, or others with `unchanged_if` (`skipping.py`). On a GPU the host
    then need not wait for the gradient's norm."""
    counts_on_host: bool = False
    """With `skips_on_device`: whether skipped updates count, too, in a whole number `step` of its state.
    After a skipped update, a trial then rests until the host has read of it and has counted back."""
    trainer_arguments: Callable[[Hyperparameters], Mapping[str, Any]] | None = None
    """Returns the equivalent arguments of `transformers.TrainingArguments`; None if there are none."""
    aliases: tuple[str, ...] = ()
    """Names in other tools, in lower case. A round file that uses one gets this name suggested."""


def optimizer(name: str) -> Optimizer:
    """Return the optimizer with this name. Raises InputError for an unknown name."""
    return described("optimizer", name, Optimizer)


def adam_arguments(values: Hyperparameters) -> dict[str, Any]:
    """Return the arguments shared by torch's and bitsandbytes' AdamW, besides parameters and rate."""
    return {
        "betas": (ADAM_BETA1.number(values), ADAM_BETA2.number(values)),
        "eps": ADAM_EPSILON.number(values),
        "weight_decay": WEIGHT_DECAY.number(values),
    }


def trainer_adam(optim: str) -> Callable[[Hyperparameters], Mapping[str, Any]]:
    """Return a function for the Trainer arguments of the AdamW named `optim`."""
    rows = ADAM
    return lambda values: {"optim": optim, **{row.name: row.number(values) for row in rows}}
