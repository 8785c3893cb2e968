"""A new adapter, initialised by PEFT itself on a meta copy of the base model."""

from __future__ import annotations

import copy
import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tuner.adapters.base import Base, load_config, num_embeddings
from tuner.errors import ModelError, TargetModulesError
from tuner.methods.kinds import ALL_LINEAR
from tuner.methods.variants import adapter_arguments, possible_variants
from tuner.methods.variants.lora import LAYERS_TO_TRANSFORM
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

    @property
    def has_zero_b(self) -> bool:
        """Return whether B is 0 everywhere, so that the adapter leaves every output as it is."""
        return not any(bool(b.any()) for _, b, *_ in self.weights.values())


def lora_config(
    hyperparameters: Hyperparameters, *, base_path: str, revision: str | None = None
) -> LoraConfig:
    """Return PEFT's configuration of a trial's adapter."""
    arguments = adapter_arguments(hyperparameters)
    if arguments.get("init_lora_weights") == "eva":
        arguments["eva_config"] = EvaConfig(rho=1.0)  # no other ranks: a pack computes layers of one rank
    layers = arguments.pop("layers_to_transform", None)
    config = LoraConfig(
        **arguments, task_type="CAUSAL_LM", base_model_name_or_path=base_path, revision=revision
    )
    config.layers_to_transform = layers  # PEFT refuses it beside all-linear, which `initial_adapter` replaces
    return config


def initial_adapter(meta_model: PreTrainedModel, config: LoraConfig, *, seed: int) -> Adapter:
    """Return the A and B that PEFT would start from after `torch.manual_seed(seed)`.

    DoRA's magnitudes are not in a meta copy: `Pack.with_magnitudes` adds them; EVA's A needs training rows:
    `eva.with_eva` sets it. Leaves `meta_model` and the global random state unchanged. Raises ModelError if a
    name of `target_modules` matches nothing in the model, the output head or a layer that is not linear, or
    if a layer of `layers_to_transform` does not exist.
    """
    takes_all = config.target_modules == ALL_LINEAR
    if config.layers_to_transform is not None:
        _refuse_missing_layers(meta_model, config.layers_to_transform)
        if takes_all:
            config.target_modules = _linear_names(meta_model)
    if config.target_modules is not None and not isinstance(config.target_modules, str):
        _refuse_missing_modules(meta_model, config.target_modules)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _without_dora(config):
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
        warnings.filterwarnings("ignore", message="lora with eva initialization")
        torch.manual_seed(seed)
        try:
            wrapped = get_peft_model(meta_model, config)
        except ValueError as error:
            there = ", ".join(sorted(_linear_names(meta_model)))
            said = str(error).removesuffix(" Please check the target modules and try again.")
            raise ModelError(f"hyperparameters.target_modules: {said} Its linear layers: {there}") from error
        try:
            return Adapter(config, _weights(wrapped.base_model.model, takes_all=takes_all))
        finally:
            wrapped.unload()


_LAYER = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")
"""How PEFT finds a layer's number in the name of a module, where no `layers_pattern` is given."""


def _refuse_missing_layers(meta_model: PreTrainedModel, wanted: Iterable[int]) -> None:
    found = (_LAYER.match(name) for name, _ in meta_model.named_modules())
    numbers = {int(match["number"]) for match in found if match}
    missing = [str(number) for number in wanted if number not in numbers]
    if missing:
        has = f"has layers {min(numbers)} to {max(numbers)}" if numbers else "has no numbered layers"
        raise ModelError(f"hyperparameters.layers_to_transform: the model {has}; got {', '.join(missing)}")


def _refuse_missing_modules(meta_model: PreTrainedModel, wanted: Iterable[str]) -> None:
    """Refuse a name that no module has: PEFT adapts the others without a word."""
    ends = {name[at:] for name, _ in meta_model.named_modules() for at in _starts(name)}
    if missing := sorted(name for name in wanted if name not in ends):
        linear = sorted(_linear_names(meta_model))
        meant = get_close_matches(missing[0], linear, n=1)
        raise ModelError(
            f"hyperparameters.target_modules: the model has no {', '.join(missing)}"
            + (f"; did you mean {meant[0]}?" if meant else ".")
            + f" Its linear layers: {', '.join(linear)}"
        )


def _starts(path: str) -> Iterator[int]:
    """Yield where each part of a module's path begins."""
    yield 0
    yield from (at + 1 for at, letter in enumerate(path) if letter == ".")


def _linear_names(meta_model: PreTrainedModel) -> set[str]:
    """Return the names of linear layers within numbered ones, without their paths.

    PEFT turns all-linear into paths, which `layers_to_transform` would not narrow.
    """
    return {
        name.rpartition(".")[2]
        for name, module in meta_model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and _LAYER.match(name)
    }


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
    adapters = list(_one_rank(meta_model, space))
    per_rank = [sum(a.numel() + b.numel() for a, b in adapter.weights.values()) for adapter in adapters]
    outputs = [sum(len(b) for _, b in adapter.weights.values()) for adapter in adapters]
    more = [each.weights_per_output for each in possible_variants(space)]
    smallest = int(lowest) * min(per_rank) + min(more) * min(outputs)
    return smallest, int(max(values_of(ranks))) * max(per_rank) + max(more) * max(outputs)


def targeted_modules(meta_model: PreTrainedModel, space: Space) -> set[str]:
    """Return the paths of all modules that any trial of a space may adapt."""
    return {name for adapter in _one_rank(meta_model, space) for name in adapter.weights}


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


def _one_rank(meta_model: PreTrainedModel, space: Space) -> Iterator[Adapter]:
    """Yield an adapter of rank 1 for each choice of the layers that it adapts."""
    targets = values_of(space["target_modules"])
    layers = values_of(LAYERS_TO_TRANSFORM.dimension(space))
    for wanted, numbers in itertools.product(targets, layers):
        shape = {"lora_r": 1, "lora_alpha": 1, "target_modules": wanted, "layers_to_transform": numbers}
        yield initial_adapter(meta_model, lora_config(shape, base_path=meta_model.name_or_path), seed=0)


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
