"""The store protocol, an in-memory store and a cached store."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol

from tuner.records import Fact, Promotion, RoundRecord, StudyState, Trial
from tuner.records.state import RoundFacts, TrialFacts


class Store(Protocol):
    """Stores the facts of one study and returns them as records.

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
        """Return all started rounds, in the order in which they started."""
        ...

    def round(self, name: str) -> RoundRecord | None:
        """Return a round; None if it has not started."""
        ...

    def trials(
        self, round: str, *, numbers: Collection[int] | None = None, examples: bool = True
    ) -> tuple[Trial, ...]:
        """Return a snapshot of a round's trials, or of some, by number; empty for an unknown round.

        Without `examples` evaluations may lack the losses of single examples, which take most of the space.
        """
        ...

    def trial(self, round: str, number: int) -> Trial:
        """Return a trial. Raises KeyError if it was never asked."""
        ...

    def num_results(self, round: str) -> int:
        """Return how many of a round's trials have a result, without reading them."""
        ...

    def promotions(self) -> tuple[Promotion, ...]:
        """Return the current plans, in the order in which they were made."""
        ...

    def close(self) -> None:
        """Close files and connections."""
        ...


class MemoryStore:
    """A Store in the memory of this process."""

    def __init__(self) -> None:
        self._state = StudyState()

    def record(self, *facts: Fact) -> None:
        """As `Store` says."""
        self._state.add(facts)

    def take_over(self, record: RoundRecord, trials: Iterable[Trial]) -> None:
        """Add a round loaded from another store."""
        self._state.rounds[record.name] = RoundFacts(
            record,
            throughputs={work.session: work for work in record.throughputs},
            branches={(branch.trial, branch.max_train_steps): branch for branch in record.branches},
            node_changes={(each.at, each.node, each.change): each for each in record.node_changes},
            trials={trial.number: TrialFacts.of(trial) for trial in trials},
        )

    def rounds(self) -> tuple[RoundRecord, ...]:
        """As `Store` says."""
        begun = (known.record() for known in self._state.rounds.values())
        return tuple(sorted(begun, key=lambda record: (record.begun_at, record.name)))

    def round(self, name: str) -> RoundRecord | None:
        """As `Store` says."""
        known = self._state.rounds.get(name)
        return None if known is None else known.record()

    def trials(
        self, round: str, *, numbers: Collection[int] | None = None, examples: bool = True
    ) -> tuple[Trial, ...]:
        """As `Store` says."""
        known = self._state.rounds.get(round)
        trials = {} if known is None else known.trials
        there = sorted(trials) if numbers is None else sorted(trials.keys() & set(numbers))
        return tuple(trials[number].trial() for number in there)

    def num_results(self, round: str) -> int:
        """As `Store` says."""
        return sum(trial.state.is_result for trial in self.trials(round))

    def trial(self, round: str, number: int) -> Trial:
        """As `Store` says."""
        return self._state.rounds[round].trials[number].trial()

    def promotions(self) -> tuple[Promotion, ...]:
        """As `Store` says."""
        return tuple(sorted(self._state.promotions.values(), key=lambda p: (p.planned_at, p.to_round)))

    def close(self) -> None:
        """As `Store` says; there is nothing to let go of."""


class CachedStore(MemoryStore):
    """A Store whose facts are recorded in `inner` first; each round is read from it once.

    Right while this process is the one that writes, which the study's lock ensures; else as of its reading.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__()
        self._inner = inner
        self._as_read: dict[str, tuple[Trial, ...]] = {}
        """Trials of rounds before the first fact is recorded; afterwards all are in the state."""
        self._has_recorded = False
        for record in inner.rounds():
            self.take_over(record, ())

    def record(self, *facts: Fact) -> None:
        """As `Store` says."""
        if not self._has_recorded:
            for record in self.rounds():
                self.take_over(record, self.trials(record.name))
            self._has_recorded = True
            self._as_read.clear()
        self._inner.record(*facts)
        super().record(*facts)

    def trials(
        self, round: str, *, numbers: Collection[int] | None = None, examples: bool = True
    ) -> tuple[Trial, ...]:
        """As `Store` says."""
        if self._has_recorded:
            return super().trials(round, numbers=numbers)
        if round not in self._as_read:
            if numbers is not None or not examples:
                return self._inner.trials(round, numbers=numbers, examples=examples)
            self._as_read[round] = self._inner.trials(round)
        known = self._as_read[round]
        return known if numbers is None else tuple(trial for trial in known if trial.number in numbers)

    def num_results(self, round: str) -> int:
        """As `Store` says."""
        return super().num_results(round) if self._has_recorded else self._inner.num_results(round)

    def trial(self, round: str, number: int) -> Trial:
        """As `Store` says."""
        return super().trial(round, number) if self._has_recorded else self._inner.trial(round, number)

    def promotions(self) -> tuple[Promotion, ...]:
        """As `Store` says: another process may plan one."""
        return self._inner.promotions()

    def close(self) -> None:
        """As `Store` says."""
        self._inner.close()
