"""A round's signs explained in sentences that a practitioner can check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import median

from tuner.playbook.edges import MAX_WIDENINGS
from tuner.playbook.gain import Gain, GainSource
from tuner.playbook.horizon import (
    LATE_SHARE_OF_GAIN,
    MAX_UNDETERMINED_NOISE,
    MULTIPLES,
    Diagnosis,
    Signs,
    Suggestion,
    puts_the_edge_first,
)
from tuner.playbook.noise import Scale, difference_error, majority_probability, measured
from tuner.playbook.results import counted, percent
from tuner.playbook.selection import LeadingTrial, best_evaluation
from tuner.records import LOSS, Direction, Evaluation, Trial

_OF_THE_GAINED = " of what the best trial gained over the base model"
_SOURCES = {
    GainSource.COMPARISON: "measured by a comparison run on the same schedule",
    GainSource.STABLE_PHASE: "from its own evaluations, without a decay",
    GainSource.EARLIER_ROUND: "from an earlier round with the same hyperparameters",
    GainSource.BEFORE_DECAY: "from its evaluations before the decay",
}


def evidence(seen: Signs, diagnosis: Diagnosis, suggestion: Suggestion | None) -> Iterator[str]:
    """Yield what was measured, what follows from it and what to do, a sentence or two each.

    Rule: this project's decision: every number behind a conclusion is stated with it.
    """
    if not seen.leading:
        yield _nothing_leads(seen)
        return
    yield _best_steps(seen)
    if seen.gain is not None:
        yield _gain(seen.gain, seen)
    yield _conclusion(seen, diagnosis)
    if puts_the_edge_first(seen, diagnosis):
        yield (
            "The best learning rate is at the upper end of those tried, so all of them may be too small and "
            f"runs then look too short or flat. Try higher rates at {seen.max_train_steps} steps first."
        )
    elif suggestion is not None:
        yield _advice(seen, diagnosis, suggestion)
    if _has_given_up_on_rates(seen, diagnosis):
        yield (
            f"The best learning rate is still at the upper end, after {MAX_WIDENINGS} rounds of higher ones: "
            "check the warmup and the scale of the adapter (lora_alpha)."
        )


def _has_given_up_on_rates(seen: Signs, diagnosis: Diagnosis) -> bool:
    is_misleading = diagnosis in (Diagnosis.TOO_SHORT, Diagnosis.SATURATED, Diagnosis.UNDETERMINED)
    return is_misleading and seen.has_small_rates and not puts_the_edge_first(seen, diagnosis)


def _nothing_leads(seen: Signs) -> str:
    if not seen.num_complete:
        finite = "evaluation loss" if seen.objective == LOSS else seen.objective.metric
        return f"No trial completed with a finite {finite}, so the round does not show how long to train."
    none = "The complete trial did not beat" if seen.num_complete == 1 else "No complete trial beat"
    look = "check the data, the loss masks and the learning rates"
    if (hidden := _hidden_drop(seen.foremost, seen.scale)) is None:
        return f"{none} the base model: {look}."
    return f"{none} the base model by more than two standard errors. {hidden}, or {look}."


def _hidden_drop(trial: Trial | None, scale: Scale | None) -> str | None:
    """Describe a gain of the best trial within the noise, and how to measure it; None if there is no gain."""
    finite = measured(trial.evaluations) if trial else []
    best, base = best_evaluation(finite), next((e for e in finite if e.step == 0), None)
    if trial is None or best is None or base is None or best.cost >= base.cost:
        return None
    error = difference_error(finite, base, best) or 0.0
    if scale is None or scale.gained is not None:
        return _hidden_rise(trial, best, base, error)
    drop = percent(1 - best.cost / base.cost)
    rows = f" over {counted(len(best.example_nll), 'evaluation row')}" if best.example_nll else ""
    return (
        f"The best, trial {trial.number}, is {drop} below it at step {best.step}, within the noise of "
        f"{percent(2 * error / base.cost)}{rows}. Add rows to data.eval"
    )


def _hidden_rise(trial: Trial, best: Evaluation, base: Evaluation, error: float) -> str:
    """The same of a metric whose share of itself means nothing."""
    name = (best.objective or LOSS).metric
    return (
        f"The best, trial {trial.number}, has a {name} of {best.value:.4f} at step {best.step} against "
        f"{base.value:.4f}, within the noise of {2 * error:.2g}. Add rows to data.eval"
    )


def _best_steps(seen: Signs) -> str:
    lead = seen.leading[0]
    name = "" if seen.objective == LOSS else f"{seen.objective.metric} "
    reached = f"reached {name}{lead.best.value:.4f} at step {lead.best.step}"
    settled = ""
    if lead.settled_step < lead.best.step:
        settled = f", and was within one standard error of that from step {lead.settled_step} on"
    if len(seen.leading) == 1:
        return f"Trial {lead.trial.number} {reached} of {seen.max_train_steps}{settled}."
    where = _where_best(seen.leading, seen.max_train_steps)
    return f"{where} The best, trial {lead.trial.number}, {reached}{settled}."


def _where_best(leading: Sequence[LeadingTrial], max_train_steps: int) -> str:
    count = len(leading)
    steps = sorted(lead.best.step for lead in leading)
    others = [step for step in steps if step < max_train_steps]
    if not others:
        every = "Both" if count == 2 else f"All {count}"
        return f"{every} leading trials were best at the last step ({max_train_steps})."
    span = f"step {others[0]}" if others[0] == others[-1] else f"steps {others[0]} to {others[-1]}"
    if len(others) < count:
        at_end = count - len(others)
        return (
            f"{at_end} of {count} leading trials {'was' if at_end == 1 else 'were'} best at the last step "
            f"({max_train_steps}), the {'other' if len(others) == 1 else 'others'} at {span}."
        )
    middle = f", the median at {median(steps):g}" if count > 2 and others[0] < others[-1] else ""
    return f"The {count} leading trials were best at {span} of {max_train_steps}{middle}."


def _gain(gain: Gain, seen: Signs) -> str:
    steps = f"{gain.from_steps} to {gain.to_steps}"
    doubling = f"Doubling the steps ({steps})"
    if not gain.is_of_a_doubling:
        doubling = f"Doubling the steps (rescaled from {steps})"
    change = _change(gain.relative, seen)
    noise = f" +- {percent(2 * seen.noise)}" if seen.noise is not None else ", with unknown noise"
    return f"{doubling} {change}{noise} (trial {gain.trial}, {_SOURCES[gain.source]})."


def _change(relative: float, seen: Signs) -> str:
    """`cut the loss by 24%`, or of a maximised metric `raised token_accuracy by 24% of what was gained`."""
    lower = (relative >= 0) == (seen.objective.direction == Direction.MINIMIZE)
    what = "the loss" if seen.objective == LOSS else seen.objective.metric
    return f"{'cut' if lower else 'raised'} {what} by {percent(abs(relative))}{_relative_to(seen)}"


def _change_to_come(relative: float, seen: Signs) -> str:
    if seen.objective == LOSS:
        return f"cut the loss by about {percent(relative)}"
    verb = "cut" if seen.objective.direction == Direction.MINIMIZE else "raise"
    return f"{verb} {seen.objective.metric} by about {percent(relative)}{_relative_to(seen)}"


def _relative_to(seen: Signs) -> str:
    """Say what a share is of, unless it is of the value itself."""
    return "" if seen.scale is None or seen.scale.gained is None else _OF_THE_GAINED


def _conclusion(seen: Signs, diagnosis: Diagnosis) -> str:
    match diagnosis:
        case Diagnosis.NO_LEARNING:
            return _nothing_leads(seen)
        case Diagnosis.TOO_LONG:
            return "All were best within the first 10% of their steps: the horizon is far too long."
        case Diagnosis.OVERFITTING:
            assert seen.rise is not None
            train = "its train loss fell" if seen.rise.train_loss_falls else "its train loss is unknown"
            what = "evaluation loss" if seen.objective == LOSS else seen.objective.metric
            rose = "rose" if seen.objective.direction == Direction.MINIMIZE else "fell"
            return (
                f"After step {seen.rise.best_step} the best trial's {what} {rose} by "
                f"{seen.rise.amount:.4f} (standard error {seen.rise.standard_error:.4f}) while {train}: it "
                "overfits. More data or regularisation will help, more steps will not."
            )
        case Diagnosis.UNDETERMINED:
            return _what_would_settle(seen)
        case Diagnosis.SATURATED:
            assert seen.gain is not None
            if seen.gain.relative < -seen.worthwhile:
                return f"{_got_worse(seen)} by more than the noise: more steps do not help."
            limit = f"{percent(seen.worthwhile)}{_because(seen)}"
            return f"That is no more than {limit}: more steps are not worth it{_unless_rates(seen)}."
        case Diagnosis.TOO_SHORT:
            return f"{_still_falling(seen)}: more steps will help."
        case Diagnosis.RIGHT:
            assert seen.late is not None
            return (
                f"The last quarter of the steps {_change(max(0.0, seen.late.relative), seen)}, at most "
                f"{percent(LATE_SHARE_OF_GAIN)} of that gain: the doubling paid off, its end did not. "
                f"{seen.max_train_steps} steps are about right."
            )


def _unless_rates(seen: Signs) -> str:
    """Describe the other reading of a flat curve when few learning rates were tried."""
    first, best = seen.leading[0].trial.evaluations[0], seen.leading[0].best
    if seen.objective.is_relative_to_gained:  # of it nothing says how little was learned
        return ""
    if not seen.has_few_rates or first.step or (first.cost - best.cost) > 0.05 * first.cost:
        return ""
    return (
        ", unless all learning rates are too small, which these few trials cannot rule out: try higher ones"
    )


def _got_worse(seen: Signs) -> str:
    if seen.objective == LOSS:
        return "The loss rose"
    fell = "rose" if seen.objective.direction == Direction.MINIMIZE else "fell"
    return f"{seen.objective.metric} {fell}"


def _because(seen: Signs) -> str:
    """Name the threshold unless the noise sets it."""
    return " (run.worthwhile_gain)" if seen.worthwhile == seen.worthwhile_gain else " (twice the noise)"


def _still_falling(seen: Signs) -> str:
    if seen.late is None or not seen.late.is_significant:
        return _late_trials(seen)
    fell = "fell" if seen.objective.direction == Direction.MINIMIZE else "rose"
    by = f"{percent(seen.late.relative)}{_relative_to(seen)}"
    return f"The best trial's {seen.objective.noun} still {fell} by {by} in the last quarter"


def _late_trials(seen: Signs) -> str:
    if len(seen.leading) == 1:
        return f"The trial was best {'in' if seen.num_late else 'before'} the last quarter"
    return f"{seen.num_late} of {len(seen.leading)} leading trials were best in the last quarter"


def _what_would_settle(seen: Signs) -> str:
    is_cost, noun = seen.objective.direction == Direction.MINIMIZE, seen.objective.noun
    if seen.gain is None:
        return (
            "The gain from doubling the steps is unknown. A comparison run (run.decay_branches: auto) "
            "measures it, or, at a constant rate, a smaller evaluation.every_steps."
        )
    if seen.noise is None:
        return (
            "There are too few evaluations to estimate the noise: set a smaller evaluation.every_steps, or "
            "repeat the best trial with other seeds."
        )
    if seen.is_hidden:
        return _what_would_uncover(seen)
    if seen.is_done_early and seen.late is not None and seen.late_by_rate is not None:
        return (
            f"The last quarter of the steps {_change(max(0.0, seen.late.relative), seen)}, but at a small "
            f"learning rate: over the last quarter of its summed learning rate, the best trial's {noun} "
            f"{'fell' if is_cost else 'rose'} by {percent(seen.late_by_rate.relative)}{_relative_to(seen)}. "
            "A longer run would show whether it has converged."
        )
    missing = trials_to_settle(seen)
    falls, falling = ("falls", "falling") if is_cost else ("rises", "rising")
    return (
        f"The gain is worthwhile, but the best trial's {noun} neither clearly {falls} at the end nor has "
        f"clearly stopped {falling}. {_late_trials(seen)}; about {counted(missing, 'more leading trial')} "
        "with a best step there would settle it."
    )


def trials_to_settle(seen: Signs) -> int:
    """Return how many more late leading trials would make them consistently late.

    Rule: this project's decision, "undetermined".
    """
    late, count = seen.num_late, len(seen.leading)
    return next(more for more in range(1, 1000) if majority_probability(late + more, count + more) >= 0.9)


def _what_would_uncover(seen: Signs) -> str:
    hidden = f"The noise is above {percent(MAX_UNDETERMINED_NOISE)} and hides the gain."
    now = _num_examples(seen.leading[0].best)
    needed = examples_to_settle(seen)
    if needed is None:
        of = "losses" if seen.objective == LOSS else "shares"
        why = "seeds differ by as much" if now else f"per-example {of} are unknown"
        return (
            f"{hidden} More evaluation examples will not help: {why}. Repeat the best trial with other seeds."
        )
    return (
        f"{hidden} About {needed} evaluation examples instead of {now} would settle a gain of this size: "
        f"{_how_to_have(needed, now, seen.max_examples)}."
    )


def _how_to_have(needed: int, now: int, max_examples: int | None) -> str:
    """Say which key limits the evaluation set, and the value it needs."""
    if max_examples is not None and now >= max_examples:
        return (
            f"set evaluation.max_examples to {needed} in the next round file, with as many rows in data.eval"
        )
    more_rows = f"add rows to data.eval, which has {now}"
    if max_examples is None or needed <= max_examples:
        return more_rows
    return f"{more_rows}, and set evaluation.max_examples to {needed} in the next round file"


def examples_to_settle(seen: Signs) -> int | None:
    """Return how many evaluation examples would reveal a gain of this size; None if no number would.

    Rounded up to two digits. The standard error falls with the square root of their number; the spread
    between seeds does not. Rule: this project's decision, "undetermined".
    """
    now = _num_examples(seen.leading[0].best) if seen.leading else 0
    if seen.gain is None or seen.noise is None or now == 0:
        return None
    allowed = max(MAX_UNDETERMINED_NOISE, abs(seen.gain.relative)) / 2
    by_examples = (seen.gain.standard_error or 0.0) ** 2
    left = allowed**2 - (seen.noise**2 - by_examples)
    return None if left <= 0 else _two_digits_up(now * by_examples / left)


def _num_examples(evaluation: Evaluation) -> int:
    """Those whose share of the objective is known."""
    return len(evaluation.example_nll) if evaluation.objective is None else 0


def _two_digits_up(number: float) -> int:
    unit = int(math.pow(10, max(0, math.floor(math.log10(max(1.0, number))) - 1)))
    return math.ceil(number / unit) * unit


def _advice(seen: Signs, diagnosis: Diagnosis, suggestion: Suggestion) -> str:
    is_kept = suggestion.steps == seen.max_train_steps
    if suggestion.is_capped:
        if is_kept:
            return f"Keep {suggestion.steps} steps: run.production_steps does not allow longer runs."
        return f"Train for {suggestion.steps} steps next, the most that run.production_steps allows."
    if is_kept:
        return f"Keep max_train_steps at {suggestion.steps}."
    factor = suggestion.steps / seen.max_train_steps
    times = f"Train for {suggestion.steps} steps next, {factor:.2g} times as many"
    if diagnosis == Diagnosis.UNDETERMINED:
        return f"{times}: when in doubt, train longer; the best step is chosen afterwards."
    between = f" ({suggestion.low} to {suggestion.high})" if suggestion.low < suggestion.high else ""
    if factor <= 1 or seen.gain is None:
        return f"Train for {suggestion.steps} steps next{between}, {factor:.2g} times as many."
    most = ", the most for one round" if factor > MULTIPLES[-2] else ""
    return (
        f"Train for {suggestion.steps} steps next{between}, {factor:.2g} times as many{most}. That should "
        f"{_change_to_come(seen.gain.to(factor), seen)}."
    )
