"""Cross entropy behind a frozen output embedding that keeps no [tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tuner.adapters.frozen_linear import product

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once: 64 MiB in float32."""


class _HeadNll(torch.autograd.Function):
    """The head is frozen, so the only gradient is that of the hidden states: the forward pass makes it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        needs_gradient = hidden.requires_grad
        nll, gradients = [], []
        for start in range(0, hidden.shape[0], rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            log_probability = product(part, weight, bias).float().log_softmax(dim=1)
            nll.append(-log_probability.gather(1, wanted)[:, 0])
            if needs_gradient:
                probability = log_probability.exp_()
                probability.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=probability.dtype))
                gradients.append(product(probability.to(weight.dtype), weight.t()))
        ctx.save_for_backward(torch.cat(gradients) if gradients else hidden.new_empty(0))
        return torch.cat(nll) if nll else hidden.new_empty(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outputs[0].to(gradient.dtype)[:, None], None, None, None)


def head_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Negative log-likelihood [tokens] in float32 of `targets` [tokens] given `hidden` [tokens, width].

    `weight` is [vocabulary, width] and gets no gradient.
    """
    return _HeadNll.apply(hidden, weight, bias, targets)  # type: ignore[no-any-return, no-untyped-call]


def chunked_nll(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, vocabulary_size: int
) -> Tensor:
    """The same behind a head of any kind: `logits` makes [tokens, vocabulary] of [tokens, width].

    It runs again in the backward pass, chunk by chunk.
    """
    rows = max(1, CHUNK_ELEMENTS // vocabulary_size)

    def nll(part: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits(part).float(), wanted, reduction="none")

    parts = zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    return torch.cat(
        [checkpoint(nll, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    )


@torch.no_grad()
def token_scores(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *, vocabulary_size: int
) -> tuple[Tensor, Tensor]:
    """For evaluations: the same values, and for each target whether no token is likelier; each [tokens]."""
    rows = max(1, CHUNK_ELEMENTS // vocabulary_size)
    nll, is_first = [hidden.new_empty(0, dtype=torch.float32)], [targets.new_empty(0, dtype=torch.bool)]
    for part, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        log_probability = logits(part).float().log_softmax(dim=1)
        chosen = log_probability.gather(1, wanted[:, None])[:, 0]
        nll.append(-chosen)
        is_first.append(chosen >= log_probability.amax(dim=1))
    return torch.cat(nll), torch.cat(is_first)
