"""`trial reproduce --restore`: put a damaged best adapter back, from a checkpoint or by training."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tuner.errors import CheckpointError, InputError, TunerError
from tuner.playbook.reproduction import Agreement, Reproduction
from tuner.records import Checkpoint, CheckpointKind, Saved, Trial
from tuner.store import hold_study
from tuner.study.folder import StudyFolder, opened
from tuner.study.plan import CheckpointFolder
from tuner.whole import digest, lead, replaced_whole

_FILES = ("adapter_config.json", "adapter_model.safetensors")

WriteBest = Callable[[Path, Path, str], None]
"""Writes the best adapter that a resumable checkpoint, with its SHA-256, contains into an empty directory."""
Take = Callable[[Reproduction, Path, Checkpoint], None]
"""Takes the best adapter of a run that has ended, before its folder is deleted."""


def restored(
    folder: StudyFolder,
    trial: Trial,
    *,
    write_best: WriteBest,
    run_again: Callable[[Take], Reproduction],
) -> tuple[str, Reproduction | None]:
    """Put the adapter of a trial's best step back; return how in words, and the new run where one was needed.

    A copy counts if it has the recorded SHA-256. Otherwise the trial is run again; if its curve agrees, its
    adapter is put back, and recorded where its bytes differ. Raises InputError for a trial without a recorded
    adapter, StorageError while a round of the study runs, TunerError if the new curve differs.
    """
    best = trial.checkpoint(CheckpointKind.BEST)
    if best is None:
        raise InputError(
            f"{trial.name} is {trial.state} and has no adapter to restore; see: tuner trial list"
        )
    place = folder.checkpoints(trial.round)
    with hold_study(folder.directory, folder.storage, folder.name):
        if place.is_intact(best):
            lead(place.trial_directory(trial.number) / "best", place.root / best.path)
            return f"{place.root / best.path} is as it was saved: there was nothing to restore", None
        source = _copied_back(place, trial, best, write_best)
        if source is not None:
            return f"{place.root / best.path}: put back from {source}, as it was saved (by its SHA-256)", None
        found = run_again(lambda ran, root, again: _taken(folder, trial, best, ran, root / again.path, again))
    words = "as it was saved (by its SHA-256)" if _is_recorded(folder, trial, best) else "recorded anew"
    return f"{place.root / best.path}: put back from a new run, {words}", found


def _copied_back(
    place: CheckpointFolder, trial: Trial, best: Checkpoint, write_best: WriteBest
) -> str | None:
    """Put the adapter back from the first checkpoint that contains it; return its path."""
    target = place.root / best.path
    for checkpoint in place.resumable(trial):
        if not place.is_intact(checkpoint):
            continue
        with _beside(target) as built:
            try:
                write_best(place.root / checkpoint.path, built, checkpoint.sha256)
            except CheckpointError:
                continue
            if _is_made_equal(built, [target], best.sha256):
                _put_back(place, trial, best, built)
                return checkpoint.path
    return None


def _is_made_equal(built: Path, others: Sequence[Path], sha256: str) -> bool:
    """Make a directory equal to the recorded one, if it is with a file of another one; else leave it.

    PEFT's configuration lists a set of modules, whose order is another in each process.
    """
    contents = [_read(*(place / name for place in (built, *others))) for name in _FILES]
    for chosen in [*itertools.product(*contents), next(itertools.product(*contents))]:
        for name, content in zip(_FILES, chosen, strict=True):
            (built / name).write_bytes(content)
        if digest(built) == sha256:
            return True
    return False


def _read(*paths: Path) -> list[bytes]:
    return [path.read_bytes() for path in paths if path.is_file()]


def _taken(
    folder: StudyFolder, trial: Trial, best: Checkpoint, ran: Reproduction, source: Path, again: Checkpoint
) -> None:
    """Put back what a new run has trained. Raises TunerError unless its curve agrees."""
    if ran.agreement == Agreement.DIFFERS or again.step != best.step:
        raise TunerError(
            f"{trial.name} is not restored: the new run does not agree with the recorded curve, so its "
            f"adapter is another one. See how: tuner trial reproduce {trial.name}"
        )
    place = folder.checkpoints(trial.round)
    with _beside(place.root / best.path) as built:
        shutil.copytree(source, built, dirs_exist_ok=True)
        others = [best, *(c for c in place.resumable(trial) if place.is_intact(c))]
        _is_made_equal(built, [place.root / checkpoint.path for checkpoint in others], best.sha256)
        found = replace(best, sha256=digest(built), size_bytes=again.size_bytes)
        _put_back(place, trial, best, built)
    if found != best:
        with opened(folder) as store:
            newest = max(attempt.number for attempt in trial.attempts)
            store.record(Saved(trial.round, trial.number, newest, found))


def _is_recorded(folder: StudyFolder, trial: Trial, best: Checkpoint) -> bool:
    return digest(folder.checkpoints(trial.round).root / best.path) == best.sha256


def _put_back(place: CheckpointFolder, trial: Trial, best: Checkpoint, built: Path) -> None:
    target = place.root / best.path
    replaced_whole(target, built)
    lead(place.trial_directory(trial.number) / "best", target)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give an empty directory beside the target, and delete it unless it was renamed."""
    built = target.with_name(f".{target.name}.restored.tmp")
    shutil.rmtree(built, ignore_errors=True)
    built.mkdir(parents=True)
    try:
        yield built
    finally:
        shutil.rmtree(built, ignore_errors=True)
