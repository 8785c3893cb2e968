"""Loaders of base models other than transformers: unsloth, an optional package that needs a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

from tuner.errors import ModelError
from tuner.installation import lacks

if TYPE_CHECKING:
    from tuner.config import ModelSpec


def require_loader(model: ModelSpec) -> None:
    """Raise ModelError if `model.loader` cannot be used here. Cheap: loads nothing."""
    if model.loader == "unsloth":
        refuse_without_unsloth(
            is_installed=find_spec("unsloth") is not None, has_gpu=torch.cuda.is_available()
        )


def refuse_without_unsloth(*, is_installed: bool, has_gpu: bool) -> None:
    """Raise ModelError for what is lacking."""
    why = lacks("unsloth", extra="unsloth", is_installed=is_installed, has_gpu=has_gpu)
    if why is not None:
        raise ModelError(
            f"model.loader: unsloth cannot be used here: {why}, or set model.loader: transformers"
        )


def load_by_unsloth(
    model: ModelSpec,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_length: int,
    quantization: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    """Load the model with unsloth's attention and normalisation kernels, from exactly the named weights.

    Its kernels that fuse LoRA come with its own PEFT patch alone and are not used.
    """
    from unsloth import FastLanguageModel

    loaded, _ = FastLanguageModel.from_pretrained(
        model_name=model.path,
        max_seq_length=max_length,
        dtype=dtype,
        load_in_4bit=quantization is not None,
        quantization_config=quantization,
        device_map={"": device},
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        # Its own repositories of pre-quantised weights would be a different base model.
        use_exact_model_name=True,
        # Base.keep_fewer_activations decides this, for any model.
        use_gradient_checkpointing=False,
    )
    assert isinstance(loaded, PreTrainedModel)
    # Its step from cached keys reads the weights of linear layers and of adapters that PEFT made. It would
    # pass by tuner's layers, and answers would be the base model's.
    loaded.generation_config.use_cache = False
    return loaded
