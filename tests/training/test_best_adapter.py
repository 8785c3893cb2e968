"""What plain PEFT makes of a trial's `best` directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from tests import tiny
from tests.training.driving import EVALUATION, assignment, curve, run_loop, worker_state
from tuner.playbook import best_evaluation


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_peft_has_the_loss_that_was_recorded(models: tiny.Models, tmp_path: Path, shape: tiny.Shape) -> None:
    """Example by example; after three neighbours of other ranks and targets trained in the same pack."""
    trials = [
        tiny.hyperparameters(
            learning_rate=3e-3, training_seed=seed, lora_r=rank, use_rslora=seed == 1, lora_dropout=0.1
        )
        for seed, rank in enumerate((4, 2, 7))
    ]
    assigned = [assignment(tmp_path, n, hyperparameters=trial) for n, trial in enumerate(trials)]
    with worker_state(models.base(shape), trials, slots=3) as state:
        events = run_loop(state, assigned)
    bests = [best_evaluation(curve(events, number)) for number in range(3)]
    assert any(best is not None and best.step > 0 for best in bests)
    for one, best in zip(assigned, bests, strict=True):
        assert best is not None
        model = PeftModel.from_pretrained(models.plain(shape), str(Path(one.directory) / "best")).eval()
        sums = [nll(model, row) for row in range(len(EVALUATION))]
        assert sums == pytest.approx(best.example_nll, rel=1e-4)
        assert sum(sums) / sum(EVALUATION.num_targets) == pytest.approx(best.eval_loss, rel=1e-5)


@torch.no_grad()
def nll(model: nn.Module, row: int) -> float:
    example = EVALUATION[row]
    ids = torch.from_numpy(example.input_ids).long()
    logits = model(input_ids=ids[None]).logits[0, :-1].float()
    of_tokens = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return float(of_tokens[torch.from_numpy(example.is_target[1:])].sum())
