"""A new adapter, initialised by PEFT itself on a meta copy of the base model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuner.adapters.base import Base, load_config, num_embeddings
from tuner.errors import ModelError, TargetModulesError
from tuner.methods.variants import variant, variant_of
from tuner.records import Choices, Dimension, Fixed, Hyperparameters, Range, Space, TimesSqrtRank

if TYPE_CHECKING:
    from tuner.config import ModelSpec


@dataclass(frozen=True)
class Adapter:
    """LoRA weights by module, in PEFT's shapes, and their PEFT configuration."""

    config: LoraConfig
    weights: Mapping[str, tuple[Tensor, ...]]
    """Module path -> (A [rank, in], B [out, rank]), float32 on the CPU unless said otherwise.

    With DoRA (A, B, magnitude [out]), once a pack has measured the base model's weights."""

    @property
    def scale(self) -> float:
        """Return the factor of B A x: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank: int = self.config.r
        return float(self.config.lora_alpha / (rank**0.5 if self.config.use_rslora else rank))


def lora_config(
    hyperparameters: Hyperparameters, *, base_path: str, revision: str | None = None
) -> LoraConfig:
    """Return PEFT's configuration of a trial's adapter."""
    plain, chosen = variant("lora"), variant_of(hyperparameters)
    arguments = {**plain.config(hyperparameters), **chosen.config(hyperparameters)}
    return LoraConfig(
        **arguments, task_type="CAUSAL_LM", base_model_name_or_path=base_path, revision=revision
    )


def initial_adapter(meta_model: PreTrainedModel, config: LoraConfig, *, seed: int) -> Adapter:
    """Return the A and B that PEFT would start from after `torch.manual_seed(seed)`.

    DoRA's magnitudes are not in a meta copy: `Pack.with_magnitudes` adds them. Leaves `meta_model` and the
    global random state unchanged. Raises ModelError if `target_modules` matches nothing in the model, the
    output head or a layer that is not linear.
    """
    takes_all = config.target_modules == "all-linear"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _without_dora(config):
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(meta_model, config)
        except ValueError as error:
            raise ModelError(f"hyperparameters.target_modules: {error}") from error
        try:
            return Adapter(config, _weights(wrapped.base_model.model, takes_all=takes_all))
        finally:
            wrapped.unload()


@contextmanager
def _without_dora(config: LoraConfig) -> Iterator[None]:
    """Keep PEFT from computing norms of a meta copy's weights, which do not exist."""
    wanted, config.use_dora = config.use_dora, False
    try:
        yield
    finally:
        config.use_dora = wanted


def _weights(wrapped: PreTrainedModel, *, takes_all: bool) -> dict[str, tuple[Tensor, ...]]:
    layers = {name: module for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}
    unfit = [
        name
        for name, module in layers.items()
        if module is wrapped.get_output_embeddings()
        or not isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
    ]
    if unfit:
        whose = "all-linear (the default) takes " if takes_all else ""
        raise TargetModulesError(
            f"hyperparameters.target_modules: {whose}{unfit[0]}, which is the output head or not a linear "
            f"layer; tuner adapts the linear layers before the head: {remedy(layers, unfit)}",
            fitting(layers, unfit),
        )
    return {
        name: (
            module.lora_A["default"].weight.detach().float(),
            module.lora_B["default"].weight.detach().float(),
        )
        for name, module in layers.items()
    }


def fitting(modules: Iterable[str], unfit: Collection[str]) -> list[str]:
    """Return names of target modules that match only fitting modules."""
    fit = {name.rpartition(".")[2] for name in modules if name not in unfit}
    return sorted(fit - {name.rpartition(".")[2] for name in unfit})


def remedy(modules: Iterable[str], unfit: Collection[str]) -> str:
    """Say which target modules to write instead, so that all of them fit."""
    names = fitting(modules, unfit)
    if not names:
        return "name the target modules without it"
    return f"name the target modules without it, as `target_modules: [{', '.join(names)}]`"


