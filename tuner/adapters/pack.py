"""Many adapters over one frozen base in one forward pass: which rows are whose, and the stacked weights.

A linear layer's update for K trials is one batched product over [K, tokens, width]. Products over a
batch dimension keep trials apart: one trial's NaN never reaches another.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tuner.adapters.base import Base
from tuner.adapters.dropout import dropout_mask
from tuner.adapters.initial import Adapter


@dataclass(frozen=True)
class PackedRows:
    """Whose rows a forward pass holds: an equal number for each slot, slot after slot."""

    slots: tuple[int, ...]
    """Slots taking part, each once."""
    dropout_keys: Tensor | None = None
    """[rows] keys of `dropout.row_keys`; None in evaluation."""


class Pack:
    """K slots of LoRA weights over a base.

    The stacked weights are what the forward pass computes with, in the base's dtype; the exact ones
    are the trials' own. `load` and `collect` carry between the two.
    """

    def __init__(self, base: Base, *, num_slots: int, max_rank: int, modules: Iterable[str]) -> None:
        self.base = base
        self.num_slots = num_slots
        self.rows: PackedRows | None = None
        self._layers: dict[str, PackedLinear] = {}
        wanted = set(modules)
        names = [name for name, _ in base.model.named_modules() if name in wanted]
        for name in names:
            inner = base.model.get_submodule(name)
            layer = PackedLinear(inner, self, key=zlib.crc32(name.encode()), max_rank=max_rank)
            parent, _, child = name.rpartition(".")
            setattr(base.model.get_submodule(parent), child, layer)
            self._layers[name] = layer
        self._ranks = [1] * num_slots
        self._names: list[tuple[str, ...]] = [()] * num_slots

    def close(self) -> None:
        """Give the base its own layers back."""
        for name, layer in self._layers.items():
            parent, _, child = name.rpartition(".")
            setattr(self.base.model.get_submodule(parent), child, layer.inner)

    def occupy(self, slot: int, adapter: Adapter) -> None:
        """Give a slot to a trial: everything of its predecessor is zeroed."""
        for layer in self._layers.values():
            layer.clear(slot)
        for name in adapter.weights:
            layer = self._layers[name]
            layer.scales[slot] = adapter.scale
            layer.dropout_rates[slot] = adapter.config.lora_dropout
        self._ranks[slot] = adapter.config.r
        self._names[slot] = tuple(adapter.weights)
        self.load(slot, adapter.weights)

    @torch.no_grad()
    def load(self, slot: int, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Copy a trial's exact weights into its slot, rounding to the compute dtype."""
        stacked: list[Tensor] = []
        exact: list[Tensor] = []
        for name, (a, b) in weights.items():
            layer = self._layers[name]
            rank = a.shape[0]
            stacked += [layer.a[slot, :rank], layer.b[slot, :rank].t()]
            exact += [a, b]
        torch._foreach_copy_(stacked, exact)

    @torch.no_grad()
    def collect(self, slot: int, gradients: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add the slot's gradients of this pass to `gradients`, in PEFT's shapes."""
        rank = self._ranks[slot]
        mine: list[Tensor] = []
        sums: list[Tensor] = []
        for name in self._names[slot]:
            layer = self._layers[name]
            if layer.a.grad is None or layer.b.grad is None:
                continue
            mine += [layer.a.grad[slot, :rank], layer.b.grad[slot, :rank].t()]
            sums += gradients[name]
        if mine and mine[0].dtype != sums[0].dtype:
            mine = [gradient.to(sums[0].dtype) for gradient in mine]
        torch._foreach_add_(sums, mine)

    def drop_gradients(self) -> None:
        """Forget the gradients of the last pass."""
        for layer in self._layers.values():
            layer.a.grad = layer.b.grad = None

    def token_nll(
        self, input_ids: Tensor, rows: Tensor, columns: Tensor, packed: PackedRows | None
    ) -> Tensor:
        """`Base.token_nll` with each row under its slot's adapter; with None, the untouched base."""
        self.rows = packed
        try:
            return self.base.token_nll(input_ids, rows, columns)
        finally:
            self.rows = None

    def rank_of(self, slots: Sequence[int]) -> int:
        """The largest rank among the slots: padding beyond it is skipped."""
        return max(self._ranks[slot] for slot in slots)


class PackedLinear(nn.Module):
    """A frozen linear layer plus, for each row, its slot's scale * B A dropout(x)."""

    def __init__(self, inner: nn.Module, pack: Pack, *, key: int, max_rank: int) -> None:
        super().__init__()
        self.inner = inner
        self.key = key
        """What tells its dropout from other modules': of its path, whichever modules the pack wraps."""
        self._pack = (pack,)  # in a tuple: a module must not own the pack that owns it
        width_in, width_out = _widths(inner)
        slots, device, dtype = pack.num_slots, pack.base.device, pack.base.dtype
        self.a = nn.Parameter(torch.zeros(slots, max_rank, width_in, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(slots, max_rank, width_out, device=device, dtype=dtype))
        """[slots, rank, out]: B transposed, so that a trial's ranks are the leading rows of both."""
        self.scales = [0.0] * slots
        self.dropout_rates = [0.0] * slots

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Zero the slot, so that nothing of its last trial is left."""
        self.a[slot].zero_()
        self.b[slot].zero_()
        self.scales[slot] = self.dropout_rates[slot] = 0.0

    @property
    def weight(self) -> Tensor:
        """The base's weight: some models look at its dtype."""
        return self.inner.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], rows grouped by slot as the pack's `rows` says."""
        y: Tensor = self.inner(x)
        rows = self._pack[0].rows
        if rows is None or not any(self.scales[slot] for slot in rows.slots):
            return y
        rank = self._pack[0].rank_of(rows.slots)
        a, b = self._select(self.a, rows.slots, rank), self._select(self.b, rows.slots, rank)
        kept = self._drop(x, rows) if rows.dropout_keys is not None else x
        grouped = kept.reshape(len(rows.slots), -1, x.shape[-1]).to(a.dtype)
        low = torch.bmm(grouped, a.transpose(1, 2)) * self._scale(rows.slots, a)
        flat = y.reshape(len(rows.slots), -1, y.shape[-1])
        return torch.baddbmm(flat, low.to(flat.dtype), b.to(flat.dtype)).view(y.shape)

    def _select(self, stacked: Tensor, slots: tuple[int, ...], rank: int) -> Tensor:
        if slots == tuple(range(slots[0], slots[0] + len(slots))):
            return stacked[slots[0] : slots[0] + len(slots), :rank]
        return stacked[list(slots), :rank]

    def _scale(self, slots: tuple[int, ...], like: Tensor) -> Tensor:
        return like.new_tensor([self.scales[slot] for slot in slots])[:, None, None]

    def _drop(self, x: Tensor, rows: PackedRows) -> Tensor:
        rates = [self.dropout_rates[slot] for slot in rows.slots]
        if not any(rates):
            return x
        assert rows.dropout_keys is not None
        num_rows, width = rows.dropout_keys.shape[0], x.shape[-1]
        shaped = x.reshape(num_rows, -1, width)
        keys = rows.dropout_keys.view(len(rates), -1)
        parts = []
        for part, rate, key in zip(shaped.view(len(rates), -1, *shaped.shape[1:]), rates, keys, strict=True):
            if rate:
                mask = dropout_mask(key, module=self.key, length=part.shape[1], width=width, rate=rate)
                part = torch.where(mask, part, part.new_zeros(())) / (1 - rate)
            parts.append(part)
        return torch.stack(parts).view(x.shape)


def _widths(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, Conv1D):
        return int(linear.weight.shape[0]), int(linear.nf)
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features
