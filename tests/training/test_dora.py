"""A trial with DoRA: its best adapter, the next trial in its slot, and the one slot of its worker."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests import tiny
from tests.data.tiny import source, write_jsonl
from tests.training.driving import (
    EVALUATION,
    Entry,
    assignment,
    curve,
    drive,
    ended,
    run_loop,
    solo,
    update_difference,
    worker_state,
)
from tests.training.test_best_adapter import nll
from tuner.config import RoundSpec
from tuner.data import load_tokenizer, prepare
from tuner.playbook import best_evaluation
from tuner.training.memory_budget import predict
from tuner.training.startup import arrange


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_peft_has_the_loss_that_was_recorded(
    models: tiny.Models, tmp_path: Path, shape: tiny.Shape, optimizer: str
) -> None:
    trial = tiny.hyperparameters(use_dora=True, optimizer=optimizer, learning_rate=3e-3, lora_dropout=0.1)
    assigned = assignment(tmp_path, hyperparameters=trial)
    with worker_state(models.base(shape), [trial]) as state:
        events = run_loop(state, [assigned])
    assert ended(events).outcome == "complete"
    best = best_evaluation(curve(events))
    assert best is not None
    assert best.step > 0
    model = PeftModel.from_pretrained(models.plain(shape), str(Path(assigned.directory) / "best")).eval()
    assert [nll(model, row) for row in range(len(EVALUATION))] == pytest.approx(best.example_nll, rel=1e-4)


def test_plain_trials_in_the_same_slot(models: tiny.Models) -> None:
    """Digit for digit what they are in a round without DoRA."""
    plain = tiny.hyperparameters(lora_dropout=0.2)
    dora = tiny.hyperparameters(use_dora=True, lora_r=8)
    base = models.base("llama")
    with worker_state(base, [plain, dora]) as state:
        trained = drive(
            state, [dora, plain, dora], [Entry(0, 0), Entry(1, 0, 1), Entry(2, 0, 2)], max_train_steps=5
        )
    alone = solo(base, plain, max_train_steps=5)
    assert trained[1].losses == pytest.approx(alone.losses, rel=1e-6)
    assert update_difference(trained[1], alone) < 1e-5
    assert trained[0].losses == trained[2].losses != trained[1].losses
    assert all(not torch.equal(m, trained[0].start[n][2]) for n, (_, _, m) in trained[0].weights.items())


@pytest.mark.parametrize("choices", [True, [False, True]])
def test_a_worker_has_one_slot(
    models: tiny.Models, tmp_path: Path, caplog: pytest.LogCaptureFixture, choices: object
) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"Row number {n}."} for n in range(30)])
    document = {
        "study": "s",
        "round": "r",
        "model": {"path": str(models.path("llama")), "dtype": "float32"},
        "data": {"train": [source(rows, "text")], "eval_fraction": 0.2, "max_length": tiny.MAX_LENGTH},
        "max_train_steps": 10,
        "hyperparameters": {"learning_rate": 1e-4, "lora_r": 2, "batch_size": 2, "use_dora": choices},
    }
    spec = RoundSpec.model_validate(document)
    with caplog.at_level(logging.INFO):
        state = arrange(spec, prepare(spec, load_tokenizer(spec.model), None), slots=3)
    assert state.pack.num_slots == 1
    assert "slots: 3: DoRA trains one trial at a time" in caplog.text
    assert predict(state, spec).slots == 1
