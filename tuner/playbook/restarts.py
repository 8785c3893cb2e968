"""When a study has enough rounds, and when it restarts from the shortest horizon."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tuner.playbook.carrying import HyperparameterChange
from tuner.playbook.gain import configuration
from tuner.playbook.horizon import Diagnosis
from tuner.playbook.observations import with_a_model
from tuner.playbook.promotion import NextRound
from tuner.playbook.reading import Reading, read_round
from tuner.playbook.results import RoundResults
from tuner.playbook.selection import may_be_carried_over, ranked
from tuner.records import Space, TimesSqrtRank, Trial, TrialState, Value, active, num_points, searched

MAX_GROWTH = 9
"""Rounds follow each other up to this multiple of the first horizon if nothing else limits them."""


@dataclass(frozen=True, slots=True)
class Enough:
    """Why no further round is run."""

    reason: str
    taught_nothing: bool = False
    """Whether the round failed to show how long to train: nothing complete, or nothing learned."""


def next_horizon(
    results: RoundResults,
    reading: Reading,
    earlier: Sequence[RoundResults] = (),
    *,
    has_deadline: bool = False,
) -> int | Enough:
    """Return the horizon of the round that follows automatically, or why none does.

    `too_short` and `undetermined` lead to a longer one, and a learning rate at its bound to another at the
    same horizon. The second `undetermined` in a row ends a study, and so do `run.production_steps` and, if
    neither that nor a deadline is set, nine times the first horizon. `earlier` holds the study's earlier
    rounds, oldest first. Rule: Deep Learning Tuning Playbook, "Deciding the number of steps for each training
    run" (one to three rounds); the bounds are this project's decision.
    """
    steps, suggested = results.max_train_steps, reading.suggested_max_train_steps
    if suggested is None:
        return Enough(_nothing_taught(reading), taught_nothing=True)
    if reading.widens_rates:
        return suggested
    match reading.diagnosis:
        case Diagnosis.TOO_SHORT | Diagnosis.UNDETERMINED:
            pass
        case Diagnosis.OVERFITTING:
            return Enough("the best trial overfits, so more steps would not help")
        case Diagnosis.RIGHT:
            return Enough(f"{steps} steps are about right")
        case _:
            return Enough(f"more than {steps} steps would not help")
    same = [other for other in earlier if other.workload == results.workload]
    if reading.diagnosis == Diagnosis.UNDETERMINED and _was_undetermined(same):
        return Enough(
            "for the second time in a row the round cannot tell whether more steps would help; its report "
            f"says what would settle it. The next horizon to try is {suggested} steps"
        )
    if suggested <= steps and results.production_steps is None:
        return Enough(f"a horizon of {steps} is too short to be extended: set a longer max_train_steps")
    if suggested <= steps:
        return Enough(f"run.production_steps, {results.production_steps}, does not allow longer runs")
    return _bounded(suggested, results, same, has_deadline=has_deadline)


def _bounded(
    suggested: int, results: RoundResults, earlier: Sequence[RoundResults], *, has_deadline: bool
) -> int | Enough:
    """Return the suggestion, limited to nine times the first horizon if nothing else limits it."""
    if has_deadline or results.production_steps is not None:
        return suggested
    most = MAX_GROWTH * min(r.max_train_steps for r in (*earlier, results))
    if results.max_train_steps >= most:
        return Enough(
            f"{results.max_train_steps} steps are {MAX_GROWTH} times the first horizon, the most without "
            f"run.production_steps or a limit in time. The next horizon would be {suggested} steps"
        )
    return min(suggested, most)


def _was_undetermined(earlier: Sequence[RoundResults]) -> bool:
    if not earlier:
        return False
    *before, last = earlier
    reading = read_round(last, before)
    return reading.diagnosis == Diagnosis.UNDETERMINED and not reading.widens_rates


def _nothing_taught(reading: Reading) -> str:
    if reading.diagnosis == Diagnosis.NO_LEARNING:
        return "no trial beat the base model: check the data, the loss masks and the learning rates first"
    return "no trial is complete, so the round does not show how long to train"


CARRIED_SHARE = 1 / 3
"""Divisor: a longer round carries over one in this many of a round's trials."""


