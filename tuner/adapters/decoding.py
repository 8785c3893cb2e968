"""How answers are decoded: sampling, where an answer ends, and which prompts go into one batch."""

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
    """What may be asked of an answer."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; 1 draws by the model's own probabilities."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0

    def processors(self, rows: Sequence[int]) -> LogitsProcessorList:
        """What is done to the logits of these rows before the largest is taken."""
        if self.temperature == 0:
            return LogitsProcessorList()
        chosen: list[LogitsProcessor] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList([*chosen, _Chance(self.seed, rows)])


class _Chance(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Adds Gumbel noise: the largest sum is a draw from the softmax of the logits (Gumbel 1954).

    Each row draws from a generator of its own, so that what is beside it in the batch changes nothing.
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
    """Positions of prompts in batches, the longest first, so that what does not fit is known at once.

    Prompts of like length go together, since the shorter ones are padded, and only those that may have the
    same number of new tokens. A batch takes at most `budget_tokens`, padding and answers included, but one
    prompt always; `most_rows`, where given, counts instead.
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
    """The tokenizer's own EOS, with which training rows end, then others that the model was made with."""
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *_listed(configured)]))


def ends_unlike_its_base(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All end tokens, where `generate` of transformers would not stop the base at the trained EOS; else none.

    Raises ModelError when the model has no configuration.
    """
    configured = _generation_config(model)
    if int(tokenizer.eos_token_id) in _listed(configured):
        return []
    return end_tokens(tokenizer, configured)


def warning_of_ends(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What `ends_unlike_its_base` means for those who generate without tuner."""
    trained, *others = (f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
    stops = f"stops at {' and '.join(others)}" if others else "does not stop"
    return (
        f"answers are trained to end with the tokenizer's EOS, {trained}, and the base's generation_config "
        f"{stops}: with the adapter, other tools would generate to the limit; set "
        f"`base.generation_config.eos_token_id = {list(ends)}` there, as the card of an exported adapter "
        "says. Merged exports and tuner itself stop"
    )


def _generation_config(model: ModelSpec) -> GenerationConfig:
    """The one that transformers gives the loaded model: its file, else what its configuration says."""
    try:
        return GenerationConfig.from_pretrained(model.path, **model_source(model))
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(load_config(model, max_length=1))


def _listed(configured: GenerationConfig | None) -> list[int]:
    ends = getattr(configured, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return [int(end) for end in listed]
