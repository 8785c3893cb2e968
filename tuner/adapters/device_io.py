"""The host's side of training: one copy to the device a pass, and reads that wait for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import masking_utils

_ALIGNMENT = 16
"""Bytes; of any dtype that is sent."""


def read(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the values of tensors on one device, each as a flat list, after waiting for it once.

    Everything that training waits for comes through here.
    """
    flat = [tensor.detach().reshape(-1).double() for tensor in tensors]
    values = iter((torch.cat(flat) if len(flat) > 1 else flat[0]).tolist()) if flat else iter(())
    return [[next(values) for _ in range(part.numel())] for part in flat]


def send(arrays: Sequence[NDArray[np.generic]], device: torch.device) -> list[Tensor]:
    """Copy arrays to the device in one pinned buffer, without waiting for it."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    buffer, starts = in_one(arrays)
    on_device = torch.from_numpy(buffer).pin_memory(device).to(device, non_blocking=True)
    return apart(on_device, starts, arrays)


def in_one(arrays: Sequence[NDArray[np.generic]]) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the bytes of all arrays in one, and where each begins."""
    starts, end = [], 0
    for array in arrays:
        starts.append(end)
        end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = np.zeros(max(end, _ALIGNMENT), np.uint8)
    for start, array in zip(starts, arrays, strict=True):
        buffer[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return buffer, starts


def apart(buffer: Tensor, starts: Sequence[int], arrays: Sequence[NDArray[np.generic]]) -> list[Tensor]:
    """Return views of the bytes of `in_one`, in the shapes and dtypes of the arrays."""
    return [
        buffer[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for start, array in zip(starts, arrays, strict=True)
    ]


@contextmanager
def one_example_a_row() -> Iterator[None]:
    """Within the block, transformers does not look for several examples in a row.

    It looks at the position ids of every pass, which waits for the device.
    """
    own = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own
