"""Attempts of commands in this process, without a study."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

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
