"""PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tuner.adapters.initial import Adapter
from tuner.errors import CheckpointError

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def named_tensors(weights: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Weights under PEFT's key names, contiguous and on the CPU."""
    named = {}
    for module, (a, b) in weights.items():
        named[f"{_PREFIX}{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        named[f"{_PREFIX}{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    return named


def weights_from(named: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The inverse of `named_tensors`."""
    modules = [key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in named if ".lora_A." in key]
    return {
        module: (named[f"{_PREFIX}{module}.lora_A.weight"], named[f"{_PREFIX}{module}.lora_B.weight"])
        for module in modules
    }


def write_adapter(
    directory: Path, adapter: Adapter, weights: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> None:
    """Write what `PeftModel.from_pretrained(base, directory)` loads, into an existing directory."""
    config = adapter.config
    was_inference = config.inference_mode
    config.inference_mode = True
    try:
        config.save_pretrained(str(directory))
    finally:
        config.inference_mode = was_inference
    tensors = named_tensors(adapter.weights if weights is None else weights)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def read_adapter(directory: Path) -> Adapter:
    """Read an adapter directory. Raises CheckpointError when a file is missing or unreadable."""
    try:
        config = PeftConfig.from_pretrained(str(directory))
        named = load_file(directory / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not a PEFT adapter directory: {error}") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{directory}: a {config.peft_type} adapter; tuner reads LoRA")
    return Adapter(config, weights_from(named))
