"""The plan of a round: its file, its space and its stable checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tuner.config import RoundFile, RoundSpec
from tuner.playbook.comparison_runs import ComparisonRule, trunk_steps
from tuner.records import Hyperparameters, RoundKind, Space


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
        return self.file.directory / ".tuner-cache"

    @property
    def comparison_rule(self) -> ComparisonRule:
        """Return which comparison runs follow the last trial."""
        return self.spec.run.decay_branches

    def trunk_steps(self, hyperparameters: Hyperparameters) -> tuple[int, ...]:
        """Return the steps at which a trial keeps a checkpoint for longer rounds; none without a stable
        phase.
        """
        return trunk_steps(hyperparameters, self.spec.max_train_steps, branches=self.comparison_rule)
