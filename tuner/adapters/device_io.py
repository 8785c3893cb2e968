"""The host's side of training: one copy to the device a pass, and reads that wait for it."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import __version__ as _VERSION
from transformers import masking_utils

_log = logging.getLogger(__name__)

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
    host = torch.from_numpy(buffer)
    if device.type == "cuda":
        host = host.pin_memory()
    return apart(host.to(device, non_blocking=True), starts, arrays)


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


_SEARCH = "find_packed_sequence_indices"
"""What transformers calls to look for several examples in a row."""


@contextmanager
def one_example_a_row() -> Iterator[None]:
    """Within the block, transformers does not look for several examples in a row.

    It looks at the position ids of every pass, which waits for the device. A transformers that has no such
    function, or another one of that name, is left as it is.
    """
    own = getattr(masking_utils, _SEARCH, None)
    if not _is_known(own):
        yield
        return
    setattr(masking_utils, _SEARCH, _nothing)
    try:
        yield
    finally:
        setattr(masking_utils, _SEARCH, own)


def _nothing(position_ids: Tensor) -> None:
    """Find what the original finds in rows of one example."""


@cache
def _is_known(search: Callable[..., Any] | None) -> bool:
    known = search is not None and list(inspect.signature(search).parameters) == ["position_ids"]
    if not known:
        _log.warning("transformers %s looks for joined rows another way: passes may wait for it", _VERSION)
    return known


_OUT_OF_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "cudaErrorMemoryAllocation",
    "can't allocate memory",
)
"""What cuBLAS, bitsandbytes and torch's CPU say, as other errors than torch's own."""


@contextmanager
def one_out_of_memory() -> Iterator[None]:
    """Raise torch.OutOfMemoryError within the block, whichever library ran out of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if any(sign in str(error) for sign in _OUT_OF_MEMORY):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
