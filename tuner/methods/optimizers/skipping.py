"""How the step of any optimizer skips an update if the device says so, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def unchanged_if(found_inf: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Update tensors within the block; after it they are as before if `found_inf` is 1.

    The device decides, and nothing waits for it. None changes nothing.
    """
    if found_inf is None:
        yield
        return
    import torch

    before = [tensor.clone() for tensor in tensors]
    yield
    is_skipped = found_inf > 0
    on_each = {is_skipped.device: is_skipped}
    for tensor, old in zip(tensors, before, strict=True):
        if (device := tensor.device) not in on_each:
            on_each[device] = is_skipped.to(device, non_blocking=True)
        torch.where(on_each[device], old, tensor, out=tensor)
