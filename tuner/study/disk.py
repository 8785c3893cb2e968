"""Disk space: which checkpoints are kept, what a round will need, and what is free."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuner.config import RoundSpec
from tuner.errors import InputError, StorageError
from tuner.methods.plug_ins import state_bytes
from tuner.playbook.comparison_runs import ComparisonRule
from tuner.playbook.promotion import TOP, incumbents
from tuner.playbook.restarts import num_carried
from tuner.records import Checkpoint, CheckpointKind, Choices, Fixed, Promotion, Ready, RoundRecord, Trial
from tuner.report.format import count, duration, size
from tuner.store.database import database_file, is_sqlite, parse_url
from tuner.study.plan import RoundPlan


@dataclass(frozen=True, slots=True)
class Unneeded:
    """Checkpoints of a trial that has ended."""

    trial: Trial
    checkpoints: tuple[Checkpoint, ...]
    reason: str

    @property
    def paths(self) -> tuple[str, ...]:
        """As in `Checkpoint.path`."""
        return tuple(checkpoint.path for checkpoint in self.checkpoints)

    @property
    def num_bytes(self) -> int:
        """Their size on disk."""
        return sum(checkpoint.size_bytes for checkpoint in self.checkpoints)


def not_retained(
    trials: Sequence[Trial],
    *,
    keep_best_trials: int | None,
    carried: int = TOP,
    promised: Collection[int] = (),
) -> Iterator[Unneeded]:
    """Return the checkpoints that `checkpoints.keep_best_trials` does not keep; None keeps all.

    It keeps the adapters of the best trials, and the checkpoints that longer rounds continue from: resumable
    ones of the best `carried` trials and of the `promised` ones, which a plan names. A trial that has fallen
    behind never comes back, since an ended trial does not change; so nothing is deleted too early.
    """
    if keep_best_trials is None:
        return
    order = [trial.number for trial in incumbents(trials, max(keep_best_trials, carried))]
    best, resumable = order[:keep_best_trials], {*order, *promised}
    for trial in trials:
        if not trial.state.is_final or trial.number in best:
            continue
        given_up = tuple(
            c for c in trial.checkpoints if c.kind == CheckpointKind.BEST or trial.number not in resumable
        )
        if given_up:
            yield Unneeded(trial, given_up, f"not among the best {keep_best_trials}")


def num_kept(num_trials: int, keep_best_trials: int | None) -> int:
    """Return how many trials of a round keep a resumable checkpoint once all have ended."""
    return num_trials if keep_best_trials is None else min(num_trials, max(keep_best_trials, TOP))


def num_carried_over(num_trials: int, *, passes: int, promotions: Sequence[Promotion]) -> int:
    """Return how many of a round's best trials longer rounds may continue: three for `study promote`.

    With `study auto --restarts`, each pass takes a third of a round's number, of the trials that the passes
    before have left. `passes`, or the plan of an earlier promotion, sets the number of passes.
    """
    planned = max([passes, *(int(promotion.plan.get("passes", 1)) for promotion in promotions)])
    return TOP if planned == 1 else max(TOP, planned * num_carried(num_trials))


def promised_trials(promotions: Sequence[Promotion], round_name: str) -> set[int]:
    """Return the trials of a round that the plans of later rounds continue."""
    named = [str(entry["trial"]) for plan in promotions for entry in plan.plan.get("continues", ())]
    places = [name.rpartition("/") for name in named]
    return {int(number) for name, _, number in places if name == round_name}


def unneeded(
    record: RoundRecord,
    trials: Sequence[Trial],
    *,
    later: Sequence[RoundRecord],
    promotions: Sequence[Promotion],
    keep_best_trials: int | None,
    is_dry_run: bool,
) -> Iterator[Unneeded]:
    """Return what `study clean` can free in a round; `later` are the rounds that started after it.

    Nothing of a trial that has not ended; of a dry run, and of a sweep whose result is in use, everything
    of the others; else the `last` checkpoints, and those that the retention rule does not keep.
    """
    whole = (
        "a dry run: nothing was trained"
        if is_dry_run
        else "a sweep whose result is in use"
        if record.is_sweep and any(not other.is_sweep for other in later)
        else None
    )
    ended = [trial for trial in trials if trial.state.is_final and trial.checkpoints]
    if whole is not None:
        yield from (Unneeded(trial, trial.checkpoints, whole) for trial in ended)
        return
    limit = None if record.is_sweep else keep_best_trials
    kept = not_retained(
        trials,
        keep_best_trials=limit,
        carried=num_carried_over(len(trials), passes=1, promotions=promotions),
        promised=promised_trials(promotions, record.name),
    )
    behind = {unneeded.trial.number: unneeded for unneeded in kept}
    for trial in ended:
        found = behind.get(trial.number)
        last = {c for c in trial.checkpoints if c.kind == CheckpointKind.LAST}
        freed = last | set(found.checkpoints if found else ())
        if freed:
            ordered = tuple(c for c in trial.checkpoints if c in freed)
            yield Unneeded(trial, ordered, found.reason if found else "ended")


_WEIGHT_BYTES = 4
"""Bytes of an adapter's weight on disk, in float32."""

