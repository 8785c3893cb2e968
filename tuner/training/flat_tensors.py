"""Tensors of many modules in one vector on each device, and the single vector of it all in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlatTensors:
    """Tensors by module, each a view of the vector on its device."""

    views: Mapping[str, Tensor]
    flats: tuple[Tensor, ...]
    """A vector of float32 on each device."""
    places: tuple[Mapping[str, slice], ...]
    """Where the elements of each module are, in the vector of each device."""
    whole: Mapping[str, slice]
    """Where they would be, were all on one device."""

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        devices: Mapping[str, torch.device],
        transposed: bool,
        multiple: int,
    ) -> FlatTensors:
        """Copy tensors to their devices, in their order.

        With a `multiple` above 1, the largest come first and each begins at a multiple of it, with zeros
        between. Memory has each tensor's transpose if `transposed`; views have its own shape.
        """
        laid = {name: tensor.t() if transposed else tensor for name, tensor in tensors.items()}
        views: dict[str, Tensor] = {}
        flats: list[Tensor] = []
        places: list[Mapping[str, slice]] = []
        for device in dict.fromkeys(devices[name] for name in tensors):
            here = {name: tensor for name, tensor in laid.items() if devices[name] == device}
            places.append(_layout(here, multiple=multiple))
            flats.append(torch.zeros(max(place.stop for place in places[-1].values()), device=device))
            views |= {name: flats[-1][place].view(here[name].shape) for name, place in places[-1].items()}
        for name, tensor in laid.items():
            views[name].copy_(tensor)
        shown = {name: views[name].t() if transposed else views[name] for name in tensors}
        return cls(shown, tuple(flats), tuple(places), _layout(laid, multiple=multiple))

    def joined(self, values: Sequence[Tensor]) -> Tensor:
        """Return an optimizer's values of the vectors as of one vector; what is no vector is alike in all."""
        if len(values) == 1 or values[0].shape != self.flats[0].shape:
            return values[0]
        joined = values[0].new_zeros(self._size, device="cpu")
        for value, places in zip(values, self.places, strict=True):
            for name, place in places.items():
                joined[self.whole[name]] = value[place].cpu()
        return joined

    def apart(self, value: Tensor) -> list[Tensor]:
        """Return the values for each vector of what `joined` returned."""
        if len(self.flats) == 1 or value.shape != (self._size,):
            return [value] * len(self.flats)
        parts = [value.new_zeros(flat.shape) for flat in self.flats]
        for part, places in zip(parts, self.places, strict=True):
            for name, place in places.items():
                part[place] = value[self.whole[name]]
        return parts

    @property
    def _size(self) -> int:
        return int(max(place.stop for place in self.whole.values()))


def _layout(tensors: Mapping[str, Tensor], *, multiple: int) -> dict[str, slice]:
    """Return the place of each tensor in a vector, in the order of memory."""
    order = list(tensors)
    if multiple > 1:
        order.sort(key=lambda name: -tensors[name].numel())
    places, end = {}, 0
    for name in order:
        start = -(-end // multiple) * multiple
        end = start + tensors[name].numel()
        places[name] = slice(start, end)
    return places
