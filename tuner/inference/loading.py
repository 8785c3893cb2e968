"""A base with an adapter on it, as PEFT has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel

from tuner.adapters.base import keep_differentiable, load_model

if TYPE_CHECKING:
    from tuner.spec import ModelSpec


def load_adapted(model: ModelSpec, adapter: Path, *, device: str | None = None) -> PeftModel:
    """Load a base and a PEFT directory on it, in evaluation mode.

    `device` is a GPU where there is one, unless it is given. Raises ModelError.
    """
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    base = load_model(model, device=device, max_length=1)
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    # In evaluation mode bitsandbytes repacks 4-bit weights; PEFT's DoRA reads wrong norms from them.
    keep_differentiable(base)
    return adapted
