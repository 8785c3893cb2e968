"""Scoring on `data.test`, told on standard error."""

from __future__ import annotations

import typer

from tuner.api import score
from tuner.cli.printing import prepared
from tuner.records import Trial
from tuner.study.folder import StudyFolder


def scored(folder: StudyFolder, trial: Trial) -> Trial:
    """As `api.scoring.scored`."""
    return score.scored(folder, trial, prepare=prepared, tell=_tell)


def score_at_the_end(folder: StudyFolder, trial: Trial) -> str | None:
    """As `api.scoring.score_at_the_end`."""
    return score.score_at_the_end(folder, trial, prepare=prepared, tell=_tell)


def _tell(text: str) -> None:
    typer.echo(text, err=True)
