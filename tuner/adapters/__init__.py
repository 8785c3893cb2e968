"""LoRA over a frozen base model: loading it, many adapters in one forward pass, PEFT's files."""

# ruff: noqa: E402  Notices that need no action are silenced before the libraries are imported.

import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # kernels that it can do without
logging.getLogger("transformers").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

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
