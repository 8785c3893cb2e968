"""The description of a variant of LoRA, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.errors import InputError, TunerError, last_words
from tuner.methods.hyperparameters import Hyperparameter
from tuner.methods.registry import BUILT_IN, described, imported, is_at_hand
from tuner.methods.variants.initialisations import refusal_of
from tuner.records import Choices, Fixed, Hyperparameters, Space


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A kind of adapter that a round file can choose.

    A variant adds arguments of `peft.LoraConfig`. They may choose scale, dropout and how A and B start; rank
    and layers are LoRA's hyperparameters. Three things hold:

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
    """The hyperparameter that selects this variant when true; None for plain LoRA and for plug-ins, which
    `variant: NAME` selects."""
    packs: bool = True
    """Whether several trials can train together in one pass over the base model."""
    weights_per_output: int = 0
    """Weights besides A and B per output of an adapted layer, such as DoRA's magnitude."""


CHOOSER = "variant"
"""The hyperparameter whose value names a plug-in's variant."""
PLAIN = "lora"
_TAKEN = frozenset({"r", "target_modules", "layers_to_transform", "layers_pattern"})
_UNSUPPORTED = frozenset(
    {
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "bias",
        "modules_to_save",
        "use_qalora",
        "alora_invocation_tokens",
    }
)


def variant(name: str) -> Variant:
    """Return the variant with this name. Raises InputError for an unknown name."""
    return described("variant", name, Variant)


def known_variant(name: str) -> Variant:
    """Return a variant without importing a plug-in: one that is already imported or recorded.

    Otherwise, assume that it packs and has no weights besides A and B.
    """
    return variant(name) if is_at_hand("variant", name) else not_imported(name)


def not_imported(
    name: str,
    *,
    title: str = "",
    packs: bool = True,
    weights_per_output: int = 0,
    hyperparameters: tuple[Hyperparameter, ...] = (),
) -> Variant:
    """Return a description of a plug-in's variant, which is imported only to make an adapter."""
    return Variant(
        name=name,
        title=title or name,
        hyperparameters=hyperparameters,
        config=lambda values: imported("variant", name, Variant).config(values),
        packs=packs,
        weights_per_output=weights_per_output,
    )


def variant_of(values: Hyperparameters) -> Variant:
    """Return the variant that a trial's hyperparameters select."""
    if (chosen := str(values.get(CHOOSER, PLAIN))) != PLAIN:
        return known_variant(chosen)
    return next((each for each in switched() if values.get(each.switch or "")), _plain())


def possible_variants(space: Space) -> tuple[Variant, ...]:
    """Return the variants that trials of a space can have."""
    names = variant_names(space)
    found = [known_variant(name) for name in names if name != PLAIN]
    if PLAIN not in names:
        return tuple(found)
    dimensions = [(each, space.get(each.switch or "")) for each in switched()]
    found[:0] = [each for each, dimension in dimensions if dimension is not None and dimension.contains(True)]
    if all(dimension is None or dimension.contains(False) for _, dimension in dimensions):
        found.insert(0, _plain())
    return tuple(found)


def variant_names(space: Space) -> tuple[str, ...]:
    """Return the names of variants that the space has, as written; DoRA has none."""
    match space.get(CHOOSER):
        case Fixed(value=value):
            return (str(value),)
        case Choices(values=values):
            return tuple(map(str, values))
    return (PLAIN,)


def adapter_arguments(values: Hyperparameters) -> dict[str, Any]:
    """Return the arguments of `peft.LoraConfig` for a trial's adapter.

    Raises InputError for arguments of a plug-in's variant that the training loop cannot follow.
    """
    chosen = variant_of(values)
    own = own_arguments(chosen, values)
    if values.get(CHOOSER, PLAIN) != PLAIN:
        refuse_arguments(chosen, own)
    return {**_plain().config(values), **own}


def own_arguments(chosen: Variant, values: Hyperparameters) -> Mapping[str, Any]:
    """Return the arguments that a variant adds. Raises InputError where its `config` does not work."""
    name = values.get(CHOOSER, chosen.name)
    try:
        own: object = chosen.config(values)
    except TunerError:
        raise
    except Exception as error:  # a plug-in may raise anything
        said = last_words(error, __file__)
        raise InputError(f"variant {name}: its config raised {said}") from error
    if not isinstance(own, Mapping):
        raise InputError(f"variant {name}: its config returned {own!r}, expects a mapping of arguments")
    return own


def refuse_arguments(chosen: Variant, arguments: Mapping[str, Any]) -> None:
    """Raise InputError for arguments of `peft.LoraConfig` that a variant may not set."""
    initialisation = arguments.get("init_lora_weights")
    wrong = {
        **dict.fromkeys(_TAKEN & arguments.keys(), "rank and layers are LoRA's hyperparameters"),
        **dict.fromkeys(_UNSUPPORTED & arguments.keys(), "the training loop does not compute it"),
    }
    if arguments.get("use_dora") and chosen.packs:
        wrong["use_dora"] = "DoRA does not pack; declare packs=False and weights_per_output=1"
    if isinstance(initialisation, str) and (reason := refusal_of(initialisation)):
        wrong["init_lora_weights"] = f"{initialisation}: {reason}"
    if wrong:
        said = "; ".join(f"{name}: {reason}" for name, reason in sorted(wrong.items()))
        raise InputError(f"variant {chosen.name}: its config returns arguments it may not set: {said}")


def _plain() -> Variant:
    return variant(PLAIN)


def switched() -> list[Variant]:
    """Return the variants that a hyperparameter of their own selects."""
    return [each for each in map(variant, BUILT_IN["variant"]) if each.switch is not None]
