"""What a run takes over from a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig

from tests.training.driving import assignment
from tuner.adapters import Adapter
from tuner.records import Evaluation
from tuner.training.trial_run import TrialRun


def test_evaluations_at_other_steps_than_its_own_are_not_inherited(tmp_path: Path) -> None:
    start = Adapter(LoraConfig(r=2), {"layer": (torch.ones(2, 3), torch.zeros(4, 2))})
    run = TrialRun(assignment(tmp_path, evaluate_every=3), start, device=torch.device("cpu"))
    made = tuple(Evaluation(step, 3.0 - step / 10) for step in range(8))
    run.restore(replace(run.snapshot(), step=6, evaluations=made))
    assert run.step == 6
    assert [evaluation.step for evaluation in run.evaluations] == [0, 3, 6]
