"""What tuner says of a horizon, against real runs that were trained longer.

    python benchmarks/horizons.py [DATA] [--output FILE]

DATA is a gzipped JSON list of runs: `data`, `layers`, `width`, `learning_rate`, `schedule`, `decay_share`,
`max_train_steps`, `decay_begins`, `warmup_steps`, `batch_size`, `weight_decay`, `seed`, `data_seed`,
`first_step` and `curve`, the [step, validation loss] of its evaluations. Runs that agree in all but schedule,
share and horizon are a family. The shorter of two runs of a family is read as a round, and the longer one is
the answer: what it gained, against what was predicted, and whether it was right to stop.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tuner.playbook import Diagnosis, RoundResults, read_round
from tuner.playbook.gain import Gain
from tuner.playbook.horizon import signs
from tuner.playbook.results import BranchResult
from tuner.records import Choices, Dimension, Evaluation, Fixed, Range, Trial, TrialState

DEFAULT_DATA = Path("../shared/data/horizons/llama_runs.json.gz")
RATIOS = (1.3, 3.4)
"""Horizons of a round and its answer stand between these factors."""
FACTOR = 1.5
"""A prediction this close to the real gain, by factor, counts as met."""
NOTICED = 0.01
"""Relative gain of a longer run beyond which it was wrong to keep the horizon."""
MOST_TRIALS = 8
NUM_CUTS = 7
"""A constant run is read at its end and at so many shorter horizons, a factor sqrt(2) apart."""
MIN_EVALUATIONS = 8
"""A constant run is not cut shorter than this."""
KEEPS = (Diagnosis.RIGHT, Diagnosis.SATURATED, Diagnosis.TOO_LONG, Diagnosis.OVERFITTING)
"""Diagnoses that stand by the horizon or shorten it."""

ONE_TRIAL = "one trial"
SEVERAL = "several trials"
MIXED = "mixed schedules"

COMPARISON = "a comparison run"
EARLIER = "an earlier round"
BOTH = "both"


class UnreadableRuns(Exception):
    """The file of runs is not what its page says; the text says where."""


class Family(NamedTuple):
    """What runs have in common that differ in schedule and horizon alone."""

    data: str
    layers: int
    width: int
    learning_rate: float
    warmup_steps: int
    batch_size: int
    weight_decay: float
    seed: int
    data_seed: str

    @property
    def size(self) -> tuple[object, ...]:
        """Runs of one size could be trials of one round."""
        return self.data, self.layers, self.width, self.batch_size


@dataclass(frozen=True)
class Run:
    """A run from step 0 to its horizon."""

    family: Family
    schedule: str
    max_train_steps: int
    decay_steps: int
    curve: tuple[tuple[int, float], ...]
    """(step, loss), by step, each step once; the last may lie before the horizon."""
    origin: int = 0
    """Place in the file; the cuts of a constant run share it."""

    @property
    def share(self) -> float:
        """Part of the run that decays linearly."""
        return self.decay_steps / self.max_train_steps

    @property
    def shape(self) -> str:
        """The class of schedules that its figures are counted in."""
        if self.schedule != "linear":
            return self.schedule
        return "linear, up to 40%" if self.share <= 0.4 + 0.5 / self.max_train_steps else "linear, above 40%"

    @cached_property
    def best_loss(self) -> float:
        """The lowest loss of its evaluations."""
        return min(loss for _, loss in self.curve)

    @cached_property
    def noise(self) -> float:
        """Spread of the last quarter's losses around a line, relative to the loss."""
        last = self.curve[-max(6, math.ceil(len(self.curve) / 4)) :]
        steps, losses = np.array(last, dtype=np.float64).T
        residuals = losses - np.polyval(np.polyfit(steps - steps[-1], losses, 1), steps - steps[-1])
        return math.sqrt(float(residuals @ residuals) / max(1, len(last) - 2)) / self.best_loss

    def cut(self, step: int) -> Run:
        """A constant run as it would have been with a shorter horizon."""
        assert self.schedule == "constant"
        return replace(self, max_train_steps=step, curve=tuple(p for p in self.curve if p[0] <= step))


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
    def name(self) -> str:
        """The class that its verdict is counted in."""
        return f"{self.kind}{f' with {self.beside}' if self.beside else ''}: {self.shape}"


