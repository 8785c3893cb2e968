"""The hook in scripts with transformers' Trainer that nobody prepared."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.driving import Ran, of_kind, trainer
from tuner.commands.attempt import tail
from tuner.commands.launch import HOOK
from tuner.records import CheckpointKind, Evaluated


def test_going_on_equals_a_run_from_scratch_to_the_digit_on_another_grid(tmp_path: Path) -> None:
    short = Ran(tmp_path, trainer())
    assert short.end.outcome == "complete"
    assert list(short.curve) == [0, 4, 8, 12, 15, 16, 20, 24]
    values = {**trainer()["hyperparameters"], "decay_steps": 15}
    longer = trainer(hyperparameters=values, evaluation={"every_steps": 5})
    resumed = Ran(tmp_path, longer, work=None, trial=1, resume=short.point(CheckpointKind.TRUNK), steps=40)
    scratch = Ran(tmp_path, longer, trial=2, steps=40)
    later = [step for step in scratch.curve if step > 15]
    assert later == [20, 25, 30, 35, 40]
    for step in (0, 15, *later):
        assert resumed.curve[step] == scratch.curve[step]
    made = {e.evaluation.step: e.evaluation for e in resumed.events if isinstance(e, Evaluated)}
    again = {e.evaluation.step: e.evaluation for e in scratch.events if isinstance(e, Evaluated)}
    assert all(made[step] == again[step] for step in later)
    assert "eval_error" in made[40].metrics
    assert not any("runtime" in name or "epoch" in name for name in made[40].metrics)
    options = json.loads((scratch.place / "arguments.json").read_text())
    assert options["gradient_accumulation_steps"] == 2
    assert options["lr_scheduler_kwargs"]["decay_type"] == "linear"

    # what died after its last checkpoint, as it exited, has nothing to run again
    over = Ran(tmp_path, longer, trial=4, resume=scratch.point(CheckpointKind.LAST), steps=40)
    assert over.end.outcome == "complete"
    assert over.curve == scratch.curve
    assert not (over.place / "command.log").exists()

    # a checkpoint without its optimizer is no start
    point = short.point(CheckpointKind.TRUNK)
    (point.path / "checkpoint" / "optimizer.pt").unlink()
    unhashed = type(point)(point.path, None, point.step)
    refused = Ran(tmp_path, longer, trial=3, resume=unhashed, steps=40)
    assert refused.end.outcome == "failed"
    assert "no optimizer" in str(refused.end.reason)


@pytest.mark.parametrize("kind", ["sft", "dpo", "torchrun"])
def test_commands_that_nobody_prepared_report_and_are_kept(tmp_path: Path, kind: str) -> None:
    """TRL's commands and two processes of torchrun; `make acceptance-commands` resumes and kills them."""
    content = of_kind(kind, tmp_path)
    values = {**content["hyperparameters"], "decay_steps": 1, "batch_size": 4}
    brief = {"max_train_steps": 3, "hyperparameters": values, "evaluation": {"every_steps": 2}}
    ran = Ran(tmp_path, content | brief)
    assert ran.end.outcome == "complete", f"{ran.end.reason}\n{tail(ran.place / 'command.log')}"
    assert list(ran.curve) == [0, 2, 3]
    assert (ran.directory / "best").is_dir()
    assert [saved.step for saved in ran.saved(CheckpointKind.TRUNK)] == [2]
    metrics = {name for e in ran.events if isinstance(e, Evaluated) for name in e.evaluation.metrics}
    assert {"sft": "eval_mean_token_accuracy", "dpo": "eval_rewards/accuracies"}.get(
        kind, "eval_error"
    ) in metrics


def test_the_folder_holds_one_module_for_old_pythons() -> None:
    assert [path.name for path in HOOK.iterdir() if path.name != "__pycache__"] == ["sitecustomize.py"]
    tree = ast.parse((HOOK / "sitecustomize.py").read_text(), feature_version=(3, 8))
    top = {
        name.name.partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert top <= sys.stdlib_module_names


def run(code: str, *, path: list[Path], **environment: str) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": places, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_loads_the_sitecustomize_that_it_hides(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    done = run("print('main')", path=[HOOK, tmp_path], TUNER_METRICS=str(tmp_path / "m"))
    assert done.stdout.split() == ["theirs", "main"]
    assert done.stderr == ""


def test_it_swallows_nothing_and_needs_no_trial(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('theirs')")
    done = run("print('main')", path=[HOOK, tmp_path], TUNER_METRICS=str(tmp_path / "m"), PYTHONVERBOSE="")
    assert "theirs" in done.stderr
    quiet = run(
        "import sys; print([f for f in sys.meta_path if 'Finder' == f.__class__.__name__[1:]])", path=[HOOK]
    )
    assert quiet.stdout.strip() == "[]"


@pytest.mark.parametrize("option", ["-E", "-I"])
def test_python_options_that_disable_it_are_known(option: str) -> None:
    done = subprocess.run(
        [sys.executable, option, "-c", "import sys; print('sitecustomize' in sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(HOOK)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() in ("False", "True")
