"""TRL, torchrun and random kills: what takes too long for `make test`.

Run by `make acceptance`, or `pytest -m acceptance tests/commands`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import studies, tiny
from tests.commands.driving import Ran, document, trainer, written
from tests.commands.test_rounds import curve, environment, searching, tuner, wait_for
from tuner.commands import process_tree
from tuner.records import CheckpointKind

pytestmark = pytest.mark.acceptance
STUDIES = Path(__file__).parents[2] / "studies"


def trl(folder: Path, method: str, **extra: Any) -> dict[str, Any]:
    """A round of TRL on a tiny model with dropout."""
    pytest.importorskip("trl", reason="TRL is not installed")
    if not (folder / "base").exists():
        tiny.save_model(folder / "base", tiny.config("llama"))
        draw = random.Random(0)
        (folder / "rows").mkdir()
        for name, count in (("train", 60), ("test", 20)):
            rows = [row(draw, method) for _ in range(count)]
            (folder / "rows" / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    config = {
        "model_name_or_path": "base", "dataset_name": "rows", "use_peft": True,
        "lora_target_modules": "all-linear",
        "per_device_train_batch_size": 4, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "max_length": 32,
    }  # fmt: skip
    (folder / "trl.yaml").write_text(yaml.safe_dump(config))
    values = {
        "learning_rate": 1e-3, "lora_r": 4, "lora_dropout": 0.1, "batch_size": 8, "warmup_steps": 2,
        "schedule": "linear", "decay_steps": 8, **({"extra": extra} if extra else {}),
    }  # fmt: skip
    command = {"run": ["trl", method, "--config", "${config}"], "tool": "trl", "config": "trl.yaml"}
    return document(command=command, hyperparameters=values, max_train_steps=20)


def row(draw: random.Random, method: str) -> dict[str, str]:
    a, b = draw.randint(0, 9), draw.randint(0, 9)
    if method == "sft":
        return {"prompt": f"{a}+{b}=", "completion": f"{a + b}"}
    return {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + draw.randint(1, 5)}"}


@pytest.mark.parametrize(("method", "extra"), [("sft", {}), ("dpo", {"beta": 0.3})])
def test_trl_goes_on_as_from_scratch_to_the_digit(tmp_path: Path, method: str, extra: dict[str, Any]) -> None:
    content = trl(tmp_path, method, **extra)
    short = Ran(tmp_path, content)
    assert short.end.outcome == "complete"
    assert (short.directory / "best" / "adapter_model.safetensors").is_file()
    values = {**content["hyperparameters"], "decay_steps": 12}
    longer = {**content, "hyperparameters": values}
    resumed = Ran(tmp_path, longer, trial=1, resume=short.point(CheckpointKind.TRUNK), steps=32)
    scratch = Ran(tmp_path, longer, trial=2, steps=32)
    assert resumed.curve == scratch.curve
    assert list(scratch.curve)[-1] == 32


@pytest.mark.timeout(1500)
def test_the_study_of_trl_runs_two_rounds(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    import shutil

    for name in ("dpo-trl", "quickstart"):
        shutil.copytree(STUDIES / name, tmp_path / name, ignore=shutil.ignore_patterns("runs", "tuner.db*"))
    folder = tmp_path / "dpo-trl"
    path = folder / "round1.yaml"
    path.write_text(
        path.read_text()
        .replace("trials: 4", "trials: 2")
        .replace("max_train_steps: 30", "max_train_steps: 20")
    )
    tuner(folder, "study", "run", "round1.yaml")
    tuner(folder, "study", "promote", "--to", "round2", "--max-train-steps", "30")
    tuner(folder, "study", "run", "round2.yaml")
    shown = json.loads(tuner(folder, "trial", "show", "round2/0", "--json"))
    assert shown["continues"]
    assert shown["executed_steps"] < 30
    assert Path(shown["adapter"], "adapter_config.json").is_file()


def test_torchrun_with_two_processes_resumes(tmp_path: Path) -> None:
    content = trainer()
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    content["command"] = {**content["command"], "run": [*run, *content["command"]["run"][1:]]}
    content["run"] = {"gpus_per_worker": 2}
    short = Ran(tmp_path, content)
    assert short.end.outcome == "complete"
    assert len(list((short.directory / "trunk").glob("step-*/checkpoint/rng_state_*.pth"))) == 2
    longer = {**content, "hyperparameters": {**content["hyperparameters"], "decay_steps": 15}}
    resumed = Ran(tmp_path, longer, trial=1, resume=short.point(CheckpointKind.TRUNK), steps=40)
    scratch = Ran(tmp_path, longer, trial=2, steps=40)
    later = [step for step in scratch.curve if step > 15]
    assert [resumed.curve[step] for step in later] == [scratch.curve[step] for step in later]


def test_stopping_torchrun_leaves_no_process(tmp_path: Path) -> None:
    content = trainer(max_train_steps=100_000, evaluation={"every_steps": 50_000})
    content["hyperparameters"]["decay_steps"] = 10
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    content["command"] = {**content["command"], "run": [*run, *content["command"]["run"][1:]]}
    content["run"] = {"gpus_per_worker": 2}
    ran = Ran(tmp_path, content, stopping=lambda events: len(events) > 1)
    assert ran.end.outcome == "stopped"
    assert not list(process_tree.with_token(ran.tokens[0]))


@pytest.mark.parametrize("seed", range(6))
def test_killed_anywhere_curves_are_equal(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    values = {**searching()["hyperparameters"], "pause": 0.03}
    written(tmp_path / "whole", searching())
    tuner(tmp_path / "whole", "study", "run", "round1.yaml")
    folder = tmp_path / "killed"
    written(folder, searching(hyperparameters=values))
    for _ in range(4):
        parent = subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "study", "run", "round1.yaml"],
            cwd=folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(draw.uniform(2.0, 8.0))
        tree = psutil.Process(parent.pid).children(recursive=True) if parent.poll() is None else []
        victims = draw.choice(
            [
                [parent.pid],
                [p.pid for p in tree[:1]],
                [p.pid for p in tree[1:]],
                [parent.pid, *(p.pid for p in tree)],
            ]
        )
        for pid in victims:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        if parent.pid in victims:
            parent.wait()
            continue
        parent.wait(timeout=120)
        break
    assert studies.tuner("study", "run", "round1.yaml", directory=folder).returncode == 0
    for trial in ("round1/0", "round1/1"):
        assert curve(folder, trial) == curve(tmp_path / "whole", trial)
    tokens = [path.read_text() for path in folder.rglob("token")]
    wait_for(lambda: not any(any(process_tree.with_token(token)) for token in tokens))
