"""The reading of a round: the diagnosis, its evidence, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tuner.playbook.checklist import checklist
from tuner.playbook.curves import FITTED_TRAIN_LOSS, train_loss_still_falls, train_losses
from tuner.playbook.edges import Edge, edges, number
from tuner.playbook.evidence import evidence
from tuner.playbook.gain import Gain, GainSource
from tuner.playbook.horizon import (
    Diagnosis,
    Signs,
    Suggestion,
    diagnose,
    puts_the_edge_first,
    signs,
    suggest,
)
from tuner.playbook.results import Finding, RoundResults, Severity
from tuner.playbook.selection import LeadingTrial

_SEVERITIES = {
    Diagnosis.NO_LEARNING: Severity.PROBLEM,
    Diagnosis.TOO_LONG: Severity.WARNING,
    Diagnosis.UNDETERMINED: Severity.WARNING,
    Diagnosis.SATURATED: Severity.INFO,
    Diagnosis.TOO_SHORT: Severity.WARNING,
}
"""Diagnoses that are findings too; overfitting is the checklist's, and right needs none."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one trial at the suggested horizon."""

    steps: int
    epochs: float | None
    """None if the rows or the batch size are unknown."""
    hours: float | None
    """None if no step was timed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a round shows about its horizon."""

    diagnosis: Diagnosis
    evidence: tuple[str, ...]
    """Sentences: what was measured, what follows, what to do."""
    suggested_max_train_steps: int | None
    """None if no trial beat the base model or none is complete."""
    suggestion_interval: tuple[int, int] | None
    """Horizons that the same evidence supports as well."""
    cost: Cost | None
    gain: float | None
    """Relative loss reduction over the last doubling of the horizon."""
    gain_source: GainSource | None
    noise: float | None
    """Of the gain, relative to the loss; None if unknown."""
    compute_bound: bool | None
    """None if the round does not show it."""
    leading: tuple[LeadingTrial, ...]
    """Best first."""
    findings: tuple[Finding, ...]
    edges: tuple[Edge, ...] = ()
    """Bounds of the search space at which the best trial lies."""
    widens_rates: bool = False
    """Whether to try higher learning rates at the same horizon before judging it."""
    has_small_rates: bool = False
    """Whether the best learning rate is so high among those tried that all may be too small."""
    doubling: Gain | None = None
    """The gain of the last doubling with its source; it predicts those of longer horizons."""


def read_round(results: RoundResults, earlier: Sequence[RoundResults] = ()) -> Reading:
    """Return the diagnosis of a round's horizon, the suggestion for the next one, and all findings.

    `earlier` holds the study's rounds before this one; those of the same workload show the gain of a longer
    horizon. Rule: Deep Learning Tuning Playbook, "Deciding the number of steps for each training run"; where
    it leaves a number open, this project's decision.
    """
    seen = signs(results, earlier)
    diagnosis = diagnose(seen)
    suggestion = suggest(seen, diagnosis)
    compute_bound = is_compute_bound(seen, diagnosis, suggestion)
    sentences = tuple(evidence(seen, diagnosis, suggestion))
    return Reading(
        diagnosis=diagnosis,
        evidence=sentences,
        suggested_max_train_steps=suggestion.steps if suggestion else None,
        suggestion_interval=(suggestion.low, suggestion.high) if suggestion else None,
        cost=_cost(results, seen, suggestion) if suggestion else None,
        gain=seen.gain.relative if seen.gain else None,
        gain_source=seen.gain.source if seen.gain else None,
        noise=seen.noise,
        compute_bound=compute_bound,
        leading=seen.leading,
        edges=edges(results, seen.leading[0].trial) if seen.leading else (),
        widens_rates=puts_the_edge_first(seen, diagnosis),
        has_small_rates=seen.has_small_rates,
        doubling=seen.gain,
        findings=(
            *_diagnosis_finding(seen, diagnosis, sentences),
            *_compute_bound_finding(seen, compute_bound),
            *checklist(
                results,
                seen.leading,
                noise=seen.noise,
                earlier=earlier,
                wants_higher_rates=seen.has_small_rates,
            ),
        ),
    )


def is_compute_bound(seen: Signs, diagnosis: Diagnosis, suggestion: Suggestion | None) -> bool | None:
    """Return whether only the compute budget ends the training; None if the round does not show it.

    True if the train loss still falls and `production_steps` keeps the horizon from growing; False if the
    evaluation loss saturates or turns up, or the training set is fitted. Rule: Deep Learning Tuning Playbook,
    "Deciding the number of steps for each training run".
    """
    if suggestion is None:
        return None
    evaluations = seen.leading[0].trial.evaluations
    is_fitted = min(train_losses(evaluations), default=math.inf) <= FITTED_TRAIN_LOSS
    if is_fitted or diagnosis in (Diagnosis.TOO_LONG, Diagnosis.OVERFITTING, Diagnosis.SATURATED):
        return False
    return True if suggestion.is_capped and train_loss_still_falls(evaluations) else None


def _cost(results: RoundResults, seen: Signs, suggestion: Suggestion) -> Cost:
    batch_size = number(seen.leading[0].trial.hyperparameters.get("batch_size"))
    steps, seconds = suggestion.steps, results.seconds_per_step
    return Cost(
        steps=steps,
        epochs=steps * batch_size / results.train_rows if batch_size and results.train_rows > 0 else None,
        hours=steps * seconds / 3600 if seconds is not None else None,
    )


def _diagnosis_finding(seen: Signs, diagnosis: Diagnosis, sentences: Sequence[str]) -> Iterator[Finding]:
    if diagnosis not in _SEVERITIES:
        return
    numbers = {"leading": float(len(seen.leading)), "late": float(seen.num_late)}
    if seen.noise is not None:
        numbers["noise"] = seen.noise
    if seen.gain is not None:
        numbers["gain"] = seen.gain.relative
    yield Finding(diagnosis.value, _SEVERITIES[diagnosis], " ".join(sentences[1:] or sentences), numbers)


def _compute_bound_finding(seen: Signs, compute_bound: bool | None) -> Iterator[Finding]:
    if compute_bound and seen.production_steps is not None:
        share = seen.max_train_steps / seen.production_steps
        yield Finding(
            "compute_bound",
            Severity.INFO,
            f"Training is compute-bound: the train loss still falls at step {seen.max_train_steps}, and "
            f"run.production_steps limits runs to {seen.production_steps}. Runs of about 10% of that length "
            "answer most questions, but their conclusions may fail at 20% or at 100%: use the last round to "
            "run the few best trials at full length.",
            {"share_of_production": share},
        )
