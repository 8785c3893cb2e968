"""How A and B start: PEFT's ways that leave the base model as it is, and why the others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tuner.records import Hyperparameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Initialisation:
    """A value of `lora_init`. One more is one more description in `INITIALISATIONS`."""

    name: str
    peft: bool | str
    """The value of `init_lora_weights` in `peft.LoraConfig`."""
    meaning: str
    """For the reference page."""
    zero_b: bool = True
    """Whether B starts at 0, so that step 0 is the base model to the last digit."""
    even_rank: bool = False
    """Whether PEFT refuses odd ranks."""


_BUILT_IN = (
    Initialisation(name="default", peft=True, meaning="PEFT's default, A Kaiming uniform and B 0"),
    Initialisation(name="gaussian", peft="gaussian", meaning="A normal with deviation 1 / lora_r and B 0"),
    Initialisation(
        name="orthogonal",
        peft="orthogonal",
        meaning="A and B random, and their product 0 but for rounding; even ranks only",
        zero_b=False,
        even_rank=True,
    ),
)
INITIALISATIONS: Mapping[str, Initialisation] = MappingProxyType({each.name: each for each in _BUILT_IN})
"""By name, the default first."""

_CHANGES_THE_BASE = "it changes the frozen base model's weights, which all trials share"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("pissa", "olora", "loftq", "corda", "lora_ga"), _CHANGES_THE_BASE),
        "mica": "it keeps B as it starts and trains A alone, and tuner trains both",
        "eva": "not available yet: it needs the activations of training rows",
    }
)
"""PEFT's other values of `init_lora_weights`, also with a suffix such as pissa_niter_16, and why not."""


def starts_with_zero_b(values: Hyperparameters) -> bool:
    """Return whether a trial's evaluation at step 0 is the base model's to the last digit."""
    chosen = INITIALISATIONS.get(str(values.get("lora_init", "default")))
    return chosen is None or chosen.zero_b
