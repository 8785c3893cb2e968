"""What a round's signs mean, in sentences that a practitioner can check."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tuner.playbook.findings import percent
from tuner.playbook.gain import Gain, GainSource
from tuner.playbook.horizon import MAX_UNDETERMINED_NOISE, Diagnosis, Signs, Suggestion


def evidence(seen: Signs, diagnosis: Diagnosis, suggestion: Suggestion | None) -> Iterator[str]:
    """What was seen, what follows from it and what to do, a sentence or two each.

    Rule: this project's decision: every number that a conclusion rests on is said beside it.
    """
    if not seen.leading:
        yield "No trial is complete with a finite evaluation loss, so the round says nothing of its horizon."
        return
    yield _best_steps(seen)
    if seen.gain is not None:
        yield _gain(seen.gain, seen)
    yield _conclusion(seen, diagnosis)
    if suggestion is not None:
        yield _advice(seen, suggestion)


def _best_steps(seen: Signs) -> str:
    lead = seen.leading[0]
    steps = ", ".join(str(step) for step in sorted(lead.best.step for lead in seen.leading))
    return (
        f"The {len(seen.leading)} leading trials were best at step {steps} of {seen.max_train_steps}. The "
        f"first, trial {lead.trial.number}, reached {lead.best.eval_loss:.4f} at step {lead.best.step}, and "
        f"step {lead.settled_step} was within one standard error of that."
    )


def _gain(gain: Gain, seen: Signs) -> str:
    match gain.source:
        case GainSource.EARLIER_ROUND:
            how = "the same hyperparameters in an earlier round"
        case GainSource.DECAY_BRANCHES:
            how = "a decay branch against the whole run"
        case GainSource.TRUNK:
            how = "its evaluations at the constant rate"
            if gain.to_steps < seen.max_train_steps:
                how += f", carried on to step {seen.max_train_steps}"
        case GainSource.CONFOUNDED:
            how = "within one run, so that the falling rate is in the number too"
    return (
        f"The last doubling was worth {percent(gain.relative)} of the loss, give or take "
        f"{percent(2 * seen.noise)}: trial {gain.trial} from {gain.from_steps} to {gain.to_steps} steps, "
        f"{how}."
    )


def _conclusion(seen: Signs, diagnosis: Diagnosis) -> str:
    count = len(seen.leading)
    match diagnosis:
        case Diagnosis.NO_LEARNING:
            return "None of them ever beat the untouched model: look at data, loss masks and learning rates."
        case Diagnosis.TOO_LONG:
            return "All of them were best within the first 10% of their steps: the horizon is far too long."
        case Diagnosis.OVERFITTING:
            assert seen.rise is not None
            train = "its train loss fell" if seen.rise.train_loss_falls else "no train loss says otherwise"
            return (
                f"After step {seen.rise.best_step} the best trial's evaluation loss rose by "
                f"{seen.rise.amount:.4f} (standard error {seen.rise.standard_error:.4f}) while {train}: it "
                "overfits. More data or regularisation will help, more steps will not."
            )
        case Diagnosis.UNDETERMINED:
            return _what_would_settle(seen)
        case Diagnosis.SATURATED:
            return (
                f"That is no more than {percent(seen.threshold)}, which counts as nothing: it has saturated."
            )
        case Diagnosis.TOO_SHORT:
            return f"{seen.num_late} of {count} were best in the last quarter: more steps will help."
        case Diagnosis.RIGHT:
            return f"Only {seen.num_late} of {count} were best in the last quarter: the horizon is right."


def _what_would_settle(seen: Signs) -> str:
    if seen.gain is None:
        return "Nothing shows what a doubling is worth: evaluate more often, or run a second horizon."
    needed = examples_to_settle(seen)
    limit = percent(MAX_UNDETERMINED_NOISE)
    if needed is not None:
        return f"The noise must be below {limit} for a verdict: about {needed} evaluation examples would do."
    return f"The noise must be below {limit} for a verdict, and more evaluation examples alone will not do."


def examples_to_settle(seen: Signs) -> int | None:
    """Evaluation examples with which twice the noise would be 1% of the loss; None if none would do.

    The standard error falls with the root of their number, the spread between seeds does not. Rule:
    this project's decision, "undetermined".
    """
    if seen.gain is None:
        return None
    now = len(seen.leading[0].best.example_nll)
    by_examples = seen.gain.standard_error**2
    left = (MAX_UNDETERMINED_NOISE / 2) ** 2 - (seen.noise**2 - by_examples)
    if now == 0 or left <= 0:
        return None
    return math.ceil(now * by_examples / left)


def _advice(seen: Signs, suggestion: Suggestion) -> str:
    if suggestion.is_capped:
        return f"Train for {suggestion.steps} steps, the most that run.production_steps allows."
    if suggestion.steps == seen.max_train_steps:
        return f"Keep max_train_steps at {suggestion.steps}."
    between = f" ({suggestion.low} to {suggestion.high})" if suggestion.low < suggestion.high else ""
    factor = suggestion.steps / seen.max_train_steps
    return f"Train for {suggestion.steps} steps next{between}, {factor:.2g} times as many."
