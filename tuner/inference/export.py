"""Adapters for other tools: copied, merged into the base model, as GGUF, on the Hub."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel
from peft.utils.integrations import dequantize_module_weight
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D

from tuner.adapters import Adapter, read_adapter, write_adapter
from tuner.adapters.base import load_model
from tuner.adapters.generation import end_tokens
from tuner.errors import CheckpointError, TunerError
from tuner.whole import written_whole

if TYPE_CHECKING:
    from tuner.config import ModelSpec


MERGED_DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def merged_model(model: ModelSpec, adapter: Adapter, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the base model with the adapter merged, as transformers would load it unquantised, on the CPU.

    The base model is read as in training, since the adapter corrects exactly that one: one in 4 or 8 bits is
    quantised and de-quantised again. Sums are taken in float32, one layer at a time, and rounded once; PEFT's
    own merge rounds in the base model's dtype, and quantises the sum again if the base model is quantised.
    Raises ModelError, and CheckpointError if the adapter is not one of this base model.
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
    """Return W + scale B A in float32, [out, in]; with DoRA's magnitude m, m times its rows at length 1.

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
    """Return [out, in] in float32, de-quantised. Call it once: PEFT corrupts 8-bit layers on a CPU."""
    weight: Tensor = dequantize_module_weight(layer).detach()
    return (weight.t() if isinstance(layer, Conv1D) else weight).float()


def _plain_layer(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Return the unquantised model's layer of this kind, with another weight [out, in]."""
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
    """Remove traces of bitsandbytes or GGUF, which would break saving or loading the model unquantised."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


_OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
_LINES_SHOWN = 15
"""Last lines of a converter's output, which contain its error."""


def convert_to_gguf(model: Path, file: Path, *, converter: Path, dtype: str) -> None:
    """Convert a directory of a merged model; the file is written atomically.

    `dtype` is one of MERGED_DTYPES. Raises TunerError with the converter's output.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as temporary:
            options = ["--outfile", str(temporary), "--outtype", _OUTTYPES[dtype]]
            command = [*_runs(converter), str(model), *options]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not temporary.is_file():
                printed = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LINES_SHOWN:])
                raise TunerError(
                    f"{converter} ended with {done.returncode} and wrote no {file.name}; the merged model is "
                    f"in {model}. It printed:\n{printed}"
                )
    except OSError as error:
        raise TunerError(f"{file}: cannot be written by {converter}: {error}") from error


def _runs(converter: Path) -> Sequence[str]:
    """Run a Python file with this Python, which has the torch and transformers that it needs."""
    if converter.suffix == ".py":
        return [sys.executable, str(converter)]
    return [shutil.which(str(converter)) or str(converter)]


_HttpError: type[Exception] = HfHubHTTPError.__mro__[1]
"""Raised by the Hub's library if the server does not answer: from httpx, or from its replacement."""


def push(directory: Path, repo: str, *, token: str, public: bool, endpoint: str | None = None) -> str:
    """Upload a complete directory as one commit; return the repository's address.

    A missing repository is created, private unless `public`. `endpoint` is another Hub. Raises TunerError,
    which says how to upload without exporting again.
    """
    api = HfApi(endpoint=endpoint, token=token)
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=directory, commit_message=f"Upload {directory.name}"
        )
    except (_HttpError, OSError) as error:
        raise TunerError(
            f"--push {repo}: the Hub refused the upload: {error}\n"
            f"{directory} is complete. Upload it again with: hf upload {repo} {directory} ."
        ) from error
    return str(made)


def export_adapter(
    adapter: Path, directory: Path, *, model: ModelSpec, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a PEFT adapter and a tokenizer into an existing directory; `model` is the base model's name.

    Raises CheckpointError.
    """
    read = read_adapter(adapter)
    read.config.base_model_name_or_path = model.path
    read.config.revision = model.revision
    write_adapter(directory, read)
    tokenizer.save_pretrained(str(directory))


def export_merged(
    adapter: Path, directory: Path, *, model: ModelSpec, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """Write the merged model for transformers, and a tokenizer, into an existing directory.

    Its generation ends at the tokenizer's EOS, which was trained, and at those of the base model. `dtype` is
    one of MERGED_DTYPES. Raises CheckpointError and ModelError.
    """
    merged = merged_model(model, read_adapter(adapter), dtype=MERGED_DTYPES[dtype])
    if merged.generation_config is not None:
        ends = end_tokens(tokenizer, merged.generation_config)
        merged.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    merged.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))


_ADAPTER_WEIGHTS = "adapter_model.safetensors"


def merge_checkpoint(adapter: Path, directory: Path, *, beside: Path, dtype: str) -> str:
    """Merge a PEFT adapter of any tool into the base model that it names, for transformers.

    Writes into an existing directory, and returns the base model's name. A relative path is in the folder
    `beside`. Sums are taken in float32 and rounded once to `dtype`, one of MERGED_DTYPES; a quantised base
    model is read unquantised. Weights are read from safetensors only, since others are pickles.
    Raises CheckpointError.
    """
    if not (adapter / _ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{adapter}: has no {_ADAPTER_WEIGHTS}, and tuner loads no pickle such as adapter_model.bin. "
            "Merge it with the tool that trained it, or let that save safetensors"
        )
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        name = str(config.base_model_name_or_path)
        place = str(beside / name) if (beside / name).is_dir() else name
        revision = {"revision": config.revision} if place == name and config.revision else {}
        kind, details = _kind_of_model(adapter, str(config.task_type))
        base = kind.from_pretrained(place, dtype=torch.float32, use_safetensors=True, **revision, **details)
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload(safe_merge=True)
        merged.to(MERGED_DTYPES[dtype]).save_pretrained(str(directory))
        has_tokenizer = (adapter / "tokenizer_config.json").is_file()
        AutoTokenizer.from_pretrained(str(adapter) if has_tokenizer else place).save_pretrained(directory)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{adapter}: cannot be merged: {error}. Merge it with the tool that trained it"
        ) from error
    return name


def _kind_of_model(adapter: Path, task: str) -> tuple[Any, Mapping[str, Any]]:
    """Return transformers' class for an adapter's task, and what else it has to know: the labels, of which a
    reward model has one."""
    if task.rpartition(".")[2] != "SEQ_CLS":
        return AutoModelForCausalLM, {}
    with safe_open(str(adapter / _ADAPTER_WEIGHTS), framework="pt") as weights:
        heads = [name for name in weights.keys() if re.search(r"(score|classifier)\b.*weight", name)]  # noqa: SIM118
        labels = {"num_labels": weights.get_slice(heads[0]).get_shape()[0]} if heads else {}
    return AutoModelForSequenceClassification, labels
