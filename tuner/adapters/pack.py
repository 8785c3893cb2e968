"""Many adapters over one frozen base model in one forward pass: stacked weights, and the rows of each slot.

A linear layer's update for K trials is one batched product over [K, tokens, width]. Products over a batch
dimension keep trials apart: one trial's NaN never reaches another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from tuner.adapters.base import Base
from tuner.adapters.device_pack import DevicePack, MasterTensors, PackedRows
from tuner.adapters.dora import weight_norm
from tuner.adapters.initial import Adapter
from tuner.adapters.joined import Joined
from tuner.adapters.packed_linear import PackedLinear

_GPU_RANK_MULTIPLE = 8
"""Ranks are filled with zeros to multiples of it on a GPU, whose tensor cores need them: zeros stay zeros."""


class Pack:
    """K slots of LoRA weights over a base model.

    The stacked weights, in the base model's dtype, are used by a forward pass; the master weights, in
    float32, belong to the trials. `load` and `collect` copy between the two. Each device of the base model
    has a `DevicePack` with the layers that are there.
    """

    def __init__(
        self,
        base: Base,
        *,
        num_slots: int,
        max_rank: int,
        modules: Iterable[str],
        rank_multiple: int | None = None,
    ) -> None:
        self.base = base
        self.devices = base.devices
        """That of the inputs first."""
        if rank_multiple is None:
            rank_multiple = 1 if base.device.type == "cpu" else _GPU_RANK_MULTIPLE
        self.num_slots = num_slots
        self.rows: PackedRows | None = None
        wanted = set(modules)
        inner = {name: module for name, module in base.model.named_modules() if name in wanted}
        places = {name: _device_of(module, base) for name, module in inner.items()}
        self.parts = [
            DevicePack(
                {name: module for name, module in inner.items() if places[name] == device},
                num_slots=num_slots,
                max_rank=-(-max_rank // rank_multiple) * rank_multiple,
                rank_multiple=rank_multiple,
                device=device,
                dtype=base.dtype,
            )
            for device in self.devices
            if device in places.values()
        ]
        """Of each device with layers of the pack."""
        self._layers: dict[str, PackedLinear] = {
            name: layer for part in self.parts for name, layer in part.layers.items()
        }
        for name, layer in self._layers.items():
            _replace(base, name, layer)
        self._slot_places: dict[int, int] = {}
        """Of each slot in the last pass."""

    @property
    def places(self) -> dict[str, torch.device]:
        """Return the device of each layer, by module path."""
        return {name: part.device for part in self.parts for name in part.layers}

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
        weights, places = {}, self.places
        for name, (a, b) in adapter.weights.items():
            device = places[name]
            norm = weight_norm(self._layers[name].inner, a.to(device), b.to(device), scale=adapter.scale)
            weights[name] = a, b, norm.cpu()
        return Adapter(adapter.config, weights)

    def occupy(self, slot: int, adapter: Adapter) -> None:
        """Give a slot to a trial and zero everything of its predecessor. DoRA needs a pack of one slot."""
        assert self.num_slots == 1 or not adapter.config.use_dora
        for part in self.parts:
            part.occupy(slot, adapter)
        self.load({slot: adapter.weights})

    @torch.no_grad()
    def load(self, weights: Mapping[int, MasterTensors]) -> None:
        """Copy trials' master weights into their slots, rounding to the compute dtype."""
        for part in self.parts:
            part.load(weights)

    def zero_gradients(self) -> None:
        """Zero the gradients before a pass."""
        for part in self.parts:
            part.zero_gradients()

    @torch.no_grad()
    def collect(self, gradients: Mapping[int, MasterTensors]) -> None:
        """Add the gradients of the pass to those of the trials in these slots, in PEFT's shapes."""
        for part in self.parts:
            part.collect(gradients, places=self._slot_places)

    @property
    def shares(self) -> list[float]:
        """Return each device's share of the weights in a slot, in the order of `devices`."""
        weights = {part.device: part.slot_weights for part in self.parts}
        return [weights.get(device, 0) / max(1, self.slot_weights) for device in self.devices]

    @property
    def slot_weights(self) -> int:
        """Return the number of weights in a slot: of every module that some trial adapts, at the largest
        rank.
        """
        return sum(part.slot_weights for part in self.parts)

    @contextmanager
    def holding(self, packed: PackedRows | None) -> Iterator[None]:
        """Set whose rows pass through the base model within the block; None for the base model alone.

        Run the backward pass inside the block too: layers whose activations were not kept run again.
        """
        self.rows = packed
        if packed is not None:
            self._slot_places = {slot: place for place, slot in enumerate(packed.slots)}
            for part in self.parts:
                part.arrange(packed)
        joined = None if packed is None else packed.joined
        try:
            with nullcontext() if joined is None else self._within(joined):
                yield
        finally:
            self.rows = None
            for part in self.parts:
                part.arranged = None

    def _within(self, joined: Joined) -> AbstractContextManager[None]:
        return joined.within(self.base.model, last=self.base.last, attention=self.base.attention)

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


def _device_of(module: nn.Module, base: Base) -> torch.device:
    weight = next(module.parameters(), None)
    return base.device if weight is None else weight.device


def _replace(base: Base, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(base.model.get_submodule(parent), child, module)
