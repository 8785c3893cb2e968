"""How rounds follow each other when the first horizon is come back to with what longer ones have taught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tuner.playbook.carrying import HyperparameterChange
from tuner.playbook.gain import configuration
from tuner.playbook.promotion import NextRound
from tuner.playbook.reading import Reading
from tuner.playbook.results import RoundResults
from tuner.playbook.search import with_a_model
from tuner.playbook.selection import may_be_carried_over, ranked
from tuner.playbook.tiers import tier_of
from tuner.records import Space, TimesSqrtRank, Trial, TrialState, Value, num_points, searched

CARRIED_SHARE = 1 / 3
"""Of a round's trials, how many a longer round carries over."""


@dataclass(frozen=True, slots=True)
class Longer:
    """A longer round that goes on with trials of shorter ones, and adds none."""

    max_train_steps: int
    candidates: tuple[Trial, ...]
    """Trials of the last round's horizon, from all passes, that no longer round has taken up."""
    top: int
    """How many of them it carries over."""


@dataclass(frozen=True, slots=True)
class Anew:
    """A round at the first horizon, sampled by what all rounds before have taught."""

    number: int
    """Of the pass that it begins: 2, 3, ..."""


Following: TypeAlias = Longer | Anew | None


def following(rounds: Sequence[RoundResults], *, longer: int | None, passes: int) -> Following:
    """What comes after the last of these rounds, oldest first; None where it was the last one.

    `longer` is the horizon that the last round asks for beyond all that were run, if it does. A pass
    climbs from the first horizon over all that the study knows. Rule: this project's decision, "How good
    is it?": rounds that go on from trunks, and a sampler that uses the earlier rounds.
    """
    last = rounds[-1]
    known = (r.max_train_steps for r in rounds if r.max_train_steps > last.max_train_steps)
    horizon = min(known, default=longer)
    candidates = left_behind(rounds, max_train_steps=last.max_train_steps)
    if horizon is not None and candidates:
        return Longer(horizon, candidates, num_carried(len(last.results)))
    begun = sum(r.max_train_steps == rounds[0].max_train_steps for r in rounds)
    return Anew(begun + 1) if begun < passes and points_left(rounds) > 0 else None


def points_left(rounds: Sequence[RoundResults]) -> float:
    """Points of the first round's space that no round of its horizon has tried; mostly infinite.

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
    """The trial's values of what is searched; None for a point that the space does not hold."""
    known = trial.hyperparameters
    is_within = all(
        isinstance(dimension, TimesSqrtRank) or (name in known and dimension.contains(known[name]))
        for name, dimension in space.items()
    )
    return tuple(known[name] for name in searched(space)) if is_within else None


def num_carried(num_trials: int) -> int:
    """A third of a round's trials, and at least one.

    Rule: this project's decision: as in successive halving, where each round is three times as long.
    """
    return max(1, round(CARRIED_SHARE * num_trials))


def left_behind(rounds: Sequence[RoundResults], *, max_train_steps: int) -> tuple[Trial, ...]:
    """Return the trials of a horizon that beat the base model and that no longer round has run, best first.

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


def plan_round_anew(
    first: RoundResults, last: RoundResults, reading: Reading, *, to: str, trials: int, number: int
) -> NextRound:
    """The round that begins pass `number`: horizon, space and number of trials of the first one.

    `reading` is that of the last round, whose findings it keeps. Rule: this project's decision, "How good
    is it?".
    """
    changes = {
        name: HyperparameterChange(dimension, dimension, tier_of(name), f"as in {first.name}")
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
        notes=(f"Pass {number} begins, with the horizon and the space of {first.name}.",),
    )
