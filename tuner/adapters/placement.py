"""A base model on several devices: where its parts are, and tensors that each of them needs once a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from tuner.adapters.device_io import send
from tuner.errors import InputError, ModelError

_copies: Any = WeakTensorKeyDictionary()
"""Of each tensor: by device, its version and a copy, both for as long as the tensor lives."""


def worker_devices(gpus_per_worker: int, *, num_gpus: int | None = None) -> list[torch.device]:
    """Return the devices of a worker's base model: its GPUs, or the CPU where torch finds none.

    Raises InputError for fewer GPUs than several that it is to have.
    """
    if num_gpus is None:
        num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus < gpus_per_worker > 1:
        raise InputError(
            f"run.gpus_per_worker: {gpus_per_worker}: torch finds {num_gpus} GPU(s) here; lower it, or see "
            "tuner doctor"
        )
    if not num_gpus:
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(max(1, gpus_per_worker))]


def on(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; without a gradient, one copy is kept there for as long as it lives."""
    if tensor.device == device:
        return tensor
    if tensor.requires_grad:
        return tensor.to(device)
    version, copy = _copies.get(tensor, {}).get(device, (None, None))
    if copy is None or version != tensor._version:
        copy = tensor.to(device, non_blocking=device.type != "cpu")
        _keep(tensor, device, copy)
    return copy  # type: ignore[no-any-return]


def _keep(tensor: Tensor, device: torch.device, copy: Tensor) -> None:
    if tensor not in _copies:
        _copies[tensor] = {}
    _copies[tensor][device] = tensor._version, copy


def send_to_each(arrays: Sequence[NDArray[np.generic]], devices: Sequence[torch.device]) -> list[Tensor]:
    """Copy arrays to all devices, in one copy each; return those on the first, of which `on` has the rest."""
    sent = send(arrays, devices[0])
    for device in devices[1:]:
        for tensor, copy in zip(sent, send(arrays, device), strict=True):
            _keep(tensor, device, copy)
    return sent


_USABLE_SHARE = 0.9
"""Of a GPU's free memory for a part of the base model; transformers' own share for one that it fills."""


def placed(devices: Sequence[torch.device]) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a model on these devices, alike in bytes on each.

    What has no room on them is not kept in the host's memory: `connect` refuses such a model.
    """
    first, *others = devices
    if not others:
        return {"device_map": {"": first}}
    rooms = {device.index: int(_USABLE_SHARE * torch.cuda.mem_get_info(device)[0]) for device in devices}
    return {"device_map": "balanced", "max_memory": rooms}


def is_about_offloading(error: Exception) -> bool:
    """Return whether a model was refused because the devices have no room for some of its parts."""
    return any(sign in str(error) for sign in ("offload", "dispatched on the CPU or the disk"))


def devices_of(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """Return the devices of a model's weights, that of its inputs first.

    Buffers do not count: unsloth leaves those of its rotary embeddings, which it does not read, on the CPU.
    """
    first = model.get_input_embeddings().weight.device
    return tuple(dict.fromkeys((first, *(weight.device for weight in model.parameters()))))


def connect(model: PreTrainedModel) -> None:
    """Let the parts of a model on several devices bring their inputs there; nothing for one device.

    accelerate's hooks, which go, do so for every layer by itself: here what all layers read, such as masks
    and rotary embeddings, is copied once a pass. Raises ValueError if parts were offloaded to the disk, and
    ModelError if a module with weights of its own has others on another device.
    """
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError("parts of it would be offloaded to the disk")
    first, *others = devices_of(model)
    if not others:
        return
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for name, part, device in _parts("", model):
        if any(tensor.device != device for tensor in _tensors(part)):
            raise ModelError(
                f"run.gpus_per_worker: {name}, a {type(part).__name__}, cannot be spread over several GPUs; "
                "remove this line, or choose another model"
            )
        if next(part.parameters(), None) is None and device != first:
            part.to(first)  # such as rotary embeddings, which read the first hidden states
            device = first
        part.register_forward_pre_hook(_bringing(device), with_kwargs=True)


def _parts(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, torch.device]]:
    """Yield the largest modules on one device. A list of modules is not called, so its modules are parts."""
    found = {tensor.device for tensor in _tensors(module)}
    own = next(chain(module.parameters(recurse=False), module.buffers(recurse=False)), None)
    if own is not None or (len(found) == 1 and not isinstance(module, (nn.ModuleList, nn.ModuleDict))):
        yield name, module, own.device if own is not None else found.pop()
        return
    for child_name, child in module.named_children():
        yield from _parts(f"{name}.{child_name}".lstrip("."), child)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def _bringing(device: torch.device) -> Callable[..., tuple[Any, Any]]:
    """Return a hook that brings a module's inputs to its device."""

    def bring(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return _brought(inputs, device), _brought(named, device)

    return bring


def _brought(value: Any, device: torch.device) -> Any:
    match value:
        case Tensor():
            return on(value, device)
        case tuple() | list() if type(value) in (tuple, list):
            return type(value)(_brought(each, device) for each in value)
        case dict() if type(value) is dict:
            return {key: _brought(each, device) for key, each in value.items()}
        case _:
            return value
