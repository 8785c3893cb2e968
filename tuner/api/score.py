"""Score a trial on `data.test`, for `trial show --test` and at the end of `study auto`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tuner.api.run import Prepare, Tell
from tuner.config import RoundSpec
from tuner.data.pretrained import as_trained
from tuner.errors import TunerError
from tuner.records import Trial, TrialState
from tuner.study.final_score import Sums, score_trial, scores_of
from tuner.study.folder import StudyFolder, opened


def scored(folder: StudyFolder, trial: Trial, *, prepare: Prepare, tell: Tell) -> Trial:
    """Return the trial with its score on `data.test`, measured if it has none yet.

    Raises what `score_trial` does.
    """

    def measure(spec: RoundSpec, cache: Path, adapter: Path) -> Sums:
        tell("scoring the best adapter on data.test")
        spec = as_trained(spec, adapter)
        if spec.model.trust_remote_code:
            tell(f"warning: {spec.model.warning_of_code}")
        rows = prepare(spec, cache).test

        from tuner.inference import score  # loads torch: only after the cheap checks

        return Sums(score(spec, rows, adapter).nll, tuple(rows.num_targets.tolist()), rows.content_hash())

    return replace(trial, final_score=score_trial(folder, trial, measure=measure, clock=time.time))


def score_at_the_end(folder: StudyFolder, trial: Trial, *, prepare: Prepare, tell: Tell) -> str | None:
    """Score a study's final trial unless its test rows were used before; return a note for the user.

    Returns None without test rows, without a trained trial, or after a successful score. A failure is
    returned, not raised: the study is complete without the score.
    """
    if folder.is_rehearsal or not folder.plan(trial.round).spec.data.test:
        return None
    if trial.final_score is not None or trial.state != TrialState.COMPLETE:
        return None
    with opened(folder) as store:
        before = scores_of(store)
    name = trial.name
    if before:
        return (
            f"data.test was already scored for {before[0].round}/{before[0].number}, so {name} is not scored "
            f"automatically; `tuner trial show {name} --test` scores it, but the result is no longer unbiased"
        )
    try:
        scored(folder, trial, prepare=prepare, tell=tell)
    except TunerError as error:
        return f"data.test is not scored: {error}"
    return None
