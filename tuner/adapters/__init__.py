"""LoRA over a frozen base model: loading it, many adapters in one forward pass, PEFT's files."""

# ruff: noqa: E402  Notices that need no action are silenced before the libraries are imported.

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels that it can do without
logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


@contextmanager
def _compiling_when_called() -> Iterator[None]:
    """Leave functions that a library compiles when it is imported to their first call.

    bitsandbytes, which PEFT imports, has two, for which torch loads its compiler: 0.6 s of CPU.
    """
    at_once = torch.compile

    def later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(later, **options)
        if not isinstance(model, FunctionType):
            return at_once(model, **options)
        compiled = functools.cache(lambda: at_once(model, **options))
        return functools.wraps(model)(lambda *given, **named: compiled()(*given, **named))

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = at_once


with _compiling_when_called():
    import peft  # noqa: F401

from tuner.adapters.base import Base, load_base
from tuner.adapters.device_pack import PackedRows
from tuner.adapters.initial import Adapter, embeddings_of, initial_adapter, largest_adapter, positions_of
from tuner.adapters.pack import Pack
from tuner.adapters.peft_files import read_adapter, write_adapter

__all__ = [
    "Adapter",
    "Base",
    "Pack",
    "PackedRows",
    "embeddings_of",
    "initial_adapter",
    "largest_adapter",
    "load_base",
    "positions_of",
    "read_adapter",
    "write_adapter",
]
