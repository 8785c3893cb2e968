"""A running round kept up fact by fact, facts read from memory, and what attempts say of a trial."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.records import Attempt, Promotion, RoundRecord, Trial, TrialState
from tuner.store import MemoryStore, Store
from tuner.store.facts import (
    AttemptEnded,
    AttemptPlaced,
    AttemptStarted,
    BranchAdvanced,
    CheckpointSaved,
    EvaluationMade,
    Fact,
    PromotionPlanned,
    RoundBegun,
    StepsRun,
    TrialAnswered,
    TrialAsked,
    TrialEnded,
    TrialNoted,
    TrialScored,
    WorkMeasured,
)

MAX_ATTEMPTS = 3
"""Attempts in a row that may die without a new checkpoint before what they try is failed."""


def have_failed(attempts: Sequence[Attempt], *, newest_step: int) -> bool:
    """Whether the last attempts died, each without a checkpoint beyond where it had started.

    `newest_step` is that of the newest resumable checkpoint.
    """
    fruitless = 0
    for attempt in reversed(attempts):
        if attempt.outcome not in ("died", "failed") or (
            attempt.outcome == "died" and attempt.from_step < newest_step
        ):
            break
        fruitless += 1
    return fruitless >= MAX_ATTEMPTS


def has_open_attempt(trial: Trial) -> bool:
    """Whether the trial runs, as far as the facts know: a pruned one does until its worker has let it go."""
    return bool(trial.attempts) and trial.attempts[-1].ended_at is None


def has_failed(trial: Trial) -> bool:
    """Whether the last attempts died, each without a checkpoint beyond where it had started."""
    newest = max((c.step for c in trial.checkpoints if c.kind != "best"), default=0)
    return have_failed(trial.attempts, newest_step=newest)


def unreplaced(trials: Sequence[Trial]) -> list[Trial]:
    """Failed trials that no later trial repeats."""
    return [
        trial
        for trial in trials
        if trial.state == TrialState.FAILED
        and not any(t.number > trial.number and t.hyperparameters == trial.hyperparameters for t in trials)
    ]


class MirroredStore:
    """A Store whose facts are recorded in `inner` first; what is read is a replay of what `inner` holds.

    Right only while this process is the one that writes, which the study's lock ensures.
    """

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self._memory = MemoryStore()
        for record in inner.rounds():
            self._memory.take_over(record, inner.trials(record.name))

    def record(self, *facts: Fact) -> None:
        """As `Store` says."""
        self._inner.record(*facts)
        self._memory.record(*facts)

    def rounds(self) -> tuple[RoundRecord, ...]:
        """As `Store` says."""
        return self._memory.rounds()

    def trials(self, round: str) -> tuple[Trial, ...]:
        """As `Store` says."""
        return self._memory.trials(round)

    def trial(self, round: str, number: int) -> Trial:
        """As `Store` says."""
        return self._memory.trial(round, number)

    def promotions(self) -> tuple[Promotion, ...]:
        """As `Store` says."""
        return self._inner.promotions()

    def close(self) -> None:
        """As `Store` says."""
        self._inner.close()


class RoundState:
    """The trials of a round while it runs: what a fact costs does not grow with their number.

    Right only while all facts of the round's trials are recorded here.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name = store, name
        self._trials = {trial.number: trial for trial in store.trials(name)}
        self._all: tuple[Trial, ...] | None = None
        self._open = {number: trial for number, trial in self._trials.items() if not trial.state.is_final}
        self._num_failed = sum(trial.state == TrialState.FAILED for trial in self._trials.values())
        self._changed = set(self._trials)

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All of them, by number."""
        if self._all is None:
            self._all = tuple(self._trials.values())
        return self._all

    @property
    def open(self) -> tuple[Trial, ...]:
        """Those that have not ended, by number."""
        return tuple(self._open[number] for number in sorted(self._open))

    @property
    def num_promised(self) -> int:
        """Trials that count, or will, towards `search.trials`."""
        return len(self._trials) - self._num_failed

    def trial(self, number: int) -> Trial:
        """The trial of a number."""
        return self._trials[number]

    def record(self, *facts: Fact) -> None:
        """As `Store` says."""
        self._store.record(*facts)
        for number in {number for fact in facts if (number := _trial_of(fact)) is not None}:
            self._replace(self._store.trial(self._name, number))

    def changed(self) -> tuple[Trial, ...]:
        """Trials of which facts were recorded since this was asked last; at first, all."""
        changed, self._changed = sorted(self._changed), set()
        return tuple(self._trials[number] for number in changed)

    def _replace(self, trial: Trial) -> None:
        before = self._trials.get(trial.number)
        was_failed = before is not None and before.state == TrialState.FAILED
        self._num_failed += (trial.state == TrialState.FAILED) - was_failed
        self._trials[trial.number], self._all = trial, None
        self._changed.add(trial.number)
        if trial.state.is_final:
            self._open.pop(trial.number, None)
        else:
            self._open[trial.number] = trial


def _trial_of(fact: Fact) -> int | None:
    """The number of the trial that a fact is about; None for what is about a round."""
    match fact:
        case TrialAsked(trial=trial):
            return trial.number
        case RoundBegun() | BranchAdvanced() | WorkMeasured() | PromotionPlanned():
            return None
        case _:
            return fact.trial


def history(trial: Trial) -> list[Fact]:
    """Facts from which a trial follows."""
    facts: list[Fact] = [TrialAsked(trial)]
    for attempt in trial.attempts:
        name = (trial.round, trial.number, attempt.number)
        facts += [
            AttemptStarted(*name, attempt.from_step, attempt.started_at),
            StepsRun(*name, attempt.to_step),
        ]
        if attempt.environment:
            facts.append(AttemptPlaced(*name, attempt.environment))
    facts += [EvaluationMade(trial.round, trial.number, evaluation) for evaluation in trial.evaluations]
    newest = max((attempt.number for attempt in trial.attempts), default=1)
    facts += [CheckpointSaved(trial.round, trial.number, newest, c) for c in trial.checkpoints]
    for attempt in trial.attempts:
        if attempt.ended_at is not None and attempt.outcome is not None:
            name = (trial.round, trial.number, attempt.number)
            facts.append(
                AttemptEnded(*name, attempt.to_step, attempt.ended_at, attempt.outcome, attempt.message)
            )
    ended = max((a.ended_at or 0.0 for a in trial.attempts), default=0.0)
    if trial.state.is_final:
        facts.append(TrialEnded(trial.round, trial.number, trial.state, trial.reason, ended))
    elif trial.reason is not None:
        facts.append(TrialNoted(trial.round, trial.number, trial.reason))
    if trial.final_score is not None:
        facts.append(TrialScored(trial.round, trial.number, trial.final_score))
    if trial.answer_score is not None:
        facts.append(TrialAnswered(trial.round, trial.number, trial.answer_score))
    return facts