@dataclass(frozen=True)
class Outcome:
    """What was said of a case."""

    case: Case
    diagnosis: Diagnosis
    suggested: int | None
    source: str | None
    predicted: tuple[float, ...] | None
    """Drop to each answer; None where no gain is known."""

    @property
    def keeps(self) -> bool:
        """Whether it stands by the horizon or shortens it."""
        is_longer = self.suggested is not None and self.suggested > self.case.results.max_train_steps
        return self.diagnosis in KEEPS and not is_longer

    @property
    def is_wrong_keep(self) -> bool:
        """Whether it keeps although a longer run gained more than 1% and twice its noise."""
        return self.keeps and any(a.drop > max(NOTICED, 2 * a.noise) for a in self.case.answers)


# --- the runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """The runs of a file."""

    runs: tuple[Run, ...]
    left_out: tuple[str, ...]
    """One line for each run that no round can be made of."""


def load_runs(path: Path) -> Runs:
    """Read the runs of a file, decayed ones with the stable phase that they left. Raises UnreadableRuns."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return assemble_runs(json.load(file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnreadableRuns(f"{path}: {type(error).__name__}: {error}") from error


def assemble_runs(entries: Sequence[dict[str, Any]]) -> Runs:
    """The runs of the file's objects; a branched one begins with the constant run of its family."""
    constant = [entry for entry in entries if entry["schedule"] == "constant"]
    runs, left_out = [], []
    for origin, entry in enumerate(entries):
        curve, first = _once(entry["curve"]), entry["first_step"]
        if first > 0:
            stable = _stable_phase(entry, curve, constant)
            if stable is None:
                left_out.append(f"{_family(entry)}: no constant run up to step {first} to begin with")
                continue
            curve = {step: loss for step, loss in stable.items() if step < first} | curve
        horizon = entry["max_train_steps"]
        decay = horizon - entry["decay_begins"] if entry["schedule"] == "linear" else 0
        points = tuple(sorted(curve.items()))
        runs.append(Run(_family(entry), entry["schedule"], horizon, decay, points, origin))
    return Runs(tuple(runs), tuple(left_out))


def _family(entry: dict[str, Any]) -> Family:
    return Family(**{name: entry[name] for name in Family._fields})


def _once(curve: Iterable[Sequence[float]]) -> dict[int, float]:
    """Loss by step. A run that was interrupted has steps twice; the last one is what it went on with."""
    return {int(step): float(loss) for step, loss in curve}


def _stable_phase(
    entry: dict[str, Any], curve: dict[int, float], constant: Sequence[dict[str, Any]]
) -> dict[int, float] | None:
    """Of the family's constant runs that reach the branch, the one that agrees with its first loss."""
    first = min(curve)
    candidates = [_once(other["curve"]) for other in constant if _family(other) == _family(entry)]
    reaching = [losses for losses in candidates if first in losses]
    return min(reaching, key=lambda losses: abs(losses[first] - curve[first]), default=None)


def pieces(run: Run) -> tuple[Run, ...]:
    """A run at the horizons it can be read at: its own, and for a constant one shorter ones too."""
    if run.schedule != "constant":
        return (run,)
    steps = [step for step, _ in run.curve]
    wanted = [steps[-1] * 2 ** (-k / 2) for k in range(NUM_CUTS)]
    nearest = {min(steps, key=lambda step: abs(step - horizon)) for horizon in wanted}
    return tuple(run.cut(step) for step in sorted(nearest) if steps.index(step) >= MIN_EVALUATIONS)


def is_longer_partner(longer: Run, run: Run) -> bool:
    """Whether one run is the other with a longer horizon, and not too far away to be its answer."""
    if (longer.family, longer.schedule) != (run.family, run.schedule):
        return False
    if run.schedule == "constant" and longer.origin != run.origin:
        return False
    low, high = RATIOS
    return low <= longer.max_train_steps / run.max_train_steps <= high and _is_of_equal_share(longer, run)


