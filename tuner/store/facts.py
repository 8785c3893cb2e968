"""What can be said of a study while it runs, and what a place that keeps it promises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from tuner.records import (
    AnswerScore,
    Attempt,
    Branch,
    Checkpoint,
    Evaluation,
    FinalScore,
    Promotion,
    RoundRecord,
    Throughput,
    Trial,
    TrialState,
)


@dataclass(frozen=True, slots=True)
class RoundBegun:
    """A round begins, or goes on with a file in which what may change has changed."""

    round: RoundRecord
    """Of it `throughputs` and `branches` are not recorded.

    Said again, only `spec` replaces what is recorded; another `max_train_steps` is refused.
    """


@dataclass(frozen=True, slots=True)
class TrialAsked:
    """A trial has its number and its hyperparameters, and waits."""

    trial: Trial
    """Of it `round`, `number`, `hyperparameters`, `continues` and `optuna_trial` are recorded.

    Said again, only `optuna_trial` replaces what is recorded; other hyperparameters are refused.
    """


@dataclass(frozen=True, slots=True)
class AttemptStarted:
    """A trial runs."""

    round: str
    trial: int
    attempt: int
    from_step: int
    at: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class AttemptPlaced:
    """The worker of an attempt has said what it computes with; the last said of an attempt counts."""

    round: str
    trial: int
    attempt: int
    environment: Mapping[str, str]
    """As in `Attempt.environment`."""


@dataclass(frozen=True, slots=True)
class StepsRun:
    """An attempt has run up to a step; the highest one said counts."""

    round: str
    trial: int
    attempt: int
    to_step: int


@dataclass(frozen=True, slots=True)
class EvaluationMade:
    """A trial was evaluated; the last evaluation said of a step counts."""

    round: str
    trial: int
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is on disk; of a kind at a step, the one of the latest attempt counts."""

    round: str
    trial: int
    attempt: int
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class CheckpointsRemoved:
    """Checkpoints are gone, or about to be; only a later attempt brings one back."""

    round: str
    trial: int
    paths: tuple[str, ...]
    """As in `Checkpoint.path`; those never recorded are ignored."""


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt is over and its trial waits again; the first end said of an attempt counts."""

    round: str
    trial: int
    attempt: int
    to_step: int
    at: float
    """Seconds since the epoch."""
    outcome: str
    """As in `Attempt.outcome`."""
    message: str | None = None


@dataclass(frozen=True, slots=True)
class TrialEnded:
    """A trial will never run again; the first end said of a trial counts."""

    round: str
    trial: int
    state: TrialState
    reason: str | None
    at: float
    """Seconds since the epoch."""

    def __post_init__(self) -> None:
        if not self.state.is_final:
            raise ValueError(f"a trial ends in a final state; got {self.state}")


@dataclass(frozen=True, slots=True)
class TrialNoted:
    """Something to know of a trial, shown as its reason until its end gives another."""

    round: str
    trial: int
    reason: str


@dataclass(frozen=True, slots=True)
class TrialScored:
    """A trial's best adapter was scored on `data.test`; the first score said of a trial counts."""

    round: str
    trial: int
    score: FinalScore


@dataclass(frozen=True, slots=True)
class TrialAnswered:
    """A trial's best adapter has answered the round's prompts; the last score said of a trial counts."""

    round: str
    trial: int
    score: AnswerScore


@dataclass(frozen=True, slots=True)
class BranchAdvanced:
    """Where a comparison run stands; the last said of a trial's run to a horizon counts."""

    round: str
    branch: Branch


@dataclass(frozen=True, slots=True)
class WorkMeasured:
    """A worker process has done so much for a round; the last said of a session counts."""

    round: str
    throughput: Throughput

    def __post_init__(self) -> None:
        if not self.throughput.session:
            raise ValueError("what one process has done needs the name of its session")


@dataclass(frozen=True, slots=True)
class PromotionPlanned:
    """A round's file was planned; the last plan said of `to_round` counts."""

    promotion: Promotion


Fact: TypeAlias = (
    RoundBegun
    | TrialAsked
    | AttemptStarted
    | AttemptPlaced
    | StepsRun
    | EvaluationMade
    | CheckpointSaved
    | CheckpointsRemoved
    | AttemptEnded
    | TrialEnded
    | TrialNoted
    | TrialScored
    | TrialAnswered
    | BranchAdvanced
    | WorkMeasured
    | PromotionPlanned
)


class FactError(Exception):
    """A fact that cannot follow from those recorded: a bug of whoever says it."""


def not_recorded(fact: Fact) -> FactError:
    """The error of a fact whose round, trial or attempt is unknown."""
    match fact:
        case RoundBegun(round=record):
            subject = f"round {record.name}"
        case TrialAsked(trial=trial):
            subject = f"round {trial.round}"
        case BranchAdvanced(round=name, branch=branch):
            subject = f"trial {name}/{branch.trial}"
        case WorkMeasured(round=name):
            subject = f"round {name}"
        case PromotionPlanned(promotion=promotion):
            subject = f"round {promotion.from_round}"
        case AttemptPlaced() | StepsRun() | CheckpointSaved() | AttemptEnded():
            subject = f"attempt {fact.attempt} of trial {fact.round}/{fact.trial}"
        case _:
            subject = f"trial {fact.round}/{fact.trial}"
    return FactError(f"{type(fact).__name__}: {subject} is not recorded")


def state_of(ended_as: TrialState | None, attempts: Sequence[Attempt]) -> TrialState:
    """Where a trial stands: as it ended, or running while its latest attempt is open."""
    if ended_as is not None:
        return ended_as
    is_running = bool(attempts) and max(attempts, key=lambda a: a.number).ended_at is None
    return TrialState.RUNNING if is_running else TrialState.WAITING


class Store(Protocol):
    """Keeps the facts of one study and gives them back as records.

    Saying facts again, one that nothing has replaced or the whole history in its order, changes
    nothing. So whoever dies between saying a fact and acting on it may say it once more.
    """

    def record(self, *facts: Fact) -> None:
        """Record all of them, in this order, or none.

        Raises FactError for a fact about a round, trial or attempt that is not recorded, or one that
        contradicts what is; StorageError when the facts cannot be written.
        """
        ...

    def rounds(self) -> tuple[RoundRecord, ...]:
        """All rounds that have begun, in the order of their beginning."""
        ...

    def trials(self, round: str) -> tuple[Trial, ...]:
        """A round's trials by number, as they stood at one moment; none for an unknown round."""
        ...

    def trial(self, round: str, number: int) -> Trial:
        """One of them. Raises KeyError for one that was never asked."""
        ...

    def promotions(self) -> tuple[Promotion, ...]:
        """The plans that count, in the order in which they were made."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...
