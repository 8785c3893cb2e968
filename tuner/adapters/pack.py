"""Many adapters over one frozen base model in one forward pass: stacked weights, and the rows of each slot.

A linear layer's update for K trials is one batched product over [K, tokens, width]. Products over a batch
dimension keep trials apart: one trial's NaN never reaches another.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tuner.adapters.base import Base
from tuner.adapters.dora import DoraUpdate, weight_norm
from tuner.adapters.frozen_linear import FrozenLinear, dropout_mask, product
from tuner.adapters.initial import Adapter
from tuner.adapters.linear_layers import widths

MasterTensors: TypeAlias = Mapping[str, tuple[Tensor, ...]]
"""A trial's weights, or their gradients, by module and in PEFT's shapes."""
_ForEach: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]
"""Changes each tensor of the first list by the one of the second."""


@dataclass(frozen=True)
class PackedRows:
    """The slots of a forward pass: an equal number of rows for each, slot after slot."""

    slots: tuple[int, ...]
    """Slots taking part, each once."""
    dropout_keys: Tensor | None = None
    """[rows] keys of `dropout.row_keys`; None in evaluation."""


class Pack:
    """K slots of LoRA weights over a base model.

    The stacked weights, in the base model's dtype, are used by a forward pass; the master weights, in
    float32, belong to the trials. `load` and `collect` copy between the two. Weights of all layers lie in one
    tensor, gradients in another: both are zeroed and converted at once.
    """

    def __init__(self, base: Base, *, num_slots: int, max_rank: int, modules: Iterable[str]) -> None:
        self.base = base
        self.num_slots = num_slots
        self.rows: PackedRows | None = None
        wanted = set(modules)
        inner = {name: module for name, module in base.model.named_modules() if name in wanted}
        shapes = [(num_slots, max_rank, width) for module in inner.values() for width in widths(module)]
        sizes = [math.prod(shape) for shape in shapes]
        weights = torch.zeros(sum(sizes), device=base.device, dtype=base.dtype)
        self._gradients = torch.zeros_like(weights)
        self._master_gradients = self._gradients.float()  # itself where the base is float32
        stacked = _views(weights, shapes, sizes)
        gradients = _views(self._gradients, shapes, sizes)
        master = _views(self._master_gradients, shapes, sizes)
        self.anchor = torch.zeros((), device=base.device, requires_grad=True)
        """Makes autograd go back through layers whose inputs need no gradient."""
        self._layers: dict[str, PackedLinear] = {}
        self._master: dict[str, tuple[Tensor, Tensor]] = {}
        for number, (name, module) in enumerate(inner.items()):
            a, b = 2 * number, 2 * number + 1
            self._layers[name] = PackedLinear(
                module,
                self,
                key=zlib.crc32(name.encode()),
                weights=(stacked[a], stacked[b]),
                gradients=(gradients[a], gradients[b]),
            )
            self._master[name] = master[a], master[b]
            _replace(base, name, self._layers[name])
        self._ranks = [1] * num_slots
        self._names: list[tuple[str, ...]] = [()] * num_slots
        self._weights_of: list[list[Tensor]] = [[] for _ in range(num_slots)]
        self._gradients_of: list[list[Tensor]] = [[] for _ in range(num_slots)]
        """Per slot, the trial's views of the stacked tensors in PEFT's shapes: A, B, A, B, ... With DoRA the
        magnitude, which is not stacked, follows each B."""
        self._dora: list[DoraUpdate] = []

    def close(self) -> None:
        """Restore the base model's own layers."""
        for name, layer in self._layers.items():
            _replace(self.base, name, layer.inner)

    def with_magnitudes(self, adapter: Adapter) -> Adapter:
        """Return a new adapter with DoRA's initial magnitudes; without DoRA, the adapter itself.

        They are the norms of W + scale B A in float32, so that DoRA changes nothing yet; PEFT rounds them to
        the base model's dtype. Raises ModelError if the base model's weights cannot be read.
        """
        if not adapter.config.use_dora:
            return adapter
        weights, device = {}, self.base.device
        for name, (a, b) in adapter.weights.items():
            norm = weight_norm(self._layers[name].inner, a.to(device), b.to(device), scale=adapter.scale)
            weights[name] = a, b, norm.cpu()
        return Adapter(adapter.config, weights)

    def occupy(self, slot: int, adapter: Adapter) -> None:
        """Give a slot to a trial and zero everything of its predecessor. DoRA needs a pack of one slot."""
        assert self.num_slots == 1 or not adapter.config.use_dora
        self._dora = []
        for layer in self._layers.values():
            layer.clear(slot)
        rank = adapter.config.r
        self._ranks[slot] = rank
        self._names[slot] = tuple(adapter.weights)
        self._weights_of[slot], self._gradients_of[slot] = [], []
        for name in adapter.weights:
            layer = self._layers[name]
            layer.take(slot, scale=adapter.scale, dropout_rate=adapter.config.lora_dropout)
            self._weights_of[slot] += [layer.a[slot, :rank], layer.b[slot, :rank].t()]
            a, b = self._master[name]
            self._gradients_of[slot] += [a[slot, :rank], b[slot, :rank].t()]
            if adapter.config.use_dora:
                dora = layer.take_dora(rank)
                self._dora.append(dora)
                self._weights_of[slot].append(dora.magnitude)
                self._gradients_of[slot].append(dora.magnitude_gradient)
        self.load({slot: adapter.weights})

    @torch.no_grad()
    def load(self, weights: Mapping[int, MasterTensors]) -> None:
        """Copy trials' master weights into their slots, rounding to the compute dtype."""
        stacked = [view for slot in weights for view in self._weights_of[slot]]
        _copy_each(stacked, self._master_tensors(weights))
        for dora in self._dora:
            dora.measure()

    def zero_gradients(self) -> None:
        """Zero the gradients before a pass."""
        self._gradients.zero_()
        for dora in self._dora:
            dora.magnitude_gradient.zero_()

    @torch.no_grad()
    def collect(self, gradients: Mapping[int, MasterTensors]) -> None:
        """Add the gradients of the pass to those of the trials in these slots, in PEFT's shapes."""
        if self._master_gradients is not self._gradients:
            self._master_gradients.copy_(self._gradients)
        mine = [view for slot in gradients for view in self._gradients_of[slot]]
        _add_each(self._master_tensors(gradients), mine)

    def _master_tensors(self, of: Mapping[int, MasterTensors]) -> list[Tensor]:
        return [tensor for slot, named in of.items() for name in self._names[slot] for tensor in named[name]]

    @property
    def slot_weights(self) -> int:
        """Return the number of weights in a slot: of every module that some trial adapts, at the largest
        rank.
        """
        return self._gradients.numel() // self.num_slots

    @contextmanager
    def holding(self, packed: PackedRows | None) -> Iterator[None]:
        """Set whose rows pass through the base model within the block; None for the base model alone.

        Run the backward pass inside the block too: layers whose activations were not kept run again.
        """
        self.rows = packed
        try:
            yield
        finally:
            self.rows = None

    def token_nll(
        self, input_ids: Tensor, rows: Tensor, columns: Tensor, packed: PackedRows | None
    ) -> Tensor:
        """Return `Base.token_nll` with each row under its slot's adapter; the base model's without slots."""
        with self.holding(packed):
            return self.base.token_nll(input_ids, rows, columns)

    def token_scores(
        self, input_ids: Tensor, rows: Tensor, columns: Tensor, packed: PackedRows | None
    ) -> tuple[Tensor, Tensor]:
        """Return `Base.token_scores` with each row under its slot's adapter; the base model's if None."""
        with self.holding(packed):
            return self.base.token_scores(input_ids, rows, columns)

    def rank_of(self, slots: Sequence[int]) -> int:
        """Return the largest rank among the slots: padding beyond it is skipped."""
        return max(self._ranks[slot] for slot in slots)