def _is_of_equal_share(one: Run, other: Run) -> bool:
    rounding = 0.5 / one.max_train_steps + 0.5 / other.max_train_steps
    return abs(one.share - other.share) <= rounding


# --- rounds and their answers ---------------------------------------------------------------------


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
    branches = {run: (BranchResult(number, run.max_train_steps, _evaluations(run)),) for run in shorter}
    before = {run: (_earlier_round(case.results, number, run),) for run in shorter}
    for run in shorter:
        compared = replace(case.results, branches=branches[run])
        yield replace(case, beside=COMPARISON, results=compared)
        yield replace(case, beside=EARLIER, earlier=before[run])
        for shortest in shorter:
            if run in partners[shortest]:
                yield replace(case, beside=BOTH, results=compared, earlier=before[shortest])


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
    points = [_hyperparameters(run) for run in runs]
    for i, point in enumerate(points):
        # Runs that the file tells apart by nothing are repeats.
        point["training_seed"] = int(str(point["training_seed"])) + points[:i].count(point)
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


# --- what tuner says ------------------------------------------------------------------------------


def judge(case: Case) -> Outcome:
    """Read a case's round, and predict the drop to each of its answers."""
    reading = read_round(case.results, case.earlier)
    # A gain of unknown noise counts as unknown.
    gain = None if reading.noise is None else signs(case.results, case.earlier).gain
    predicted = None if gain is None else tuple(predicted_drop(gain, answer.ratio) for answer in case.answers)
    source = None if gain is None else str(gain.source)
    return Outcome(case, reading.diagnosis, reading.suggested_max_train_steps, source, predicted)


def predicted_drop(gain: Gain, ratio: float) -> float:
    """Relative drop of the loss when the horizon grows by a factor, in a geometric series of doublings."""
    if hasattr(gain, "to"):
        return float(gain.to(ratio))
    doublings = math.log2(ratio)
    return gain.relative * gain.ratio * (1 - math.pow(gain.ratio, doublings)) / (1 - gain.ratio)


@dataclass(frozen=True)
class Tally:
    """How predictions turned out."""

    rounds: int
    asked: int
    """Answers that a prediction could be compared with."""
    given: int
    within: int
    median: float | None
    """Of predicted / real."""


def tally(outcomes: Sequence[Outcome]) -> Tally:
    """Count predictions, one for each answer; those within a factor 1.5 of the real drop are met."""
    asked = sum(len(outcome.case.answers) for outcome in outcomes)
    ratios = [
        predicted / answer.drop if answer.drop > 0 else math.inf
        for outcome in outcomes
        if outcome.predicted is not None
        for predicted, answer in zip(outcome.predicted, outcome.case.answers, strict=True)
    ]
    within = sum(1 / FACTOR <= ratio <= FACTOR for ratio in ratios)
    return Tally(len(outcomes), asked, len(ratios), within, statistics.median(ratios) if ratios else None)


# --- the page -------------------------------------------------------------------------------------

_METHOD = """\
A round is the shorter of two runs that differ in their horizons alone, which stand 1.3 to 3.4 apart; the
longer one is the answer, the mean of its repeats where there are several. A round may have several answers,
and each is compared with a prediction. A gain is relative to the round's best loss. `several trials` differ in
rate, seed or weight decay, `mixed schedules` in the schedule too. A comparison run or an earlier round is a run
shorter than the round's. A verdict keeps where it is `right`, `saturated`, `too_long` or `overfitting` and
names no longer horizon; it is wrong where a longer run gained more than 1% and more than twice its noise
(spread of the last quarter around a line). No losses of single examples are known. A decayed run ends at its
last evaluation, up to 200 steps before its horizon; a constant run is read at several of its steps.
"""
NUM_LISTED = 20
"""Wrong keeps that are listed one by one."""