_MOST_STARTS: Mapping[ComparisonRule, int] = {False: 0, "auto": 1, True: 2}
"""The most stable checkpoints that a trial keeps for comparison runs."""

WORKING_BYTES = 16 * 2**20
"""Space for the database and its journal, the logs and the tokenised rows of a small dataset: with less, no
round starts or resumes."""
_LOOK_SECONDS = 1.0
"""How often free space is looked at while there is none."""
SAVING_BYTES = WORKING_BYTES // 2
"""With less, a running round stops. Half of the above, so that a resumed round does not stop again at once.
"""


def checkpoint_bytes(spec: RoundSpec, adapter_weights: int) -> int:
    """Return the most bytes that the checkpoints of a round take: best adapters, a `last`, stable ones.

    With `keep_best_trials`, after all trials have ended; before that, those in the slots come on top.
    """
    best = spec.checkpoints.keep_best * _WEIGHT_BYTES * adapter_weights
    kept = num_kept(spec.num_trials, spec.checkpoints.most_kept_trials)
    # A `last`, the end of the stable phase, and the starts of comparison runs.
    resumable = 2 + _MOST_STARTS[spec.run.decay_branches]
    return kept * (best + resumable * resumable_bytes(spec, adapter_weights))


def checkpoints_of_commands(spec: RoundSpec, size_bytes: int) -> int:
    """Return the most bytes that the checkpoints of a round of commands take; each of them has this size."""
    kept = num_kept(spec.num_trials, spec.checkpoints.most_kept_trials)
    resumable = 2 + _MOST_STARTS[spec.run.decay_branches]
    return kept * (spec.checkpoints.keep_best + resumable) * size_bytes


def resumable_bytes(spec: RoundSpec, adapter_weights: int) -> int:
    """Return the most bytes of one resumable checkpoint: weights, moments, and the best adapter so far."""
    moments = max(_state_bytes(spec))
    return (2 * _WEIGHT_BYTES + moments) * adapter_weights


def least_trial_bytes(spec: RoundSpec, adapter_weights: int) -> int:
    """Return the least bytes of a trial's checkpoints: one best adapter and a `last` that equals it."""
    moments = min(_state_bytes(spec))
    return (2 * _WEIGHT_BYTES + moments) * adapter_weights


