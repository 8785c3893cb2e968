"""Initialisations of A and B: PEFT's that do not change the base model, and why others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tuner.records import Dimension, Hyperparameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialisation:
    """A value of `lora_init`. Add a new one to `INITIALISATIONS`."""

    name: str
    peft: bool | str
    """The value of `init_lora_weights` in `peft.LoraConfig`."""
    meaning: str
    """For the reference page."""
    zero_b: bool = True
    """Whether B starts at 0, so that step 0 equals the base model exactly."""
    even_rank: bool = False
    """Whether PEFT refuses odd ranks."""
    reads_rows: bool = False
    """Whether A is computed from what the layers read of training rows, which takes passes over the base."""


_BUILT_IN = (
    Initialisation(name="default", peft=True, meaning="PEFT's default, Kaiming-uniform A and zero B"),
    Initialisation(
        name="gaussian", peft="gaussian", meaning="normal A with standard deviation 1 / lora_r, and zero B"
    ),
    Initialisation(
        name="orthogonal",
        peft="orthogonal",
        meaning="random A and B whose product is 0 up to rounding, only for even ranks",
        zero_b=False,
        even_rank=True,
    ),
    Initialisation(
        name="eva",
        peft="eva",
        meaning="A from the principal components of each layer's inputs at the trial's first training rows "
        "(arXiv:2410.07170, with rho = 1: every layer keeps its rank), and zero B",
        reads_rows=True,
    ),
)
INITIALISATIONS: Mapping[str, Initialisation] = MappingProxyType({each.name: each for each in _BUILT_IN})
"""By name, the default first."""

_CHANGES_THE_BASE = "it changes the frozen base model's weights, which all trials share"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("pissa", "olora", "loftq", "corda", "lora_ga"), _CHANGES_THE_BASE),
        "mica": "it trains only A, but tuner trains both A and B",
    }
)
"""PEFT's unsupported values of `init_lora_weights`, also with suffixes such as pissa_niter_16; and why."""


def needs_even_ranks(initialisation: Dimension) -> bool:
    """Return whether PEFT refuses odd ranks for a value of this dimension of `lora_init`."""
    return any(each.even_rank and initialisation.contains(name) for name, each in INITIALISATIONS.items())


def refusal_of(name: str) -> str | None:
    """Return why a value of `init_lora_weights` is not supported; None if it is."""
    return next((why for each, why in REFUSED.items() if name == each or name.startswith(f"{each}_")), None)


def starts_with_zero_b(values: Hyperparameters) -> bool:
    """Return whether a trial's evaluation at step 0 is known to equal the base model's exactly."""
    if values.get("variant", "lora") != "lora":
        return False
    chosen = INITIALISATIONS.get(str(values.get("lora_init", "default")))
    return chosen is None or chosen.zero_b
