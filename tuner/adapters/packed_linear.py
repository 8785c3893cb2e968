"""A linear layer under many adapters: one step of autograd for the updates of all slots of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tuner.adapters.device_io import send
from tuner.adapters.dora import DoraUpdate
from tuner.adapters.frozen_linear import (
    FrozenLinear,
    dropout,
    dropout_threshold,
    module_keys,
    product,
    token_keys,
)
from tuner.adapters.placement import on

if TYPE_CHECKING:
    from tuner.adapters.device_pack import DevicePack
    from tuner.adapters.joined import Joined


@dataclass(frozen=True)
class Stacked:
    """Where a matrix of one layer lies in a tensor [slots, weights] of all layers."""

    flat: Tensor
    """That of all slots."""
    start: int
    shape: tuple[int, int]
    """(rank, width), at the largest rank."""

    def of(self, flat: Tensor) -> Tensor:
        """Return the view [slots, rank, width] of this or of another tensor with the same columns."""
        end = self.start + self.shape[0] * self.shape[1]
        return flat[:, self.start : end].view(flat.shape[0], *self.shape)


@dataclass(frozen=True)
class Settings:
    """What all layers need of each slot besides its weights, on the device."""

    keys: Tensor
    """[modules] distinguish the dropout of modules."""
    scales: Tensor
    """[modules, slots, 1, 1] in the dtype of the weights; 0 where the slot's trial does not adapt it."""
    thresholds: Tensor
    """[modules, slots, 1, 1] of `dropout_threshold`."""
    kept_shares: Tensor
    """[modules, slots, 1, 1] float32, 1 - dropout rate."""

    @classmethod
    def empty(cls, keys: Sequence[int], num_slots: int, *, like: Tensor) -> Settings:
        """Create those of slots without trials; `keys` are the modules' own."""
        shape = len(keys), num_slots, 1, 1
        return cls(
            module_keys(keys, device=like.device),
            like.new_zeros(shape),
            torch.full(shape, dropout_threshold(0.0), dtype=torch.int32, device=like.device),
            torch.ones(shape, device=like.device),
        )

    def write(self, slot: int, *, scales: Sequence[float], dropout_rates: Sequence[float]) -> None:
        """Set those of a slot, module by module."""
        values = (
            np.array(scales, np.float32),
            np.array([dropout_threshold(rate) for rate in dropout_rates], np.int32),
            np.array([1 - rate for rate in dropout_rates], np.float32),
        )
        for into, sent in zip(self._by_slot, send(values, self.keys.device), strict=True):
            into[:, slot, 0, 0] = sent

    def of(self, first: int, end: int) -> Settings:
        """Return views of adjacent slots."""
        return Settings(self.keys, *(each[:, first:end] for each in self._by_slot))

    def gathered(self, slots: Sequence[int]) -> Settings:
        """Return copies of any slots."""
        return Settings(
            self.keys, *(torch.cat([each[:, slot : slot + 1] for slot in slots], 1) for each in self._by_slot)
        )

    @property
    def _by_slot(self) -> tuple[Tensor, ...]:
        return self.scales, self.thresholds, self.kept_shares


@dataclass(frozen=True)
class Arranged:
    """The slots of a pass side by side."""

    slots: tuple[int, ...]
    rank: int
    """The largest: padding beyond it is skipped."""
    weights: Tensor
    """[slots of the pass, weights]"""
    settings: Settings
    dropout_keys: Tensor | None = None
    """[examples]; None without dropout."""
    joined: Joined | None = None
    matrices: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """Of each layer: A [slots, rank, in], B [slots, rank, out] and the scales [slots, 1, 1]."""
    _token_keys: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def token_keys(self, tokens: int) -> Tensor:
        """Return the keys [modules, slots, tokens of a slot] for a pass over so many tokens in all."""
        assert self.dropout_keys is not None
        if tokens not in self._token_keys:
            if self.joined is None:
                length = tokens // self.dropout_keys.shape[0]
                made = token_keys(self.dropout_keys, self.settings.keys, length=length)
            else:
                made = self._joined_keys(self.joined, tokens)
            self._token_keys[tokens] = made.view(made.shape[0], len(self.slots), -1)
        return self._token_keys[tokens]

    def _joined_keys(self, joined: Joined, tokens: int) -> Tensor:
        """Return the keys [modules, tokens] of joined rows, or of their tokens before targets."""
        assert self.dropout_keys is not None
        device, predicting = self.dropout_keys.device, joined.predicting
        whose = on(joined.examples, device), on(joined.positions, device).reshape(-1)
        if predicting is not None and tokens == predicting.shape[0]:
            predicting = on(predicting, device)
            whose = whose[0].index_select(0, predicting), whose[1].index_select(0, predicting)
        return token_keys(self.dropout_keys, self.settings.keys, length=tokens, joined=whose)


