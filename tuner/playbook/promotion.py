"""The next round: its horizon, its search space, and the trials that continue."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tuner.errors import InputError, TunerError
from tuner.methods.schedules import DecayRule
from tuner.methods.table import seed_of
from tuner.playbook.carrying import Carrying, HyperparameterChange, longest
from tuner.playbook.edges import Edge, number
from tuner.playbook.horizon import Diagnosis
from tuner.playbook.noise import BY_VALUE, paired_standard_error
from tuner.playbook.observations import default_sampler, search_findings
from tuner.playbook.reading import Reading
from tuner.playbook.reopening import (
    OverturnedOrder,
    overturned_order,
    remarks,
    reopened_space,
    reopening_findings,
)
from tuner.playbook.results import Finding, RoundResults, Sampler, Severity, counted, percent
from tuner.playbook.schedule import continuation_step, decay_lengths, tiny_rate_share
from tuner.playbook.selection import distinct, may_be_carried_over, ranked, trial_score
from tuner.records import Dimension, Hyperparameters, Space, Trial, active, possible, searched

TOP = 3
"""The most trials that are carried over unchanged."""
TINY_RATE_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class EnqueuedTrial:
    """A trial of the last round that the next one runs first."""

    hyperparameters: Hyperparameters
    """Only the hyperparameters that the next round searches; fixed ones are not repeated."""
    round: str
    trial: int
    from_step: int | None
    """The step it continues from; None if it starts over; the horizon itself if nothing is left to run."""
    reason: str | None
    """Why it starts over; None if it continues."""

    @property
    def name(self) -> str:
        """Return, for example, `round1/7`."""
        return f"{self.round}/{self.trial}"


@dataclass(frozen=True, slots=True)
class NextRound:
    """The content of the next round's file, with reasons."""

    from_round: str
    to_round: str
    old_max_train_steps: int
    max_train_steps: int
    evaluate_every: int
    decay: DecayRule
    """What is kept of a linear decay."""
    space: Space
    """Every hyperparameter of the next round, in the last one's order."""
    changes: Mapping[str, HyperparameterChange]
    """One for each name in the space, including unchanged ones."""
    enqueue: tuple[EnqueuedTrial, ...]
    """Best first."""
    trials_total: int
    """Including the enqueued ones."""
    sampler: Sampler
    sampler_reason: str
    proposed_seeds: tuple[int, ...]
    """Other seeds for the best two trials if they differ by less than the noise; else empty."""
    findings: tuple[Finding, ...]
    """Findings of the reading and of the promotion itself."""
    notes: tuple[str, ...]
    """Remarks to read before running it."""


def plan_next_round(
    results: RoundResults,
    reading: Reading,
    *,
    to: str,
    earlier: Sequence[RoundResults] = (),
    max_train_steps: int | None = None,
    top: int | None = None,
    decay: DecayRule = "share",
    added: Mapping[str, Dimension] | None = None,
    candidates: Sequence[Trial] | None = None,
    adds_trials: bool = True,
) -> NextRound:
    """Return the plan of the next round, at the suggested horizon or the given one.

    `earlier` holds the study's earlier rounds, oldest first. The incumbents, three or half of the round's
    trials if that is fewer, are chosen among `candidates`, trials of this horizon, by default those of the
    round. `added` holds dimensions that the user adds to the search. Raises TunerError if no horizon is given
    and the reading suggests none, InputError for a horizon that is too short for one evaluation interval or
    the warmup. Rule: Deep Learning Tuning Playbook, "Round 2: Fewer runs, but of longer duration"; counts are
    this project's decisions.
    """
    horizon = _horizon(results, reading, max_train_steps)
    num_kept = num_carried_over(len(results.results)) if top is None else top
    best = incumbents(results.trials if candidates is None else candidates, num_kept)
    overturned = overturned_order(results, earlier, noise=reading.noise)
    carrying = _carrying(results, reading, best, horizon, decay, overturned=overturned, added=added or {})
    return _next_round(carrying, reading, overturned, to=to, earlier=earlier, adds_trials=adds_trials)


