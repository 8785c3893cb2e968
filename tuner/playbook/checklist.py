"""The playbook's checks of a round, to be made before its best trial is trusted."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence

from tuner.methods.schedules import warmup_length
from tuner.playbook.curve_checks import curve_findings
from tuner.playbook.edges import diverged_above, edges, number
from tuner.playbook.horizon import MULTIPLES
from tuner.playbook.noise import BY_VALUE, Scale, is_number
from tuner.playbook.results import Finding, RoundResults, Severity, counted, percent
from tuner.playbook.selection import LeadingTrial, distinct, ranked_by_curve
from tuner.records import Choices, Range, Trial, TrialState, searched


def space_findings(results: RoundResults, best: Trial | None) -> Iterator[Finding]:
    """Yield findings on the search space: boundary, unstable_edge, alpha_follows_rank, batch_size_searched.

    Rule: Deep Learning Tuning Playbook, "Identifying bad search space boundaries", "Choosing the
    batch size"; the last two are this project's decisions.
    """
    if best is not None:
        yield from _boundaries(results, best)
        yield from _unstable_edge(results, best)
    yield from _alpha_follows_rank(results)
    if "batch_size" in searched(results.space):
        yield Finding(
            "batch_size_searched",
            Severity.WARNING,
            "batch_size is searched. It affects the speed, not the loss that can be reached, and the best "
            "values of the others change with it: fix it at the largest size that runs well.",
        )


def _boundaries(results: RoundResults, best: Trial) -> Iterator[Finding]:
    for edge in edges(results, best):
        yield Finding(
            "boundary",
            Severity.WARNING,
            f"The best {edge.name}, {edge.value:.3g}, lies at the {edge.side} bound of the search space, "
            f"{edge.bound:.3g}. A better value may lie beyond it; `tuner study promote` widens it there.",
            {"value": edge.value, "bound": edge.bound},
        )


def _unstable_edge(results: RoundResults, best: Trial) -> Iterator[Finding]:
    if "learning_rate" not in searched(results.space):
        return
    rates = {trial.number: number(trial.hyperparameters.get("learning_rate")) for trial in results.results}
    infeasible = {trial.number for trial in results.results if trial.state == TrialState.INFEASIBLE}
    edge = max((rate for n, rate in rates.items() if rate is not None and n not in infeasible), default=None)
    if edge is None or rates.get(best.number) != edge:
        return
    if beyond := diverged_above(results, edge):
        yield Finding(
            "unstable_edge",
            Severity.WARNING,
            f"The best trial has the highest learning rate that trained, {edge:.3g}, and {beyond} above it "
            "were infeasible. A wider range will not help: try more warmup or stronger gradient clipping.",
            {"edge": edge, "infeasible_above": float(beyond)},
        )


def _alpha_follows_rank(results: RoundResults) -> Iterator[Finding]:
    rank, alpha = results.space.get("lora_r"), results.space.get("lora_alpha")
    if not isinstance(rank, (Choices, Range)) or not isinstance(alpha, (Choices, Range)):
        return
    values = [(t.hyperparameters.get("lora_r"), t.hyperparameters.get("lora_alpha")) for t in results.trials]
    pairs = {(r, a) for r, a in ((number(r), number(a)) for r, a in values) if r and a}
    ratios = {round(a / r, 6) for r, a in pairs}
    is_multiple = len(pairs) > 1 and len(ratios) == 1
    how = f"at {ratios.pop():g} times the rank" if is_multiple else "independently of the rank"
    yield Finding(
        "alpha_follows_rank",
        Severity.WARNING,
        f"lora_r is searched, and so is lora_alpha, {how}: the scale of the update then changes with the "
        "rank and hides the effect of the rank. Fix lora_alpha, or write {times_sqrt_r: FACTOR}.",
    )


INFEASIBLE_SHARE = 0.25
EVALUATION_SHARE = 0.3
MIN_EVALUATIONS = 4
"""With fewer evaluations in a run there is hardly a best step to choose."""
LONG_WARMUP_SHARE = 0.05
VERY_LONG_WARMUP_SHARE = 0.1


def checklist(
    results: RoundResults,
    leading: Sequence[LeadingTrial],
    *,
    noise: float | None,
    earlier: Sequence[RoundResults] = (),
    wants_higher_rates: bool = False,
) -> tuple[Finding, ...]:
    """Yield the findings of the rules other than the diagnosis.

    `noise` is relative to the loss; None if unknown. `wants_higher_rates` means that all rates tried may be
    too small. Rule: Deep Learning Tuning Playbook, "After each round of experiments" and its checklist; the
    numbers are this project's decisions.
    """
    return (
        *space_findings(results, leading[0].trial if leading else None),
        *_infeasible_share(results),
        *_too_few_trials(results, noise),
        *curve_findings(
            results,
            results.foremost,
            wants_higher_rates=wants_higher_rates,
        ),
        *_long_warmup(results, leading),
        *_costly_evaluation(results),
        *_workload_changed(results, earlier),
        *_objective_changed(results, earlier),
    )


def doubling_of_trials(losses: Sequence[float], scale: Scale | None = None) -> float:
    """Return the expected gain of the last doubling of the trials, relative to the loss.

    `losses` are costs of the objective, lower is better, and `scale` is what they are relative to.

    This compares the expected best of half the trials, drawn without replacement, with the best of all; half
    is rounded down. Infinite losses stand for trials without an objective; draws of only such trials are left
    out. 0 if fewer than two trials have an objective. Rule: this project's decision, "too_few_trials".
    """
    order = sorted(losses)
    count, half = len(order), len(order) // 2
    num_finite = sum(is_number(loss) for loss in order)
    scale = scale or BY_VALUE
    if num_finite < 2 or not scale.can_compare(order[0]):
        return 0.0
    # The best of the half has rank k (from 0) with probability C(n - 1 - k, half - 1) / C(n, half),
    # computed from the one before, since binomials overflow a float.
    steps = ((count - half - k) / (count - 1 - k) for k in range(num_finite - 1))
    chances = list(itertools.accumulate(steps, operator.mul, initial=1.0))
    expected = math.fsum(chance * loss for chance, loss in zip(chances, order, strict=False)) / sum(chances)
    return expected / order[0] - 1.0 if scale.gained is None else (expected - order[0]) / scale.gained


def _infeasible_share(results: RoundResults) -> Iterator[Finding]:
    counted = len(results.results)
    infeasible = sum(trial.state == TrialState.INFEASIBLE for trial in results.results)
    if infeasible > INFEASIBLE_SHARE * counted:
        yield Finding(
            "infeasible_share",
            Severity.PROBLEM if infeasible == counted else Severity.WARNING,
            f"{infeasible} of {counted} trials diverged or did not fit into memory. Remove what they have in "
            "common from the search space, the highest learning rates first, to waste no more trials on it.",
            {"infeasible": float(infeasible), "trials": float(counted)},
        )


def _too_few_trials(results: RoundResults, noise: float | None) -> Iterator[Finding]:
    """Yield a finding if the last doubling of the number of trials brought a worthwhile gain."""
    if (scale := results.scale) is None:
        return
    losses = [best.cost for _, best in ranked_by_curve(distinct(results.complete))]
    losses += [math.inf] * (len(tuple(distinct(results.results))) - len(losses))
    gain, threshold = doubling_of_trials(losses, scale), max(noise or 0.0, results.worthwhile_gain)
    if gain <= threshold:
        return
    half = len(losses) // 2
    yield Finding(
        "too_few_trials",
        Severity.WARNING,
        f"The best of only {counted(half, 'trial')} would typically be {percent(gain)} worse than "
        f"the best of {len(losses)}, more than {percent(threshold)}: more trials would probably find a "
        "better one. Raise search.trials, or make the space smaller.",
        {"gain": gain, "threshold": threshold, "trials": float(len(losses))},
    )


def _long_warmup(results: RoundResults, leading: Sequence[LeadingTrial]) -> Iterator[Finding]:
    warmup = warmup_length(leading[0].trial.hyperparameters) if leading else 0
    share = warmup / results.max_train_steps
    if share > LONG_WARMUP_SHARE:
        # A round is at most three times as long as the one before.
        at_once = math.ceil(warmup / LONG_WARMUP_SHARE) <= MULTIPLES[-1] * results.max_train_steps
        longer = "a longer horizon" if at_once else "longer horizons over the next rounds"
        yield Finding(
            "long_warmup",
            Severity.PROBLEM if share > VERY_LONG_WARMUP_SHARE else Severity.WARNING,
            f"The best trial warms up for {warmup} of {results.max_train_steps} steps ({percent(share)}, "
            f"more than {percent(LONG_WARMUP_SHARE)}). Try fewer warmup_steps, or, if the trial needs them, "
            f"{longer}.",
            {"warmup_steps": float(warmup), "share": share},
        )


def _costly_evaluation(results: RoundResults) -> Iterator[Finding]:
    if results.evaluation_share > EVALUATION_SHARE:
        yield Finding(
            "costly_evaluation",
            Severity.WARNING,
            f"Evaluation takes {percent(results.evaluation_share)} of the compute. {_cheaper(results)}",
            {"share": results.evaluation_share},
        )


def _cheaper(results: RoundResults) -> str:
    """Say how few evaluations, or examples, would reduce evaluation to the allowed share."""
    share = min(results.evaluation_share, 0.999)
    less = (1 / share - 1) / (1 / EVALUATION_SHARE - 1)
    every = math.ceil(results.evaluate_every / less)
    is_sparse = MIN_EVALUATIONS * every > results.max_train_steps
    return (
        f"Evaluating every {every} steps instead of {results.evaluate_every} (evaluation.every_steps) would "
        f"lower it to {percent(EVALUATION_SHARE)}{', in a longer run' if is_sparse else ''}. So would "
        f"{percent(less)} of the examples (evaluation.max_examples), but gains are then less certain, and no "
        "trial of this round can be continued."
    )


def _workload_changed(results: RoundResults, earlier: Sequence[RoundResults]) -> Iterator[Finding]:
    other_work = [other.name for other in earlier if other.workload != results.workload]
    other_batches = [
        other.name for other in earlier if other.space.get("batch_size") != results.space.get("batch_size")
    ]
    differing = [
        f"{what} from {', '.join(names)}"
        for what, names in (
            ("model, data, evaluation set or length differ", other_work),
            ("the batch size differs", other_batches),
        )
        if names
    ]
    if differing:
        said = " and ".join(differing)
        yield Finding(
            "workload_changed",
            Severity.INFO,
            f"{said[0].upper()}{said[1:]}: the right horizon may have moved. A smaller batch or more dropout "
            "needs more steps.",
        )


def _objective_changed(results: RoundResults, earlier: Sequence[RoundResults]) -> Iterator[Finding]:
    others = [other for other in earlier if other.objective.metric != results.objective.metric]
    if others:
        ranked_by = ", ".join(f"{other.name} by {other.objective.metric}" for other in others)
        own = results.objective.metric
        yield Finding(
            "objective_changed",
            Severity.INFO,
            f"{results.name} ranks its trials by {own}, {ranked_by}. Their best trials do not compare; where "
            f"an earlier round measured {own} too, its trials are read by that.",
            {"rounds": float(len(others))},
        )
