"""Assignments to workers, and events from them: facts, which are recorded, and signs of life."""

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
from tuner.records.throughput import Prediction, Throughput
from tuner.records.trials import AnswerScore, Checkpoint, Evaluation, NodeChange, RunId


@dataclass(frozen=True, slots=True)
class Assignment:
    """A trial, or the remainder of one, for a worker to run."""

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
    """Expected hash of `resume_from`."""
    trunk_steps: tuple[int, ...] = ()
    """Steps at which to keep a resumable checkpoint for longer rounds."""
    is_comparison: bool = False
    """Whether it is a comparison run, which records a loss but generates no answers."""
    room_bytes: int = 0
    """Free bytes on the disk of `directory` below which training pauses."""

    @property
    def horizon(self) -> int | None:
        """As in `RunId`."""
        return self.max_train_steps if self.is_comparison else None

    @property
    def run(self) -> RunId:
        """Return what is run."""
        return RunId(self.round, self.trial, self.horizon)


@dataclass(frozen=True, slots=True)
class Ready(Said):
    """The worker has loaded the base model and the data, and accepts assignments."""

    slots: int
    device: str
    base: Evaluation | None = None
    """Evaluation of the base model, measured or passed in."""
    train_rows: int = 0
    eval_rows: int = 0
    workload: str = ""
    """Fingerprint of base model, data, evaluation set and length."""
    evaluation_share: float = 0.0
    """Share of a trial's work that its evaluations take, in [0, 1]."""
    smallest_adapter: int = 0
    """Number of weights of the smallest adapter a trial can have; 0 if no adapters are saved."""
    largest_adapter: int = 0
    """Number of weights of the largest adapter a trial can have."""
    waits_for_disk: bool = False
    """Whether its trials wait while the disk of the round's folder is full, instead of training on."""
    data_fingerprint: str = ""
    """Of the rows alone, which `study check` compares without the model; empty if not known."""
    model_fingerprint: str = ""
    """Of the model's configuration and of its files, which `study check` compares without loading them."""
    remarks: tuple[str, ...] = ()
    """Which rows are truncated or dropped, and how many."""
    predicted: Prediction | None = None
    """Of a worker that was asked to time a few steps; it takes no assignment."""


@dataclass(frozen=True, slots=True)
class Preparing(Said):
    """A worker that is not ready yet is alive; sent at most about once per second."""

    doing: str
    """Such as `tokenising: 120,000 rows of train.jsonl`."""


@dataclass(frozen=True, slots=True)
class Beat(Said):
    """A worker's main loop is alive, and says how long it may be silent now; nobody records it."""

    doing: str
    allowed_seconds: float | None
    """None where it waits for its parent."""


@dataclass(frozen=True, slots=True)
class Remarked(Said):
    """A worker says something to the user; nobody records it."""

    text: str


@dataclass(frozen=True, slots=True)
class Died(Said):
    """A worker has died; its trials resume in a new worker, or fail."""

    reason: str
    runs: tuple[RunId, ...] = ()
    """Those it held."""
    is_input_error: bool = False
    """Whether the cause is the round file, the model or the data, so that a new worker would fail too."""

    @property
    def trials(self) -> tuple[int, ...]:
        """Return the numbers of its trials, without comparison runs."""
        return tuple(sorted(run.trial for run in self.runs if run.horizon is None))


@dataclass(frozen=True, slots=True)
class Started(AttemptFact):
    """A trial's attempt starts in a worker; the last environment of an attempt is kept."""

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
    """An attempt has reached a step; the highest step is kept. Sent at most about once per second."""

    step: int
    train_loss: float | None = None
    """For the live view alone."""

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        self.reach(trial, self.step)


@dataclass(frozen=True, slots=True)
class Evaluated(AttemptFact):
    """A trial was evaluated (possibly before the checkpoint that it resumed from).

    The last evaluation of a step is kept.
    """

    evaluation: Evaluation

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        if self.attempt in trial.attempts:
            self.reach(trial, self.evaluation.step)
        trial.evaluations[self.evaluation.step] = self.evaluation


@dataclass(frozen=True, slots=True)
class Saved(AttemptFact):
    """A checkpoint is on disk under its final name; the latest attempt's is kept, per kind and step."""

    checkpoint: Checkpoint

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says. A checkpoint proves that its step was run."""
        self.reach(trial, self.checkpoint.step)
        key = (self.checkpoint.kind, self.checkpoint.step)
        known = trial.checkpoints.get(key)
        if known is None or (known.attempt, known.is_removed) <= (self.attempt, False):
            trial.checkpoints[key] = SavedCheckpoint(self.attempt, self.checkpoint)


@dataclass(frozen=True, slots=True)
class Answered(AttemptFact):
    """A trial's best adapter has answered the round's prompts at the horizon; the last score is kept.

    Its `Ended` follows.
    """

    score: AnswerScore

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        trial.answer_score = self.score


@dataclass(frozen=True, slots=True)
class Measured(RoundFact):
    """A worker's throughput since it was ready; sent after evaluations and at the end.

    The last one of a session is kept.
    """

    throughput: Throughput
    round: str = ""
    """Set by the receiver."""

    def change(self, found: RoundFacts) -> None:
        """As in `RoundFact`. Requires the name of the process's session."""
        assert self.throughput.session
        found.throughputs[self.throughput.session] = self.throughput


@dataclass(frozen=True, slots=True)
class NodeChanged(RoundFact):
    """A node of the cluster joined, was lost or was left out, as the engine saw; each is kept."""

    node_change: NodeChange
    round: str = ""
    """Set by the receiver."""

    def change(self, found: RoundFacts) -> None:
        """As in `RoundFact`."""
        said = self.node_change
        reason = None if said.reason is None else storable_text(said.reason)
        found.node_changes.setdefault((said.at, said.node, said.change), replace(said, reason=reason))


Outcome: TypeAlias = Literal["complete", "infeasible", "pruned", "stopped", "failed", "interrupted", "died"]
"""Of an attempt. The last two no worker says: its parent died, or it did."""


@dataclass(frozen=True, slots=True)
class Ended(AttemptFact):
    """A trial's attempt has ended and its slot is free; the first end of an attempt is kept."""

    step: int
    outcome: Outcome
    reason: str | None = None
    at: float | None = None
    """Seconds since the epoch, set when it is recorded."""

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
    Preparing
    | Ready
    | Beat
    | Remarked
    | Started
    | Progressed
    | Evaluated
    | Saved
    | Answered
    | Measured
    | NodeChanged
    | Ended
    | Died
)