def _next_round(
    carrying: Carrying,
    reading: Reading,
    overturned: OverturnedOrder | None,
    *,
    to: str,
    earlier: Sequence[RoundResults],
    adds_trials: bool,
) -> NextRound:
    results, best, horizon = carrying.results, carrying.incumbents, carrying.new_horizon
    changes = carrying.changes()
    _refuse_long_warmup(changes, horizon)
    space = possible({name: change.to_dimension for name, change in changes.items()})
    enqueue = tuple(_enqueued(carrying, trial, searched(space)) for trial in best)
    total = _trials_total(carrying, len(enqueue), is_searched=adds_trials and bool(searched(space)))
    sampler, sampler_reason = default_sampler(
        knows_good_trials=bool(best),
        before=results.sampler,
        is_narrowed=not carrying.widens_rates and not carrying.reopened,
    )
    seeds = proposed_seeds(results, noise=reading.noise)
    notes = _notes(results, reading, horizon, space), remarks(results, reading, space, best, earlier)
    return NextRound(
        from_round=results.name,
        to_round=to,
        old_max_train_steps=results.max_train_steps,
        max_train_steps=horizon,
        evaluate_every=results.evaluate_every,
        decay=carrying.decay,
        space=space,
        changes={name: change for name, change in changes.items() if name in space},
        enqueue=enqueue,
        trials_total=total,
        sampler=sampler,
        sampler_reason=sampler_reason,
        proposed_seeds=seeds,
        findings=tuple(_findings(carrying, reading, overturned, space, total, seeds)),
        notes=(*itertools.chain(*notes), *_nothing_to_run(enqueue, total, horizon)),
    )


def _trials_total(carrying: Carrying, enqueued: int, *, is_searched: bool) -> int:
    results = carrying.results
    return num_trials(
        len(results.results) or len(results.trials),
        enqueued=enqueued,
        old_horizon=results.max_train_steps,
        new_horizon=carrying.new_horizon,
        is_searched=is_searched,
    )


def _carrying(
    results: RoundResults,
    reading: Reading,
    best: Sequence[Trial],
    horizon: int,
    decay: DecayRule,
    *,
    overturned: OverturnedOrder | None,
    added: Mapping[str, Dimension],
) -> Carrying:
    widens_rates = reading.widens_rates and horizon == results.max_train_steps
    return Carrying(
        results,
        incumbents=best,
        leading=[*best, *(lead.trial for lead in reading.leading if lead.trial not in best)],
        new_horizon=horizon,
        decay=decay,
        edges=_edges(results, reading),
        widens_rates=widens_rates,
        has_small_rates=reading.has_small_rates,
        reopened=reopened_space(results, overturned) if overturned and not widens_rates else {},
        added=added,
    )


def _findings(
    carrying: Carrying,
    reading: Reading,
    overturned: OverturnedOrder | None,
    space: Space,
    total: int,
    seeds: Sequence[int],
) -> Iterator[Finding]:
    yield from reading.findings
    yield from search_findings(space, total)
    yield from reopening_findings(overturned, carrying.reopened, widens_rates=carrying.widens_rates)
    yield from _tiny_rate(carrying)
    yield from _lead_within_noise(seeds)


