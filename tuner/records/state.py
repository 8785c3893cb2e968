"""The state of a study, derived from its facts, and the base classes of facts."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, ClassVar, TypeVar

from tuner.records.space import hyperparameters_from_json
from tuner.records.throughput import Throughput
from tuner.records.trials import (
    AnswerScore,
    Attempt,
    Branch,
    Checkpoint,
    CheckpointKind,
    Evaluation,
    FinalScore,
    NodeChange,
    Promotion,
    RoundRecord,
    RunId,
    Trial,
    TrialState,
)

K = TypeVar("K")
V = TypeVar("V")


class FactError(Exception):
    """A fact that contradicts those recorded: a bug."""


class Said:
    """Anything that is said of a study. Its JSON form names its class, in lower case."""

    kinds: ClassVar[dict[str, type[Said]]] = {}

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Said.kinds[cls.__name__.lower()] = cls


class Fact(Said, ABC):
    """What is recorded: a frozen dataclass that knows what it changes.

    Saying a fact again, one that nothing has replaced or the whole history in its order, changes nothing.
    A new kind of fact is such a class, a description of its table (`kept` in `tuner.store`) and a migration.
    """

    __slots__ = ()

    @property
    @abstractmethod
    def subject(self) -> str:
        """Return what must be recorded before the fact."""

    @abstractmethod
    def apply(self, state: StudyState) -> None:
        """Change the state. Raises FactError where the fact cannot follow from it."""

    def not_recorded(self) -> FactError:
        """Return the error for a fact whose subject is unknown."""
        return FactError(f"{type(self).__name__}: {self.subject} is not recorded")


class RoundFact(Fact):
    """A fact about a round, which its field `round` names."""

    __slots__ = ()
    round: str

    @property
    def subject(self) -> str:
        """As `Fact` says."""
        return f"round {self.round}"

    def apply(self, state: StudyState) -> None:
        """As `Fact` says: change the round."""
        found = state.round(self.round)
        if found is None:
            raise self.not_recorded()
        self.change(found)

    @abstractmethod
    def change(self, found: RoundFacts) -> None:
        """Change what is known of the round."""


@dataclass(frozen=True, slots=True)
class TrialFact(Fact):
    """A fact about a trial."""

    round: str
    trial: int

    @property
    def subject(self) -> str:
        """As `Fact` says."""
        return f"trial {self.round}/{self.trial}"

    def apply(self, state: StudyState) -> None:
        """As `Fact` says: change the trial."""
        trial = state.trial(self.round, self.trial)
        if trial is None:
            raise self.not_recorded()
        self.change(trial)

    @abstractmethod
    def change(self, trial: TrialFacts) -> None:
        """Change what is known of the trial."""


@dataclass(frozen=True, slots=True)
class AttemptFact(TrialFact):
    """A fact about a trial's attempt, or about one of a comparison run of the trial."""

    attempt: int
    horizon: int | None = field(default=None, kw_only=True)
    """Where a comparison run of the trial ends; None where it is the trial itself."""

    @property
    def run(self) -> RunId:
        """Return what the attempt runs."""
        return RunId(self.round, self.trial, self.horizon)

    @property
    def subject(self) -> str:
        """As `Fact` says."""
        return f"attempt {self.attempt} of trial {self.round}/{self.trial}"

    def apply(self, state: StudyState) -> None:
        """As `Fact` says. A comparison run's progress is recorded as `BranchAdvanced` alone."""
        self.refuse_comparison()
        # Named, since a dataclass with slots is another class than the one that `super()` would mean.
        TrialFact.apply(self, state)

    def refuse_comparison(self) -> None:
        """Raises FactError where the fact is not about the trial itself."""
        if self.horizon is not None:
            raise FactError(f"{type(self).__name__}: {self.run} is a comparison run: record BranchAdvanced")

    def of(self, trial: TrialFacts) -> Attempt:
        """Return the attempt that it is about. Raises FactError if it is unknown."""
        if self.attempt not in trial.attempts:
            raise self.not_recorded()
        return trial.attempts[self.attempt]

    def reach(self, trial: TrialFacts, step: int) -> Attempt:
        """Let the attempt have come to a step, unless it has come further."""
        attempt = self.of(trial)
        if step > attempt.to_step:
            attempt = trial.attempts[self.attempt] = replace(attempt, to_step=step)
        return attempt


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """A checkpoint, the attempt that saved it, and whether it is gone.

    A removed one is kept, so that saying it was saved again does not revive it.
    """

    attempt: int
    checkpoint: Checkpoint
    is_removed: bool = False


