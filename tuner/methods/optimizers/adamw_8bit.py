"""AdamW with 8-bit states, from bitsandbytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from tuner.methods.optimizers import ADAM, Optimizer, adam_arguments, trainer_adam
from tuner.methods.optimizers.skipping import unchanged_if
from tuner.records import Hyperparameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_ELEMENTS = 256
"""Elements that bitsandbytes quantises together. None belong to two tensors: each begins at a multiple."""
_ELEMENTS_A_VALUE = {"state1": 1, "state2": 1, "absmax1": BLOCK_ELEMENTS, "absmax2": BLOCK_ELEMENTS}
"""Of bitsandbytes' state of a tensor; the rest is the same for all tensors."""


def _build(groups: Sequence[dict[str, Any]], values: Hyperparameters) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return without_waiting(AdamW8bit)(groups, **adam_arguments(values))  # type: ignore[no-any-return]


@dataclass
class _Stretch:
    """Parameters one after the other in memory, with at most a block of zeros between two."""

    group: dict[str, Any]
    parameters: list[Tensor]
    weights: Tensor
    gradients: Tensor
    """[elements], the zeros included."""
    state: dict[str, Any]
    """As bitsandbytes' state of one tensor."""
    moments: Tensor
    """The memory of all that an update changes in the state."""
    views: list[Tensor]
    """`state1` of each parameter."""


@cache
def without_waiting(library: type) -> type:
    """Return an optimizer with the updates of one of bitsandbytes', in one call for adjacent tensors.

    The library updates tensor by tensor and waits for the device after each. Its own state per tensor stays,
    as views. Small tensors keep 32-bit states there, so a stretch has tensors of one kind.
    """
    import torch

    class Flat(library):  # type: ignore[misc]
        found_inf: Tensor | None = None
        _stretches: list[_Stretch] = []  # noqa: RUF012

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """Update all parameters, which have gradients, unless `found_inf` is 1; steps count anyway."""
            assert closure is None
            if not self._stretches or any(map(self._is_replaced, self._stretches)):
                self._stretches = [
                    _laid(self, number, list(part))
                    for number, group in enumerate(self.param_groups)
                    for part in _adjacent(group["params"], self.args.min_8bit_size)
                ]
            changed = [part for stretch in self._stretches for part in (stretch.weights, stretch.moments)]
            with unchanged_if(self.found_inf, changed):
                for stretch in self._stretches:
                    stretch.state["step"] = self.state[stretch.parameters[0]]["step"] + 1
                    for parameter in stretch.parameters:
                        self.state[parameter]["step"] = stretch.state["step"]
                    _update(self.optimizer_name, stretch)

        def _is_replaced(self, stretch: _Stretch) -> bool:
            """Return whether a checkpoint's state has taken the place of views."""
            pairs = zip(stretch.parameters, stretch.views, strict=True)
            return any(self.state[parameter].get("state1") is not view for parameter, view in pairs)

    return Flat


def _laid(optimizer: Any, number: int, parameters: list[Tensor]) -> _Stretch:
    """Lay the states of adjacent parameters of a group one after the other, as the parameters are."""
    group, first = optimizer.param_groups[number], parameters[0]
    assert first.grad is not None and first.is_contiguous()  # noqa: PT018
    starts = [int(parameter.storage_offset() - first.storage_offset()) for parameter in parameters]
    size = starts[-1] + parameters[-1].numel()
    for parameter in parameters:
        if not optimizer.state[parameter]:
            optimizer.init_state(group, parameter, number, 0)
    moments, laid = _memory(size, optimizer.state[first])
    state: dict[str, Any] = {**optimizer.state[first], **laid}
    for parameter, start in zip(parameters, starts, strict=True):
        own = optimizer.state[parameter]
        for key, whole in laid.items():
            begin = start // _ELEMENTS_A_VALUE[key]
            own[key] = whole[begin : begin + own[key].numel()].view(own[key].shape).copy_(own[key])
    weights, gradients = (
        part.as_strided((size,), (1,), part.storage_offset()) for part in (first.data, first.grad)
    )
    views = [optimizer.state[parameter]["state1"] for parameter in parameters]
    return _Stretch(group, parameters, weights, gradients, state, moments, views)


