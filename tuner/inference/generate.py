"""Generation: one prompt, one answer, with an adapter or with the untouched base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from tuner.adapters import load_base
from tuner.errors import InputError

if TYPE_CHECKING:
    from tuner.spec import ModelSpec


def generate(
    model: ModelSpec,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    *,
    adapter: Path | None,
    max_new_tokens: int,
) -> str:
    """The greedy continuation of a tokenised prompt, up to the end of text or the model's last position.

    `adapter` is a PEFT directory, or None for the untouched base. Raises ModelError, and InputError for a
    prompt that leaves the model no position to answer in.
    """
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    base = load_base(model, device=device, max_length=1)
    positions = getattr(base.model.config, "max_position_embeddings", None)
    left = max_new_tokens if positions is None else positions - len(prompt_ids)
    if left < 1:
        raise InputError(
            f"--prompt: it has {len(prompt_ids)} tokens with its template, and {model.path} has {positions} "
            "positions for prompt and answer; shorten it"
        )
    answering = base.model if adapter is None else PeftModel.from_pretrained(base.model, str(adapter)).eval()
    ids = torch.tensor([list(prompt_ids)], device=base.device)
    with torch.no_grad():
        out = answering.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, left),
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
        )
    answer: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return answer.strip()
