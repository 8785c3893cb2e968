"""Decoding of answers: sampling, end tokens, and batching of prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tuner.adapters.base import load_config, model_source

if TYPE_CHECKING:
    from tuner.config import ModelSpec


@dataclass(frozen=True, slots=True)
class Decoding:
    """The decoding options of an answer."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples with the model's own probabilities."""
    top_k: int = 0
    """Sample among this many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability."""
    seed: int = 0

    def processors(self, rows: Sequence[int]) -> LogitsProcessorList:
        """Return the processors of these rows' logits, applied before the largest is taken."""
        if self.temperature == 0:
            return LogitsProcessorList()
        chosen: list[LogitsProcessor] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*chosen, _Chance(self.seed, rows)])


class _Chance(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Adds Gumbel noise, which makes the largest sum a sample from the softmax of the logits (Gumbel 1954).

    Each row samples from a generator of its own, so its neighbours in the batch change nothing.
    """

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(_mixed(seed, row)) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [torch.empty(scores.shape[-1]).exponential_(generator=each) for each in self._generators]
        return scores.float() - torch.stack(draws).log().to(scores.device)


def _mixed(seed: int, row: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest())


def batches(
    prompt_tokens: Sequence[int], new_tokens: Sequence[int], *, budget_tokens: int, most_rows: int | None
) -> list[list[int]]:
    """Group prompts into batches of positions, the longest first, so that one that does not fit fails early.

    Prompts of similar length go together, since the shorter ones are padded, and only those with the same
    number of new tokens. A batch has at most `budget_tokens`, including padding and answers, but always at
    least one prompt; `most_rows`, if given, limits the rows instead.
    """
    order = sorted(range(len(prompt_tokens)), key=lambda at: (-prompt_tokens[at], at))
    found: list[list[int]] = []
    for at in order:
        batch = found[-1] if found else []
        rows = most_rows
        if batch and rows is None:
            rows = budget_tokens // (prompt_tokens[batch[0]] + new_tokens[batch[0]])
        if batch and rows is not None and len(batch) < rows and new_tokens[at] == new_tokens[batch[0]]:
            batch.append(at)
        else:
            found.append([at])
    return found


def end_tokens(tokenizer: PreTrainedTokenizerBase, configured: GenerationConfig | None) -> list[int]:
    """Return the tokenizer's own EOS, with which training rows end, then the model's other end tokens."""
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *_listed(configured)]))


def ends_unlike_its_base(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all end tokens if transformers' `generate` would not stop the base model at the trained EOS;
    else none.

    Raises ModelError if the model has no configuration.
    """
    configured = _generation_config(model)
    if int(tokenizer.eos_token_id) in _listed(configured):
        return []
    return end_tokens(tokenizer, configured)


def warning_of_ends(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a warning about `ends_unlike_its_base` for users who generate without tuner."""
    trained, *others = (f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
    stops = f"stops at {' and '.join(others)}" if others else "does not stop"
    return (
        f"answers are trained to end with the tokenizer's EOS, {trained}, and the base's generation_config "
        f"{stops}: with the adapter, other tools would generate to the limit; set "
        f"`base.generation_config.eos_token_id = {list(ends)}` there, as the card of an exported adapter "
        "says. Merged exports and tuner itself stop"
    )


def _generation_config(model: ModelSpec) -> GenerationConfig:
    """Return the model's generation config: its file, or else one made from its configuration."""
    try:
        return GenerationConfig.from_pretrained(model.path, **model_source(model))
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(load_config(model, max_length=1))


def _listed(configured: GenerationConfig | None) -> list[int]:
    ends = getattr(configured, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return [int(end) for end in listed]
