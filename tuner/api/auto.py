"""Several rounds by one call: a sweep of learning rates, and a whole study."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tuner.api.generate import score_at_the_end
from tuner.api.run import Prepare, Tell, has_begun
from tuner.config import RoundFile, edit_round, read_round, without_secrets
from tuner.errors import InputError, Interrupted, RoundStopped, StorageAway, TunerError
from tuner.playbook.restarts import MAX_GROWTH, Enough, next_horizon
from tuner.playbook.sweep import (
    PERFECT_ACCURACY,
    PERFECT_LOSS,
    ComputeBound,
    FirstHorizon,
    SweepDecision,
    SweepProblem,
    answer_without_a_sweep,
)
from tuner.store import exists, hold_study
from tuner.study.check import mean
from tuner.study.dashboard import next_name
from tuner.study.disk import taken_back
from tuner.study.dry_run import forgotten_if_refused
from tuner.study.folder import is_dry_run, open_folder, opened
from tuner.study.lookup import begun_round, find_trial
from tuner.study.outage import Waiting
from tuner.study.plan import RoundPlan
from tuner.study.promotion import (
    Overrides,
    PromotedRound,
    continue_passes,
    promote_held,
    promoted_from,
    write_round_file,
)
from tuner.study.results import earlier_results, reading_of
from tuner.study.sweep import first_sweep, next_sweep, with_first_horizon

T = TypeVar("T")

MOST_EPOCHS = 1_000_000


def sweep_round(
    file: RoundFile,
    *,
    epochs: float | None,
    run: Callable[[RoundFile], None],
    prepare: Prepare,
    tell: Tell,
    say: Tell = lambda text: None,
    stopping: Callable[[], bool] = lambda: False,
) -> FirstHorizon | ComputeBound:
    """Start or resume a sweep and write its result into the round file.

    `epochs` sets `run.production_steps`, which is written with the result. `run` starts or resumes a round;
    `tell` receives what was found and written, `say` why it waits between two rounds, which `stopping` ends.
    Raises TunerError if the sweep gives no result, and what running raises.
    """
    with forgotten_if_refused(file):
        file.spec.require_model("study sweep fits training rows")
        if epochs is not None:
            file = _with_epochs(file, epochs, prepare, tell)
        answer = _answer_at_once(file, prepare) or _decided(file, run, say, stopping)
    if isinstance(answer, SweepProblem):
        raise TunerError(answer.message)
    assert isinstance(answer, (FirstHorizon, ComputeBound))
    _say_and_write(file, answer, tell)
    return answer


def _decided(
    file: RoundFile, run: Callable[[RoundFile], None], say: Tell, stopping: Callable[[], bool]
) -> SweepDecision:
    """Run the rounds of a sweep until they decide."""
    found = next_sweep(file)
    if isinstance(found, RoundFile):
        _run(found, run)
    while isinstance(found, RoundFile):
        found = _through(file, partial(next_sweep, file), say, stopping)
        if isinstance(found, RoundFile):
            _through(file, partial(_run, found, run), say, stopping)
    return found


def refuse_epochs(epochs: float | None, *, is_dry_run: bool) -> None:
    """Raise InputError for an impossible number of epochs."""
    if epochs is not None and not 0 < epochs <= MOST_EPOCHS:
        raise InputError(f"--epochs {epochs:g}: expects a number above 0, and at most {MOST_EPOCHS:,}")
    if epochs is not None and is_dry_run:
        raise InputError(
            "--epochs: a dry run does not open the data to count its rows; set run.production_steps instead"
        )


def _with_epochs(file: RoundFile, epochs: float, prepare: Prepare, tell: Tell) -> RoundFile:
    """Return the file with `run.production_steps` set to this number of epochs, reported but not written.

    Raises InputError if that is less than `max_train_steps`.
    """
    planned = RoundPlan(file)
    with taken_back(planned.cache):
        rows = len(prepare(planned.absolute, planned.cache).train)
        batch_size = round(mean(planned.space["batch_size"]))
        steps = math.ceil(epochs * rows / batch_size)
        tell(
            f"--epochs {epochs:g}: of {rows} rows, {batch_size} a step: {steps} steps, the longest of a sweep"
        )
        comments = {"run.production_steps": f"{epochs:g} x {rows} rows"}
        return read_round(edit_round(file.text, {"run.production_steps": steps}, comments), file.path)


def _run(found: RoundFile, run: Callable[[RoundFile], None]) -> None:
    try:
        run(found)
    except StorageAway:
        raise
    except InputError:
        if not has_begun(found):
            found.path.unlink(missing_ok=True)
        raise


def _answer_at_once(file: RoundFile, prepare: Prepare) -> ComputeBound | None:
    """Return the estimate from the number of training rows; none in a dry run, which opens no data."""
    planned = RoundPlan(read_round(first_sweep(file), file.path))
    if is_dry_run(file):
        return None
    spec = planned.absolute
    with taken_back(planned.cache):
        data = prepare(spec, planned.cache)
    return answer_without_a_sweep(
        production_steps=spec.run.production_steps,
        batch_size=round(mean(planned.space["batch_size"])),
        train_rows=len(data.train),
    )


def _say_and_write(file: RoundFile, answer: FirstHorizon | ComputeBound, tell: Tell) -> None:
    match answer:
        case FirstHorizon(max_train_steps=steps, learning_rate=rate):
            tell(
                f"The training set is fitted in {steps} steps, fastest at a constant learning rate of "
                f"{rate:.3g}: the mean loss of a sample of training rows reaches {PERFECT_LOSS} or less, or "
                f"{PERFECT_ACCURACY:.0%} of its target tokens are predicted correctly."
            )
        case ComputeBound(message=message):
            tell(message)
    before = file.spec.max_train_steps
    if has_begun(file):
        tell(f"{file.spec.round} has started, so {file.path.name} keeps {before} steps: start another round")
        return
    found = with_first_horizon(file, answer)
    write_round_file(file.path, found.text, force=True, advice="")
    tell(f"wrote {file.path}: max_train_steps {before} -> {found.spec.max_train_steps}")


def _through(file: RoundFile, act: Callable[[], T], say: Tell, stopping: Callable[[], bool]) -> T:
    """Return what `act` does, and do it again while the database is away, as a running round does.

    Only after a round has run: before, a database that is not there is a mistake. Raises RoundStopped once it
    has been away for too long.
    """

    def there() -> T:
        storage = RoundPlan(file).absolute.storage
        if not exists(storage):
            raise StorageAway(f"{without_secrets(storage)}: the database is gone; put it back")
        return act()

    try:
        return Waiting(file.spec.run.storage_seconds, say, stopping).through(there)
    except StorageAway as error:
        raise RoundStopped(f"{error}. Earlier records are kept. Fix the problem") from error


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
    restarts: int = 0
    """How often to restart from the shortest horizon."""
    has_deadline: bool = False
    """Whether the caller limits the time."""
    say: Callable[[str], None] = lambda text: None
    """Receives messages between two rounds."""
    last: RoundFile | None = None
    """The latest round that has started."""

    def run_until_enough(self) -> Enough:
        """Return why there is no further round.

        Raises InputError for a round of a sweep, Interrupted when asked to stop, and what running raises.
        """
        refuse_sweep(self.first)
        file = _latest(self.first)
        self._run(file)
        while True:
            follows, written = self._through(file, partial(self._follow, file))
            self.last = file
            if not isinstance(written, PromotedRound):
                reason = written or (follows.reason if isinstance(follows, Enough) else "")
                taught_nothing = isinstance(follows, Enough) and follows.taught_nothing
                return Enough(f"enough after {file.spec.round}: {reason}", taught_nothing)
            self.promoted(written.document)
            if self.stopping():
                raise Interrupted(f"{file.spec.round} is complete and {written.path.name} is written")
            file = self._through(file, lambda: _latest(self.first))
            self._through(file, partial(self._run, file))

    def _run(self, file: RoundFile) -> None:
        try:
            self.run(file)
        finally:
            with suppress(StorageAway):
                if has_begun(file):
                    self.last = file

    def _follow(self, file: RoundFile) -> tuple[int | Enough, PromotedRound | str | None]:
        """Return what follows a complete round, and the next round if its file is written."""
        follows = _next_horizon(file, has_deadline=self.has_deadline)
        if self.restarts > 0:
            return follows, self._next_with_restarts(file)
        return follows, None if isinstance(follows, Enough) else self._promote(file, follows)

    def _through(self, file: RoundFile, act: Callable[[], T]) -> T:
        return _through(file, act, self.say, self.stopping)

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

    def _next_with_restarts(self, file: RoundFile) -> PromotedRound | str:
        """Write the next round's file and return it, or return why there is none."""
        name, folder = file.spec.round, open_folder(file.directory)
        with hold_study(folder.directory, folder.storage, folder.name), opened(folder) as store:
            return continue_passes(
                folder,
                store,
                first=self.first.spec.round,
                last=name,
                to=next_name(name),
                passes=self.restarts + 1,
                clock=time.time,
            )


def restarts_of(
    restarts: int | None, passes: int | None, *, spelt: tuple[str, str] = ("restarts=", "passes=")
) -> tuple[int, str | None]:
    """Return the number of restarts, and a hint if it was given by its former spelling, `passes`.

    `spelt` are the two names as the caller types them. Raises InputError for both, or a number that is too
    small.
    """
    new, former = spelt
    if restarts is not None and passes is not None:
        raise InputError(f"{former}{passes}: was renamed; pass {new}{restarts} only")
    for name, number, least in ((new, restarts, 0), (former, passes, 1)):
        if number is not None and number < least:
            raise InputError(f"{name}{number}: expects at least {least}")
    if passes is None:
        return restarts or 0, None
    return passes - 1, f"hint: {former}{passes} is now {new}{passes - 1}"


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
