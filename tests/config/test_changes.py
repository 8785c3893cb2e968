from pathlib import Path

import pytest

from tests.config.rounds import FULL, file_of, spec_of
from tuner.config import refused_changes
from tuner.errors import Mistake


def refused(old: str, new: str) -> list[Mistake]:
    assert FULL.count(old) == 1
    return refused_changes(spec_of(FULL).model_dump(mode="json"), file_of(FULL.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("goal: Learning rate", "goal: Only the learning rate"),
        ("trials: 16", "trials: 32"),
        ("trials: 16", "trials: 2"),
        ("batch_size: 16", "batch_size: 4"),
        ("slots: auto", "slots: 3"),
        ("pruner: none}", "pruner: none, report_to: [tensorboard, mlflow]}"),
        ("production_steps: 2000", "production_steps: 60"),
        ("{engine: local, slots: auto, production_steps: 2000, decay_branches: false, pruner: none}", "{}"),
        ("  decay_steps: 24\n", "  decay_steps: 24\n  lora_dropout: 0\n"),
        ("  lora_alpha: 16\n", ""),
        ("  warmup_steps: 5\n", ""),
        ("  lora_alpha: 16\n", "  lora_alpha: 16.0\n"),
        ("storage: sqlite:///tuner.db\n", ""),
        ("path: data/train.jsonl", "path: ./data/train.jsonl"),
    ],
)
def test_what_changes_no_result_may_change(old, new):
    assert refused(old, new) == []


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "before", "now"),
    [
        ("max_train_steps: 60", "max_train_steps: 120", 11, "max_train_steps", "60", "120"),
        ("high: 3e-3", "high: 1e-3", 13, "hyperparameters.learning_rate", "0.003", "0.001"),
        ("lora_r: [8, 16, 32]", "lora_r: [8, 16]", 14, "hyperparameters.lora_r", "[8, 16, 32]", "[8, 16]"),
        ("  lora_alpha: 16\n", "  lora_alpha: 32\n", 15, "hyperparameters.lora_alpha", "16", "32"),
        ("  lora_alpha: 16\n", "  use_dora: true\n", 15, "hyperparameters.use_dora", "false", "true"),
        ("quasi-random", "tpe", 24, "search.sampler", "quasi-random", "tpe"),
        ("seed: 0", "seed: 1", 25, "search.seed", "0", "1"),
        ("enqueue: []", "enqueue: [{lora_r: 8}]", 26, "search.enqueue", "[]", "[{lora_r: 8}]"),
        ("every_steps: 5", "every_steps: 6", 27, "evaluation.every_steps", "5", "6"),
        ("max_examples: 200", "max_examples: 20", 27, "evaluation.max_examples", "200", "20"),
        ("max_examples: 200", "answers: {max_examples: 9}", 27, "evaluation.answers", "null", "{metric:"),
        ("max_length: 512", "max_length: 256", 9, "data.max_length", "512", "256"),
        ("loss_on: completion", "loss_on: all", 10, "data.loss_on", "completion", "all"),
        ("dtype: bfloat16", "dtype: float32", 4, "model.dtype", "bfloat16", "float32"),
        ("directory: runs", "directory: out", 28, "checkpoints.directory", "runs", "out"),
        ("tuner.db", "other.db", 30, "storage", "sqlite:///tuner.db", "sqlite:///other.db"),
    ],
)  # fmt: skip
def test_everything_else_is_refused(old, new, line, key, before, now):
    mistakes = refused(old, new)
    [mistake] = mistakes
    assert (mistake.line, mistake.key) == (line, key)
    assert before in mistake.message
    assert now in mistake.message
    assert "put it back, or start a new round" in mistake.message


def test_changed_data_shows_both_lists():
    [mistake] = refused("data/train.jsonl", "data/more.jsonl")
    assert mistake.key == "data.train"
    assert "path: data/train.jsonl" in mistake.message
    assert "path: data/more.jsonl" in mistake.message


def test_all_changes_come_at_once_in_the_order_of_the_file():
    text = FULL.replace("seed: 0", "seed: 1").replace("dtype: bfloat16", "dtype: float32")
    mistakes = refused_changes(spec_of(FULL).model_dump(mode="json"), file_of(text))
    assert [mistake.key for mistake in mistakes] == ["model.dtype", "search.seed"]


def test_lengths_that_only_follow_the_horizon_are_not_blamed():
    text = FULL.replace("  decay_steps: 24\n", "").replace("every_steps: 5, ", "")
    longer = text.replace("max_train_steps: 60", "max_train_steps: 120")
    mistakes = refused_changes(spec_of(text).model_dump(mode="json"), file_of(longer))
    assert [mistake.key for mistake in mistakes] == ["max_train_steps"]


def test_a_length_that_falls_back_to_another_default_is_blamed():
    began = FULL.replace("decay_steps: 24", "decay_steps: 30")
    dropped = FULL.replace("  decay_steps: 24\n", "")
    [mistake] = refused_changes(spec_of(began).model_dump(mode="json"), file_of(dropped))
    assert (mistake.line, mistake.key) == (12, "hyperparameters.decay_steps")


def test_the_round_may_have_been_recorded_with_absolute_paths():
    spec = spec_of(FULL).absolute(Path("/study"))
    assert refused_changes(spec.model_dump(mode="json"), file_of(FULL)) == []
    moved = spec_of(FULL).absolute(Path("/elsewhere")).model_dump(mode="json")
    assert "storage" in [mistake.key for mistake in refused_changes(moved, file_of(FULL))]
