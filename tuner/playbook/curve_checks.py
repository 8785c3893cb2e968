"""Findings on the learning curves of a round's trials."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuner.playbook.curves import periodicity, restless_changes, rise_after_best, train_loss_rise
from tuner.playbook.edges import number
from tuner.playbook.results import Finding, RoundResults, Severity, counted
from tuner.playbook.schedule import known_schedule_of
from tuner.playbook.selection import LeadingTrial, beats_the_base
from tuner.records import LOSS, Direction

CLIPPED_SHARE = 0.5
PERIODIC_SHARE = 0.6
"""Share of the detrended variance above which an evaluation loss counts as periodic."""
MIN_RESTLESS = 3
"""Number of significant changes in the last quarter that count as repeated."""


def curve_findings(
    results: RoundResults, leading: Sequence[LeadingTrial], *, wants_higher_rates: bool = False
) -> Iterator[Finding]:
    """Yield the findings on curves: overfitting, late_variance, train_loss_rising, clipped,
    periodic_evaluation.

    With `wants_higher_rates`, no other advice on learning rates is given. Rule: Deep Learning Tuning
    Playbook, "Examining the training curves" and, for clipping, "How can optimization failures be debugged
    and mitigated?"; periods are this project's decision.
    """
    yield from _overfitting(results, leading)
    if leading:
        best = leading[0]
        yield from _late_variance(best)
        yield from _train_loss_rising(leading)
        yield from _clipped(best, wants_higher_rates=wants_higher_rates)
        yield from _periodic_evaluation(results, best)


def _overfitting(results: RoundResults, leading: Sequence[LeadingTrial]) -> Iterator[Finding]:
    rises = ((trial, rise_after_best(trial.evaluations)) for trial in results.complete)
    rising = {
        trial.number: rise
        for trial, rise in rises
        # A trial that never beat the base model cannot overfit.
        if rise is not None and rise.is_overfitting and beats_the_base(trial)
    }
    in_front = [lead.trial.number for lead in leading if lead.trial.number in rising]
    if in_front:
        rise = rising[in_front[0]]
        objective = leading[0].best.objective or LOSS
        what = "evaluation loss" if objective == LOSS else objective.metric
        direction = "rises" if objective.direction == Direction.MINIMIZE else "falls"
        yield Finding(
            "overfitting",
            Severity.WARNING,
            f"Overfitting in {len(in_front)} of {counted(len(leading), 'leading trial')}: the {what} "
            f"of trial {in_front[0]} {direction} by {rise.amount:.4f} from step {rise.best_step} to step "
            f"{rise.last_step}{' while its train loss falls' if rise.train_loss_falls else ''}. More data or "
            "more regularisation (lora_dropout, weight_decay, a lower lora_r) help; more steps do not.",
            {
                "leading": float(len(in_front)),
                "trials": float(len(rising)),
                "rise": rise.amount,
                "standard_error": rise.standard_error,
            },
        )
    elif rising:
        yield Finding(
            "overfitting",
            Severity.INFO,
            f"Overfitting in {counted(len(rising), 'trial')}, none of the leading ones. Choosing the best "
            "trial then favours slow training, such as a small learning rate: search lora_dropout or "
            "weight_decay in the next round and compare again.",
            {"leading": 0.0, "trials": float(len(rising))},
        )


def _late_variance(best: LeadingTrial) -> Iterator[Finding]:
    restless, changes = restless_changes(best.trial.evaluations)
    if restless >= MIN_RESTLESS:
        yield Finding(
            "late_variance",
            Severity.WARNING,
            f"{restless} of the best trial's last {changes} changes from evaluation to evaluation exceed two "
            f"standard errors, up and down, so its best step is partly luck. {_calming(best)}",
            {"restless": float(restless), "changes": float(changes)},
        )


def _calming(best: LeadingTrial) -> str:
    """Say how to stabilise the end of a run with this trial's schedule."""
    own = known_schedule_of(best.trial.hyperparameters)
    if own.decay_lengths:
        lengths = ", ".join(row.name for row in own.decay_lengths)
        return f"Use longer {lengths} or a lower learning_rate for a smoother end."
    if own.has_stable_phase:
        return "Use `schedule: linear`, with decay_steps of about 40% of the run, for a smoother end."
    return "Use a lower learning_rate for a smoother end."


def _train_loss_rising(leading: Sequence[LeadingTrial]) -> Iterator[Finding]:
    rising = [lead for lead in leading if train_loss_rise(lead.trial.evaluations) > 0]
    if leading[0] in rising or len(rising) > len(leading) / 2:
        yield Finding(
            "train_loss_rising",
            Severity.PROBLEM,
            f"The train loss ends above its start in {len(rising)} of "
            f"{counted(len(leading), 'leading trial')}, by more than its noise explains. This is usually a "
            "bug: check which tokens the loss covers with `tuner study check ROUND.yaml --show 5`.",
            {"rising": float(len(rising)), "leading": float(len(leading))},
        )


def _clipped(best: LeadingTrial, *, wants_higher_rates: bool) -> Iterator[Finding]:
    updates = max(evaluation.step for evaluation in best.trial.evaluations)
    clipped = sum(evaluation.clipped_updates for evaluation in best.trial.evaluations)
    if clipped > CLIPPED_SHARE * updates:
        norm = number(best.trial.hyperparameters.get("max_grad_norm"))
        rate = number(best.trial.hyperparameters.get("learning_rate"))
        remedy = (
            f"Search rates below {f'its {rate:.2g}' if rate else 'its own'} in the next round; if they do "
            "worse, raise max_grad_norm instead."
        )
        if wants_higher_rates:
            remedy = (
                "Higher rates did better all the same: raise max_grad_norm and check whether they still do."
            )
        yield Finding(
            "clipped",
            Severity.WARNING,
            f"{clipped} of the best trial's {updates} updates were clipped"
            f"{f' at max_grad_norm {norm:g}' if norm else ''}, so clipping, not the learning rate, sets the "
            f"step size. {remedy}",
            {"clipped": float(clipped), "updates": float(updates)},
        )


def _periodic_evaluation(results: RoundResults, best: LeadingTrial) -> Iterator[Finding]:
    batch_size = number(best.trial.hyperparameters.get("batch_size"))
    if not batch_size or results.train_rows <= 0:
        return
    epoch = results.train_rows / batch_size
    share = periodicity(best.trial.evaluations, epoch)
    if share is not None and share > PERIODIC_SHARE:
        yield Finding(
            "periodic_evaluation",
            Severity.WARNING,
            f"The best trial's evaluation loss repeats with the epoch of {epoch:.0f} steps: check the "
            "shuffling, and whether rows are in both the training and the evaluation data.",
            {"epoch_steps": epoch, "share": share},
        )