def _memory(size: int, own: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return one memory for the moments of a stretch, all of them zero, and its parts by key of the state."""
    import torch

    wanted = {key: -(-size // elements) for key, elements in _ELEMENTS_A_VALUE.items() if key in own}
    keys = sorted(wanted, key=lambda key: -own[key].element_size())  # so that each part is aligned
    ends = list(accumulate(wanted[key] * own[key].element_size() for key in keys))
    memory = own[keys[0]].new_zeros(ends[-1], dtype=torch.uint8)
    parts = {
        key: memory[start:end].view(own[key].dtype).copy_(_zero(key, own))
        for key, start, end in zip(keys, [0, *ends], ends, strict=False)
    }
    return memory, parts


def _zero(key: str, own: dict[str, Any]) -> Tensor:
    """Return what stands for 0 between tensors: of a code, the place of the lowest number of its map.

    It stays on the device, which is not waited for.
    """
    is_code = str(own[key].dtype) == "torch.uint8"
    return own[f"qmap{key[-1]}"].abs().argmin() if is_code else own[key].new_zeros(())  # type: ignore[no-any-return]


def _update(optimizer_name: str, stretch: _Stretch) -> None:
    """Call the library's kernel on a stretch."""
    from bitsandbytes import functional

    group, state = stretch.group, stretch.state
    (beta1, beta2), decay, rate = group["betas"], group["weight_decay"], group["lr"]
    update = optimizer_name, stretch.gradients, stretch.weights, state["state1"]
    if str(state["state1"].dtype) == "torch.float32":
        functional.optimizer_update_32bit(
            *update,
            beta1,
            group["eps"],
            state["step"],
            rate,
            state.get("state2"),
            beta2,
            weight_decay=decay,
        )
        return
    functional.optimizer_update_8bit_blockwise(
        *update,
        state.get("state2"),
        beta1,
        beta2,
        0.0,
        0.0,
        group["eps"],
        state["step"],
        rate,
        state["qmap1"],
        state.get("qmap2"),
        state["absmax1"],
        state.get("absmax2"),
        decay,
    )


def _adjacent(parameters: Sequence[Tensor], quantised_from: int) -> list[list[Tensor]]:
    """Cut parameters, in the order of their places in memory, into stretches that one call can update."""
    stretches: list[list[Tensor]] = []
    for one in sorted(parameters, key=lambda each: (each.data_ptr(), each.numel())):
        last = stretches[-1][-1] if stretches else None
        if (
            last is not None
            and one.grad is not None
            and last.grad is not None
            and (one.numel() < quantised_from) == (last.numel() < quantised_from)
            and _follows(last, one)
            and _follows(last.grad, one.grad)
            and one.storage_offset() - last.storage_offset()
            == one.grad.storage_offset() - last.grad.storage_offset()
            and (one.storage_offset() - stretches[-1][0].storage_offset()) % BLOCK_ELEMENTS == 0
        ):
            stretches[-1].append(one)
        else:
            stretches.append([one])
    return stretches


def _follows(last: Tensor, one: Tensor) -> bool:
    """Return whether a tensor begins less than a block after the end of another, in the same memory."""
    gap = one.storage_offset() - last.storage_offset() - last.numel()
    same = one.untyped_storage().data_ptr() == last.untyped_storage().data_ptr()
    return same and 0 <= gap < BLOCK_ELEMENTS and one.is_contiguous() and last.is_contiguous()


ADAMW_8BIT = Optimizer(
    name="adamw_8bit",
    hyperparameters=ADAM,
    state_bytes=2,
    block_elements=BLOCK_ELEMENTS,
    build=_build,
    amplifies_rounding=True,
    skips_on_device=True,
    counts_on_host=True,
    trainer_arguments=trainer_adam("adamw_8bit"),
    aliases=("adamw_bnb_8bit", "paged_adamw_8bit", "adam_8bit", "adam8bit", "adamw8bit"),
)
