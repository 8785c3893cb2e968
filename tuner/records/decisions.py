"""Facts recorded by the study itself: rounds started, trials asked and ended, checkpoints removed."""

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
    """A round starts, or resumes with a changed file."""

    round: RoundRecord
    """Of it `throughputs`, `branches` and `node_changes` are not recorded.

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
            begun = replace(self.round, spec=spec, throughputs=(), branches=(), node_changes=())
            state.put(state.rounds, name, RoundFacts(begun))
            return
        self.refuse_other_horizon(found.begun.max_train_steps)
        found.begun = replace(found.begun, spec=spec)

    def refuse_other_horizon(self, begun: int | None) -> None:
        """Raise FactError if the round started with another horizon."""
        if begun != self.round.max_train_steps:
            raise FactError(
                f"{self.round.name} started with other max_train_steps than {self.round.max_train_steps}"
            )


@dataclass(frozen=True, slots=True)
class TrialAsked(Fact):
    """A trial has its number and hyperparameters, and is waiting."""

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
        """Raise FactError if the number belongs to a trial with other hyperparameters."""
        same = dict(asked.hyperparameters) == dict(self.trial.hyperparameters)
        if not same or asked.continues != self.trial.continues:
            raise FactError(f"{self.trial.name} was asked with other hyperparameters")


@dataclass(frozen=True, slots=True)
class AttemptStarted(AttemptFact):
    """A trial's attempt is assigned to a worker; the first record of an attempt is kept."""

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
    """Checkpoints have been or are about to be removed; only a later attempt can save one again."""

    paths: tuple[str, ...]
    """As in `Checkpoint.path`; unknown paths are ignored."""

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        for key, saved in trial.checkpoints.items():
            if saved.checkpoint.path in self.paths:
                trial.checkpoints[key] = SavedCheckpoint(saved.attempt, saved.checkpoint, is_removed=True)


@dataclass(frozen=True, slots=True)
class TrialEnded(TrialFact):
    """A trial has ended for good; the first end of a trial is kept."""

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
    """A note on a trial, shown as its reason until its end gives another."""

    reason: str

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        trial.note = storable_text(self.reason)


@dataclass(frozen=True, slots=True)
class TrialScored(TrialFact):
    """A trial's best adapter was scored on `data.test`; the first score of a trial is kept."""

    score: FinalScore

    def change(self, trial: TrialFacts) -> None:
        """As `TrialFact` says."""
        trial.final_score = trial.final_score or self.score


@dataclass(frozen=True, slots=True)
class BranchAdvanced(Fact):
    """The state of a comparison run; the last one of a trial's run to a horizon is kept."""

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
    """A round's file was planned; the last plan for `to_round` is kept."""

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
