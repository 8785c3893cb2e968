"""Examples one after the other in a row: linear layers see a row a trial, attention sees a row an example.

Padding an example to the longest costs the linear layers, which are most of a pass. So the examples of a
trial are joined to one row, and only queries, keys and values are laid apart again, into the grid that the
model's own masks are made for. Positions begin anew with each example.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tuner.adapters.placement import on
from tuner.data import Example

Attention: TypeAlias = Literal["torch", "varlen"]
"""A value of `model.attention`."""
NAMES: Mapping[Attention, str] = {"torch": "tuner_joined", "varlen": "tuner_varlen"}
"""Of the attentions that transformers finds in the model's configuration while rows are joined."""


@dataclass(frozen=True)
class Joined:
    """Where each token of joined rows [slots, length] belongs."""

    positions: Tensor
    """[slots, length] in its example."""
    examples: Tensor
    """[slots * length] its example's number: slot after slot, as many as in the slot with the most."""
    places: Tensor
    """[slots * length] in the flattened grids of examples, one grid after the other."""
    starts: Tensor
    """[examples + 1] in int32 where each begins in the flattened rows, filler too; the end of the last."""
    shapes: tuple[tuple[int, int], ...]
    """Rows and length of each grid. Attention costs the square of the length: short rows have their own."""
    predicting: Tensor | None = None
    """[slots * any number] where the tokens before targets are, as many of each slot; None if most are."""

    @property
    def sizes(self) -> list[int]:
        """Return the tokens of each grid, with padding."""
        return [rows * length for rows, length in self.shapes]

    def apart(self, x: Tensor) -> list[Tensor]:
        """[slots, heads, length, width] -> [rows, heads, length, width] of each grid, zero where padded."""
        places = on(self.places, x.device)
        laid: Tensor = _Scattered.apply(x.transpose(1, 2).flatten(0, 1), places, sum(self.sizes))  # type: ignore[no-untyped-call]
        parts = zip(torch.split(laid, self.sizes), self.shapes, strict=True)
        return [part.view(*shape, *part.shape[1:]).transpose(1, 2) for part, shape in parts]

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """[rows, length, heads, width] of each grid -> [slots, length, heads, width]"""
        flat = [part.flatten(0, 1) for part in parts]
        places = on(self.places, flat[0].device)
        joined: Tensor = _Gathered.apply(flat[0] if len(flat) == 1 else torch.cat(flat), places)  # type: ignore[no-untyped-call]
        return joined.view(*self.positions.shape, *joined.shape[1:])

    @property
    def longest(self) -> int:
        """Return the length that no example exceeds."""
        return max(length for _, length in self.shapes)

    @contextmanager
    def within(
        self, model: nn.Module, *, last: nn.Module | None = None, attention: Attention = "torch"
    ) -> Iterator[None]:
        """Keep examples apart in the model's attention within the block, the backward pass included.

        `last` is a module after which tokens do not meet: it runs on the tokens before targets only.
        """
        configs = _configs_of(model)
        own = [config._attn_implementation_internal for config in configs]
        _current.append(self)
        try:
            for config in configs:
                config._attn_implementation_internal = NAMES[attention]
            with nullcontext() if last is None or self.predicting is None else self._narrowing(last):
                yield
        finally:
            _current.pop()
            for config, implementation in zip(configs, own, strict=True):
                config._attn_implementation_internal = implementation

    @contextmanager
    def _narrowing(self, module: nn.Module) -> Iterator[None]:
        """Let a module see the tokens before targets; its output is 0 at the others."""
        assert self.predicting is not None
        predicting = on(self.predicting, next(module.parameters()).device)

        def narrow(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = inputs
            few: Tensor = _Gathered.apply(x.flatten(0, 1), predicting)  # type: ignore[no-untyped-call]
            return (few.view(x.shape[0], -1, x.shape[-1]),)

        def widen(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            whole: Tensor = _Scattered.apply(output.flatten(0, 1), predicting, self.positions.numel())  # type: ignore[no-untyped-call]
            return whole.view(*self.positions.shape, -1)

        hooks = module.register_forward_pre_hook(narrow), module.register_forward_hook(widen)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


_found: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def _configs_of(model: nn.Module) -> list[Any]:
    """Return the configurations of a model and its parts, each once."""
    if model not in _found:
        found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
        _found[model] = list({id(config): config for config in found if config is not None}.values())
    return _found[model]


_current: list[Joined] = []
"""That of the pass; transformers hands attention nothing of ours."""


def current() -> Joined:
    """Return where tokens belong in the pass that is running."""
    return _current[-1]


def joined_positions() -> dict[str, Tensor]:
    """Return a model's argument with the positions of tokens in joined rows; nothing for padded ones."""
    return {"position_ids": _current[-1].positions} if _current else {}


class _Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return _scattered(x, places, size)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return outputs[0].index_select(0, places), None, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _scattered(outputs[0], places, ctx.size), None


def _scattered(x: Tensor, places: Tensor, size: int) -> Tensor:
    """[tokens, ...] -> [size, ...] with each token at its place, which no other has, and 0 elsewhere."""
    return x.new_zeros(size, *x.shape[1:]).index_copy_(0, places, x)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """As transformers' for `sdpa`, on rows that are laid apart."""
    joined, outputs = current(), []
    for *parts, (_, length) in zip(*map(joined.apart, (query, key, value)), joined.shapes, strict=True):
        mask = None if attention_mask is None else attention_mask[:, :, :length, :length]
        output, _ = sdpa_attention_forward(module, *parts, mask, **more)
        outputs.append(output)
    return joined.together(outputs), None


def _mask(batch_size: int, q_length: int, kv_length: int, **more: Any) -> Tensor | None:
    """Make the mask that the model wants for an example of the longest grid; the same for every example."""
    length = current().longest
    mask: Tensor | None = sdpa_mask(1, length, length, **more)
    return mask


AttentionInterface.register(NAMES["torch"], _attention)
AttentionMaskInterface.register(NAMES["torch"], _mask)


_GRID_COST = 128**2
"""Of another grid, beside the square of its length for each row; measured on a CPU."""


def joined_rows(
    examples: Sequence[Sequence[Example]], *, max_grids: int = 1, multiple: int = 1
) -> tuple[list[NDArray[Any]], tuple[tuple[int, int], ...]]:
    """Join the examples of each slot.

    Returns tokens [slots, length], the row and column of each target token, and the fields of `Joined`. A
    slot with fewer tokens is filled with examples that have no target. Grids have lengths of a `multiple`.
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
    firsts, shapes = _in_grids(
        [span.stop - span.start for span in spans], max_grids=max_grids, multiple=multiple
    )
    for span, first in zip(spans, firsts, strict=True):
        positions[span] = np.arange(span.stop - span.start)
        places[span] = first + positions[span]
    shape = len(examples), length
    rows, columns = np.nonzero(target.reshape(shape))
    starts = np.array([0, *(span.stop for span in spans)], np.int32)
    return [ids.reshape(shape), rows, columns, positions.reshape(shape), numbers, places, starts], shapes


def _in_grids(
    sizes: Sequence[int], *, max_grids: int, multiple: int
) -> tuple[list[int], tuple[tuple[int, int], ...]]:
    """Put rows of these sizes into the grids that cost attention the least, each of a multiple's length.

    Returns where each begins in the flattened grids, and rows and length of each grid.
    """
    lengths = [-(-size // multiple) * multiple for size in sizes]
    kinds = sorted(set(lengths), reverse=True)
    ends = (len(kinds),) if max_grids == 1 else _cheapest_ends(kinds, Counter(lengths), max_grids=max_grids)
    firsts, begin, start = [0] * len(sizes), 0, 0
    shapes: list[tuple[int, int]] = []
    for end in ends:
        rows = [number for number, length in enumerate(lengths) if kinds[end - 1] <= length <= kinds[start]]
        for row, number in enumerate(rows):
            firsts[number] = begin + row * kinds[start]
        shapes.append((len(rows), kinds[start]))
        begin, start = begin + len(rows) * kinds[start], end
    return firsts, tuple(shapes)


def _cheapest_ends(kinds: Sequence[int], num_rows: Mapping[int, int], *, max_grids: int) -> tuple[int, ...]:
    """Return how many kinds, the longest first, each grid ends after."""
    rows_before = list(accumulate((num_rows[kind] for kind in kinds), initial=0))
    # For the first kinds, from none to all: the least cost, and how many kinds each grid ends after.
    plans: list[tuple[float, tuple[int, ...]]] = [(0, ()), *[(math.inf, ())] * len(kinds)]
    for _ in range(max_grids):
        plans = [
            min(
                plans[end],
                *(
                    (
                        cost + _GRID_COST + (rows_before[end] - rows_before[start]) * kinds[start] ** 2,
                        (*ends, end),
                    )
                    for start, (cost, ends) in enumerate(plans[:end])
                ),
            )
            if end
            else plans[0]
            for end in range(len(kinds) + 1)
        ]
    return plans[-1][1]


MAX_PREDICTING_SHARE = 0.75
"""Of the tokens before targets in a row; with more of them, the copies cost what they save."""


def predicting_places(
    rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]
) -> NDArray[np.int64] | None:
    """Return `Joined.predicting` for targets at these rows and columns of joined rows.

    A slot with fewer than the slot with the most is filled with other tokens of its own.
    """
    wanted = np.zeros(shape, bool)
    wanted[rows, columns - 1] = True
    most = int(wanted.sum(axis=1).max())
    if not 0 < most <= MAX_PREDICTING_SHARE * shape[1]:
        return None
    first = np.argsort(~wanted, axis=1, kind="stable")[:, :most]
    return (first + np.arange(shape[0])[:, None] * shape[1]).reshape(-1)