@dataclass(slots=True)
class TrialFacts:
    """What is known of a trial."""

    asked: Trial
    """The trial as it was asked."""
    attempts: dict[int, Attempt] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    """By step."""
    checkpoints: dict[tuple[CheckpointKind, int], SavedCheckpoint] = field(default_factory=dict)
    ended: TrialState | None = None
    reason: str | None = None
    """What its end said."""
    note: str | None = None
    final_score: FinalScore | None = None
    answer_score: AnswerScore | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    """Other fields of the assembled Trial, by name, from kinds of facts that came later."""
    _trial: Trial | None = None
    """Once it was assembled."""

    @classmethod
    def of(cls, trial: Trial) -> TrialFacts:
        """Return what is known of a trial, without removed checkpoints."""
        newest = max((attempt.number for attempt in trial.attempts), default=1)
        is_final = trial.state.is_final
        return cls(
            as_asked(trial),
            attempts={attempt.number: attempt for attempt in trial.attempts},
            evaluations={evaluation.step: evaluation for evaluation in trial.evaluations},
            checkpoints={(c.kind, c.step): SavedCheckpoint(newest, c) for c in trial.checkpoints},
            ended=trial.state if is_final else None,
            reason=trial.reason if is_final else None,
            note=None if is_final else trial.reason,
            final_score=trial.final_score,
            answer_score=trial.answer_score,
            _trial=trial,
        )

    def copy(self) -> TrialFacts:
        """Return a copy to change."""
        return replace(
            self,
            attempts=dict(self.attempts),
            evaluations=dict(self.evaluations),
            checkpoints=dict(self.checkpoints),
            changes=dict(self.changes),
            _trial=None,
        )

    def trial(self) -> Trial:
        """Return the trial."""
        if self._trial is None:
            self._trial = self._assembled()
        return self._trial

    def _assembled(self) -> Trial:
        asked, attempts = self.asked, tuple(self.attempts[number] for number in sorted(self.attempts))
        there = [saved.checkpoint for saved in self.checkpoints.values() if not saved.is_removed]
        trial = Trial(
            round=asked.round,
            number=asked.number,
            hyperparameters=asked.hyperparameters,
            state=state_of(self.ended, attempts),
            reason=self.note if self.reason is None else self.reason,
            continues=asked.continues,
            evaluations=tuple(self.evaluations[step] for step in sorted(self.evaluations)),
            checkpoints=tuple(sorted(there, key=attrgetter("step", "kind"))),
            attempts=attempts,
            optuna_trial=asked.optuna_trial,
            final_score=self.final_score,
            answer_score=self.answer_score,
        )
        return replace(trial, **self.changes) if self.changes else trial


def as_asked(trial: Trial) -> Trial:
    """Return the fields of a trial that are recorded when it is asked."""
    return Trial(
        trial.round,
        trial.number,
        trial.hyperparameters,
        continues=trial.continues,
        optuna_trial=trial.optuna_trial,
    )


def state_of(ended_as: TrialState | None, attempts: Iterable[Attempt]) -> TrialState:
    """Return a trial's state: as it ended, or running while its latest attempt is open."""
    if ended_as is not None:
        return ended_as
    latest = max(attempts, key=attrgetter("number"), default=None)
    is_running = latest is not None and latest.ended_at is None
    return TrialState.RUNNING if is_running else TrialState.WAITING


@dataclass(slots=True)
class RoundFacts:
    """What is known of a round."""

    begun: RoundRecord
    """As it was said; its `throughputs`, `branches` and `node_changes` do not count."""
    throughputs: dict[str, Throughput] = field(default_factory=dict)
    """By session."""
    branches: dict[tuple[int, int], Branch] = field(default_factory=dict)
    """By trial and horizon."""
    node_changes: dict[tuple[float, str, str], NodeChange] = field(default_factory=dict)
    """By time, node and change."""
    trials: dict[int, TrialFacts] = field(default_factory=dict)
    _record: RoundRecord | None = None
    """Once it was assembled."""

    def copy(self) -> RoundFacts:
        """Return a copy to change, with the same trials."""
        return replace(
            self,
            throughputs=dict(self.throughputs),
            branches=dict(self.branches),
            node_changes=dict(self.node_changes),
            _record=None,
        )

    def record(self) -> RoundRecord:
        """Return the round."""
        if self._record is None:
            self._record = replace(
                self.begun,
                throughputs=tuple(work for _, work in sorted(self.throughputs.items())),
                branches=tuple(branch for _, branch in sorted(self.branches.items(), key=lambda b: b[0])),
                node_changes=tuple(self.node_changes[key] for key in sorted(self.node_changes)),
            )
        return self._record


@dataclass
class StudyState:
    """What is known of a study. What a fact costs does not grow with the number of trials."""

    rounds: dict[str, RoundFacts] = field(default_factory=dict)
    promotions: dict[str, Promotion] = field(default_factory=dict)
    """By the round that they lead to."""
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def add(self, facts: Iterable[Fact]) -> None:
        """Apply all of them, in this order, or none."""
        try:
            for fact in facts:
                fact.apply(self)
        except BaseException:  # raised again below; a Ctrl-C must not leave half of the facts either
            for undo in reversed(self._undo):
                undo()
            raise
        finally:
            self._undo.clear()

    def round(self, name: str) -> RoundFacts | None:
        """Return a round to change; None if it has not begun."""
        return None if name not in self.rounds else self.put(self.rounds, name, self.rounds[name].copy())

    def trial(self, round: str, number: int) -> TrialFacts | None:
        """Return a trial to change; None if it was never asked."""
        trials = self.rounds[round].trials if round in self.rounds else {}
        return None if number not in trials else self.put(trials, number, trials[number].copy())

    def put(self, where: dict[K, V], key: K, value: V) -> V:
        """Set an entry of what is known, until a later fact of the same `add` is refused."""
        before = {key: where[key]} if key in where else {}

        def undo() -> None:
            del where[key]
            where.update(before)

        self._undo.append(undo)
        where[key] = value
        return value


def plain_json(document: Mapping[str, Any]) -> Any:
    """Return a copy of a document as a database would return it."""
    return json.loads(json.dumps(document))


def plain_hyperparameters(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters as a database would return them."""
    return hyperparameters_from_json(plain_json(values))


def storable_text(text: str) -> str:
    """Return the text with NUL, which PostgreSQL refuses, and lone surrogates replaced.

    A worker's last words may hold any byte, and why a trial died must not be lost for one of them.
    """
    return text.replace("\0", "\ufffd").encode(errors="replace").decode()
