"""What a pack has on one device: stacked weights and gradients of the layers there, slots side by side."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tuner.adapters.dora import DoraUpdate
from tuner.adapters.initial import Adapter
from tuner.adapters.joined import Joined
from tuner.adapters.linear_layers import widths
from tuner.adapters.packed_linear import Arranged, PackedLinear, Settings, Stacked
from tuner.adapters.placement import on

MasterTensors: TypeAlias = Mapping[str, tuple[Tensor, ...]]
"""A trial's weights, or their gradients, by module and in PEFT's shapes."""
_ForEach: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]
"""Changes each tensor of the first list by the one of the second."""


@dataclass(frozen=True)
class PackedRows:
    """The slots of a forward pass: an equal number of rows for each, or one joined row, slot after slot."""

    slots: tuple[int, ...]
    """Slots taking part, each once."""
    dropout_keys: Tensor | None = None
    """[examples] keys of `frozen_linear.row_keys`; None in evaluation."""
    joined: Joined | None = None
    """Where tokens belong if a row has several examples."""


class DevicePack:
    """The layers of a pack on one device.

    A slot's weights of all these layers lie in one row of a tensor, so slots that are not adjacent are
    brought together by one copy. Gradients lie in another tensor, in the order of the slots of the pass, and
    are zeroed and converted at once.
    """

    def __init__(
        self,
        inner: Mapping[str, nn.Module],
        *,
        num_slots: int,
        max_rank: int,
        rank_multiple: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_slots = num_slots
        self.device = device
        self._rank_multiple = rank_multiple
        shapes = [(max_rank, width) for module in inner.values() for width in widths(module)]
        sizes = [math.prod(shape) for shape in shapes]
        self._weights = torch.zeros(num_slots, sum(sizes), device=device, dtype=dtype)
        self._gradients = torch.zeros(self._weights.numel(), device=device, dtype=dtype)
        self._master_gradients = self._gradients.float()  # itself where the base is float32
        gradients = _views(self._gradients, num_slots, shapes)
        master = _views(self._master_gradients, num_slots, shapes)
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        """Makes autograd go back through layers whose inputs need no gradient."""
        keys = [zlib.crc32(name.encode()) for name in inner]  # of its path, whichever modules the pack wraps
        self._settings = Settings.empty(keys, num_slots, like=self._weights)
        self.layers: dict[str, PackedLinear] = {}
        self._master: dict[str, tuple[Tensor, Tensor]] = {}
        for number, (name, module) in enumerate(inner.items()):
            a, b = 2 * number, 2 * number + 1
            start = sum(sizes[:a])
            self.layers[name] = PackedLinear(
                module,
                self,
                number=number,
                a=Stacked(self._weights, start=start, shape=shapes[a]),
                b=Stacked(self._weights, start=start + sizes[a], shape=shapes[b]),
                gradients=(gradients[a], gradients[b]),
            )
            self._master[name] = master[a], master[b]
        self._ranks = [1] * num_slots
        self._names: list[tuple[str, ...]] = [()] * num_slots
        self._weights_of: list[list[Tensor]] = [[] for _ in range(num_slots)]
        """Per slot, the trial's views of the stacked tensors in PEFT's shapes: A, B, A, B, ... With DoRA the
        magnitude, which is not stacked, follows each B."""
        self._gradients_of: dict[tuple[int, int], list[Tensor]] = {}
        """The same of the gradients, by slot and its place in a pass."""
        self.arranged: Arranged | None = None
        """What the layers use in the current pass."""
        self._adjacent: dict[tuple[int, ...], Arranged] = {}
        """Views of adjacent slots, until a trial occupies one."""
        self._together: Arranged | None = None
        """Copies of slots that are not adjacent, until their weights change."""
        self._dora: list[DoraUpdate] = []

    def occupy(self, slot: int, adapter: Adapter) -> None:
        """Give a slot to a trial and zero everything of its predecessor; `load` follows."""
        self._dora, self._together, self._adjacent = [], None, {}
        self._weights[slot].zero_()
        for layer in self.layers.values():
            layer.clear(slot)
        rank = adapter.config.r
        self._ranks[slot] = rank
        self._names[slot] = tuple(name for name in adapter.weights if name in self.layers)
        self._weights_of[slot] = []
        self._gradients_of = {key: views for key, views in self._gradients_of.items() if key[0] != slot}
        for name in self._names[slot]:
            layer = self.layers[name]
            layer.take(slot, scale=adapter.scale, dropout_rate=adapter.config.lora_dropout)
            self._weights_of[slot] += [layer.a[slot, :rank], layer.b[slot, :rank].t()]
            if adapter.config.use_dora:
                dora = layer.take_dora(rank)
                self._dora.append(dora)
                self._weights_of[slot].append(dora.magnitude)
        layers = self.layers.values()
        self._settings.write(
            slot,
            scales=[layer.scales[slot] for layer in layers],
            dropout_rates=[layer.dropout_rates[slot] for layer in layers],
        )

    def load(self, weights: Mapping[int, MasterTensors]) -> None:
        """Copy trials' master weights into their slots, rounding to the compute dtype."""
        self._together = None
        stacked = [view for slot in weights for view in self._weights_of[slot]]
        if stacked:  # a trial may adapt no layer that is here
            _copy_each(stacked, self._master_tensors(weights))
        for dora in self._dora:
            dora.measure()

    def zero_gradients(self) -> None:
        """Zero the gradients before a pass."""
        self._gradients.zero_()
        for dora in self._dora:
            dora.magnitude_gradient.zero_()

    def collect(self, gradients: Mapping[int, MasterTensors], *, places: Mapping[int, int]) -> None:
        """Add the gradients of the pass, in which each slot had its place, to those of the trials."""
        if self._master_gradients is not self._gradients:
            self._master_gradients.copy_(self._gradients)
        mine = [view for slot in gradients for view in self._gradients_in(slot, places[slot])]
        if mine:
            _add_each(self._master_tensors(gradients), mine)

    def _gradients_in(self, slot: int, place: int) -> list[Tensor]:
        """Return the views of a trial's gradients, which are at the slot's place in the pass."""
        if (slot, place) not in self._gradients_of:
            rank, views = self._ranks[slot], []
            for number, name in enumerate(self._names[slot]):
                a, b = self._master[name]
                views += [a[place, :rank], b[place, :rank].t()]
                if self._dora:
                    views.append(self._dora[number].magnitude_gradient)
            self._gradients_of[slot, place] = views
        return self._gradients_of[slot, place]

    def _master_tensors(self, of: Mapping[int, MasterTensors]) -> list[Tensor]:
        return [tensor for slot, named in of.items() for name in self._names[slot] for tensor in named[name]]

    @property
    def slot_weights(self) -> int:
        """Return the number of weights in a slot: of every module that some trial adapts, at the largest
        rank.
        """
        return self._gradients.numel() // self.num_slots

    def arrange(self, rows: PackedRows) -> None:
        """Bring the slots of a pass together: views if they are adjacent, else one copy until `load`."""
        slots, settings = rows.slots, self._settings
        first, end = slots[0], slots[0] + len(slots)
        if slots == tuple(range(first, end)):
            if slots not in self._adjacent:
                weights = self._weights[first:end]
                self._adjacent[slots] = Arranged(slots, self.rank_of(slots), weights, settings.of(first, end))
            there = self._adjacent[slots]
        else:
            if self._together is None or self._together.slots != slots:
                weights = torch.cat([self._weights[slot : slot + 1] for slot in slots])
                self._together = Arranged(slots, self.rank_of(slots), weights, settings.gathered(slots))
            there = self._together
        keys = None if rows.dropout_keys is None else on(rows.dropout_keys, self.device)
        self.arranged = replace(there, dropout_keys=keys, joined=rows.joined)

    def rank_of(self, slots: Sequence[int]) -> int:
        """Return the largest rank among the slots, as products have it: padding beyond it is skipped."""
        largest = max(self._ranks[slot] for slot in slots)
        return -(-largest // self._rank_multiple) * self._rank_multiple


def _one_by_one(operation: Callable[[Tensor, Tensor], Tensor]) -> _ForEach:
    """What torch's operators on lists do, by public ones: a call for each tensor."""

    def operate(into: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        for one, other in zip(into, tensors, strict=True):
            operation(one, other)

    return operate


# Private to torch, whose own optimizers are made of them; a torch without them is slower and as right.
_copy_each: _ForEach = getattr(torch, "_foreach_copy_", _one_by_one(Tensor.copy_))
_add_each: _ForEach = getattr(torch, "_foreach_add_", _one_by_one(Tensor.add_))


def _views(flat: Tensor, num_slots: int, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return a view [slots, rank, width] for each shape."""
    parts = torch.split(flat, [num_slots * math.prod(shape) for shape in shapes]) if shapes else ()
    return [part.view(num_slots, *shape) for part, shape in zip(parts, shapes, strict=True)]
