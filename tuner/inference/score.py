"""The loss of one adapter on rows that no choice was based on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tuner.adapters import Pack, load_base, read_adapter
from tuner.adapters.evaluation import Scores, scores_of
from tuner.data import Examples

if TYPE_CHECKING:
    from tuner.config import RoundSpec

PASS_TOKENS = 4096
"""Tokens of a pass, including padding."""


def score(spec: RoundSpec, examples: Examples, adapter: Path) -> Scores:
    """Return the scores of a PEFT directory's adapter on examples.

    Computed like the evaluations of a trial alone in its worker: on a CPU in float32 they are equal digit for
    digit. Raises ModelError, and CheckpointError if there is no such adapter.
    """
    saved = read_adapter(adapter)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    base = load_base(spec.model, device=device, max_length=spec.data.max_length)
    pack = Pack(base, num_slots=1, max_rank=saved.config.r, modules=saved.weights)
    pack.occupy(0, saved)
    (scores,), _ = scores_of(pack, examples, (0,), rows=spec.evaluation.batch_size, pass_tokens=PASS_TOKENS)
    return scores
