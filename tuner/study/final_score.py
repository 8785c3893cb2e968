"""Scoring a trial on `data.test`: which trials may be scored, and the score as a fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.config import RoundSpec
from tuner.errors import InputError
from tuner.playbook.scores import final_score, scored_trials
from tuner.records import CheckpointKind, FinalScore, Trial, TrialScored, TrialState
from tuner.store import Store, hold_study
from tuner.study.folder import StudyFolder, opened


@dataclass(frozen=True)
class Sums:
    """An adapter's sums on the test rows, example by example."""

    nll: Sequence[float]
    """Sum of negative log-likelihoods of each example."""
    tokens: Sequence[int]
    """Target tokens of each example."""
    rows: str
    """Fingerprint of the examples."""


def score_trial(
    folder: StudyFolder,
    trial: Trial,
    *,
    measure: Callable[[RoundSpec, Path, Path], Sums],
    clock: Callable[[], float],
) -> FinalScore:
    """Score a trial's best adapter on its round's `data.test` and record it; later calls return the record.

    `measure` gets the round file with absolute paths, the folder of tokenised rows and the adapter. Raises
    InputError for a trial that cannot be scored, StorageError while a round of the study runs.
    """
    if trial.final_score is not None:
        return trial.final_score
    plan = folder.plan(trial.round)
    adapter, best = _adapter_to_score(folder, trial), trial.checkpoint(CheckpointKind.BEST)
    if not plan.spec.data.test:
        raise InputError(
            f"{plan.file.path.name}: data.test: missing, so there is nothing to score {trial.name} on; "
            "add rows that are in neither train nor eval, as `test: [{path: ..., format: ...}]`"
        )
    assert best is not None
    with hold_study(folder.directory, folder.storage, folder.name):
        sums = measure(plan.absolute, plan.cache, adapter)
        score = final_score(sums.nll, sums.tokens, step=best.step, rows=sums.rows, scored_at=clock())
        with opened(folder) as store:
            store.record(TrialScored(trial.round, trial.number, score))
    return score


def scores_of(store: Store) -> tuple[Trial, ...]:
    """Return the study's trials that were scored on `data.test`, in the order in which they were scored."""
    return scored_trials(trial for record in store.rounds() for trial in store.trials(record.name))


def _adapter_to_score(folder: StudyFolder, trial: Trial) -> Path:
    if folder.is_rehearsal:
        raise InputError(f"{folder.directory}: a dry run trains no model, so there is nothing to score")
    adapter = folder.adapter(trial)
    if trial.state != TrialState.COMPLETE or adapter is None:
        why = f"is {trial.state}" if trial.state != TrialState.COMPLETE else "has no adapter any more"
        raise InputError(f"{trial.name} {why}; data.test is for the trial you settle on: tuner trial list")
    return Path(adapter)
