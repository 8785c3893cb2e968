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
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = _PARTS = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
"""PEFT's names for the entries of a module's tuple; the last with DoRA only."""


def named_tensors(weights: Mapping[str, tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Return weights under PEFT's key names, contiguous and on the CPU."""
    return {
        f"{_PREFIX}{module}.{part}": tensor.detach().cpu().contiguous()
        for module, tensors in weights.items()
        for part, tensor in zip(_PARTS, tensors, strict=False)
    }


def weights_from(named: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Invert `named_tensors`."""
    parts = _PARTS if any(key.endswith(_MAGNITUDE) for key in named) else _PARTS[:2]
    modules = [key.removeprefix(_PREFIX).removesuffix(f".{_A}") for key in named if key.endswith(f".{_A}")]
    return {module: tuple(named[f"{_PREFIX}{module}.{part}"] for part in parts) for module in modules}


def write_adapter(
    directory: Path, adapter: Adapter, weights: Mapping[str, tuple[Tensor, ...]] | None = None
) -> None:
    """Write an adapter for `PeftModel.from_pretrained(base, directory)` into an existing directory."""
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
    """Read an adapter directory. Raises CheckpointError if a file is missing or unreadable."""
    try:
        config = PeftConfig.from_pretrained(str(directory))
        named = load_file(directory / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: not a PEFT adapter directory: {error}") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{directory}: a {config.peft_type} adapter; tuner reads LoRA")
    return Adapter(config, weights_from(named))
