"""What users measured does not change while the code is moved: a study, as it was when it was recorded.

`python -m tests.recorded.test_unchanged` records it again, after a change that is meant.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import tuner
from tests.studies import QUICKSTART

RECORDED = Path(__file__).parent / "dry_run.json"


def dry_run(directory: Path) -> list[dict[str, Any]]:
    """Rounds of the quickstart's file with made-up losses, promoted until it is enough."""
    for name in ("base", "data"):
        shutil.copytree(QUICKSTART / name, directory / name)
    shutil.copy(QUICKSTART / "round1.yaml", directory)
    tuner.Study(directory).auto("round1.yaml", engine="simulated", progress=False)
    study = tuner.Study(directory / "rehearsal")
    return [
        {
            "round": each.name,
            "max_train_steps": each.max_train_steps,
            "diagnosis": str(each.advice.diagnosis),
            "suggested": each.advice.suggested_max_train_steps,
            "evidence": list(each.advice.evidence),
            "rules": [finding.rule for finding in each.advice.findings],
            "trials": [
                {
                    "hyperparameters": dict(trial.hyperparameters),
                    "continues": trial.continues,
                    "best_step": trial.best_step,
                    "losses": [made.eval_loss for made in trial.evaluations],
                }
                for trial in each.trials
            ],
        }
        for each in study.rounds
    ]


def test_a_dry_run_is_what_it_was(tmp_path: Path) -> None:
    now, then = json.loads(json.dumps(dry_run(tmp_path))), json.loads(RECORDED.read_text())
    assert [each["round"] for each in now] == [each["round"] for each in then]
    for found, recorded in zip(now, then, strict=True):
        for key in ("max_train_steps", "diagnosis", "suggested", "evidence", "rules"):
            assert found[key] == recorded[key], (found["round"], key)
        for trial, was in zip(found["trials"], recorded["trials"], strict=True):
            assert trial["losses"] == pytest.approx(was["losses"], rel=1e-9, nan_ok=True)
            assert {**trial, "losses": None} == {**was, "losses": None}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        RECORDED.write_text(json.dumps(dry_run(Path(scratch)), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {RECORDED}\n")
