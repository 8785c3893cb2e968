"""What scoring on `data.test` is wired to: `trial show --test`, and the end of `study auto`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import typer

from tuner.cli.preparing import prepared
from tuner.cli.printing import warn_of_code
from tuner.data.pretrained import as_trained
from tuner.errors import TunerError
from tuner.records import Trial, TrialState
from tuner.spec import RoundSpec
from tuner.study.final_score import Sums, score_trial, scores_of
from tuner.study.folder import StudyFolder


def scored(folder: StudyFolder, trial: Trial) -> Trial:
    """The trial with its score on `data.test`, which is measured where it has none yet.

    Raises what `score_trial` does.
    """
    return replace(trial, final_score=score_trial(folder, trial, measure=_measure, clock=time.time))


def score_at_the_end(folder: StudyFolder, trial: Trial) -> str | None:
    """Score the trial a study has come to, unless its test rows were looked at before; what to say of it.

    None where there is nothing to say: no test rows, nothing trained, or scored without a hitch. A failure
    is said, not raised: the study is complete without the score.
    """
    if folder.is_rehearsal or not folder.plan(trial.round).spec.data.test:
        return None
    if trial.final_score is not None or trial.state != TrialState.COMPLETE:
        return None
    store = folder.open()
    try:
        before = scores_of(store)
    finally:
        store.close()
    name = f"{trial.round}/{trial.number}"
    if before:
        return (
            f"data.test was scored for {before[0].round}/{before[0].number} before, so {name} is not scored "
            f"by itself; `tuner trial show {name} --test` does it, for a number that is no longer unbiased"
        )
    try:
        scored(folder, trial)
    except TunerError as error:
        return f"data.test is not scored: {error}"
    return None


def _measure(spec: RoundSpec, cache: Path, adapter: Path) -> Sums:
    typer.echo("scoring the best adapter on data.test", err=True)
    spec = as_trained(spec, adapter)
    warn_of_code(spec.model)
    rows = prepared(spec, cache).test

    from tuner.inference import score  # after what can be wrong: it loads torch

    return Sums(score(spec, rows, adapter).nll, tuple(rows.num_targets.tolist()), rows.content_hash())
