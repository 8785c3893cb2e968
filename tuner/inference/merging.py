"""Merging: an adapter added into its base's weights, so that the model stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuner.adapters import Adapter
from tuner.adapters.base import load_model
from tuner.errors import CheckpointError

if TYPE_CHECKING:
    from tuner.spec import ModelSpec

MERGED_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def merged_model(model: ModelSpec, adapter: Adapter, *, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the adapter in its weights, as transformers would load it unquantised, on the CPU.

    The base is read as it was in training, since the adapter corrects exactly that one: one in 4 or 8 bits is
    quantised and de-quantised again. Sums are taken in float32, one layer at a time, and rounded once; PEFT's
    own merge rounds in the base's dtype, and quantises the sum again where the base is quantised.
    Raises ModelError, and CheckpointError when the adapter is not one of this base.
    """
    merged = load_model(model, device="cpu", max_length=1)
    layers = dict(merged.named_modules())
    if missing := sorted(adapter.weights.keys() - layers.keys()):
        raise CheckpointError(f"the adapter has weights for {missing[0]}, and {model.path} has no such layer")
    for name, layer in layers.items():
        if name in adapter.weights or _is_quantised(layer):
            weight = _weight(layer)
            if name in adapter.weights:
                weight = adapted_weight(weight, adapter.weights[name], scale=adapter.scale)
            merged.set_submodule(name, _plain_layer(layer, weight.to(dtype)))
    _forget_quantisation(merged)
    for tensor in (*merged.parameters(), *merged.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    merged.config.dtype = dtype
    return merged


def adapted_weight(weight: Tensor, parts: tuple[Tensor, ...], *, scale: float) -> Tensor:
    """W + scale B A in float32, [out, in]; with DoRA's magnitude m, m times its rows at length 1.

    `parts` are those of `Adapter.weights`.
    """
    a, b, *magnitude = parts
    adapted = torch.addmm(weight, b.float(), a.float(), alpha=scale)
    if magnitude:
        lengths = torch.linalg.vector_norm(adapted, dim=1)
        adapted *= (magnitude[0].float() / lengths)[:, None]
    return adapted


def _is_quantised(layer: nn.Module) -> bool:
    return type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params")


@torch.no_grad()
def _weight(layer: nn.Module) -> Tensor:
    """[out, in] in float32, de-quantised. Call it once: PEFT spoils 8-bit layers on a CPU."""
    weight: Tensor = dequantize_module_weight(layer).detach()
    return (weight.t() if isinstance(layer, Conv1D) else weight).float()


def _plain_layer(layer: nn.Module, weight: Tensor) -> nn.Module:
    """What the unquantised model has in this place, with another weight [out, in]."""
    outputs, inputs = weight.shape
    bias = getattr(layer, "bias", None)
    plain: nn.Module
    with torch.device("meta"):
        if issubclass(getattr(layer, "source_cls", type(layer)), Conv1D):
            plain, weight = Conv1D(outputs, inputs), weight.t()
        else:
            plain = nn.Linear(inputs, outputs, bias=bias is not None)
    plain.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return plain


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Of bitsandbytes or a GGUF file: with it, the model is not saved, or loaded as what it no longer is."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