def markdown(outcomes: Sequence[Outcome], *, command: str, runs: Runs) -> str:
    """The page of results."""
    total = tally(outcomes)
    wrong = [outcome for outcome in outcomes if outcome.is_wrong_keep]
    met = f"{total.within / total.given:.0%}" if total.given else "none"
    lines = [
        "# Predicted and real gains of longer runs",
        "",
        f"    {command}",
        "",
        f"{len(runs.runs)} runs, {len(runs.left_out)} left out; {total.rounds} rounds with {total.asked} answers.",
        f"Of {total.given} predictions, {total.within} ({met}) are within a factor {FACTOR} of the real gain;",
        f"{total.asked - total.given} were not given. Wrong to keep the horizon: {len(wrong)} rounds.",
        "",
        *_METHOD.splitlines(),
        "",
        "## Predictions by source",
        *_predictions(outcomes, "source", lambda outcome: outcome.source or "not given"),
        "## Predictions by round and schedule",
        *_predictions(outcomes, "round", lambda outcome: outcome.case.name),
        "## Predictions by data set",
        *_predictions(outcomes, "data and source", lambda o: f"{o.case.data}: {o.source or 'not given'}"),
        "## Verdicts by round and schedule",
        *_verdicts(outcomes, lambda outcome: outcome.case.name),
        "## Verdicts by data set",
        *_verdicts(outcomes, lambda outcome: outcome.case.data),
        *_listed("Wrong keeps", [_in_words(outcome) for outcome in wrong]),
        *_listed("Left out", runs.left_out),
    ]
    return "\n".join(lines)


def _predictions(outcomes: Sequence[Outcome], title: str, group: Callable[[Outcome], str]) -> list[str]:
    lines = [
        "",
        f"| {title} | rounds | answers | predictions | within {FACTOR} | median predicted / real |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, members in _grouped(outcomes, group).items():
        t = tally(members)
        share = f"{t.within} ({t.within / t.given:.0%})" if t.given else ""
        median = "" if t.median is None else f"{t.median:.2f}"
        lines.append(f"| {name} | {t.rounds} | {t.asked} | {t.given} | {share} | {median} |")
    return [*lines, ""]


def _verdicts(outcomes: Sequence[Outcome], group: Callable[[Outcome], str]) -> list[str]:
    seen = [d for d in Diagnosis if any(outcome.diagnosis == d for outcome in outcomes)]
    lines = [
        "",
        f"| round | rounds | {' | '.join(str(d) for d in seen)} | keeps | wrong |",
        f"| --- | {'---: | ' * (len(seen) + 3)}".rstrip(),
    ]
    for name, members in _grouped(outcomes, group).items():
        counts = Counter(outcome.diagnosis for outcome in members)
        keeps = sum(outcome.keeps for outcome in members)
        wrong = sum(outcome.is_wrong_keep for outcome in members)
        cells = " | ".join(str(counts[d]) if counts[d] else "" for d in seen)
        lines.append(f"| {name} | {len(members)} | {cells} | {keeps} | {wrong} |")
    return [*lines, ""]


def _in_words(outcome: Outcome) -> str:
    case = outcome.case
    most = max(case.answers, key=lambda answer: answer.drop)
    return (
        f"{case.results.workload}, {case.name}: `{outcome.diagnosis}` at {case.results.max_train_steps} steps; "
        f"{most.ratio:.2f} times as long gained {most.drop:.2%}"
    )


def _listed(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    more = len(lines) - NUM_LISTED
    shown = [f"- {line}" for line in lines[:NUM_LISTED]] + ([f"- and {more} more"] if more > 0 else [])
    return [f"## {title}", "", *shown, ""]


def _grouped(outcomes: Sequence[Outcome], group: Callable[[Outcome], str]) -> dict[str, list[Outcome]]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(group(outcome), []).append(outcome)
    return groups


def main() -> int:
    arguments = _arguments()
    try:
        runs = load_runs(arguments.data)
    except UnreadableRuns as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcomes = [judge(case) for case in cases(runs.runs)]
    text = markdown(outcomes, command=f"python benchmarks/horizons.py {arguments.data}", runs=runs)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    print(text)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data", metavar="DATA", nargs="?", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the Markdown there too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