class PackedLinear(nn.Module):
    """A frozen linear layer plus, for each row, its slot's scale * B A dropout(x)."""

    def __init__(
        self,
        inner: nn.Module,
        pack: Pack,
        *,
        key: int,
        weights: tuple[Tensor, Tensor],
        gradients: tuple[Tensor, Tensor],
    ) -> None:
        super().__init__()
        self.inner = inner
        self._is_plain = type(inner) in (nn.Linear, FrozenLinear)
        self.key = key
        """Distinguishes its dropout from other modules': from its path, whichever modules the pack wraps."""
        self._pack = (pack,)  # in a tuple: a module must not own the pack that owns it
        self.a, self.b = weights
        """[slots, rank, in] and [slots, rank, out]: B transposed, so that a trial's ranks lead in both."""
        self.gradient_a, self.gradient_b = gradients
        """Of the current pass, in the same shapes."""
        self.scales = [0.0] * pack.num_slots
        self.scale = torch.zeros(pack.num_slots, 1, 1, device=self.a.device, dtype=self.a.dtype)
        """The same as a tensor."""
        self.dropout_rates = [0.0] * pack.num_slots
        self._dora: DoraUpdate | None = None

    def take(self, slot: int, *, scale: float, dropout_rate: float) -> None:
        """Adapt this layer with a trial's weights."""
        self.scales[slot] = scale
        self.scale[slot] = scale
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
        """Zero the slot, so that nothing of its last trial remains."""
        self.a[slot].zero_()
        self.b[slot].zero_()
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
        """[..., in] -> [..., out], rows grouped by slot according to the pack's `rows`."""
        pack = self._pack[0]
        rows = pack.rows
        if rows is None or not any(self.scales[slot] for slot in rows.slots):
            return self.inner(x)  # type: ignore[no-any-return]
        dropped = self._drop(x, rows) if rows.dropout_keys is not None else None
        if self._dora is not None:
            return self._dora.apply(x, dropped)
        y = None if self._is_plain else self.inner(x)
        place = self, rows.slots, pack.rank_of(rows.slots)
        return _Update.apply(x, dropped, y, pack.anchor, *place)  # type: ignore[no-any-return, no-untyped-call]

    def _drop(self, x: Tensor, rows: PackedRows) -> Tensor | None:
        """Return which inputs dropout keeps; None if it keeps all."""
        rates = [self.dropout_rates[slot] for slot in rows.slots]
        if not any(rates):
            return None
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


