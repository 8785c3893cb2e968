"""A small study trained for real: a comparison run from scratch is what a trial of its length would be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.studies import tuner, write_round
from tests.training.driving import curve, run_loop
from tuner.config import load_round
from tuner.records import Assignment
from tuner.store import open_store
from tuner.study.plan import RoundPlan
from tuner.training.startup import load_worker_state

ROUND = {"trials": 1, "learning_rate": 0.01, "lora_r": 2, "steps": 12, "evaluation": ""}


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        ({"schedule": "linear", "decay_steps": 11}, 6),  # begins before the warmup has ended: from scratch
        ({"schedule": "cosine", "decay_steps": 0}, 0),
    ],
)
def test_one_from_scratch_equals_a_trial_of_its_length(
    tmp_path: Path, schedule: dict[str, object], decay: int
) -> None:
    """Digit for digit: alone in its worker, on a CPU, in float32, dropout included."""
    study = tmp_path / "study"
    path = write_round(study, **ROUND, **schedule)
    done = tuner("study", "run", "round1.yaml", directory=study)
    assert done.returncode == 0, done.stderr
    assert "comparison run of trial 0 to step 6 starts at step 0" in done.stdout + done.stderr
    store = open_store(f"sqlite:///{study}/tuner.db", study="tiny")
    (record,), (trial,) = store.rounds(), store.trials("round1")
    store.close()
    (branch,) = record.branches
    assert (branch.state, branch.from_step, branch.executed_steps) == ("complete", 0, 6)

    plan = RoundPlan(load_round(path))
    state, _ = load_worker_state(plan.absolute, cache=plan.cache, slots=1)
    fresh = Assignment(
        round="fresh",
        trial=0,
        attempt=1,
        hyperparameters={**trial.hyperparameters, "decay_steps": decay},
        max_train_steps=6,
        evaluate_every=2,
        directory=str(tmp_path / "fresh"),
    )
    assert curve(run_loop(state, [fresh]))[-1] == branch.evaluation

    shown = tuner("study", "report", "--markdown", "report.md", directory=study).stdout
    assert "measured by a comparison run" in " ".join(shown.split())
    page = (study / "report.md").read_text()
    assert "18 steps run, 6 of them in comparison runs" in page
    assert "-6" not in page.split()
    listed = json.loads(tuner("trial", "list", "--json", directory=study).stdout)
    assert [each["number"] for each in listed] == [0]
