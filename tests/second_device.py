"""A second device that computes with numbers: its tensors hold those of the CPU, and mix with no others.

So a model on two devices can be compared with the same model on one, to the digit, without a GPU. An operator
over both raises, but for numbers without dimensions, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.accelerator import FIRST, register

register()
DEVICE = torch.device(FIRST)
_COPIES = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten._foreach_copy_.default,
)


class Held(torch.Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        assert isinstance(made, Held)
        made.held = held
        return made

    def tolist(self) -> Any:
        """torch refuses it for subclasses."""
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operator, args, kwargs or {})


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(operator, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Tensors made of Python's numbers ask a device itself, beside all other modes."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            return function(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if function is torch.Tensor.__getitem__ and isinstance(args[0], Held) and isinstance(args[1], tuple):
            args = (
                args[0],
                tuple(torch.tensor(list(at)).to(DEVICE) if isinstance(at, range) else at for at in args[1]),
            )
        return function(*args, **kwargs)


def _computed(operator: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    held = [each for each in tensors if isinstance(each, Held)]
    plain = [each for each in tensors if not isinstance(each, Held) and each.dim() > 0]
    if held and plain and operator not in _COPIES:
        raise RuntimeError(f"{operator} over two devices: {[tuple(each.shape) for each in tensors]}")
    is_here = bool(held) if operator not in _COPIES else isinstance(tensors[0], Held)
    if (device := kwargs.get("device")) is not None:
        is_here = torch.device(device).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    known = {id(each.held): each for each in held}
    args, kwargs = tree_map(lambda each: each.held if isinstance(each, Held) else each, (args, kwargs))
    made = operator(*args, **kwargs)

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_here:
            return value
        return known[id(value)] if id(value) in known else Held(value)

    return tree_map(placed, made)


@contextmanager
def second_device() -> Iterator[None]:
    """Within the block the device is there, and attention is computed alike on both."""
    with _Device(), _Literals(), sdpa_kernel(SDPBackend.MATH):
        yield


def move(module: nn.Module) -> None:
    """Move a module to the device."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            moved = nn.Parameter(parameter.data.to(DEVICE), requires_grad=False)
            part.register_parameter(name, moved)
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, buffer.to(DEVICE))