class _Update(torch.autograd.Function):
    """W x + scale * B A dropped(x) for every slot at once.

    `y` is W x, or None for a plain layer weight: then that product is computed here, and the sums are done in
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
        slots: tuple[int, ...],
        rank: int,
    ) -> Tensor:
        a, b, scale = _of_slots((layer.a[:, :rank], layer.b[:, :rank], layer.scale), slots)
        kept = _by_slot(x if dropped is None else dropped, slots).to(a.dtype)
        low = torch.bmm(kept, a.transpose(1, 2)).mul_(scale)
        ctx.save_for_backward(kept, low)
        ctx.layer, ctx.slots, ctx.rank = layer, slots, rank
        ctx.is_dropped, ctx.is_plain = dropped is not None, y is None
        if y is not None:
            return _own(torch.baddbmm(_by_slot(y, slots), low.to(y.dtype), b.to(y.dtype)), y.shape)
        y = product(x, layer.inner.weight, layer.inner.bias)  # type: ignore[arg-type]
        _by_slot(y, slots).baddbmm_(low.to(y.dtype), b.to(y.dtype))
        return _own(y, y.shape)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        kept, low = ctx.saved_tensors
        layer, slots, rank = ctx.layer, ctx.slots, ctx.rank
        (gradient,) = outputs
        a, b, scale = _of_slots((layer.a[:, :rank], layer.b[:, :rank], layer.scale), slots)
        high = _by_slot(gradient, slots).to(b.dtype)
        down = torch.bmm(high, b.transpose(1, 2)).mul_(scale)
        _add_product(layer.gradient_a[:, :rank], slots, down.transpose(1, 2), kept)
        _add_product(layer.gradient_b[:, :rank], slots, low.transpose(1, 2), high)
        of_x = of_dropped = None
        if ctx.is_plain and ctx.needs_input_grad[0]:
            of_x = product(gradient, layer.inner.weight.t())
        if ctx.is_dropped and ctx.needs_input_grad[1]:
            of_dropped = torch.bmm(down, a).view(*gradient.shape[:-1], -1)
        elif of_x is not None:
            _by_slot(of_x, slots).baddbmm_(down.to(of_x.dtype), a.to(of_x.dtype))
        elif ctx.needs_input_grad[0]:
            of_x = torch.bmm(down, a).view(*gradient.shape[:-1], -1)
        return of_x, of_dropped, None if ctx.is_plain else gradient, None, None, None, None


def _one_by_one(operation: Callable[[Tensor, Tensor], Tensor]) -> _ForEach:
    """What torch's operators on lists do, by public ones: a call for each tensor."""

    def operate(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        for one, other in zip(into, tensors, strict=True):
            operation(one, other)

    return operate


# Private to torch, whose own optimizers are made of them; a torch without them is slower and as right.
_copy_each: _ForEach = getattr(torch, "_foreach_copy_", _one_by_one(Tensor.copy_))
_add_each: _ForEach = getattr(torch, "_foreach_add_", _one_by_one(Tensor.add_))


def _by_slot(rows: Tensor, slots: tuple[int, ...]) -> Tensor:
    """[rows, length, width] -> [slots, tokens, width]"""
    return rows.reshape(len(slots), -1, rows.shape[-1])


def _own(made: Tensor, shape: torch.Size) -> Tensor:
    """Return the same memory in a shape, not as an autograd view: some models add to outputs in place."""
    return made.view(shape).data


def _of_slots(stacked: Sequence[Tensor], slots: tuple[int, ...]) -> list[Tensor]:
    """Return the slots' slices of stacked tensors: views if the slots are adjacent."""
    if _are_neighbours(slots):
        return [tensor[slots[0] : slots[-1] + 1] for tensor in stacked]
    return [tensor[list(slots)] for tensor in stacked]


def _add_product(total: Tensor, slots: tuple[int, ...], left: Tensor, right: Tensor) -> None:
    """total[slots] += left @ right"""
    if _are_neighbours(slots):
        total[slots[0] : slots[-1] + 1].baddbmm_(left, right)
    else:
        total[list(slots)] += torch.bmm(left, right)


def _are_neighbours(slots: tuple[int, ...]) -> bool:
    return slots == tuple(range(slots[0], slots[0] + len(slots)))


def _views(flat: Tensor, shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> list[Tensor]:
    parts = torch.split(flat, list(sizes)) if sizes else ()
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _replace(base: Base, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(base.model.get_submodule(parent), child, module)
