"""What a round's trials say about its search space: bounds, unstable edges, names better not searched."""

from __future__ import annotations

from collections.abc import Iterator

from tuner.playbook.edges import diverged_above, edges, number
from tuner.playbook.findings import Finding, Severity
from tuner.playbook.results import RoundResults
from tuner.records import Choices, Range, Trial, TrialState, searched


def space_findings(results: RoundResults, best: Trial | None) -> Iterator[Finding]:
    """Findings on the search space: boundary, unstable_edge, alpha_follows_rank, batch_size_searched.

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
            "batch_size is searched. It decides about speed, not about the loss that can be reached, and "
            "every other good value moves with it: fix it at the largest size that runs well.",
        )


def _boundaries(results: RoundResults, best: Trial) -> Iterator[Finding]:
    for edge in edges(results, best):
        yield Finding(
            "boundary",
            Severity.WARNING,
            f"The best {edge.name}, {edge.value:.3g}, lies at the {edge.side} bound of the search space, "
            f"{edge.bound:.3g}. A better value may lie beyond it: `tuner study promote` widens it there.",
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
    how = f"always {ratios.pop():g} times the rank" if is_multiple else "apart from the rank"
    yield Finding(
        "alpha_follows_rank",
        Severity.WARNING,
        f"lora_r is searched, and lora_alpha as well, {how}: the scale of the update then changes with the "
        "rank and hides what the rank does. Fix lora_alpha, or write {times_sqrt_r: FACTOR}.",
    )
