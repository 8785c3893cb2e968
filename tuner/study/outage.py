"""What a running round does while its database is away: it waits, and writes only if it is still its turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, TypeVar

from optuna.exceptions import StorageInternalError

from tuner.errors import Interrupted, StorageAway
from tuner.records import Fact, Promotion, RoundRecord, Trial
from tuner.report.format import duration
from tuner.store import Store, explained_at

T = TypeVar("T")

_log = logging.getLogger(__name__)

_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
_LOOK_SECONDS = 0.25
"""How often a waiting round looks whether it is to stop."""


class Lock(Protocol):
    """The write lock of the study."""

    @property
    def is_lost(self) -> bool:
        """Return whether it is known to be lost."""
        ...

    def renew(self) -> None:
        """Take it again if it was lost. Raises StudyTaken, StorageAway, StorageError."""
        ...


@dataclass
class Waiting:
    """Does something again while the database is away, less and less often."""

    patience_seconds: float
    say: Callable[[str], None]
    stopping: Callable[[], bool]
    """Whether the user asked to stop."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    meanwhile: str = "Nothing runs meanwhile"
    if_stopped: str = "nothing is lost"

    def through(self, act: Callable[[], T], error: StorageAway | None = None) -> T:
        """Return what `act` does, which must be right to do again; with an error, it has failed once.

        Raises StorageAway once the database has been away for too long, and Interrupted if the user asks to
        stop meanwhile.
        """
        if error is None:
            try:
                return act()
            except StorageAway as first:
                error = first
        begun, wait = self.clock(), _FIRST_WAIT_SECONDS
        _log.warning("%s", error)
        self.say(
            f"warning: {error}. {self.meanwhile}; trying again for {duration(self.patience_seconds)} "
            "(run.storage_patience)"
        )
        while (left := begun + self.patience_seconds - self.clock()) > 0:
            self._wait(min(wait, left))
            wait = min(2 * wait, _LONGEST_WAIT_SECONDS)
            try:
                found = act()
            except StorageAway as again:
                error = again
                _log.info("%s", error)
                continue
            _log.warning("the database is back")
            self.say(f"the database is back after {duration(self.clock() - begun)}; nothing is lost")
            return found
        raise error

    def _wait(self, seconds: float) -> None:
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            if self.stopping():
                raise Interrupted(f"stopped while the database was away: {self.if_stopped}")
            self.sleep(min(left, _LOOK_SECONDS))


@dataclass
class Outage:
    """Does what needs the database of a running round, and tries again while that is away.

    Whoever calls waits: so no trial is asked and no file deleted. Workers train on, and what they say waits
    in the memory of this process.
    """

    url: str
    lock: Lock
    patience_seconds: float
    say: Callable[[str], None]
    stopping: Callable[[], bool]
    """Whether the user asked to stop."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    @property
    def waiting(self) -> Waiting:
        """Return how it waits."""
        return Waiting(
            self.patience_seconds,
            self.say,
            self.stopping,
            self.clock,
            self.sleep,
            meanwhile="Running trials go on, and what they report waits in memory",
            if_stopped="what was reported since is run again",
        )

    def through(self, act: Callable[[], T]) -> T:
        """Return what `act` does, which must be right to do again.

        Raises StorageAway once the database has been away for too long, StudyTaken where another process runs
        the study, and Interrupted if the user asks to stop meanwhile.
        """
        try:
            return self._once(act)
        except StorageAway as error:
            return self.waiting.through(lambda: self._once(act), error)

    def _once(self, act: Callable[[], T]) -> T:
        if self.lock.is_lost:
            self.lock.renew()
        with explained_at(self.url):
            try:
                return act()
            except StorageInternalError as error:
                # Optuna says "invalid data in the commit" of whatever its database says: that is the cause.
                raise (error.__cause__ or error) from None


@dataclass(frozen=True)
class WaitingStore:
    """A Store that waits while its database is away."""

    inner: Store
    outage: Outage

    def record(self, *facts: Fact) -> None:
        """As `Store` says."""
        self.outage.through(lambda: self.inner.record(*facts))

    def rounds(self) -> tuple[RoundRecord, ...]:
        """As `Store` says."""
        return self.outage.through(self.inner.rounds)

    def round(self, name: str) -> RoundRecord | None:
        """As `Store` says."""
        return self.outage.through(lambda: self.inner.round(name))

    def trials(
        self, round: str, *, numbers: Collection[int] | None = None, examples: bool = True
    ) -> tuple[Trial, ...]:
        """As `Store` says."""
        return self.outage.through(lambda: self.inner.trials(round, numbers=numbers, examples=examples))

    def trial(self, round: str, number: int) -> Trial:
        """As `Store` says."""
        return self.outage.through(lambda: self.inner.trial(round, number))

    def num_results(self, round: str) -> int:
        """As `Store` says."""
        return self.outage.through(lambda: self.inner.num_results(round))

    def promotions(self) -> tuple[Promotion, ...]:
        """As `Store` says."""
        return self.outage.through(self.inner.promotions)

    def close(self) -> None:
        """As `Store` says."""
        self.inner.close()
