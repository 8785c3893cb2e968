"""What a worker is told, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from tuner.records.facts import AnswerScore, Checkpoint, Evaluation
from tuner.records.space import Hyperparameters
from tuner.records.throughput import Throughput


@dataclass(frozen=True, slots=True)
class Assignment:
    """A trial, or the rest of one, for a worker to run."""

    round: str
    trial: int
    """The trial's number; a negative one names a comparison run."""
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


@dataclass(frozen=True, slots=True)
class Ready:
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
class Preparing:
    """A sign of life of a worker that is not ready yet; said at most about once a second."""

    doing: str
    """Such as `tokenising: 120,000 rows of train.jsonl`."""


@dataclass(frozen=True, slots=True)
class Started:
    """A trial's attempt begins."""

    round: str
    trial: int
    attempt: int
    step: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """As in `Attempt.environment`."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """A sign of life for the live view and the step count; said at most about once a second."""

    round: str
    trial: int
    attempt: int
    step: int
    train_loss: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A trial was evaluated (or had been, in the checkpoint it resumed from)."""

    round: str
    trial: int
    attempt: int
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint is on disk under its final name."""

    round: str
    trial: int
    attempt: int
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class Answered:
    """The best adapter of a trial at its horizon has answered the round's prompts; its `Ended` follows."""

    round: str
    trial: int
    attempt: int
    score: AnswerScore


@dataclass(frozen=True, slots=True)
class Measured:
    """The worker's throughput since it was ready; said after evaluations and at the end."""

    throughput: Throughput


Outcome: TypeAlias = Literal["complete", "infeasible", "pruned", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Ended:
    """A trial's attempt is over and its slot free."""

    round: str
    trial: int
    attempt: int
    step: int
    outcome: Outcome
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Died:
    """A worker is gone; every trial it held goes on in a new one, or fails."""

    reason: str
    trials: tuple[int, ...] = ()
    """Those it held."""
    is_input_error: bool = False
    """Whether the round file, the model or the data is to blame, so that a new worker would not help."""


Event: TypeAlias = (
    Preparing | Ready | Started | Progressed | Evaluated | Saved | Answered | Measured | Ended | Died
)
