"""What an exported directory holds: an adapter or a merged model, with the tokenizer that goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from tuner.adapters import read_adapter, write_adapter
from tuner.adapters.ends import end_tokens
from tuner.inference.merging import MERGED_DTYPES, merged_model

if TYPE_CHECKING:
    from tuner.spec import ModelSpec


def export_adapter(
    adapter: Path, directory: Path, *, model: ModelSpec, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write a PEFT adapter and a tokenizer into an existing directory; `model` says what the base is called.

    Raises CheckpointError.
    """
    read = read_adapter(adapter)
    read.config.base_model_name_or_path = model.path
    read.config.revision = model.revision
    write_adapter(directory, read)
    tokenizer.save_pretrained(str(directory))


def export_merged(
    adapter: Path, directory: Path, *, model: ModelSpec, tokenizer: PreTrainedTokenizerBase, dtype: str
) -> None:
    """Write the merged model, as transformers alone loads it, and a tokenizer into an existing directory.

    Its generation ends at the tokenizer's EOS, which was trained, beside those of the base.
    `dtype` is one of MERGED_DTYPES. Raises CheckpointError and ModelError.
    """
    merged = merged_model(model, read_adapter(adapter), dtype=MERGED_DTYPES[dtype])
    if merged.generation_config is not None:
        ends = end_tokens(tokenizer, merged.generation_config)
        merged.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    merged.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))
