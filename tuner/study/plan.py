"""The plan of a round: its file, its space, its stable checkpoints, and where they lie."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.config import RoundFile, RoundSpec
from tuner.errors import CheckpointError
from tuner.playbook.comparison_runs import ComparisonRule, trunk_steps
from tuner.records import Checkpoint, CheckpointKind, Hyperparameters, RoundKind, Space, Trial
from tuner.whole import digest, lead

CACHE = ".tuner-cache"
"""Folder of tokenised rows beside the round file."""


@dataclass(frozen=True)
class RoundPlan:
    """A round file that has been checked."""

    file: RoundFile

    @property
    def spec(self) -> RoundSpec:
        """Return the file's content."""
        return self.file.spec

    @property
    def name(self) -> str:
        """Return the round's name."""
        return self.spec.round

    @property
    def kind(self) -> RoundKind:
        """Return the kind of the round, as recorded when it starts."""
        is_dry_run = self.spec.run.engine == "simulated" and not self.spec.is_sweep
        return RoundKind.DRY_RUN if is_dry_run else RoundKind(self.spec.kind)

    @property
    def space(self) -> Space:
        """Return all hyperparameters of the round."""
        return self.spec.space()

    @property
    def absolute(self) -> RoundSpec:
        """Return the file with absolute paths, for processes with another working directory."""
        return self.spec.absolute(self.file.directory)

    @property
    def checkpoints(self) -> Path:
        """Return the directory `runs/ROUND`."""
        return Path(self.absolute.checkpoints.directory) / self.name

    @property
    def cache(self) -> Path:
        """Return the directory beside the file where tokenised rows are kept between runs."""
        return self.file.directory / CACHE

    @property
    def comparison_rule(self) -> ComparisonRule:
        """Return which comparison runs follow the last trial."""
        return self.spec.run.decay_branches

    def trunk_steps(self, hyperparameters: Hyperparameters) -> tuple[int, ...]:
        """Return the steps at which a trial keeps a checkpoint for longer rounds; none without a stable
        phase.
        """
        return trunk_steps(hyperparameters, self.spec.max_train_steps, branches=self.comparison_rule)


_VERSIONED = ("best-steps", "last", "trunk")


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """A resumable checkpoint for an assignment."""

    path: Path
    sha256: str
    step: int


@dataclass(frozen=True, slots=True)
class CheckpointFolder:
    """The directory `runs/ROUND`."""

    root: Path

    def trial_directory(self, number: int) -> Path:
        """Return a trial's directory, such as `runs/round1/trial-0007`."""
        return self.root / f"trial-{number:04d}"

    def adapter(self, trial: Trial) -> Path | None:
        """Return the link to the best step's adapter; None if there is none."""
        if trial.checkpoint(CheckpointKind.BEST) is None:
            return None
        link = self.trial_directory(trial.number) / "best"
        return link if link.exists() else None

    def verified_adapter(self, trial: Trial) -> Path | None:
        """Return the link to the best step's adapter, to load it; None if there is none.

        Raises CheckpointError if its files are not those that were recorded.
        """
        link, best = self.adapter(trial), trial.checkpoint(CheckpointKind.BEST)
        if link is None or best is None:
            return None
        if digest(link.resolve()) != best.sha256:
            raise CheckpointError(
                f"{link}: the adapter of {trial.name} was changed or damaged after it was saved: its SHA-256 "
                f"is not the recorded one. Put it back with: tuner trial reproduce {trial.name} --restore"
            )
        return link

    def is_intact(self, checkpoint: Checkpoint) -> bool:
        """Return whether a checkpoint's files are those that were recorded."""
        path = self.root / checkpoint.path
        return path.is_dir() and digest(path) == checkpoint.sha256

    def resumable(self, trial: Trial) -> list[Checkpoint]:
        """Return the checkpoints that a trial can resume from, the newest first."""
        found = [c for c in trial.checkpoints if c.kind != CheckpointKind.BEST]
        return sorted(found, key=lambda c: (c.step, c.kind == CheckpointKind.LAST), reverse=True)

    def newest(self, trial: Trial) -> StartingPoint | None:
        """Return the newest checkpoint of the trial that still exists."""
        return next((point for c in self.resumable(trial) if (point := self.point(c)) is not None), None)

    def point(self, checkpoint: Checkpoint) -> StartingPoint | None:
        """Return a checkpoint as a starting point; None if its directory is missing."""
        path = self.root / checkpoint.path
        return StartingPoint(path, checkpoint.sha256, checkpoint.step) if path.is_dir() else None

    def surplus(self, trial: Trial, *, keep_best: int) -> list[Checkpoint]:
        """Return recorded checkpoints that a recorded successor replaces."""
        found = trial.checkpoints
        best = sorted((c for c in found if c.kind == CheckpointKind.BEST), key=lambda c: c.age, reverse=True)
        last = sorted((c for c in found if c.kind == CheckpointKind.LAST), key=lambda c: c.step, reverse=True)
        # Until the trial ends, the one before is there should the newest be damaged.
        return [*best[keep_best:], *last[1 if trial.state.is_final else 2 :]]

    def delete(self, paths: Iterable[str]) -> None:
        """Delete checkpoint directories; ignore missing ones."""
        for path in paths:
            shutil.rmtree(self.root / path, ignore_errors=True)

    def clean_up(self, trial: Trial) -> None:
        """Delete checkpoints without a fact, and let the link `best` point where the facts say.

        A crash leaves such checkpoints, and so does a trial that was pruned. Only while no worker runs it.
        """
        for leftover in self.leftovers(trial):
            shutil.rmtree(leftover, ignore_errors=True)
        link = self.trial_directory(trial.number) / "best"
        for unfinished in link.parent.glob(".best.*.tmp"):
            unfinished.unlink(missing_ok=True)
        self.switch_best(trial)
        if not link.exists():
            link.unlink(missing_ok=True)

    def switch_best(self, trial: Trial) -> None:
        """Let the link `best` lead to the recorded adapter, if that is on disk. Workers never do."""
        best, link = trial.checkpoint(CheckpointKind.BEST), self.trial_directory(trial.number) / "best"
        if best is not None and (self.root / best.path).is_dir():
            target = self.root / best.path
            if link.resolve() != target.resolve():
                lead(link, target)

    def leftovers(self, trial: Trial) -> list[Path]:
        """Return directories of checkpoints without a fact."""
        recorded = {self.root / checkpoint.path for checkpoint in trial.checkpoints}
        return _unrecorded(self.trial_directory(trial.number), recorded)

    def size_bytes(self, trials: Sequence[Trial]) -> int:
        """Return the disk space of trials' recorded checkpoints."""
        return sum(checkpoint.size_bytes for trial in trials for checkpoint in trial.checkpoints)


def _unrecorded(directory: Path, recorded: set[Path]) -> list[Path]:
    return [
        path
        for kind in _VERSIONED
        if (directory / kind).is_dir()
        for path in (directory / kind).iterdir()
        if path not in recorded
    ]
