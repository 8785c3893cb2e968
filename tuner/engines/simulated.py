"""The engine `simulated`: replay curves on a virtual clock, for dry runs, benchmarks and tests."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from tuner.config import RoundSpec
from tuner.engines.protocol import Job, Worker
from tuner.engines.synthetic import LoraFormula
from tuner.errors import CheckpointError
from tuner.methods.metrics import ExampleScores, metric, values
from tuner.methods.tools import UNKNOWN_SCHEDULE
from tuner.playbook import best_evaluation, is_diverged
from tuner.playbook.schedule import evaluation_steps
from tuner.records import (
    LOSS,
    Assignment,
    Checkpoint,
    CheckpointKind,
    Direction,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    Hyperparameters,
    Objective,
    Outcome,
    Ready,
    RunId,
    Saved,
    Started,
)
from tuner.report.format import GpuReading
from tuner.whole import digest

SLOTS = 4
"""Parallel trials if neither the file nor the command line sets a number."""

Curve: TypeAlias = Callable[[Hyperparameters, int, int], Evaluation]
"""(hyperparameters, step, horizon) -> evaluation; on the trunk the same for every horizon.

A loss that is not finite, or too high for too long, makes the trial infeasible, as in the real worker.
"""

Keep: TypeAlias = Callable[[Assignment, CheckpointKind, int], Checkpoint | None]
"""Saves a checkpoint of a step, or None. The path is named like a real one: `step-000036.a1`."""


def measured_by(curve: Curve, spec: RoundSpec) -> Curve:
    """Return the curve with values of the round's metric.

    Takes `exp(-loss)` as the chance to predict a token first. Returns the curve itself if the loss chooses
    the best step.
    """
    name = spec.objective.metric
    if spec.command is not None:
        return _as_reported(curve, spec.recorded_objective)
    chosen = metric(name)
    objective = chosen.objective(name)
    if objective == LOSS or objective.per == "trial":
        return curve

    def evaluation(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        made = curve(hyperparameters, step, horizon)
        nll = np.asarray(made.example_nll or (made.eval_loss,))
        tokens = np.asarray(made.example_tokens or (1,))
        examples = ExampleScores(nll, tokens, tokens * np.exp(-nll / tokens))
        return replace(made, metrics=values(name, chosen, examples), objective=objective)

    return evaluation


def _as_reported(curve: Curve, objective: Objective) -> Curve:
    """Return the curve of a command: without the losses of single examples, at a rate that is known."""

    def evaluation(hyperparameters: Hyperparameters, step: int, horizon: int) -> Evaluation:
        known = {"schedule": "constant"} if hyperparameters.get("schedule") == UNKNOWN_SCHEDULE else {}
        made = curve({**hyperparameters, **known}, step, horizon)
        made = replace(made, example_nll=(), example_tokens=())
        if objective == LOSS:
            return made
        value = made.eval_loss if objective.direction == Direction.MINIMIZE else math.exp(-made.eval_loss)
        return replace(made, metrics={objective.metric: value}, objective=objective)

    return evaluation


@dataclass
class _Run:
    assignment: Assignment
    step: int
    evaluations: list[Evaluation] = field(default_factory=list)
    last_saved_step: int | None = None

    @property
    def name(self) -> tuple[str, int, int]:
        return self.assignment.round, self.assignment.trial, self.assignment.attempt

    @property
    def evaluation_steps(self) -> tuple[int, ...]:
        return evaluation_steps(self.assignment.max_train_steps, self.assignment.evaluate_every)


def keep_on_disk(assignment: Assignment, kind: CheckpointKind, step: int) -> Checkpoint:
    """Save a directory named like a real checkpoint, with its step and no weights."""
    trial = Path(assignment.directory)
    place = simulated_path(assignment, kind, step)
    directory = trial.parent / place
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    content = json.dumps({"simulated": True, "step": step})
    (directory / "simulated.json").write_text(content)
    return Checkpoint(kind, step, place, len(content), digest(directory))


def keep_trunk_names(assignment: Assignment, kind: CheckpointKind, step: int) -> Checkpoint | None:
    """Return trunk names without files, for replays that no other process resumes."""
    if kind != CheckpointKind.TRUNK:
        return None
    return Checkpoint(kind, step, simulated_path(assignment, kind, step), 0, "")


def simulated_path(assignment: Assignment, kind: CheckpointKind, step: int) -> str:
    """Return the real worker's path, relative to the round's checkpoint directory."""
    trial = Path(assignment.directory).name
    folder = {CheckpointKind.BEST: "best-steps", CheckpointKind.LAST: "last", CheckpointKind.TRUNK: "trunk"}
    return f"{trial}/{folder[kind]}/step-{step:06d}.a{assignment.attempt}"


class SimulatedEngine:
    """Synthetic losses from the study's surface, on a virtual clock."""

    def __init__(self) -> None:
        self._begun_at = time.time()
        self._workers: list[SimulatedWorker] = []

    def start(self, job: Job) -> Worker:
        """Return a worker in this process, without starting the job's program."""
        wanted = job.spec.run.slots
        slots = 1 if job.spec.trains_alone else wanted if isinstance(wanted, int) else SLOTS
        ready = Ready(slots, "simulated", workload=_workload(job))
        formula = LoraFormula(job.spec.study, pace_steps=max(1, job.first_horizon))
        curve = measured_by(formula, job.spec)
        self._workers.append(SimulatedWorker(curve, slots=slots, ready=ready))
        return self._workers[-1]

    def gpu_readings(self) -> Sequence[GpuReading]:
        """Return no devices."""
        return ()

    def now(self) -> float:
        """Return the time of the virtual clock."""
        return self._begun_at + sum(worker.seconds for worker in self._workers)

    def close(self) -> None:
        """Do nothing."""


