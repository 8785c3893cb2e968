"""Attempts of commands in this process, without a study."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tuner.commands.attempt import Attempt, Round
from tuner.config import RoundSpec, read_round
from tuner.playbook.comparison_runs import trunk_steps
from tuner.records import Assignment, CheckpointKind, Ended, Evaluated, Event, Saved, complete_hyperparameters
from tuner.study.plan import CheckpointFolder
from tuner.whole import lead

HERE = Path(__file__).parent
PYTHON = sys.executable


def document(script: str = "train.py", **changes: Any) -> dict[str, Any]:
    """A round file of a script in this folder; `changes` replace whole sections."""
    return {
        "study": "commands",
        "round": "round1",
        "command": {"run": [PYTHON, script, "${args}"], "resume": ["--resume", "${resume_from}"]},
        "max_train_steps": 24,
        "hyperparameters": {"learning_rate": 0.05, "schedule": "linear", "decay_steps": 8},
        "search": {"trials": 1},
        "evaluation": {"every_steps": 4},
        "run": {"gpus_per_worker": 0},
    } | changes


def trainer(**changes: Any) -> dict[str, Any]:
    """A round file of `trainer.py`."""
    command = {
        "run": [
            PYTHON, "trainer.py", "--use_cpu", "--per_device_train_batch_size=4", "--report_to=none",
            "--disable_tqdm=true", "${args}",
        ],
        "tool": "transformers",
    }  # fmt: skip
    values = {
        "learning_rate": 0.02,
        "batch_size": 8,
        "warmup_steps": 2,
        "schedule": "linear",
        "decay_steps": 9,
    }
    return document(command=command, hyperparameters=values) | changes


TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def torchrun(**changes: Any) -> dict[str, Any]:
    """`trainer.py` in two processes."""
    content = trainer(**changes)
    content["command"] = {**content["command"], "run": [*TORCHRUN, *content["command"]["run"][1:]]}
    return content


def trl(folder: Path, method: str, **changes: Any) -> dict[str, Any]:
    """A round of `trl sft` or `trl dpo` on a tiny model with dropout, whose files are written, too."""
    pytest.importorskip("trl", reason="TRL is not installed")
    if not (folder / "base").exists():
        tiny.save_model(folder / "base", tiny.config("llama"))
        draw = random.Random(0)
        (folder / "rows").mkdir()
        for name, count in (("train", 60), ("test", 20)):
            rows = [_row(draw, method) for _ in range(count)]
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
        "schedule": "linear", "decay_steps": 8, **({"extra": {"beta": 0.3}} if method == "dpo" else {}),
    }  # fmt: skip
    command = {"run": ["trl", method, "--config", "${config}"], "tool": "trl", "config": "trl.yaml"}
    return document(command=command, hyperparameters=values, max_train_steps=20) | changes


def _row(draw: random.Random, method: str) -> dict[str, str]:
    a, b = draw.randint(0, 9), draw.randint(0, 9)
    if method == "sft":
        return {"prompt": f"{a}+{b}=", "completion": f"{a + b}"}
    return {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + draw.randint(1, 5)}"}


KINDS = ("plain", "trainer", "torchrun", "sft", "dpo")
"""What is run for real on a CPU: a script of one's own, one with Trainer, that in two processes, TRL."""


def of_kind(kind: str, folder: Path) -> dict[str, Any]:
    """A round of this kind; the files that its command reads are in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    match kind:
        case "plain":
            return document()
        case "trainer":
            return trainer()
        case "torchrun":
            return torchrun()
        case _:
            return trl(folder, kind)


def with_fault(fault: str, **values: Any) -> dict[str, Any]:
    """The plain script with a fault."""
    return document(hyperparameters={"learning_rate": 0.05, "fault": fault, **values})


def written(folder: Path, content: dict[str, Any], name: str = "round1.yaml") -> Path:
    """The round file and the scripts in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for script in ("train.py", "trainer.py"):
        shutil.copy(HERE / script, folder / script)
    (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / name


def spec_of(folder: Path, content: dict[str, Any]) -> RoundSpec:
    """The round with absolute paths."""
    path = written(folder, content)
    return read_round(path.read_text(), path).spec.absolute(folder)


class Ran:
    """One attempt that has ended, and what it said."""

    def __init__(
        self,
        folder: Path,
        content: dict[str, Any],
        *,
        work: Round | None = None,
        trial: int = 0,
        attempt: int = 1,
        resume: Any = None,
        stopping: Callable[[list[Event]], bool] = lambda events: False,
        steps: int | None = None,
    ) -> None:
        spec = spec_of(folder, content)
        self.work = work or Round(spec, folder, spec.recorded_objective, {})
        self.events: list[Event] = []
        horizon = steps or spec.max_train_steps
        values = complete_hyperparameters(spec.space(), {})
        self.directory = folder / "runs" / spec.round / f"trial-{trial:04d}"
        assignment = Assignment(
            round=spec.round,
            trial=trial,
            attempt=attempt,
            hyperparameters=values,
            max_train_steps=horizon,
            evaluate_every=spec.evaluation.every_steps,
            directory=str(self.directory),
            resume_from=None if resume is None else str(resume.path),
            resume_sha256=None if resume is None else resume.sha256,
            trunk_steps=trunk_steps(values, horizon, branches=False),
        )
        self.place = self.directory / f"attempt-{attempt}"
        self.tokens: list[str] = []
        self.running = Attempt(self.work, assignment, self._take, on_start=self.tokens.append)
        self.running.run(lambda: stopping(self.events))

    def _take(self, event: Event) -> None:
        """Switch the link `best` as the process that records an adapter does."""
        self.events.append(event)
        if isinstance(event, Saved) and event.checkpoint.kind == CheckpointKind.BEST:
            lead(self.directory / "best", self.directory.parent / event.checkpoint.path)

    @property
    def end(self) -> Ended:
        (found,) = (event for event in self.events if isinstance(event, Ended))
        return found

    @property
    def curve(self) -> dict[int, float]:
        return {e.evaluation.step: e.evaluation.eval_loss for e in self.events if isinstance(e, Evaluated)}

    def saved(self, kind: CheckpointKind) -> list[Any]:
        return [e.checkpoint for e in self.events if isinstance(e, Saved) and e.checkpoint.kind == kind]

    def point(self, kind: CheckpointKind, step: int | None = None) -> Any:
        """A kept checkpoint to resume from."""
        found = [c for c in self.saved(kind) if step in (None, c.step)][-1]
        return CheckpointFolder(self.directory.parent).point(found)
