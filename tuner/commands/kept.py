"""Checkpoints of a command that tuner keeps: copied while it runs, whole, and never from elsewhere.

A resumable one is a folder with the command's checkpoint in `checkpoint/`, the curve up to there in
`curve.json`, and the best checkpoint so far in `best/` unless it is the same. The best adapter is the
checkpoint as it is.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tuner.commands.reported import SavedByCommand
from tuner.errors import CheckpointError, InputError
from tuner.records import Checkpoint, CheckpointKind, Evaluation, evaluation_from_json, to_json
from tuner.whole import digest, published

_CURVE_FILE = "curve.json"
_STATE_FILE = "trainer_state.json"
_STEP_KEYS = ("eval_steps", "save_steps", "logging_steps")
"""Numbers of a Trainer's state that win over its arguments."""


@dataclass(frozen=True)
class Kept:
    """A resumable checkpoint as it was kept."""

    step: int
    checkpoint: Path
    """What the command wrote: a folder, or a file."""
    evaluations: tuple[Evaluation, ...]
    best_step: int | None
    best: Path | None
    """The folder of the best checkpoint so far."""


def resolved(saved: SavedByCommand, *, output: Path, directory: Path) -> Path:
    """Return the reported checkpoint's place. Raises InputError for one outside the output folder."""
    inside = output.resolve()
    place = (directory / saved.path).resolve()
    within = [Path(folder, name) for folder, *names in os.walk(place) for name in chain(*names)]
    for path in [place, *(path for path in within if path.is_symlink())]:
        if not path.resolve().is_relative_to(inside) or path.resolve() == inside:
            raise InputError(
                f"the command reported the checkpoint {saved.path}, which is not inside TUNER_OUTPUT_DIR "
                f"({output}): trials must not share a folder. Write checkpoints below TUNER_OUTPUT_DIR"
            )
    return place


def is_whole(place: Path, saved: SavedByCommand, *, is_trainers: bool) -> bool:
    """Return whether a checkpoint is written completely: the Trainer's by its state, others if they exist."""
    if not is_trainers:
        return place.exists()
    try:
        state = json.loads((place / _STATE_FILE).read_text())
        states = [path for path in place.glob("rng_state*.pth") if not _is_cut_short(path)]
    except (OSError, ValueError):  # it is being written, or deleted
        return False
    return bool(state.get("global_step") == saved.step) and len(states) >= saved.processes


_ZIP = b"PK"
"""The first bytes of a zip archive, such as PyTorch writes; its directory comes last."""


def _is_cut_short(path: Path) -> bool:
    """Return whether a process still writes this file of PyTorch's."""
    with path.open("rb") as file:
        head = file.read(len(_ZIP))
    return not head or (head == _ZIP and not zipfile.is_zipfile(path))


def can_resume(place: Path) -> bool:
    """Return whether a Trainer's checkpoint has optimizer and schedule; without, it starts with new ones."""
    names = {path.name for path in place.iterdir()}
    has_optimizer = any(name.startswith(("optimizer", "global_step")) for name in names)
    return has_optimizer and "scheduler.pt" in names | {"scheduler.pt" if "latest" in names else ""}