def meta_copy(base: Base, *, base_path: str) -> PreTrainedModel:
    """Copy the base model's shapes to the CPU, with weights that take no memory.

    PEFT rounds a new adapter to the base model's dtype, so linear layers keep it; a quantised model has none
    that PEFT would round to.
    """
    quantised = getattr(base.model, "is_quantized", False)
    return _meta_copy(
        base.model.config, dtype=torch.float32 if quantised else base.dtype, base_path=base_path
    )


def largest_adapter(model: ModelSpec, space: Space) -> int:
    """Return the number of weights of the largest adapter of a space, from the model's configuration alone.

    Raises ModelError if there is none, or if `target_modules` matches nothing in the model.
    """
    config = load_config(model, max_length=1)
    meta_model = _meta_copy(
        config, dtype=torch.float32, base_path=model.path, trust_remote_code=model.trust_remote_code
    )
    return adapter_sizes(meta_model, space)[1]


def positions_of(model: ModelSpec) -> int | None:
    """Return the tokens that a row may have, by the model's configuration; None if it sets no limit.

    Raises ModelError.
    """
    text = load_config(model, max_length=1).get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None)


def embeddings_of(model: ModelSpec) -> int:
    """Return the number of token ids with embeddings, by the model's configuration. Raises ModelError."""
    config = load_config(model, max_length=1)
    meta_model = _meta_copy(
        config, dtype=torch.float32, base_path=model.path, trust_remote_code=model.trust_remote_code
    )
    return num_embeddings(meta_model)


def adapter_sizes(meta_model: PreTrainedModel, space: Space) -> tuple[int, int]:
    """Return the number of weights of the smallest and of the largest adapter of a space."""
    ranks = space["lora_r"]
    lowest = ranks.low if isinstance(ranks, Range) else min(values_of(ranks))
    adapters = [
        _one_rank(meta_model, wanted, meta_model.name_or_path)
        for wanted in values_of(space["target_modules"])
    ]
    per_rank = [sum(a.numel() + b.numel() for a, b in adapter.weights.values()) for adapter in adapters]
    magnitudes = [sum(len(b) for _, b in adapter.weights.values()) for adapter in adapters]
    dora = values_of(space.get("use_dora", Fixed(False)))
    smallest = int(lowest) * min(per_rank) + all(dora) * min(magnitudes)
    return smallest, int(max(values_of(ranks))) * max(per_rank) + any(dora) * max(magnitudes)


def targeted_modules(meta_model: PreTrainedModel, space: Space) -> set[str]:
    """Return the paths of all modules that any trial of a space may adapt."""
    targets = values_of(space["target_modules"])
    return {
        name for wanted in targets for name in _one_rank(meta_model, wanted, meta_model.name_or_path).weights
    }


def values_of(dimension: Dimension) -> list[Any]:
    """Return the values that a hyperparameter may have: all choices, or the largest of a range."""
    match dimension:
        case Fixed(value=value):
            return [value]
        case Choices(values=values):
            return list(values)
        case Range(high=high):
            return [high]
        case TimesSqrtRank():
            raise TypeError("lora_alpha follows the rank")


def _one_rank(meta_model: PreTrainedModel, targets: Any, base_path: str) -> Adapter:
    shape = {"lora_r": 1, "lora_alpha": 1, "target_modules": targets}
    return initial_adapter(meta_model, lora_config(shape, base_path=base_path), seed=0)


def _meta_copy(
    config: Any, *, dtype: torch.dtype, base_path: str, trust_remote_code: bool = False
) -> PreTrainedModel:
    """`trust_remote_code` is needed for a class that no model of this process has been loaded by."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        meta_model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    for module in meta_model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            zero = torch.zeros((), dtype=dtype).expand(module.weight.shape)
            module.weight = nn.Parameter(zero, requires_grad=False)
    meta_model.name_or_path = base_path  # PEFT writes it into an adapter's configuration
    return meta_model
