"""Answers stay the same where layers are to run again in the backward pass."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from tests import tiny
from tuner.adapters import load_base
from tuner.adapters.generation import Decoding, TextGenerator
from tuner.data import Prompt


def test_layers_that_keep_fewer_activations_answer_alike(tmp_path: Path) -> None:
    """Such layers drop keys and values while they train; they do again after the answers."""
    path = tiny.Models(tmp_path).path("llama")
    base = load_base(tiny.model_spec(path), device="cpu", max_length=tiny.MAX_LENGTH)
    generator = TextGenerator(base, AutoTokenizer.from_pretrained(path), limited_by="")
    prompts = [Prompt(row, "", "", tuple(range(row, row + 4))) for row in (5, 50, 90)]
    before = generator.answers(base.model, prompts, Decoding(8))
    assert base.keep_fewer_activations()
    assert generator.answers(base.model, prompts, Decoding(8)) == before
    layers = [m for m in base.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert len(layers) == 2
    assert all(layer.training for layer in layers)