class PackedLinear(nn.Module):
    """A frozen linear layer plus, for each row, its slot's scale * B A dropout(x)."""

    def __init__(
        self,
        inner: nn.Module,
        pack: DevicePack,
        *,
        number: int,
        a: Stacked,
        b: Stacked,
        gradients: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__()
        self.inner = inner
        self.is_plain = type(inner) in (nn.Linear, FrozenLinear)
        self.is_4bit = type(inner).__name__ == "Linear4bit"  # bitsandbytes', which other models do without
        self.number = number
        """Among the layers of the pack."""
        self._pack = (pack,)  # in a tuple: a module must not own the pack that owns it
        self.stacked_a, self.stacked_b = a, b
        self.a, self.b = a.of(a.flat), b.of(b.flat)
        """[slots, rank, in] and [slots, rank, out]: B transposed, so that a trial's ranks lead in both."""
        self.gradient_a, self.gradient_b = gradients
        """Of the current pass, in the same shapes, for the slots of the pass in their order."""
        self.scales = [0.0] * pack.num_slots
        self.dropout_rates = [0.0] * pack.num_slots
        self._dora: DoraUpdate | None = None

    def take(self, slot: int, *, scale: float, dropout_rate: float) -> None:
        """Adapt this layer with a trial's weights."""
        self.scales[slot] = scale
        self.dropout_rates[slot] = dropout_rate

    def take_dora(self, rank: int) -> DoraUpdate:
        """Adapt this layer by DoRA with the weights of the trial in the only slot."""
        self._dora = DoraUpdate(
            self.inner,
            weights=(self.a[0, :rank], self.b[0, :rank].t()),
            gradients=(self.gradient_a[0, :rank], self.gradient_b[0, :rank].t()),
            scale=self.scales[0],
        )
        return self._dora

    def clear(self, slot: int) -> None:
        """Adapt this layer no longer in a slot."""
        self.take(slot, scale=0.0, dropout_rate=0.0)
        self._dora = None

    @property
    def weight(self) -> Tensor:
        """Return the base layer's weight: some models check its dtype."""
        return self.inner.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Return the base layer's bias: some models take it out and put it back."""
        return self.inner.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], rows grouped by slot according to `Pack.rows`."""
        pack = self._pack[0]
        arranged = pack.arranged
        if arranged is None or not any(self.scales[slot] for slot in arranged.slots):
            return self.inner(x)  # type: ignore[no-any-return]
        dropped = self._drop(x, arranged)
        if self._dora is not None:
            return self._dora.apply(x, dropped)
        y = None if self.is_plain or self.is_4bit else self.inner(x)
        return _Update.apply(x, dropped, y, pack.anchor, self, arranged)  # type: ignore[no-any-return, no-untyped-call]

    def _drop(self, x: Tensor, arranged: Arranged) -> Tensor | None:
        """Return the inputs after dropout; None if it keeps all."""
        if arranged.dropout_keys is None or not any(self.dropout_rates[slot] for slot in arranged.slots):
            return None
        keys = arranged.token_keys(x.numel() // x.shape[-1])[self.number]
        settings = arranged.settings
        of_slots = settings.thresholds[self.number], settings.kept_shares[self.number]
        return dropout(x, keys, *of_slots)


class _Update(torch.autograd.Function):
    """W x + scale * B A dropped(x) for every slot at once.

    `y` is W x, or None for a plain layer weight: then that product is computed here. The sum is done in
    place. The adapters' weights are no leaves of autograd: their gradients are added to the layer's own
    tensors, so a pass of any number of trials leaves them in one place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        y: Tensor | None,
        _anchor: Tensor,
        layer: PackedLinear,
        arranged: Arranged,
    ) -> Tensor:
        a, b, scale = _matrices(layer, arranged)
        num_slots = len(arranged.slots)
        kept = _by_slot(x if dropped is None else dropped, num_slots).to(a.dtype)
        low = torch.bmm(kept, a.transpose(1, 2)).mul_(scale)
        ctx.save_for_backward(kept, low)
        ctx.layer, ctx.arranged = layer, arranged
        ctx.is_dropped, ctx.has_base = dropped is not None, y is None
        # No linear layer needs its output for its gradients, so the sum may replace it.
        y = _of_base(layer, x) if y is None else y.data
        shape = y.shape
        y = _by_slot(y, num_slots)
        y.baddbmm_(low.to(y.dtype), b.to(y.dtype))
        return y.view(shape).data  # not as an autograd view: some models add to outputs in place

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        kept, low = ctx.saved_tensors
        layer, arranged = ctx.layer, ctx.arranged
        (gradient,) = outputs
        a, b, scale = _matrices(layer, arranged)
        num_slots, rank = a.shape[:2]
        high = _by_slot(gradient, num_slots).to(b.dtype)
        down = torch.bmm(high, b.transpose(1, 2)).mul_(scale)
        layer.gradient_a[:num_slots, :rank].baddbmm_(down.transpose(1, 2), kept)
        layer.gradient_b[:num_slots, :rank].baddbmm_(low.transpose(1, 2), high)
        of_x = of_dropped = None
        if ctx.has_base and ctx.needs_input_grad[0]:
            of_x = _of_input(layer, gradient)
        if ctx.is_dropped and ctx.needs_input_grad[1]:
            of_dropped = torch.bmm(down, a).view(*gradient.shape[:-1], -1)
        elif of_x is not None:
            _by_slot(of_x, num_slots).baddbmm_(down.to(of_x.dtype), a.to(of_x.dtype))
        elif ctx.needs_input_grad[0]:
            of_x = torch.bmm(down, a).view(*gradient.shape[:-1], -1)
        return of_x, of_dropped, None if ctx.has_base else gradient, None, None, None