@dataclass(frozen=True)
class Keeper:
    """Keeps the checkpoints of one attempt in its trial's folder."""

    trial: Path
    attempt: int

    def keep_best(self, source: Path, step: int) -> Checkpoint:
        """Keep the best step's checkpoint; whoever records it switches the link `best` to it."""
        target = self.trial / "best-steps" / f"step-{step:06d}.a{self.attempt}"
        published(target, lambda folder: _copy(source, folder))
        return self._recorded(CheckpointKind.BEST, step, target)

    def keep_resumable(
        self,
        source: Path,
        step: int,
        *,
        kind: CheckpointKind,
        evaluations: Sequence[Evaluation],
        best: tuple[int, Path] | None,
    ) -> Checkpoint:
        """Keep a checkpoint to resume from, with the curve up to its step.

        `best` is the best step so far and its kept checkpoint.
        """
        kinds = "trunk" if kind == CheckpointKind.TRUNK else "last"
        target = self.trial / kinds / f"step-{step:06d}.a{self.attempt}"
        curve = {
            "step": step,
            "file": source.name if source.is_file() else None,
            "best_step": best[0] if best else None,
            "evaluations": [to_json(evaluation) for evaluation in evaluations if evaluation.step <= step],
        }

        def write(folder: Path) -> None:
            (folder / "checkpoint").mkdir()
            _copy(source, folder / "checkpoint")
            if best is not None and best[0] != step:
                shutil.copytree(best[1], folder / "best", copy_function=os.link)  # files that never change
            (folder / _CURVE_FILE).write_text(json.dumps(curve))

        published(target, write)
        return self._recorded(kind, step, target)

    def _recorded(self, kind: CheckpointKind, step: int, target: Path) -> Checkpoint:
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        place = f"{self.trial.name}/{target.relative_to(self.trial).as_posix()}"
        return Checkpoint(kind, step, place, size, digest(target))


def _copy(source: Path, target: Path) -> None:
    """Copy a checkpoint's content into a folder.

    Raises CheckpointError if it changes meanwhile, OSError if the disk is full.
    """
    before = _listing(source)
    try:
        if source.is_file():
            shutil.copy2(source, target / source.name)
        else:
            shutil.copytree(source, target, dirs_exist_ok=True)
    except (shutil.Error, FileNotFoundError) as error:
        if (full := _full_disk(error)) is not None:
            raise OSError(full, os.strerror(full), str(target)) from error
        raise CheckpointError(f"{source}: changed while it was copied: {error}") from error
    if _listing(source) != before:
        raise CheckpointError(f"{source}: changed while it was copied")


def _full_disk(error: OSError) -> int | None:
    """Return the number of a disk's error among those of a copied folder, of which only texts are left."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
    return next((number for number in numbers if f"[Errno {number}]" in str(error)), None)


def _listing(source: Path) -> dict[str, tuple[int, int]]:
    try:
        paths = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}
    except FileNotFoundError as error:
        raise CheckpointError(f"{source}: changed while it was copied") from error


def read_kept(directory: Path, *, sha256: str | None) -> Kept:
    """Read a resumable checkpoint. Raises CheckpointError if it is missing or not the recorded one."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: the recorded checkpoint is missing from the disk")
    if sha256 is not None and (found := digest(directory)) != sha256:
        raise CheckpointError(
            f"{directory}: the checkpoint was changed or damaged: its hash is {found}, recorded was {sha256}"
        )
    try:
        curve: dict[str, Any] = json.loads((directory / _CURVE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: not a checkpoint of a command: {error}") from error
    step, best_step, inner = curve["step"], curve["best_step"], directory / "checkpoint"
    best = inner if best_step == step else directory / "best"
    return Kept(
        step=step,
        checkpoint=inner / curve["file"] if curve["file"] else inner,
        evaluations=tuple(evaluation_from_json(each) for each in curve["evaluations"]),
        best_step=best_step,
        best=best if best_step is not None and best.is_dir() else None,
    )


def copy_to_resume(kept: Kept, target: Path, *, is_trainers: bool, every: int) -> Path:
    """Copy a checkpoint for one attempt, with a Trainer's own step numbers replaced; returns the copy.

    Raises CheckpointError for a Trainer's checkpoint without its optimizer.
    """
    target.mkdir(parents=True)
    copy = target / f"checkpoint-{kept.step}"
    if kept.checkpoint.is_file():
        return Path(shutil.copy2(kept.checkpoint, target / kept.checkpoint.name))
    shutil.copytree(kept.checkpoint, copy)
    if is_trainers:
        if not can_resume(copy):
            raise CheckpointError(
                f"{kept.checkpoint}: has no optimizer or schedule (save_only_model?), so a run from it would "
                "start with new ones"
            )
        state = json.loads((copy / _STATE_FILE).read_text())
        state.update(dict.fromkeys(_STEP_KEYS, every))
        state["best_model_checkpoint"] = None
        (copy / _STATE_FILE).write_text(json.dumps(state, indent=2))
    return copy
