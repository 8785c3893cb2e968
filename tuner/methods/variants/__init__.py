"""What a variant of LoRA has to say of itself, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.registry import BUILT_IN, described
from tuner.records import Hyperparameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kind of adapter that a round file may ask for."""

    name: str
    hyperparameters: tuple[Hyperparameter, ...]
    """Those that it brings. LoRA's own count with each."""
    config: Callable[[Hyperparameters], Mapping[str, Any]]
    """Arguments of `peft.LoraConfig`, on top of LoRA's."""
    switch: str | None = None
    """The hyperparameter that is true in a trial of this variant; None of LoRA, which is what is left."""
    packs: bool = True
    """Whether several trials can train together in one pass over the base model."""


def variant(name: str) -> Variant:
    """Return the variant of this name. Raises InputError when the name leads to none."""
    return described("variant", name, Variant)


def variant_of(values: Hyperparameters) -> Variant:
    """Return the variant that a trial's hyperparameters switch on."""
    known = [variant(name) for name in BUILT_IN["variant"]]
    plain = next(each for each in known if each.switch is None)
    return next((each for each in known if each.switch is not None and values.get(each.switch)), plain)
