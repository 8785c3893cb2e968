"""LoRA over a frozen base model: loading it, many adapters in one forward pass, PEFT's files."""

import tuner.adapters.quiet  # noqa: F401
from tuner.adapters.base import Base, load_base
from tuner.adapters.initial import Adapter, embeddings_of, initial_adapter, largest_adapter, positions_of
from tuner.adapters.pack import Pack, PackedRows
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