def _of_base(layer: PackedLinear, x: Tensor) -> Tensor:
    """Return the base layer's output, without a gradient."""
    if layer.is_plain:
        return product(x, layer.weight, layer.bias)
    return layer.inner(x)  # type: ignore[no-any-return]


def _of_input(layer: PackedLinear, gradient: Tensor) -> Tensor:
    """Return the gradient of the base layer's input from its output's; in 4 bits as bitsandbytes does."""
    if layer.is_plain:
        return product(gradient, layer.weight.t())
    from bitsandbytes.functional import dequantize_4bit

    inner: Any = layer.inner
    weight = dequantize_4bit(inner.weight.view(-1, 1), inner.weight.quant_state)
    dtype = gradient.dtype if inner.compute_dtype is None else inner.compute_dtype
    of_x: Tensor = gradient.to(dtype) @ weight.to(dtype)
    return of_x.to(gradient.dtype)


def _matrices(layer: PackedLinear, arranged: Arranged) -> tuple[Tensor, Tensor, Tensor]:
    """Return A, B and the scales of the slots of a pass."""
    if (made := arranged.matrices.get(layer.number)) is None:
        a, b = (
            stacked.of(arranged.weights)[:, : arranged.rank] for stacked in (layer.stacked_a, layer.stacked_b)
        )
        made = arranged.matrices[layer.number] = a, b, arranged.settings.scales[layer.number]
    return made


def _by_slot(rows: Tensor, num_slots: int) -> Tensor:
    """[rows, length, width] -> [slots, tokens, width]"""
    return rows.reshape(num_slots, -1, rows.shape[-1])
