"""What a round's signs mean, in sentences that a practitioner can check."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tuner.playbook.findings import percent
from tuner.playbook.gain import Gain, GainSource
from tuner.playbook.horizon import MAX_UNDETERMINED_NOISE, MULTIPLES, Diagnosis, Signs, Suggestion


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
    reached = f"reached {lead.best.eval_loss:.4f} at step {lead.best.step}"
    settled = (
        "no earlier step was within one standard error of that"
        if lead.settled_step == lead.best.step
        else f"step {lead.settled_step} was already within one standard error of that"
    )
    if len(seen.leading) == 1:
        number = lead.trial.number
        return f"The only complete trial, {number}, {reached} of {seen.max_train_steps}, and {settled}."
    steps = ", ".join(str(step) for step in sorted(lead.best.step for lead in seen.leading))
    return (
        f"The {len(seen.leading)} leading trials were best at step {steps} of {seen.max_train_steps}. The "
        f"first, trial {lead.trial.number}, {reached}, and {settled}."
    )


def _gain(gain: Gain, seen: Signs) -> str:
    match gain.source:
        case GainSource.EARLIER_ROUND:
            how = "the same hyperparameters in an earlier round"
            if not gain.is_of_a_doubling:
                how += ", reckoned for one doubling"
        case GainSource.DECAY_BRANCHES:
            how = "a decay branch against the whole run"
        case GainSource.TRUNK:
            how = "its evaluations at the constant rate"
            if gain.to_steps < seen.max_train_steps:
                how += f", carried on to step {seen.max_train_steps}"
        case GainSource.CONFOUNDED:
            how = "within one run, so that the falling rate is in the number too"
    worth = (
        f"was worth {percent(gain.relative)} of the loss"
        if gain.relative >= 0
        else f"made the loss {percent(-gain.relative)} worse"
    )
    return (
        f"The last doubling {worth}, give or take {percent(2 * seen.noise)}: trial {gain.trial} "
        f"from {gain.from_steps} to {gain.to_steps} steps, {how}."
    )


def _conclusion(seen: Signs, diagnosis: Diagnosis) -> str:
    count = len(seen.leading)
    match diagnosis:
        case Diagnosis.NO_LEARNING:
            return "None ever beat the untouched model: look at data, loss masks and learning rates."
        case Diagnosis.TOO_LONG:
            return "All were best within the first 10% of their steps: the horizon is far too long."
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
            assert seen.gain is not None
            if seen.gain.relative < -seen.threshold:
                return "That is a loss beyond the noise: more steps do not help."
            return (
                f"That is no more than {percent(seen.threshold)}, which counts as nothing: it has saturated."
            )
        case Diagnosis.TOO_SHORT:
            return f"{seen.num_late} of {count} were best in the last quarter: more steps will help."
        case Diagnosis.RIGHT if 2 * seen.num_late > count:
            return (
                f"{seen.num_late} of {count} best in the last quarter are too few trials for a pattern: the "
                "horizon counts as right until more of them say otherwise."
            )
        case Diagnosis.RIGHT:
            return f"Only {seen.num_late} of {count} were best in the last quarter: the horizon is right."


def _what_would_settle(seen: Signs) -> str:
    decide = "`tuner study promote --to ROUND --max-train-steps N` decides without it."
    if seen.gain is None:
        return (
            "Nothing shows what a doubling is worth: a smaller evaluation.every_steps would, or a round at "
            f"another horizon. {decide}"
        )
    hidden = f"The noise is above {percent(MAX_UNDETERMINED_NOISE)} and hides it."
    now = len(seen.leading[0].best.example_nll)
    needed = examples_to_settle(seen)
    if needed is None:
        why = "the seeds differ by as much" if now else "their losses are not known one by one"
        return f"{hidden} More evaluation examples alone will not do: {why}. {decide}"
    return (
        f"{hidden} About {needed} evaluation examples instead of {now} would settle a gain of this size: "
        f"{_how_to_have(needed, now, seen.max_examples)}. {decide}"
    )


def _how_to_have(needed: int, now: int, max_examples: int | None) -> str:
    """Which key keeps the evaluation set small, and what it has to be."""
    if max_examples is not None and now >= max_examples:
        return f"set evaluation.max_examples to {needed} in the next file, with as many rows in data.eval"
    more_rows = f"add rows to data.eval, which has {now}"
    if max_examples is None or needed <= max_examples:
        return more_rows
    return f"{more_rows}, and set evaluation.max_examples to {needed} in the next file"


def examples_to_settle(seen: Signs) -> int | None:
    """Evaluation examples with which a gain of this size would not be hidden; None if none would do.

    Rounded up to two digits. The standard error falls with the root of their number, the spread between
    seeds does not. Rule: this project's decision, "undetermined".
    """
    now = len(seen.leading[0].best.example_nll) if seen.leading else 0
    if seen.gain is None or now == 0:
        return None
    allowed = max(MAX_UNDETERMINED_NOISE, abs(seen.gain.relative)) / 2
    left = allowed**2 - (seen.noise**2 - _by_examples(seen))
    if left <= 0:
        return None
    return _two_digits_up(now * _by_examples(seen) / left)


def _by_examples(seen: Signs) -> float:
    """The part of the squared noise that more evaluation examples would lower."""
    return seen.gain.standard_error**2 if seen.gain is not None else 0.0


def _two_digits_up(number: float) -> int:
    unit = int(math.pow(10, max(0, math.floor(math.log10(max(1.0, number))) - 1)))
    return math.ceil(number / unit) * unit


def _advice(seen: Signs, suggestion: Suggestion) -> str:
    is_kept = suggestion.steps == seen.max_train_steps
    if suggestion.is_capped:
        train = "Keep max_train_steps at" if is_kept else "Train for"
        steps = "" if is_kept else " steps"
        return f"{train} {suggestion.steps}{steps}, the most that run.production_steps allows."
    if is_kept:
        return f"Keep max_train_steps at {suggestion.steps}."
    between = f" ({suggestion.low} to {suggestion.high})" if suggestion.low < suggestion.high else ""
    factor = suggestion.steps / seen.max_train_steps
    times = f"Train for {suggestion.steps} steps next{between}, {factor:.2g} times as many"
    if factor <= 1 or seen.gain is None:
        return f"{times}."
    most = ", the most for one round" if factor > MULTIPLES[-2] else ""
    return f"{times}{most}: the last doubling of these should be worth {percent(seen.gain.at(factor))}."
