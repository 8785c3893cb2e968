"""The description of a variant of LoRA, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.registry import BUILT_IN, described
from tuner.records import Hyperparameters, Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kind of adapter that a round file can choose.

    A variant adds arguments of `peft.LoraConfig`. They may choose layers, rank, scale and how A and B start,
    as long as three things hold:

    - The base model's weights stay as they are, since trials share them.
    - The forward pass is LoRA's, W x + scale B A x, with one rank and scale for all layers. The training loop
      computes it, not PEFT, and DoRA's is the only other one it knows.
    - Training starts at the base model, so B A is 0 but for rounding. Gains and divergence are measured
      against step 0.

    `rank_pattern`, `alpha_pattern`, `lora_bias`, `modules_to_save`, `use_qalora`, aLoRA and the like break
    one of these.
    """

    name: str
    title: str
    """Name in messages, such as `DoRA`."""
    hyperparameters: tuple[Hyperparameter, ...]
    """Its own hyperparameters, in addition to LoRA's."""
    config: Callable[[Hyperparameters], Mapping[str, Any]]
    """Returns arguments of `peft.LoraConfig`, in addition to LoRA's."""
    switch: str | None = None
    """The hyperparameter that selects this variant when true; None for plain LoRA."""
    packs: bool = True
    """Whether several trials can train together in one pass over the base model."""
    weights_per_output: int = 0
    """Weights besides A and B per output of an adapted layer, such as DoRA's magnitude."""


def variant(name: str) -> Variant:
    """Return the variant with this name. Raises InputError for an unknown name."""
    return described("variant", name, Variant)


def variant_of(values: Hyperparameters) -> Variant:
    """Return the variant that a trial's hyperparameters select."""
    return next((each for each in _switched() if values.get(each.switch or "")), _plain())


def possible_variants(space: Space) -> tuple[Variant, ...]:
    """Return the variants that trials of a space can have."""
    dimensions = [(each, space.get(each.switch or "")) for each in _switched()]
    found = [each for each, dimension in dimensions if dimension is not None and dimension.contains(True)]
    if all(dimension is None or dimension.contains(False) for _, dimension in dimensions):
        found.insert(0, _plain())
    return tuple(found)


def adapter_arguments(values: Hyperparameters) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig` for a trial's adapter."""
    return {**_plain().config(values), **variant_of(values).config(values)}


def _plain() -> Variant:
    return variant("lora")


def _switched() -> list[Variant]:
    return [each for each in map(variant, BUILT_IN["variant"]) if each.switch is not None]
