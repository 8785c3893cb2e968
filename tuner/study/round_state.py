"""A running round kept up fact by fact, and what attempts say of a trial."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.records import Attempt, Branch, Fact, Trial, TrialAsked, TrialFact, TrialState
from tuner.store import Store

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


def has_open_attempt(run: Trial | Branch) -> bool:
    """Whether it runs, as far as the facts know: a pruned trial does until its worker has let it go."""
    return bool(run.attempts) and run.attempts[-1].ended_at is None


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
    if isinstance(fact, TrialAsked):
        return fact.trial.number
    return fact.trial if isinstance(fact, TrialFact) else None
