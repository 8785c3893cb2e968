"""`study auto`: run and promote rounds until the playbook suggests no further one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tuner.api.run import Prepare, Tell, has_begun
from tuner.api.score import score_at_the_end
from tuner.config import RoundFile
from tuner.errors import InputError, Interrupted
from tuner.playbook.restarts import MAX_GROWTH, Enough, next_horizon
from tuner.store import hold_study
from tuner.study.dashboard import next_name
from tuner.study.folder import open_folder, opened
from tuner.study.lookup import begun_round, find_trial
from tuner.study.promotion import Overrides, PromotedRound, continue_passes, promote_held, promoted_from
from tuner.study.results import earlier_results, reading_of


@dataclass
class Automatic:
    """Run the latest round descended from a file, promote it and run the next, until no more is needed.

    All state is in facts and files, so the same call resumes.
    """

    first: RoundFile
    run: Callable[[RoundFile], None]
    """Starts or resumes a round."""
    promoted: Callable[[Mapping[str, Any]], None]
    """Called with the JSON document of each promotion."""
    stopping: Callable[[], bool]
    passes: int = 1
    """How often to start from the shortest horizon."""
    has_deadline: bool = False
    """Whether the caller limits the time."""
    last: RoundFile | None = None
    """The latest round that has started."""

    def run_until_enough(self) -> Enough:
        """Return why there is no further round.

        Raises InputError for a round of a sweep, Interrupted when asked to stop, and what running raises.
        """
        refuse_sweep(self.first)
        while True:
            file = _latest(self.first)
            try:
                self.run(file)
            finally:
                if has_begun(file):
                    self.last = file
            follows = _next_horizon(file, has_deadline=self.has_deadline)
            written: PromotedRound | str | None = None
            if self.passes > 1:
                written = self._next_in_passes(file)
            elif not isinstance(follows, Enough):
                written = self._promote(file, follows)
            if not isinstance(written, PromotedRound):
                reason = written or (follows.reason if isinstance(follows, Enough) else "")
                taught_nothing = isinstance(follows, Enough) and follows.taught_nothing
                return Enough(f"enough after {file.spec.round}: {reason}", taught_nothing)
            self.promoted(written.document)
            if self.stopping():
                raise Interrupted(f"{file.spec.round} is complete and {written.path.name} is written")

    def score_the_best(self, enough: Enough, prepare: Prepare, tell: Tell) -> str | None:
        """Score the study's best trial on `data.test`, once, if the rounds ended without an interruption.

        Returns a note for the user, or None.
        """
        if self.last is None or enough.taught_nothing:
            return None
        folder = open_folder(self.last.directory)
        trial, _ = find_trial(folder, "best")
        return score_at_the_end(folder, trial, prepare=prepare, tell=tell)

    def _promote(self, file: RoundFile, max_train_steps: int) -> PromotedRound:
        return promote_held(
            open_folder(file.directory),
            to=next_name(file.spec.round),
            from_round=file.spec.round,
            overrides=Overrides(max_train_steps, reason=f"at most {MAX_GROWTH} times the first horizon"),
        )

    def _next_in_passes(self, file: RoundFile) -> PromotedRound | str:
        """Write the next round's file and return it, or return why there is none."""
        name, folder = file.spec.round, open_folder(file.directory)
        with hold_study(folder.directory, folder.storage, folder.name), opened(folder) as store:
            return continue_passes(
                folder,
                store,
                first=self.first.spec.round,
                last=name,
                to=next_name(name),
                passes=self.passes,
                clock=time.time,
            )


def refuse_sweep(file: RoundFile) -> None:
    """Raise InputError for a round that is never promoted."""
    folder = open_folder(file.directory)
    with opened(folder) as store:
        is_sweep = folder.is_sweep(file.spec.round, store)
    if is_sweep:
        raise InputError(
            f"{file.path}: {file.spec.round} is a round of a sweep, which is never promoted; pass the round "
            "file that the sweep started from"
        )


def _latest(file: RoundFile) -> RoundFile:
    """Return the last round in the line of promotions from a round."""
    folder = open_folder(file.directory)
    with opened(folder) as store:
        while (name := promoted_from(folder, store, file.spec.round)) is not None:
            file = folder.plan(name).file
        return file


def _next_horizon(file: RoundFile, *, has_deadline: bool) -> int | Enough:
    """Return the horizon of the next round, or why the finished round is the last."""
    with opened(open_folder(file.directory)) as store:
        record = begun_round(store, file.spec.round)
        results, reading = reading_of(store, record)
        return next_horizon(results, reading, earlier_results(store, record), has_deadline=has_deadline)
