"""What a worker is told, and what it says: facts, which are recorded as they are, and signs of life."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from tuner.records.space import Hyperparameters
from tuner.records.state import (
    AttemptFact,
    RoundFact,
    RoundFacts,
    Said,
    SavedCheckpoint,
    TrialFacts,
    storable_text,
)
from tuner.records.throughput import Throughput
from tuner.records.trials import AnswerScore, Checkpoint, Evaluation, RunId


@dataclass(frozen=True, slots=True)
class Assignment:
    """A trial, or the rest of one, for a worker to run."""

    round: str
    trial: int
    """The trial's number, or that of a comparison run's parent."""
    attempt: int
    hyperparameters: Hyperparameters
    max_train_steps: int
    evaluate_every: int
    directory: str
    """Where the trial's checkpoints go: absolute, `.../runs/ROUND/trial-0007`."""
    resume_from: str | None = None
    """Absolute path of the resumable checkpoint to start from; None starts at step 0."""
    resume_sha256: str | None = None
    """What `resume_from` must hash to."""
    trunk_steps: tuple[int, ...] = ()
    """Steps at which to keep a resumable checkpoint for longer rounds."""
    is_comparison: bool = False
    """Whether it is a comparison run: it leaves a loss, and no adapter that answers."""

    @property
    def horizon(self) -> int | None:
        """As in `RunId`."""
        return self.max_train_steps if self.is_comparison else None

    @property
    def run(self) -> RunId:
        """What is run."""
        return RunId(self.round, self.trial, self.horizon)


@dataclass(frozen=True, slots=True)
class Ready(Said):
    """The worker has loaded base and data and takes assignments."""

    slots: int
    device: str
    base: Evaluation | None = None
    """The untouched base's evaluation, measured or told."""
    train_rows: int = 0
    eval_rows: int = 0
    workload: str = ""
    """Fingerprint of base, data, evaluation set and length."""
    evaluation_share: float = 0.0
    """Share of a trial's work that its evaluations take, in [0, 1]."""
    smallest_adapter: int = 0
    """Weights of the smallest adapter that a trial of the round may have; 0 where nothing is written."""
    largest_adapter: int = 0
    """Weights of the largest one."""
    remarks: tuple[str, ...] = ()
    """Which rows are cut or left out, and how many."""


@dataclass(frozen=True, slots=True)
class Preparing(Said):
    """A sign of life of a worker that is not ready yet; said at most about once a second."""

    doing: str
    """Such as `tokenising: 120,000 rows of train.jsonl`."""


@dataclass(frozen=True, slots=True)
class Died(Said):
    """A worker is gone; every trial it held goes on in a new one, or fails."""

    reason: str
    runs: tuple[RunId, ...] = ()
    """Those it held."""
    is_input_error: bool = False
    """Whether the round file, the model or the data is to blame, so that a new worker would not help."""

    @property
    def trials(self) -> tuple[int, ...]:
        """Numbers of the trials that it held, comparison runs aside."""
        return tuple(sorted(run.trial for run in self.runs if run.horizon is None))


@dataclass(frozen=True, slots=True)
class Started(AttemptFact):
    """A trial's attempt begins in a worker; the last said environment of an attempt counts."""

    step: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """As in `Attempt.environment`; an empty one changes nothing."""

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        attempt = self.reach(trial, self.step)
        if self.environment:
            trial.attempts[self.attempt] = replace(attempt, environment=dict(self.environment))


@dataclass(frozen=True, slots=True)
class Progressed(AttemptFact):
    """An attempt has come to a step; the highest one said counts. Said at most about once a second."""

    step: int
    train_loss: float | None = None
    """For the live view alone."""

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        self.reach(trial, self.step)


@dataclass(frozen=True, slots=True)
class Evaluated(AttemptFact):
    """A trial was evaluated (or had been, in the checkpoint it resumed from).

    Of a step, the last said counts.
    """

    evaluation: Evaluation

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        if self.attempt in trial.attempts:
            self.reach(trial, self.evaluation.step)
        trial.evaluations[self.evaluation.step] = self.evaluation


@dataclass(frozen=True, slots=True)
class Saved(AttemptFact):
    """A checkpoint is on disk under its final name; of a kind at a step, the latest attempt's counts."""

    checkpoint: Checkpoint

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        self.of(trial)
        key = (self.checkpoint.kind, self.checkpoint.step)
        known = trial.checkpoints.get(key)
        if known is None or (known.attempt, known.is_removed) <= (self.attempt, False):
            trial.checkpoints[key] = SavedCheckpoint(self.attempt, self.checkpoint)


@dataclass(frozen=True, slots=True)
class Answered(AttemptFact):
    """The best adapter of a trial at its horizon has answered the round's prompts; the last said counts.

    Its `Ended` follows.
    """

    score: AnswerScore

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        trial.answer_score = self.score


@dataclass(frozen=True, slots=True)
class Measured(RoundFact):
    """A worker's throughput since it was ready; said after evaluations and at the end.

    The last said of a session counts.
    """

    throughput: Throughput
    round: str = ""
    """Filled in by who hears it."""

    def change(self, found: RoundFacts) -> None:
        """As `RoundFact` says. What one process has done needs the name of its session."""
        assert self.throughput.session
        found.throughputs[self.throughput.session] = self.throughput


Outcome: TypeAlias = Literal["complete", "infeasible", "pruned", "stopped", "failed", "interrupted", "died"]
"""Of an attempt. The last two no worker says: its parent died, or it did."""


@dataclass(frozen=True, slots=True)
class Ended(AttemptFact):
    """A trial's attempt is over, its slot is free and it waits; the first end said of an attempt counts."""

    step: int
    outcome: Outcome
    reason: str | None = None
    at: float | None = None
    """Seconds since the epoch; filled in by who records it."""

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        assert self.at is not None
        attempt = self.reach(trial, self.step)
        if attempt.ended_at is None:
            message = None if self.reason is None else storable_text(self.reason)
            trial.attempts[self.attempt] = replace(
                attempt, ended_at=self.at, outcome=self.outcome, message=message
            )


Event: TypeAlias = (
    Preparing | Ready | Started | Progressed | Evaluated | Saved | Answered | Measured | Ended | Died
)
