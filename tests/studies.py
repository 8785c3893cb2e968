"""Studies that are small enough to run in a test."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tuner.cli import run
from tuner.config import RoundFile, load_round
from tuner.records import (
    Answered,
    AttemptStarted,
    Ended,
    Evaluated,
    Evaluation,
    Fact,
    Hyperparameters,
    Progressed,
    RoundBegun,
    RoundRecord,
    Saved,
    Started,
    Trial,
    TrialAsked,
    TrialEnded,
    TrialNoted,
    TrialScored,
    TrialState,
)
from tuner.report import open_view
from tuner.store import open_store
from tuner.study.plan import RoundPlan

QUICKSTART = Path(__file__).parent.parent / "studies" / "quickstart"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}

ROUND = """\
study: {study}
round: round1
goal: Does it run
model: {{path: {base}, dtype: float32}}
data:
  train: [{{path: {data}/train.jsonl, format: alpaca}}]
  eval: [{{path: {data}/eval.jsonl, format: alpaca}}]
  max_length: 64
max_train_steps: {steps}
hyperparameters:
  learning_rate: {learning_rate}
  lora_r: {lora_r}
  optimizer: {optimizer}
  batch_size: 2
  warmup_steps: 1
  schedule: {schedule}
  decay_steps: {decay_steps}
  lora_dropout: {dropout}
search:
  trials: {trials}
  sampler: {sampler}
  enqueue: {enqueue}
evaluation: {{every_steps: {every}, batch_size: 8, max_examples: 8{evaluation}}}
storage: {storage}
{run}"""


def write_round(directory: Path, **changes: Any) -> Path:
    """A round on the quickstart's base, with a few rows."""
    values: dict[str, Any] = {
        "study": "tiny",
        "base": QUICKSTART / "base",
        "data": QUICKSTART / "data",
        "steps": 8,
        "learning_rate": "{low: 1e-4, high: 1e-1, log: true}",
        "lora_r": "[2, 4]",
        "optimizer": "adamw",
        "schedule": "linear",
        "decay_steps": 3,
        "dropout": 0.1,
        "trials": 3,
        "sampler": "quasi-random",
        "enqueue": "[]",
        "every": 2,
        "evaluation": "",
        "storage": "sqlite:///tuner.db",
        "run": "",
        **changes,
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "round1.yaml"
    path.write_text(ROUND.format(**values))
    return path


def installed(site: Path, name: str, **entry_points: str) -> Path:
    """Let a package look installed in a folder on the path; `samplers="ladder = plug_ins:Ladder"` registers
    a name.
    """
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    sections = (f"[tuner.{group}]\n{line}\n" for group, line in entry_points.items())
    (info / "entry_points.txt").write_text("\n".join(sections))
    return site


def round_file(directory: Path, **changes: Any) -> RoundFile:
    """The same, loaded."""
    return load_round(write_round(directory, **changes))


def history(trial: Trial) -> list[Fact]:
    """Facts from which a trial follows."""
    facts: list[Fact] = [TrialAsked(trial)]
    for attempt in trial.attempts:
        name = (trial.round, trial.number, attempt.number)
        facts += [
            AttemptStarted(*name, attempt.from_step, attempt.started_at),
            Progressed(*name, attempt.to_step),
            Started(*name, attempt.from_step, attempt.environment),
        ]
    newest = max((attempt.number for attempt in trial.attempts), default=0)
    place = (trial.round, trial.number, newest)
    facts += [Evaluated(trial.round, trial.number, 0, evaluation) for evaluation in trial.evaluations]
    facts += [Saved(*place, checkpoint) for checkpoint in trial.checkpoints]
    for attempt in trial.attempts:
        if attempt.ended_at is not None and attempt.outcome is not None:
            outcome: Any = attempt.outcome
            name = (trial.round, trial.number, attempt.number)
            facts.append(Ended(*name, attempt.to_step, outcome, attempt.message, attempt.ended_at))
    ended = max((a.ended_at or 0.0 for a in trial.attempts), default=0.0)
    if trial.state.is_final:
        facts.append(TrialEnded(trial.round, trial.number, trial.state, trial.reason, ended))
    elif trial.reason is not None:
        facts.append(TrialNoted(trial.round, trial.number, trial.reason))
    if trial.final_score is not None:
        facts.append(TrialScored(trial.round, trial.number, trial.final_score))
    if trial.answer_score is not None:
        facts.append(Answered(*place, trial.answer_score))
    return facts


def record_sweep(
    file: RoundFile, found: Mapping[float, float | None], *more: Trial, correct: int = 50
) -> None:
    """Record a round of a sweep as run: the loss that each rate came to; None where it diverged.

    `correct` is the percentage of tokens that all of them predict.
    """
    spec = file.spec
    store = open_store(RoundPlan(file).absolute.storage, study=spec.study)
    record = RoundRecord(spec.round, spec.max_train_steps, spec.model_dump(mode="json"), 0.0)
    store.record(RoundBegun(replace(record, kind=RoundPlan(file).kind)))
    for number, (rate, loss) in enumerate(found.items()):
        last = Evaluation(
            spec.max_train_steps,
            loss or math.nan,
            example_nll=(1.0,),
            example_tokens=(100,),
            correct_tokens=correct,
        )
        state = TrialState.INFEASIBLE if loss is None else TrialState.COMPLETE
        curve = (Evaluation(0, 3.0), last)
        run = Trial(spec.round, number, {"learning_rate": rate}, state, evaluations=curve)
        store.record(*history(run))
    for trial in more:
        store.record(*history(trial))
    store.close()


def hub_cache(directory: Path, *, commit: str) -> Path:
    """A Hub's local cache with `quickstart/base`, its main at this commit; returns that repository."""
    repository = directory / "models--quickstart--base"
    shutil.copytree(QUICKSTART / "base", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository


def formula(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
    """A loss that falls faster the nearer the rate is to 3e-3, and is NaN above 5e-2."""
    rate = float(hyperparameters["learning_rate"])  # type: ignore[arg-type]
    distance = abs(math.log10(rate) - math.log10(3e-3))
    loss = 2.0 + 2.0 * math.exp(-step / (3.0 * (1 + distance)))
    if rate > 5e-2 and step > 0:
        loss = math.nan
    return Evaluation(step, loss, train_loss=loss if step else None, learning_rate=rate if step else None)


def silent_view() -> Any:
    """A view that writes to nowhere."""
    from rich.console import Console

    console = Console(file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115, PTH123
    return open_view(console=console, title="test", trials_total=1, max_train_steps=1)


@dataclass(frozen=True)
class Done:
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


def tuner(*arguments: str, directory: Path, columns: int = 200, merged: bool = False) -> Done:
    """The command line, without the seconds that a process of its own takes to load.

    `merged`: everything in `stdout`, in its order.
    """
    stdout = io.StringIO()
    stderr = stdout if merged else io.StringIO()
    with (
        chdir(directory),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
        patch.dict(os.environ, {**ENVIRONMENT, "COLUMNS": str(columns)}),
    ):
        returncode = run(list(arguments))
    return Done(returncode, stdout.getvalue(), "" if merged else stderr.getvalue())


def tuner_process(*arguments: str, directory: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tuner.cli", *arguments],
        cwd=directory,
        text=True,
        capture_output=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **ENVIRONMENT},
    )


def trials_of(directory: Path) -> list[dict[str, Any]]:
    """`trial list --json`."""
    done = tuner("trial", "list", "--json", directory=directory)
    assert done.returncode == 0, done.stderr
    listed: list[dict[str, Any]] = json.loads(done.stdout)
    return listed