@dataclass(frozen=True, slots=True)
class LongerRound:
    """A longer round that continues trials of shorter ones and adds none."""

    max_train_steps: int
    candidates: tuple[Trial, ...]
    """Trials of the last round's horizon, from all restarts, that no longer round has run."""
    top: int
    """How many of them it carries over."""


@dataclass(frozen=True, slots=True)
class Restart:
    """A round at the first horizon, sampled with the results of all earlier rounds."""

    number: int
    """Number of the pass that it starts: 2, 3, ..."""


Following: TypeAlias = LongerRound | Restart | None


def following(rounds: Sequence[RoundResults], *, longer: int | None, passes: int) -> Following:
    """Return what comes after the last of these rounds, oldest first; None if nothing does.

    `longer` is a horizon beyond all that were run, if the last round asks for one. A pass climbs from the
    first horizon, using all trials of the study. Rule: this project's decision, "How good is it?": rounds
    that continue from stable checkpoints, and a sampler that uses the earlier rounds.
    """
    last = rounds[-1]
    known = (r.max_train_steps for r in rounds if r.max_train_steps > last.max_train_steps)
    horizon = min(known, default=longer)
    candidates = left_behind(rounds, max_train_steps=last.max_train_steps)
    if horizon is not None and candidates:
        return LongerRound(horizon, candidates, num_carried(len(last.results)))
    begun = sum(r.max_train_steps == rounds[0].max_train_steps for r in rounds)
    return Restart(begun + 1) if begun < passes and points_left(rounds) > 0 else None


def points_left(rounds: Sequence[RoundResults]) -> float:
    """Return how many points of the first round's space are untried at its horizon; mostly infinite.

    Rule: this project's decision, "Search": no point is run twice for as many steps.
    """
    first = rounds[0]
    tried = {
        configuration
        for r in rounds
        if r.max_train_steps == first.max_train_steps
        for trial in r.trials
        if trial.state != TrialState.FAILED
        if (configuration := _within(first.space, trial)) is not None
    }
    return num_points(first.space) - len(tried)


def _within(space: Space, trial: Trial) -> tuple[Value, ...] | None:
    """Return the trial's values of the searched hyperparameters; None if the space excludes the point."""
    known = trial.hyperparameters
    counting = active(space, known)
    is_within = all(
        isinstance(dimension, TimesSqrtRank) or (name in known and dimension.contains(known[name]))
        for name, dimension in counting.items()
    )
    return tuple(known[name] for name in searched(counting)) if is_within else None


def num_carried(num_trials: int) -> int:
    """Return a third of a round's trials, and at least one.

    Rule: this project's decision: as in successive halving, where each round is three times as long.
    """
    return max(1, round(CARRIED_SHARE * num_trials))


def left_behind(rounds: Sequence[RoundResults], *, max_train_steps: int) -> tuple[Trial, ...]:
    """Return the trials of a horizon that beat the base model and were not run longer, best first.

    Rule: this project's decision: a trial that was just behind in its own pass may lead in the next.
    """
    taken = {
        configuration(trial)
        for r in rounds
        if r.max_train_steps > max_train_steps
        for trial in r.trials
        if trial.state != TrialState.FAILED
    }
    same = [trial for r in rounds if r.max_train_steps == max_train_steps for trial in r.trials]
    left = (trial for trial, _ in ranked(same) if configuration(trial) not in taken)
    return tuple(trial for trial in left if may_be_carried_over(trial))


def plan_restart(
    first: RoundResults, last: RoundResults, reading: Reading, *, to: str, trials: int, number: int
) -> NextRound:
    """Return the round that starts pass `number`: horizon, space and number of trials of the first one.

    `reading` is that of the last round; its findings are kept. Rule: this project's decision, "How good is
    it?".
    """
    changes = {
        name: HyperparameterChange(dimension, dimension, first.tier_of(name), f"as in {first.name}")
        for name, dimension in first.space.items()
    }
    return NextRound(
        from_round=last.name,
        to_round=to,
        old_max_train_steps=last.max_train_steps,
        max_train_steps=first.max_train_steps,
        evaluate_every=first.evaluate_every,
        decay="share",
        space=first.space,
        changes=changes,
        enqueue=(),
        trials_total=trials,
        sampler=with_a_model(first.sampler),
        sampler_reason="learns from the trials of all rounds",
        proposed_seeds=(),
        findings=reading.findings,
        notes=(f"Restart {number - 1}: this round has the horizon and the search space of {first.name}.",),
    )
