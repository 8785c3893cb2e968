"""The disk that a round writes to: permission, free space, and cleanup after bad input."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuner.config import RoundSpec
from tuner.errors import InputError, StorageError
from tuner.methods.plug_ins import state_bytes
from tuner.playbook.comparison_runs import ComparisonRule
from tuner.records import Choices, Fixed, Ready, Trial
from tuner.report.format import count, size
from tuner.store.database import database_file, is_sqlite, parse_url
from tuner.study.plan import RoundPlan
from tuner.study.retention import num_kept

_WEIGHT_BYTES = 4
"""Bytes of an adapter's weight on disk, in float32."""

_MOST_STARTS: Mapping[ComparisonRule, int] = {False: 0, "auto": 1, True: 2}
"""The most stable checkpoints that a trial keeps for comparison runs."""

WORKING_BYTES = 16 * 2**20
"""Space for the database and its journal, the logs and the tokenised rows of a small data set: with less, no
round starts or resumes."""
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
        needed = max(0, left * a_trial - there) + self._in_flight_bytes(ready) + WORKING_BYTES
        needs = dict.fromkeys(self._places(), WORKING_BYTES) | {self.plan.checkpoints: needed}
        why = f"{count(left, 'trial')} of at least {size(a_trial)} each"
        self._refuse(needs, f"{why}, and working space")

    def shortage(self, ready: Ready) -> str | None:
        """Return why a running round must stop and save while it still can; None if there is enough space."""
        needs = dict.fromkeys(self._places(), SAVING_BYTES)
        needs[self.plan.checkpoints] += self._in_flight_bytes(ready)
        return self._shortage(needs, "enough to save every running trial")

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
    """Remembers the first shortage of a running round, since stopping may free space again."""

    disk: RoundDisk
    ready: Ready
    shortage: str | None = None

    def is_short(self) -> bool:
        """Return whether the round has to stop."""
        self.shortage = self.shortage or self.disk.shortage(self.ready)
        return self.shortage is not None


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
