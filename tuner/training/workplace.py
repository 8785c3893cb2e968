"""What all trials of a round share in one worker, and how much of it goes into one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from tuner.adapters import Adapter, Base, Pack, initial_adapter
from tuner.adapters.initial import lora_config
from tuner.data import Examples
from tuner.records import Evaluation, Hyperparameters
from tuner.training.answering import Exam
from tuner.training.meter import Meter


@dataclass
class Workplace:
    """Base, pack and data of a round, loaded once."""

    base: Base
    hollow: PreTrainedModel
    """For PEFT's initialisation."""
    pack: Pack
    train: Examples
    evaluation: Examples
    base_path: str
    revision: str | None
    """The Hub's commit that the base was loaded from, kept in each adapter; None for a directory."""
    evaluation_rows: int
    """Evaluation examples of one trial in one pass."""
    micro_tokens: int
    """Tokens of one trial in one training pass, padding included."""
    base_evaluation: Evaluation | None = None
    """The untouched base at step 0, once measured."""
    exam: Exam | None = None
    """What complete trials are asked; None unless the round file has `evaluation.answers`."""
    pass_tokens: int = 1 << 40
    """Tokens of all trials in one training pass, padding included; halved after each out-of-memory."""
    evaluation_tokens: int = 1 << 40
    """The same of an evaluation's pass."""
    meter: Meter = field(default_factory=Meter)
    environment: Mapping[str, str] = field(default_factory=dict)
    """As in `Attempt.environment`."""

    def new_adapter(self, hyperparameters: Hyperparameters, *, seed: int) -> Adapter:
        """What a trial starts from: PEFT's initialisation. Raises ModelError where there is none."""
        config = lora_config(hyperparameters, base_path=self.base_path, revision=self.revision)
        return self.pack.with_magnitudes(initial_adapter(self.hollow, config, seed=seed))
