"""Rounds that recorded runs make up, and what longer runs of their best trials came to."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from tuner.playbook import RoundResults
from tuner.playbook.results import BranchResult
from tuner.records import Choices, Dimension, Evaluation, Fixed, Range, Trial, TrialState

from .runs import Run, is_longer_partner, pieces

MOST_TRIALS = 8
NOTICED = 0.01
"""Relative gain of a longer run beyond which it is wrong to keep the horizon."""

ONE_TRIAL = "one trial"
SEVERAL = "several trials"
MIXED = "mixed schedules"

COMPARISON = "a comparison run"
EARLIER = "an earlier round"
BOTH = "both"


@dataclass(frozen=True)
class Answer:
    """What the round's best trial came to with a longer horizon; repeats at one horizon are averaged."""

    ratio: float
    """Its horizon over the round's."""
    drop: float
    """Relative to the round's best loss."""
    noise: float


@dataclass(frozen=True)
class Case:
    """A round and what is known of longer runs."""

    kind: str
    """What its trials are."""
    beside: str
    """What else the round has to go by; empty for nothing."""
    shape: str
    """Of the schedule of its best trial."""
    data: str
    results: RoundResults
    earlier: tuple[RoundResults, ...]
    answers: tuple[Answer, ...]

    @property
    def is_worth_going_on(self) -> bool:
        """Whether a longer run gained more than 1% and twice its noise."""
        return any(answer.drop > max(NOTICED, 2 * answer.noise) for answer in self.answers)

    @property
    def name(self) -> str:
        """The class that its verdict is counted in."""
        return f"{self.kind}{f' with {self.beside}' if self.beside else ''}: {self.shape}"


def cases(runs: Sequence[Run]) -> Iterator[Case]:
    """Every round that has an answer: as it is, and with each shorter run of its best trial beside it."""
    read = [piece for run in runs for piece in pieces(run)]
    partners = {run: [other for other in read if is_longer_partner(other, run)] for run in read}
    for kind, groups in (
        (ONE_TRIAL, [[run] for run in read]),
        (SEVERAL, _alike(read)),
        (MIXED, _mixed(read)),
    ):
        for group in groups:
            trials = sorted(group, key=lambda run: (run.family, run.origin))[:MOST_TRIALS]
            best = min(trials, key=lambda run: run.best_loss)
            if longer := partners.get(best):
                case = _case(kind, trials, longer)
                yield case
                yield from _with_shorter(case, trials.index(best), best, partners)


def _alike(read: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in rate, seed or weight decay alone, several of a size, schedule and horizon."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in read:
        share = round(run.share, 2)
        groups.setdefault((*run.family.size, run.max_train_steps, run.schedule, share), []).append(run)
    return [group for group in groups.values() if len(group) > 1]


def _mixed(read: Sequence[Run]) -> list[list[Run]]:
    """Runs of a size and horizon that differ in the schedule too; constant ones are cut to be among them."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in read:
        if run.schedule != "constant":
            groups.setdefault((*run.family.size, run.max_train_steps), []).append(run)
    # The last piece of a constant run is all of it.
    whole = {run.origin: run for run in read if run.schedule == "constant"}
    for group in groups.values():
        size, horizon = group[0].family.size, group[0].max_train_steps
        constant = [run for run in whole.values() if run.family.size == size]
        group += [run.cut(horizon) for run in constant if run.max_train_steps >= horizon]
    return [group for group in groups.values() if len({(run.schedule, run.share) for run in group}) > 1]


def _with_shorter(
    case: Case, number: int, best: Run, partners: Mapping[Run, Sequence[Run]]
) -> Iterator[Case]:
    """The case with shorter runs of its best trial; a constant rate shows them by itself."""
    if best.schedule == "constant":
        return
    shorter = [run for run, longer in partners.items() if best in longer]
    for run in shorter:
        branch = BranchResult(number, run.max_train_steps, _evaluations(run))
        compared = replace(case.results, branches=(branch,))
        yield replace(case, beside=COMPARISON, results=compared)
        yield replace(case, beside=EARLIER, earlier=(_earlier_round(case.results, number, run),))
        for shortest, longer in partners.items():
            if run in longer:
                earlier = _earlier_round(case.results, number, shortest)
                yield replace(case, beside=BOTH, results=compared, earlier=(earlier,))


def _earlier_round(results: RoundResults, number: int, run: Run) -> RoundResults:
    """A round at the horizon of a shorter run, which is the twin of the trial of that number."""
    alone = _round("round0", [run])
    point = dict(results.trials[number].hyperparameters) | {"decay_steps": run.decay_steps}
    return replace(alone, trials=(replace(alone.trials[0], hyperparameters=point),))


def _case(kind: str, trials: Sequence[Run], longer: Sequence[Run]) -> Case:
    best = min(trials, key=lambda run: run.best_loss)
    repeats: dict[int, list[Run]] = {}
    for run in longer:
        repeats.setdefault(run.max_train_steps, []).append(run)
    answers = tuple(
        Answer(
            ratio=horizon / best.max_train_steps,
            drop=1.0 - statistics.fmean(run.best_loss for run in runs) / best.best_loss,
            noise=statistics.fmean(run.noise for run in runs),
        )
        for horizon, runs in sorted(repeats.items())
    )
    return Case(kind, "", best.shape, best.family.data, _round("round1", trials), (), answers)


def _round(name: str, runs: Sequence[Run]) -> RoundResults:
    points: list[dict[str, Any]] = []
    for run in runs:
        point = _hyperparameters(run)
        # Runs that the file tells apart by nothing are repeats, with seeds of their own.
        while point in points:
            point["training_seed"] += 1
        points.append(point)
    trials = tuple(
        Trial(name, i, points[i], TrialState.COMPLETE, evaluations=_evaluations(run))
        for i, run in enumerate(runs)
    )
    steps = [step for step, _ in runs[0].curve]
    every = int(statistics.median(b - a for a, b in pairwise(steps)))
    family = runs[0].family
    return RoundResults(
        name=name,
        max_train_steps=runs[0].max_train_steps,
        evaluate_every=every,
        space={key: _dimension(key, [point[key] for point in points]) for key in points[0]},
        trials=trials,
        workload=f"{family.data} {family.layers}x{family.width}",
    )


def _hyperparameters(run: Run) -> dict[str, Any]:
    return {
        "learning_rate": run.family.learning_rate,
        "schedule": run.schedule,
        "decay_steps": run.decay_steps,
        "warmup_steps": run.family.warmup_steps,
        "batch_size": run.family.batch_size,
        "weight_decay": run.family.weight_decay,
        "training_seed": run.family.seed,
    }


def _dimension(name: str, values: Sequence[Any]) -> Dimension:
    """A space that holds the values; rates have room on both sides, as nobody knows where theirs ended."""
    found = tuple(dict.fromkeys(values))
    if len(found) == 1:
        return Fixed(found[0])
    return Range(min(found) / 10, max(found) * 10, log=True) if name == "learning_rate" else Choices(found)


def _evaluations(run: Run) -> tuple[Evaluation, ...]:
    return tuple(Evaluation(step, loss) for step, loss in run.curve)
