"""Facts that the study says itself: what has begun, what was asked, what has ended, what was given up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tuner.records.state import (
    AttemptFact,
    Fact,
    FactError,
    RoundFacts,
    SavedCheckpoint,
    StudyState,
    TrialFact,
    TrialFacts,
    as_asked,
    plain_hyperparameters,
    plain_json,
    storable_text,
)
from tuner.records.trials import Attempt, Branch, FinalScore, Promotion, RoundRecord, Trial, TrialState


@dataclass(frozen=True, slots=True)
class RoundBegun(Fact):
    """A round begins, or goes on with a file in which what may change has changed."""

    round: RoundRecord
    """Of it `throughputs` and `branches` are not recorded.

    Said again, only `spec` replaces what is recorded; another `max_train_steps` is refused.
    """

    @property
    def subject(self) -> str:
        """As `Fact` says."""
        return f"round {self.round.name}"

    def apply(self, state: StudyState) -> None:
        """As `Fact` says."""
        name, spec = self.round.name, plain_json(self.round.spec)
        found = state.round(name)
        if found is None:
            begun = replace(self.round, spec=spec, throughputs=(), branches=())
            state.put(state.rounds, name, RoundFacts(begun))
            return
        self.refuse_other_horizon(found.begun.max_train_steps)
        found.begun = replace(found.begun, spec=spec)

    def refuse_other_horizon(self, begun: int | None) -> None:
        """Raises FactError where the round has begun with another horizon."""
        if begun != self.round.max_train_steps:
            raise FactError(
                f"{self.round.name} has begun with other max_train_steps than {self.round.max_train_steps}"
            )


@dataclass(frozen=True, slots=True)
class TrialAsked(Fact):
    """A trial has its number and its hyperparameters, and waits."""

    trial: Trial
    """Of it `round`, `number`, `hyperparameters`, `continues` and `optuna_trial` are recorded.

    Said again, only `optuna_trial` replaces what is recorded; other hyperparameters are refused.
    """

    @property
    def subject(self) -> str:
        """As `Fact` says."""
        return f"round {self.trial.round}"

    def apply(self, state: StudyState) -> None:
        """As `Fact` says."""
        if self.trial.round not in state.rounds:
            raise self.not_recorded()
        asked = as_asked(self.trial)
        asked = replace(asked, hyperparameters=plain_hyperparameters(asked.hyperparameters))
        known = state.trial(asked.round, asked.number)
        if known is None:
            trials = state.rounds[asked.round].trials
            known = state.put(trials, asked.number, TrialFacts(asked))
        self.refuse_other(known.asked)
        known.asked = asked

    def refuse_other(self, asked: Trial) -> None:
        """Raises FactError where the number belongs to a trial with other hyperparameters."""
        same = dict(asked.hyperparameters) == dict(self.trial.hyperparameters)
        if not same or asked.continues != self.trial.continues:
            raise FactError(f"{self.trial.name} was asked with other hyperparameters")


@dataclass(frozen=True, slots=True)
class AttemptStarted(AttemptFact):
    """A trial's attempt is given to a worker; the first said of an attempt counts."""

    from_step: int
    at: float
    """Seconds since the epoch."""

    @property
    def subject(self) -> str:
        """As `Fact` says."""
        return f"trial {self.round}/{self.trial}"

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        trial.attempts.setdefault(
            self.attempt, Attempt(self.attempt, self.from_step, self.from_step, self.at)
        )


@dataclass(frozen=True, slots=True)
class CheckpointsRemoved(TrialFact):
    """Checkpoints are gone, or about to be; only a later attempt brings one back."""

    paths: tuple[str, ...]
    """As in `Checkpoint.path`; those never recorded are ignored."""

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        for key, saved in trial.checkpoints.items():
            if saved.checkpoint.path in self.paths:
                trial.checkpoints[key] = SavedCheckpoint(saved.attempt, saved.checkpoint, is_removed=True)


@dataclass(frozen=True, slots=True)
class TrialEnded(TrialFact):
    """A trial will never run again; the first end said of a trial counts."""

    state: TrialState
    reason: str | None
    at: float
    """Seconds since the epoch."""

    def __post_init__(self) -> None:
        if not self.state.is_final:
            raise ValueError(f"a trial ends in a final state; got {self.state}")

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        if trial.ended is None:
            trial.ended = self.state
            trial.reason = None if self.reason is None else storable_text(self.reason)


@dataclass(frozen=True, slots=True)
class TrialNoted(TrialFact):
    """Something to know of a trial, shown as its reason until its end gives another."""

    reason: str

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        trial.note = storable_text(self.reason)


@dataclass(frozen=True, slots=True)
class TrialScored(TrialFact):
    """A trial's best adapter was scored on `data.test`; the first score said of a trial counts."""

    score: FinalScore

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        trial.final_score = trial.final_score or self.score


@dataclass(frozen=True, slots=True)
class BranchAdvanced(Fact):
    """Where a comparison run stands; the last said of a trial's run to a horizon counts."""

    round: str
    branch: Branch

    @property
    def subject(self) -> str:
        """As `Fact` says."""
        return f"trial {self.round}/{self.branch.trial}"

    def apply(self, state: StudyState) -> None:
        """As `Fact` says."""
        branch, found = self.branch, state.round(self.round)
        if found is None or branch.trial not in found.trials:
            raise self.not_recorded()
        reason = None if branch.reason is None else storable_text(branch.reason)
        found.branches[branch.trial, branch.max_train_steps] = replace(branch, reason=reason)


@dataclass(frozen=True, slots=True)
class PromotionPlanned(Fact):
    """A round's file was planned; the last plan said of `to_round` counts."""

    promotion: Promotion

    @property
    def subject(self) -> str:
        """As `Fact` says."""
        return f"round {self.promotion.from_round}"

    def apply(self, state: StudyState) -> None:
        """As `Fact` says."""
        said = self.promotion
        if said.from_round not in state.rounds:
            raise self.not_recorded()
        kept = replace(said, plan=plain_json(said.plan), file_text=storable_text(said.file_text))
        state.put(state.promotions, said.to_round, kept)
