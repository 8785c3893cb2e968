"""How likely each hyperparameter's best value is to hold at another horizon."""

from __future__ import annotations

from enum import StrEnum


class Tier(StrEnum):
    """The chance that what was best in short runs is best in long ones."""

    VERY_LIKELY = "very_likely"
    LIKELY = "likely"
    MIGHT = "might"
    UNLIKELY = "unlikely"
    KEPT = "kept"
    """No question of transfer: it stays as it is, since changing it starts the tuning anew."""


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
    """The tier of a hyperparameter; a name that is not known here `might` transfer.

    So might the learning rate, weight decay, betas, dropout, lora_alpha and the optimizer itself.
    Rule: Deep Learning Tuning Playbook, "Round 1: Many short training runs"; which of LoRA's names is
    architecture, and that batch size and seed are kept, are this project's decisions.
    """
    return _TIERS.get(name, Tier.MIGHT)
