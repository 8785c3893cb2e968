"""Models, examples and trials small enough to train in a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tests.data.tiny import byte_level
from tuner.adapters import Base, load_base
from tuner.config.sections import ModelSpec
from tuner.data import Example, Examples
from tuner.records import Value

Shape: TypeAlias = Literal["llama", "qwen2", "gpt2", "gemma2"]
SHAPES: tuple[Shape, ...] = get_args(Shape)

VOCABULARY = 352
"""Logits of every model: a few more than the tokenizer has words, as in real models."""
MAX_LENGTH = 32
"""The longest row; models have twice as many positions."""


def config(shape: Shape, **changes: Any) -> PreTrainedConfig:
    """Two layers; weights large enough for attention and gates to be far from linear."""
    widths: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2 * MAX_LENGTH,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    match shape:
        case "llama":
            return LlamaConfig(**widths | changes)
        case "qwen2":
            return Qwen2Config(**widths | {"tie_word_embeddings": True} | changes)
        case "gemma2":
            softcapping = {"head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 4.0}
            return Gemma2Config(**widths | softcapping | changes)
        case "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2 * MAX_LENGTH}
            kept = {name: widths[name] for name in ("vocab_size", "initializer_range", "bos_token_id")}
            return GPT2Config(**sizes | kept | {"eos_token_id": 1} | changes)


def save_model(directory: Path, made: PreTrainedConfig, *, seed: int = 0) -> Path:
    """Random float32 weights with biases that are not zero, and a byte-level tokenizer, as files."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    byte_level().save_pretrained(directory)
    return directory


def model_spec(path: Path | str, **more: Any) -> ModelSpec:
    """The `model` section of a round file; float32 unless said otherwise."""
    return ModelSpec.model_validate({"path": str(path), "dtype": "float32"} | more)


class Models:
    """Tiny models, each made and loaded once; `changes` are those of `config`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._bases: dict[tuple[Path, str, str], Base] = {}

    def path(self, shape: Shape, **changes: Any) -> Path:
        """A directory with configuration, weights and tokenizer."""
        directory = self._directory / "-".join([shape, *(f"{k}={v}" for k, v in sorted(changes.items()))])
        return directory if directory.exists() else save_model(directory, config(shape, **changes))

    def base(
        self, shape: Shape, *, dtype: str = "float32", quantization: str = "none", **changes: Any
    ) -> Base:
        """The frozen base; whoever puts a pack on it closes the pack again."""
        path = self.path(shape, **changes)
        key = (path, dtype, quantization)
        if key not in self._bases:
            spec = model_spec(path, dtype=dtype, quantization=quantization)
            self._bases[key] = load_base(spec, device="cpu", max_length=MAX_LENGTH)
        return self._bases[key]

    def plain(self, shape: Shape) -> PreTrainedModel:
        """The model as anyone would load it, in float32 and fresh."""
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.path(shape), dtype=torch.float32)
        return model.eval()


WIDE = {"hidden_size": 64, "intermediate_size": 128}
"""Changes that give a model layers wide enough for 4-bit blocks of 64."""


def examples(count: int, *, seed: int = 0, shortest: int = 4, longest: int = 24) -> Examples:
    """Rows whose tokens follow from the token before, by a rule of each row: there is something to learn.

    A prompt that the loss does not see comes first; at least one token is a target.
    """
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(draw.integers(shortest, longest + 1))
        start, stride = int(draw.integers(VOCABULARY)), int(draw.choice([1, 3, 7]))
        tokens = (start + stride * np.arange(length)) % VOCABULARY
        is_target = np.arange(length) >= draw.integers(1, length)
        rows.append(Example(tokens.astype(np.int32), is_target))
    return Examples.of(rows)


def hyperparameters(changes: Mapping[str, Value] | None = None, **more: Value) -> dict[str, Value]:
    """All hyperparameters of a trial: a round file's defaults, but for a rate that moves a tiny model."""
    defaults: dict[str, Value] = {
        "learning_rate": 1e-2,
        "lora_r": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "use_rslora": False,
        "use_dora": False,
        "loraplus_ratio": 1.0,
        "lora_init": "default",
        "batch_size": 4,
        "optimizer": "adamw",
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "warmup_steps": 0,
        "schedule": "constant",
        "decay_steps": 0,
        "training_seed": 0,
    }
    return defaults | dict(changes or {}) | more