def _state_bytes(spec: RoundSpec) -> list[int]:
    """Return the bytes of optimizer state per weight, for each optimizer that a trial can have."""
    if spec.command is not None:
        return [0]  # its checkpoints are measured when the first is kept
    chosen = spec.space()["optimizer"]
    assert isinstance(chosen, (Fixed, Choices))
    names = chosen.values if isinstance(chosen, Choices) else (chosen.value,)
    return [state_bytes(str(name), spec.plug_ins) for name in names]


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write at `path`, which may not exist yet."""
    return shutil.disk_usage(nearest_existing(path)).free


@dataclass(frozen=True)
class RoundDisk:
    """The paths that a round writes to, and the space it needs there."""

    plan: RoundPlan
    free: Callable[[Path], int] = free_bytes

    def refuse_unwritable(self) -> None:
        """Raise StorageError if checkpoints cannot be written; leave nothing behind."""
        directory = self.plan.checkpoints
        try:
            place = nearest_existing(directory)
            for link in (directory, *directory.parents):
                if link.is_symlink() and not link.exists():
                    raise FileNotFoundError(
                        errno.ENOENT, f"{link} is a link to {link.readlink()}, which does not exist"
                    )
            if not place.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{place} is a file")
            probe = place / f".tuner-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise StorageError(
                f"checkpoints.directory: cannot write to {directory}: {error.strerror}; "
                "set a writable directory"
            ) from error

    def refuse_full(self) -> None:
        """Raise StorageError if there is not enough working space. Called before anything is loaded."""
        self._refuse(dict.fromkeys(self._places(), WORKING_BYTES), "working space")

    def refuse_too_small(self, ready: Ready, trials: Sequence[Trial]) -> None:
        """Raise StorageError if the remaining trials of the round need more than is free."""
        spec = self.plan.spec
        left = spec.num_trials - sum(trial.state.is_result for trial in trials)
        left = min(left, num_kept(left, spec.checkpoints.most_kept_trials))
        if left <= 0:
            return
        a_trial = least_trial_bytes(spec, ready.smallest_adapter)
        there = sum(c.size_bytes for t in trials if not t.state.is_final for c in t.checkpoints)
        # The checkpoint before the last is kept until a trial ends.
        before_last = min(ready.slots, left) * resumable_bytes(spec, ready.smallest_adapter)
        in_flight = self._in_flight_bytes(ready) + before_last
        needed = max(0, left * a_trial - there) + in_flight + WORKING_BYTES
        needs = dict.fromkeys(self._places(), WORKING_BYTES) | {self.plan.checkpoints: needed}
        why = f"{count(left, 'trial')} of at least {size(a_trial)} each"
        self._refuse(needs, f"{why}, and working space")

    def shortage(self, ready: Ready) -> str | None:
        """Return why a running round must stop and save while it still can; None if there is enough space."""
        needs = dict.fromkeys(self._places(), SAVING_BYTES)
        needs[self.plan.checkpoints] += self._in_flight_bytes(ready)
        return self._shortage(needs, "enough to save every running trial")

    def room_bytes(self, ready: Ready) -> int:
        """Return the free bytes below which a worker pauses: enough to save what is in its slots."""
        return SAVING_BYTES + self._in_flight_bytes(ready)

    def _in_flight_bytes(self, ready: Ready) -> int:
        """Return the bytes that trials in the slots write before they delete older checkpoints."""
        weights = ready.largest_adapter
        return ready.slots * (resumable_bytes(self.plan.spec, weights) + _WEIGHT_BYTES * weights)

    def _places(self) -> list[Path]:
        database = parse_url(self.plan.absolute.storage)
        beside = [database_file(database).parent] if is_sqlite(database) else []
        return [self.plan.checkpoints, *beside]

    def _refuse(self, needs: Mapping[Path, int], what_for: str) -> None:
        shortage = self._shortage(needs, what_for)
        if shortage is not None:
            raise StorageError(
                f"no disk: {shortage}. Free some space (tuner study clean lists checkpoints that are no "
                "longer needed), lower search.trials, or set checkpoints.directory to another disk"
            )

    def _shortage(self, needs: Mapping[Path, int], what_for: str) -> str | None:
        """Return the first disk with less space than needed."""
        for path in needs:
            needed = max(n for other, n in needs.items() if _device(other) == _device(path))
            if (free := self.free(path)) < needed:
                return (
                    f"{path} has {size(free)} free, and at least {size(needed)} is needed "
                    f"({size(needed - free)} more): {what_for}"
                )
        return None


@dataclass
class DiskWatch:
    """Remembers the shortage that a running round stops for, since stopping may free space again."""

    disk: RoundDisk
    ready: Ready
    patience_seconds: float = 0.0
    """How long a shortage may last."""
    workers_pause: bool = True
    """Whether workers stop training meanwhile by themselves; else nothing is asked and recorded here."""
    say: Callable[[str], None] = lambda text: None
    stopping: Callable[[], bool] = lambda: False
    """Whether the user asked to stop."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    shortage: str | None = None
    _since: float | None = None

    def is_short(self) -> bool:
        """Return whether the round has to stop, after waiting for room where workers train on."""
        if self.shortage is not None:
            return True
        found = self.disk.shortage(self.ready)
        if found is not None and not self.workers_pause:
            return self._is_short_for_good(found)
        if found is None:
            self._since = None
            return False
        self._since = self.clock() if self._since is None else self._since
        if self.clock() - self._since >= self.patience_seconds:
            self.shortage = found
        return self.shortage is not None

    def _is_short_for_good(self, found: str | None) -> bool:
        begun = self.clock()
        self.say(
            f"warning: no disk: {found}. No trial is started and nothing is recorded until there is room, "
            f"for up to {duration(self.patience_seconds)} (run.storage_patience); what running trials report "
            "waits. Free some space"
        )
        while found is not None and not self.stopping():
            if self.clock() - begun >= self.patience_seconds:
                self.shortage = found
                return True
            self.sleep(_LOOK_SECONDS)
            found = self.disk.shortage(self.ready)
        if found is None:
            self.say(f"there is room again, after {duration(self.clock() - begun)}")
        return found is not None


@contextmanager
def taken_back(*directories: Path) -> Iterator[None]:
    """Delete the directories that the block made, including new parents, if it raises InputError."""
    missing = {directory: _missing_parents(directory) for directory in directories if not directory.exists()}
    try:
        yield
    except InputError:
        for directory, parents in missing.items():
            shutil.rmtree(directory, ignore_errors=True)
            for parent in parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        raise


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or its nearest existing parent."""
    return next(place for place in (path, *path.parents) if place.exists())


def _missing_parents(directory: Path) -> list[Path]:
    return [parent for parent in directory.parents if not parent.exists()]


def _device(path: Path) -> int:
    return nearest_existing(path).stat().st_dev
