"""The work that a round file promises, its comparison runs included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.studies import round_file
from tuner.study.check import Work, planned_hours, planned_work

BRANCHES = "run: {decay_branches: true}"


def work(directory: Path, **changes: Any) -> Work:
    return planned_work(round_file(directory, **changes).spec)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run": "run: {decay_branches: false}"}, Work(3 * 8, 3 * 4)),
        # By `auto` one run to 4: from 2, or from scratch where no checkpoint holds its start.
        ({}, Work(3 * 8 + 2, 3 * 4 + 1, branches=1, branch_steps=2)),
        ({"schedule": "cosine"}, Work(3 * 8 + 4, 3 * 4 + 2, 1, 4)),
        ({"schedule": "[linear, cosine]"}, Work(3 * 8 + 4, 3 * 4 + 2, 1, 4)),
        ({"decay_steps": "{low: 3, high: 7, integer: true}"}, Work(3 * 8 + 4, 3 * 4 + 2, 1, 4)),
        ({"enqueue": "[{lora_r: 2, continues: round0/1}]"}, Work(3 * 8 + 4, 3 * 4 + 2, 1, 4)),
        ({"schedule": "constant"}, Work(3 * 8, 3 * 4)),
        # Eight steps, the last three decaying: branches from 2 to 4 and from 4 to 6, evaluated at their ends.
        ({"learning_rate": "1e-3", "trials": 9}, Work(2 * 8 + 2, 2 * 4 + 1, 1, 2)),  # of two ranks
        ({"run": BRANCHES}, Work(3 * 8 + 3 * 4, 3 * 4 + 3 * 2, branches=6, branch_steps=12)),
        ({"run": BRANCHES, "trials": 24}, Work(24 * 8 + 6 * 4, 24 * 4 + 6 * 2, 12, 24)),
        ({"run": BRANCHES, "schedule": "cosine"}, Work(3 * 8 + 3 * 4, 3 * 4 + 3 * 2, 3, 12)),
        ({"run": BRANCHES, "schedule": "[linear, constant]"}, Work(3 * 8 + 12, 3 * 4 + 6, 6, 12)),
        (
            {"run": f"{BRANCHES}\ncheckpoints: {{keep_best_trials: 1}}", "trials": 24},
            # Three of the six leading trials have no checkpoint to start from.
            Work(24 * 8 + 3 * 4 + 3 * 4, 24 * 4 + 3 * 2 + 3 * 2, 9, 24),
        ),
    ],
)
def test_work(tmp_path: Path, changes: dict[str, Any], expected: Work) -> None:
    assert work(tmp_path, **changes) == expected


def test_hours_count_steps_and_evaluations(tmp_path: Path) -> None:
    spec = round_file(tmp_path, run=BRANCHES).spec
    assert planned_hours(spec, seconds_per_step=3600.0, seconds_per_evaluation=0.0) == 36
    assert planned_hours(spec, seconds_per_step=0.0, seconds_per_evaluation=3600.0) == 18