def _workload(job: Job) -> str:
    """Return a fingerprint of the file's model and data settings, without opening either."""
    said = job.spec.model_dump(mode="json", include={"model", "data", "command"})
    fingerprint = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    return f"rehearsal-{fingerprint[:16]}"  # as in databases of earlier versions, where it is compared


class SimulatedWorker:
    """Trials whose evaluations come from a curve; each call of `events` moves every trial to its next event.

    `seconds` is the virtual clock: the steps of all trials at `seconds_per_step`.
    """

    def __init__(
        self,
        curve: Curve,
        *,
        slots: int,
        vocabulary_size: int = 32_000,
        seconds_per_step: float = 1.0,
        keep: Keep = keep_on_disk,
        ready: Ready | None = None,
    ) -> None:
        self._curve = curve
        self._slots = slots
        self._vocabulary_size = vocabulary_size
        self._seconds_per_step = seconds_per_step
        self._keep = keep
        self._runs: dict[RunId, _Run] = {}
        self._said: list[Event] = [ready or Ready(slots, "simulated")]
        self.seconds = 0.0

    def capacity(self) -> int:
        """Number of free slots."""
        return self._slots - len(self._runs)

    def start(self, assignment: Assignment) -> None:
        """Start at step 0, or at the checkpoint's step with the curve up to it."""
        try:
            step = self._first_step(assignment)
        except CheckpointError as error:
            name = (assignment.round, assignment.trial, assignment.attempt)
            self._say(Ended(*name, 0, "failed", str(error), horizon=assignment.horizon))
            return
        run = _Run(assignment, step)
        self._runs[assignment.run] = run
        self._say(Started(*run.name, step, horizon=run.assignment.horizon))
        if step == 0:
            self._evaluate(run)
        else:
            self._inherit(run)
        self._end_if_over(run)

    def stop(self, run: RunId) -> None:
        """Save the run at its current step and end the attempt."""
        found = self._runs.get(run)
        if found is not None:
            if found.last_saved_step != found.step:
                self._save(found, CheckpointKind.LAST, found.step)
            self._end(found, "stopped")

    def events(self, timeout_seconds: float) -> list[Event]:
        """Advance every trial to its next evaluation or trunk step and return the events. Never waits."""
        if not self._said:
            for run in list(self._runs.values()):
                self._advance(run)
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        """Save and stop every trial."""
        for run in list(self._runs):
            self.stop(run)

    def _first_step(self, assignment: Assignment) -> int:
        if assignment.resume_from is None:
            return 0
        place = Path(assignment.resume_from)
        if self._keep is keep_on_disk and not place.is_dir():
            raise CheckpointError(f"{place}: the recorded checkpoint is missing")
        return int(place.name.removeprefix("step-").partition(".")[0])

    def _inherit(self, run: _Run) -> None:
        """Report the checkpoint's content again: the curve so far and its best adapter."""
        run.evaluations += [self._at(run, step) for step in run.evaluation_steps if step <= run.step]
        best = best_evaluation(run.evaluations)
        if best is not None:
            self._save(run, CheckpointKind.BEST, best.step)
        for evaluation in run.evaluations:
            self._say(Evaluated(*run.name, evaluation, horizon=run.assignment.horizon))

    def _advance(self, run: _Run) -> None:
        planned = {*run.evaluation_steps, *run.assignment.trunk_steps}
        following = min(step for step in planned if step > run.step)
        self.seconds += (following - run.step) * self._seconds_per_step
        run.step = following
        if following in run.evaluation_steps:
            self._evaluate(run)
        elif following in run.assignment.trunk_steps:
            self._save(run, CheckpointKind.TRUNK, following)
        self._end_if_over(run)

    def _evaluate(self, run: _Run) -> None:
        """Evaluate the run at its current step; files are written before their evaluation is reported."""
        evaluation = self._at(run, run.step)
        run.evaluations.append(evaluation)
        if best_evaluation(run.evaluations) is evaluation:
            self._save(run, CheckpointKind.BEST, run.step)
        if run.step in run.assignment.trunk_steps:
            self._save(run, CheckpointKind.TRUNK, run.step)
        self._save(run, CheckpointKind.LAST, run.step)
        self._say(Evaluated(*run.name, evaluation, horizon=run.assignment.horizon))

    def _at(self, run: _Run, step: int) -> Evaluation:
        return self._curve(run.assignment.hyperparameters, step, run.assignment.max_train_steps)

    def _save(self, run: _Run, kind: CheckpointKind, step: int) -> None:
        checkpoint = self._keep(run.assignment, kind, step)
        if kind == CheckpointKind.LAST:
            run.last_saved_step = step
        if checkpoint is not None:
            self._say(Saved(*run.name, checkpoint, horizon=run.assignment.horizon))

    def _end_if_over(self, run: _Run) -> None:
        reason = is_diverged(run.evaluations, self._vocabulary_size)
        if reason is not None:
            self._end(run, "infeasible", reason)
        elif run.step >= run.assignment.max_train_steps:
            self._end(run, "complete")

    def _end(self, run: _Run, outcome: Outcome, reason: str | None = None) -> None:
        del self._runs[run.assignment.run]
        self._say(Ended(*run.name, run.step, outcome, reason, horizon=run.assignment.horizon))

    def _say(self, event: Event) -> None:
        self._said.append(event)
