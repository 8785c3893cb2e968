"""Tokens that end an answer: the EOS that is trained, and those that the files of a model name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import GenerationConfig, PreTrainedTokenizerBase

from tuner.adapters.base import load_config, model_source

if TYPE_CHECKING:
    from tuner.spec import ModelSpec


def end_tokens(tokenizer: PreTrainedTokenizerBase, configured: GenerationConfig | None) -> list[int]:
    """The tokenizer's own EOS, with which training rows end, then others that the model was made with."""
    return list(dict.fromkeys([int(tokenizer.eos_token_id), *_listed(configured)]))


def ends_unlike_its_base(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All end tokens, where `generate` of transformers would not stop the base at the trained EOS; else none.

    Raises ModelError when the model has no configuration.
    """
    configured = _generation_config(model)
    if int(tokenizer.eos_token_id) in _listed(configured):
        return []
    return end_tokens(tokenizer, configured)


def warning_of_ends(ends: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """What `ends_unlike_its_base` means for those who generate without tuner."""
    trained, *others = (f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends)
    stops = f"stops at {' and '.join(others)}" if others else "does not stop"
    return (
        f"answers are trained to end with the tokenizer's EOS, {trained}, and the base's generation_config "
        f"{stops}: with the adapter, other tools would generate to the limit; set "
        f"`base.generation_config.eos_token_id = {list(ends)}` there, as the card of an exported adapter "
        "says. Merged exports and tuner itself stop"
    )


def _generation_config(model: ModelSpec) -> GenerationConfig:
    """The one that transformers gives the loaded model: its file, else what its configuration says."""
    try:
        return GenerationConfig.from_pretrained(model.path, **model_source(model))
    except (OSError, ValueError):
        return GenerationConfig.from_model_config(load_config(model, max_length=1))


def _listed(configured: GenerationConfig | None) -> list[int]:
    ends = getattr(configured, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return [int(end) for end in listed]
