"""The page of results: predictions and verdicts in tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from tuner.playbook import Diagnosis

from .cases import ONE_TRIAL
from .outcomes import FACTOR, Outcome, Tally, tally
from .runs import Runs

_METHOD = """\
A round is the shorter of two runs that differ in their horizons alone, which stand 1.3 to 3.4 apart; the
longer one is the answer, the mean of its repeats where there are several. A round may have several answers,
and each is compared with a prediction. A gain is relative to the round's best loss. `several trials` differ
in rate, seed or weight decay, `mixed schedules` in the schedule too. A comparison run or an earlier round is
a run shorter than the round's. A verdict keeps where it is `right`, `saturated`, `too_long` or `overfitting`
and names no longer horizon; it is wrong where a longer run gained more than 1% and more than twice its noise
(spread of the last quarter around a line). No losses of single examples are known. A decayed run ends at its
last evaluation, up to 200 steps before its horizon; a constant run is read at several of its steps.
"""
NUM_LISTED = 20
"""Wrong keeps that are listed one by one."""


def markdown(outcomes: Sequence[Outcome], *, command: str, runs: Runs) -> str:
    """The page of results."""
    wrong = [outcome for outcome in outcomes if outcome.is_wrong_keep]
    keepable = sum(not outcome.case.is_worth_going_on for outcome in outcomes)
    plain = [o for o in outcomes if o.case.kind == ONE_TRIAL and not o.case.beside]
    lines = [
        "# Predicted and real gains of longer runs",
        "",
        f"    {command}",
        "",
        f"{len(runs.runs)} runs, {len(runs.left_out)} left out; {len(outcomes)} rounds.",
        f"All rounds: {_in_short(tally(outcomes))}",
        f"One trial and nothing else to go by: {_in_short(tally(plain))}",
        f"Wrong to keep the horizon: {len(wrong)} rounds. In {keepable} rounds it would not have been wrong.",
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


def _in_short(counted: Tally) -> str:
    share = f" ({counted.within / counted.given:.0%})" if counted.given else ""
    not_given = counted.asked - counted.given
    return (
        f"of {counted.given} predictions {counted.within}{share} are within a factor {FACTOR} of the real "
        f"gain; {not_given} were not given."
    )


def _in_words(outcome: Outcome) -> str:
    case = outcome.case
    most = max(case.answers, key=lambda answer: answer.drop)
    return (
        f"{case.results.workload}, {case.name}: `{outcome.diagnosis}` at "
        f"{case.results.max_train_steps} steps; "
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
