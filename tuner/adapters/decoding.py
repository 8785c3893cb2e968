"""How the next token is chosen: the likeliest, or one drawn by chance that depends on seed and row alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


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
