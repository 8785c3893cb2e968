"""What an optimizer has to say of itself, one file each, and the hyperparameters that several share."""

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
    "Decoupled weight decay of the adapter: each update takes so much times the rate off the weights.",
)
ADAM_BETA1 = Hyperparameter(
    "adam_beta1", 0.9, Number(at_least=0, below=1), "Decay of the first moment's average."
)
ADAM_BETA2 = Hyperparameter(
    "adam_beta2", 0.999, Number(at_least=0, below=1), "Decay of the second moment's average."
)
ADAM_EPSILON = Hyperparameter(
    "adam_epsilon", 1e-8, Number(above=0), "Added to the root of the second moment."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """An optimizer that a round file may name."""

    name: str
    hyperparameters: tuple[Hyperparameter, ...]
    """Those that count with it, besides those of every trial such as `learning_rate`."""
    state_bytes: int
    """Bytes of its state for each weight of an adapter, at most."""
    build: Callable[[Sequence[dict[str, Any]], Hyperparameters], torch.optim.Optimizer]
    """Make it from parameter groups as torch has them and the trial's hyperparameters.

    A group has `params`, the `lr` of its first update, and `part`: `A`, `B`, or DoRA's `magnitude`. The
    optimizer's own `param_groups` keep `part`; before each update their `lr` is set. The parameters are
    float32, and their `grad` is there already.
    """
    is_elementwise: bool = False
    """Whether it updates each element by that element's gradient alone.

    It is then given one vector with all A's, one with all B's and one with all magnitudes, which is faster;
    else a tensor for each matrix, in PEFT's shapes: A [rank, in], B [out, rank], magnitude [out].
    """
    amplifies_rounding: bool = False
    """Whether rounding grows from run to run: its state has fewer than 32 bits a number, or its update is a
    sign or computed in fewer bits."""
    trainer_arguments: Callable[[Hyperparameters], Mapping[str, Any]] | None = None
    """Its name and hyperparameters as arguments of `transformers.TrainingArguments`; None if it has none."""
    aliases: tuple[str, ...] = ()
    """What other tools call it, in lower case: a round file that says one of them is told this name."""


def optimizer(name: str) -> Optimizer:
    """Return the optimizer of this name. Raises InputError when the name leads to none."""
    return described("optimizer", name, Optimizer)


def adam_arguments(values: Hyperparameters) -> dict[str, Any]:
    """Return the arguments that torch's AdamW and bitsandbytes' both take, besides parameters and rate."""
    return {
        "betas": (ADAM_BETA1.number(values), ADAM_BETA2.number(values)),
        "eps": ADAM_EPSILON.number(values),
        "weight_decay": WEIGHT_DECAY.number(values),
    }


def trainer_adam(optim: str) -> Callable[[Hyperparameters], Mapping[str, Any]]:
    """Return what transformers' Trainer is told of an AdamW that it calls `optim`."""
    rows = (WEIGHT_DECAY, ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON)
    return lambda values: {"optim": optim, **{row.name: row.number(values) for row in rows}}
