"""How likely each hyperparameter's best value is to hold at another horizon."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """The chance that the best value in short runs is the best in long ones."""

    VERY_LIKELY = "very_likely"
    LIKELY = "likely"
    MIGHT = "might"
    UNLIKELY = "unlikely"
    KEPT = "kept"
    """Not transferred: it stays unchanged, since changing it means tuning everything again."""


_TIERS = {
    "warmup_steps": Tier.VERY_LIKELY,
    "lora_init": Tier.VERY_LIKELY,
    "lora_r": Tier.LIKELY,
    "target_modules": Tier.LIKELY,
    "use_dora": Tier.LIKELY,
    "use_rslora": Tier.LIKELY,
    "schedule": Tier.UNLIKELY,
    "decay_steps": Tier.UNLIKELY,
    "batch_size": Tier.KEPT,
    "training_seed": Tier.KEPT,
}


def tier_of(name: str) -> Tier:
    """Return the tier of a hyperparameter; unlisted names `might` transfer.

    These include the learning rate, weight decay, betas, dropout, lora_alpha and the optimizer itself. Rule:
    Deep Learning Tuning Playbook, "Round 1: Many short training runs"; which of LoRA's names is architecture,
    and that batch size and seed are kept, are this project's decisions.
    """
    return _TIERS.get(name, Tier.MIGHT)
