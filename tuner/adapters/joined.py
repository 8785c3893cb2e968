"""Examples one after the other in a row: linear layers see a row a trial, attention sees a row an example.

Padding an example to the longest costs the linear layers, which are most of a pass. So the examples of a
trial are joined to one row, and only queries, keys and values are laid apart again, into the grid that the
model's own masks are made for. Positions begin anew with each example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tuner.data import Example

_NAME = "tuner_joined"
"""Of the attention that transformers finds in the model's configuration while rows are joined."""


@dataclass(frozen=True)
class Joined:
    """Where each token of joined rows [slots, length] belongs."""

    positions: Tensor
    """[slots, length] in its example."""
    examples: Tensor
    """[slots * length] its example's number: slot after slot, as many as in the slot with the most."""
    places: Tensor
    """[slots * length] in the flattened grids of examples, one grid after the other."""
    shapes: tuple[tuple[int, int], ...]
    """Rows and length of each grid. Attention costs the square of the length: short rows have their own."""

    @property
    def sizes(self) -> list[int]:
        """Return the tokens of each grid, with padding."""
        return [rows * length for rows, length in self.shapes]

    def apart(self, x: Tensor) -> list[Tensor]:
        """[slots, heads, length, width] -> [rows, heads, length, width] of each grid, zero where padded."""
        laid: Tensor = _Apart.apply(x.transpose(1, 2).flatten(0, 1), self)  # type: ignore[no-untyped-call]
        parts = zip(torch.split(laid, self.sizes), self.shapes, strict=True)
        return [part.view(*shape, *part.shape[1:]).transpose(1, 2) for part, shape in parts]

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """[rows, length, heads, width] of each grid -> [slots, length, heads, width]"""
        flat = [part.flatten(0, 1) for part in parts]
        joined: Tensor = _Together.apply(flat[0] if len(flat) == 1 else torch.cat(flat), self)  # type: ignore[no-untyped-call]
        return joined.view(*self.positions.shape, *joined.shape[1:])

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Lay rows apart in the model's attention within the block, the backward pass included."""
        found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        configs = {id(config): config for config in found if config is not None}
        own = {key: config._attn_implementation_internal for key, config in configs.items()}
        _current.append(self)
        try:
            for config in configs.values():
                config._attn_implementation_internal = _NAME
            yield
        finally:
            _current.pop()
            for key, config in configs.items():
                config._attn_implementation_internal = own[key]


_current: list[Joined] = []
"""That of the pass; transformers hands attention nothing of ours."""


def joined_positions() -> dict[str, Tensor]:
    """Return a model's argument with the positions of tokens in joined rows; nothing for padded ones."""
    return {"position_ids": _current[-1].positions} if _current else {}


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: Joined) -> Tensor:
        ctx.joined = joined
        return _scattered(x, joined)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        return outputs[0].index_select(0, ctx.joined.places), None


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, joined: Joined) -> Tensor:
        ctx.joined = joined
        return x.index_select(0, joined.places)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        return _scattered(outputs[0], ctx.joined), None


def _scattered(x: Tensor, joined: Joined) -> Tensor:
    return x.new_zeros(sum(joined.sizes), *x.shape[1:]).index_copy_(0, joined.places, x)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """As transformers' for `sdpa`, on rows that are laid apart."""
    joined, outputs = _current[-1], []
    for *parts, (_, length) in zip(*map(joined.apart, (query, key, value)), joined.shapes, strict=True):
        mask = None if attention_mask is None else attention_mask[:, :, :length, :length]
        output, _ = sdpa_attention_forward(module, *parts, mask, **more)
        outputs.append(output)
    return joined.together(outputs), None


def _mask(batch_size: int, q_length: int, kv_length: int, **more: Any) -> Tensor | None:
    """Make the mask that the model wants for an example of the longest grid; the same for every example."""
    length = max(length for _, length in _current[-1].shapes)
    mask: Tensor | None = sdpa_mask(1, length, length, **more)
    return mask


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def joined_rows(
    examples: Sequence[Sequence[Example]], *, max_grids: int = 1
) -> tuple[list[NDArray[np.int64]], tuple[tuple[int, int], ...]]:
    """Join the examples of each slot.

    Returns tokens [slots, length], the row and column of each target token, and the fields of `Joined`. A
    slot with fewer tokens is filled with examples that have no target.
    """
    longest = max(len(example.input_ids) for part in examples for example in part)
    length = max(sum(len(example.input_ids) for example in part) for part in examples)
    height = max(len(part) for part in examples)
    ids, positions, numbers, places = np.zeros((4, len(examples) * length), np.int64)
    target = np.zeros(len(examples) * length, bool)
    spans: list[slice] = []
    for slot, part in enumerate(examples):
        start, end = slot * length, (slot + 1) * length
        for place, example in enumerate(part):
            here = slice(start, start + len(example.input_ids))
            ids[here], target[here], numbers[here] = (
                example.input_ids,
                example.is_target,
                slot * height + place,
            )
            spans.append(here)
            start = here.stop
        numbers[start:end] = slot * height
        spans += [slice(first, min(first + longest, end)) for first in range(start, end, longest)]
    firsts, shapes = _in_grids([span.stop - span.start for span in spans], max_grids=max_grids)
    for span, first in zip(spans, firsts, strict=True):
        positions[span] = np.arange(span.stop - span.start)
        places[span] = first + positions[span]
    shape = len(examples), length
    rows, columns = np.nonzero(target.reshape(shape))
    return [ids.reshape(shape), rows, columns, positions.reshape(shape), numbers, places], shapes


def _in_grids(sizes: Sequence[int], *, max_grids: int) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Put rows of these sizes into grids: those at most half as long as a grid's longest go into the next.

    Returns where each begins in the flattened grids, and rows and length of each grid.
    """
    firsts, start = [0] * len(sizes), 0
    shapes: list[tuple[int, int]] = []
    left = sorted(range(len(sizes)), key=lambda number: -sizes[number])
    while left:
        length = sizes[left[0]]
        is_last = len(shapes) == max_grids - 1
        rows = [number for number in left if is_last or 2 * sizes[number] > length]
        for row, number in enumerate(rows):
            firsts[number] = start + row * length
        shapes.append((len(rows), length))
        start, left = start + len(rows) * length, left[len(rows) :]
    return firsts, tuple(shapes)
