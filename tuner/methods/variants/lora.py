"""LoRA, optionally with rank-stabilised scale (rsLoRA) and a separate learning rate for B (LoRA+)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.methods.hyperparameters import Hyperparameter, Tier
from tuner.methods.kinds import ALL_LAYERS, ALL_LINEAR, Flag, Integer, Layers, Modules, Number, OneOf
from tuner.methods.variants import Variant
from tuner.methods.variants.initialisations import INITIALISATIONS, REFUSED
from tuner.records import Hyperparameters

LORA_R = Hyperparameter(
    "lora_r", 16, Integer(at_least=1), "Rank of the adapter's matrices.", tier=Tier.LIKELY
)
LORA_ALPHA = Hyperparameter(
    "lora_alpha",
    16.0,
    Number(above=0),
    "Scale of the adapter's output: lora_alpha / lora_r, or lora_alpha / sqrt(lora_r) with use_rslora. "
    "{times_sqrt_r: 4} sets it to 4 sqrt(lora_r) in each trial.",
    may_follow_rank=True,
)
TARGET_MODULES = Hyperparameter(
    "target_modules",
    ALL_LINEAR,
    Modules(),
    "Linear layers that get an adapter: all-linear, all of them except the output head; a list of names, "
    "which match the end of a layer's name; or a regular expression, which must match the whole name. "
    "To search, list such values: [all-linear, [q_proj, v_proj]].",
    tier=Tier.LIKELY,
)
LAYERS_TO_TRANSFORM = Hyperparameter(
    "layers_to_transform",
    ALL_LAYERS,
    Layers(),
    "Numbers of the transformer layers that get an adapter, if target_modules is all-linear or a list of "
    "names. To search, list such values: [all, [0, 1]].",
    tier=Tier.LIKELY,
    only_if_written=True,
)
LORA_DROPOUT = Hyperparameter(
    "lora_dropout",
    0.0,
    Number(at_least=0, below=1),
    "Probability of dropping an input of the adapter during training.",
)
USE_RSLORA = Hyperparameter(
    "use_rslora",
    False,
    Flag(),
    "Scale by lora_alpha / sqrt(lora_r) (rank-stabilised LoRA, arXiv:2312.03732).",
    tier=Tier.LIKELY,
)
LORAPLUS_RATIO = Hyperparameter(
    "loraplus_ratio",
    1.0,
    Number(above=0),
    "Learning rate of the B matrices divided by that of the A matrices (LoRA+, arXiv:2402.12354).",
)
LORA_INIT = Hyperparameter(
    "lora_init",
    "default",
    OneOf(tuple(INITIALISATIONS), refused=tuple(REFUSED.items())),
    "Initialisation of A and B. "
    + "; ".join(f"{each.name}: {each.meaning}" for each in INITIALISATIONS.values())
    + ". PEFT's other values are refused, most because they change the base model.",
    tier=Tier.VERY_LIKELY,
)


def _config(values: Hyperparameters) -> Mapping[str, Any]:
    targets = values["target_modules"]
    layers = LAYERS_TO_TRANSFORM.value(values)
    initialisation = INITIALISATIONS[str(LORA_INIT.value(values))]
    return {
        "r": int(LORA_R.number(values)),
        "lora_alpha": values["lora_alpha"],
        "lora_dropout": LORA_DROPOUT.number(values),
        "use_rslora": bool(USE_RSLORA.value(values)),
        "target_modules": list(targets) if isinstance(targets, tuple) else targets,
        "layers_to_transform": list(layers) if isinstance(layers, tuple) else None,
        "init_lora_weights": initialisation.peft,
    }


LORA = Variant(
    name="lora",
    title="LoRA",
    hyperparameters=(
        LORA_R,
        LORA_ALPHA,
        TARGET_MODULES,
        LAYERS_TO_TRANSFORM,
        LORA_DROPOUT,
        USE_RSLORA,
        LORAPLUS_RATIO,
        LORA_INIT,
    ),
    config=_config,
)