def num_carried_over(num_trials: int) -> int:
    """Return how many of a round's trials the next one runs first: three, or half if that is fewer.

    At least one. Rule: Deep Learning Tuning Playbook, "Round 2: Fewer runs, but of longer duration"; the
    numbers are this project's decision.
    """
    return min(TOP, max(1, num_trials // 2))


def _edges(results: RoundResults, reading: Reading) -> tuple[Edge, ...]:
    """Return the bounds to widen, including the learning rate's if only higher rates are tried first."""
    name = "learning_rate"
    if not reading.widens_rates or any(edge.name == name for edge in reading.edges):
        return reading.edges
    rate = number(reading.leading[0].trial.hyperparameters.get(name))
    return reading.edges if rate is None else (*reading.edges, Edge(name, "upper", rate, rate))


def num_trials(
    old_total: int, *, enqueued: int, old_horizon: int, new_horizon: int, is_searched: bool = True
) -> int:
    """Return the number of trials of the next round: trials x T1/T2, at least two new ones, at most as
    before.

    There is always at least one new trial, unless nothing is searched: then only the enqueued ones run. Rule:
    Deep Learning Tuning Playbook, "Round 2: Fewer runs, but of longer duration"; the numbers are this
    project's decision.
    """
    if not is_searched:
        return max(1, enqueued)
    wanted = max(round(old_total * old_horizon / new_horizon), enqueued + 2)
    return max(enqueued + 1, min(wanted, old_total))


def proposed_seeds(results: RoundResults, *, noise: float | None) -> tuple[int, ...]:
    """Return two other seeds for the best two trials if they differ by less than the noise; else none.

    The noise is that of their own paired difference or `noise` (relative to the loss), whichever is larger;
    if the objective has one value per trial, that of the two scores' difference. Rule: Deep Learning Tuning
    Playbook, "Determining whether to adopt a training pipeline change or hyperparameter configuration": run
    the winner again before adopting it.
    """
    best_evaluations = {trial.number: best for trial, best in ranked(results.trials)}
    order = incumbents(results.trials, 2)
    if len(order) < 2:
        return ()
    winner, runner_up = order
    first, second = (best_evaluations[trial.number] for trial in order)
    if (best := trial_score(winner)) is not None and (other := trial_score(runner_up)) is not None:
        behind, limit = best - other, _answers_error(winner, runner_up)
    else:
        behind = second.cost - first.cost
        scale = results.scale or BY_VALUE
        spread = scale.amount(noise or 0.0, of=first.cost)
        limit = max(spread, paired_standard_error(second, first) or 0.0)
    if behind > limit:
        return ()
    used = {seed_of(trial.hyperparameters) for trial in results.trials}
    fresh = (seed for seed in itertools.count(seed_of(winner.hyperparameters) + 1) if seed not in used)
    return next(fresh), next(fresh)


def _answers_error(*trials: Trial) -> float:
    """Return the standard error of the difference between answer scores, as if on independent rows."""
    scores = [trial.answer_score for trial in trials if trial.answer_score is not None]
    return math.sqrt(sum((score.standard_error or 0.0) ** 2 for score in scores))


def incumbents(trials: Iterable[Trial], top: int) -> list[Trial]:
    """Return the best trials that beat the base model, without duplicates.

    Rule: this project's decision, "The next round": what is carried over unchanged.
    """
    return list(itertools.islice(distinct(t for t, _ in ranked(trials) if may_be_carried_over(t)), top))


def _horizon(results: RoundResults, reading: Reading, given: int | None) -> int:
    horizon = reading.suggested_max_train_steps if given is None else given
    if horizon is None:
        raise TunerError(
            f"{results.name} suggests no horizon for the next round: {' '.join(reading.evidence)} "
            "Pass --max-train-steps to promote it anyway."
        )
    if horizon < results.evaluate_every:
        raise InputError(
            f"max_train_steps {horizon} is less than evaluation.every_steps {results.evaluate_every}: "
            "no step before the last would be evaluated"
        )
    return horizon


def _refuse_long_warmup(changes: Mapping[str, HyperparameterChange], horizon: int) -> None:
    warmup = longest(changes["warmup_steps"].to_dimension) if "warmup_steps" in changes else 0
    if warmup > horizon:
        raise InputError(
            f"warmup_steps {warmup:.0f} does not fit into max_train_steps {horizon}: pass a longer "
            "--max-train-steps, or shorten the warmup"
        )


def _enqueued(carrying: Carrying, trial: Trial, names: Mapping[str, Dimension]) -> EnqueuedTrial:
    point = carrying.point(trial)
    step, reason = continuation_step(trial, carrying.results.max_train_steps, point, carrying.new_horizon)
    chosen = {name: point[name] for name in active(names, point) if name in point}
    return EnqueuedTrial(chosen, trial.round, trial.number, step, reason)


def _tiny_rate(carrying: Carrying) -> Iterator[Finding]:
    if not carrying.incumbents:
        return
    old_horizon, horizon = carrying.results.max_train_steps, carrying.new_horizon
    point = carrying.point(carrying.incumbents[0])
    share = tiny_rate_share(
        point, old=carrying.incumbents[0].hyperparameters, old_horizon=old_horizon, new_horizon=horizon
    )
    if share > TINY_RATE_SHARE:
        yield Finding(
            "tiny_rate",
            Severity.WARNING,
            f"{percent(share)} of the {counted(horizon - old_horizon, 'step')} added by the longer horizon "
            "would run below a tenth of the peak rate, where little is learned. An even longer horizon, or a "
            "constant rate with a short decay, spends more steps at the peak.",
            {"share": share, "steps": float(horizon - old_horizon)},
        )


def _lead_within_noise(seeds: Sequence[int]) -> Iterator[Finding]:
    if seeds:
        yield Finding(
            "lead_within_noise",
            Severity.INFO,
            "The best two trials differ by less than the noise. Before adopting the winner, run both again "
            f"with other seeds, training_seed {' and '.join(map(str, seeds))}: make training_seed a list "
            "that holds them, and add the runs to search.enqueue.",
        )


def _nothing_to_run(enqueue: Sequence[EnqueuedTrial], total: int, horizon: int) -> Iterator[str]:
    if len(enqueue) == total and all(entry.from_step == horizon for entry in enqueue):
        yield "All of its trials are complete already. Raise search.trials to run new ones."


def _notes(results: RoundResults, reading: Reading, horizon: int, space: Space) -> Iterator[str]:
    suggested, cap = reading.suggested_max_train_steps, results.production_steps
    if suggested is not None and horizon != suggested:
        yield f"The next round trains for {horizon} steps; the playbook suggests {suggested}."
    if cap is not None and horizon > cap:
        yield f"{horizon} steps are more than run.production_steps, {cap}."
    if horizon > 3 * results.max_train_steps:
        yield "More than three times the last horizon: its best trials may not be the best here."
    decays = [name for name in decay_lengths(space) if longest(space[name]) > 0]
    if reading.diagnosis == Diagnosis.TOO_SHORT and horizon > results.max_train_steps and decays:
        yield f"The best steps are late: also retune {', '.join(decays)}."
    if not incumbents(results.trials, 1):
        yield "No complete trial beat the base model, so nothing is enqueued and no range is narrowed."
