"""Round files that tests start from, and what they ask of them."""

from pathlib import Path
from typing import Any

import pytest

from tuner.config import RoundFile, RoundSpec, read_round
from tuner.errors import Mistake, RoundFileError

PATH = Path("/study/round1.yaml")

MINIMAL = """\
study: greeting
round: round1
model: {path: some/model}
data: {train: [{path: train.jsonl, format: alpaca}], eval_fraction: 0.1}
max_train_steps: 60
"""

FULL = """\
study: alpaca-smollm2
round: round1
goal: Learning rate and rank for Alpaca on SmolLM2      # shown in reports
model:   {path: HuggingFaceTB/SmolLM2-135M-Instruct, dtype: bfloat16, quantization: none}
data:
  train: [{path: data/train.jsonl, format: alpaca}]
  eval:  [{path: data/eval.jsonl, format: alpaca}]
  test:  []
  max_length: 512
  loss_on: completion
max_train_steps: 60
hyperparameters:
  learning_rate: {low: 1e-5, high: 3e-3, log: true}
  lora_r: [8, 16, 32]
  lora_alpha: 16
  target_modules: all-linear
  batch_size: 8            # sequences per optimizer step
  optimizer: adamw_8bit
  warmup_steps: 5
  schedule: linear
  decay_steps: 24
search:
  trials: 16
  sampler: quasi-random
  seed: 0
  enqueue: []              # hyperparameters to try first
evaluation: {every_steps: 5, batch_size: 16, max_examples: 200}
checkpoints: {directory: runs, keep_best: 1}
run:        {engine: local, slots: auto, production_steps: 2000, decay_branches: false, pruner: none}
storage: sqlite:///tuner.db
"""


def file_of(text: str) -> RoundFile:
    return read_round(text, PATH)


def spec_of(text: str) -> RoundSpec:
    return file_of(text).spec


def mistakes_in(text: str) -> tuple[Mistake, ...]:
    with pytest.raises(RoundFileError) as caught:
        read_round(text, PATH)
    return caught.value.mistakes


def mistake_in(text: str) -> Mistake:
    mistakes = mistakes_in(text)
    assert len(mistakes) == 1, mistakes
    return mistakes[0]


def with_hyperparameters(**written: str) -> str:
    """The minimal file with hyperparameters, as YAML; the first stands on line 7."""
    lines = "".join(f"  {name}: {value}\n" for name, value in written.items())
    return f"{MINIMAL}hyperparameters:\n{lines}"


def document(**changes: Any) -> dict[str, Any]:
    """The minimal file as JSON, with some top-level keys changed."""
    source = {"path": "train.jsonl", "format": "alpaca"}
    base = {
        "study": "greeting",
        "round": "round1",
        "model": {"path": "some/model"},
        "data": {"train": [source], "eval_fraction": 0.1},
        "max_train_steps": 60,
    }
    return {**base, **changes}
