"""How often the playbook reads synthetic rounds correctly, by class, and the page that reports it.

`python -m tests.playbook.diagnoses docs/reference/diagnoses.md` measures again and writes the page.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.playbook.hard_rounds import CLASSES, hard_round
from tests.playbook.rounds import NUM_EXAMPLES, SyntheticRound, synthetic_round
from tests.playbook.truth import EVEN_FALL_MARGIN, MARGIN
from tuner.playbook import Diagnosis, read_round

EASY = "easy"
RIGHT_DIAGNOSES = 0.95
"""Over all hard classes together, and of the easy rounds."""
RIGHT_IN_EACH_CLASS = 0.90
RIGHT_HORIZONS = 0.80
FACTOR = 1.5
"""A suggestion within this factor of the true horizon is good."""

PAGE_ROUNDS, PAGE_EASY_ROUNDS, PAGE_SEED = 100, 250, 2
"""Inputs of the page: rounds of each hard class, easy rounds, and the seed."""


@dataclass
class Measured:
    """Counts of synthetic rounds that the playbook read."""

    count: int = 0
    confusion: Counter[tuple[Diagnosis, Diagnosis]] = field(default_factory=Counter)
    """Of the clear rounds: (truth, reading)."""
    horizons: Counter[tuple[Diagnosis, bool]] = field(default_factory=Counter)
    """Of those with a true horizon: (truth, whether the suggestion is good)."""
    possible: int = 0
    """Of the rounds set aside, those read as one of the diagnoses that may hold."""

    @property
    def clear(self) -> int:
        return self.confusion.total()

    @property
    def right(self) -> int:
        """Clear rounds that were read correctly."""
        return sum(n for (truth, reading), n in self.confusion.items() if truth == reading)

    @property
    def right_share(self) -> float:
        return self.right / self.clear

    @property
    def good_horizons(self) -> int:
        return sum(n for (_, good), n in self.horizons.items() if good)

    def of(self, truth: Diagnosis) -> int:
        """Clear rounds of this truth."""
        return sum(n for (of, _), n in self.confusion.items() if of == truth)

    def add(self, synthetic: SyntheticRound) -> None:
        self.count += 1
        answer, reading = synthetic.answer, read_round(synthetic.results)
        if not answer.is_clear:
            self.possible += reading.diagnosis in answer.possible
            return
        self.confusion[answer.diagnosis, reading.diagnosis] += 1
        if answer.horizon is not None:
            ratio = (reading.suggested_max_train_steps or 0) / answer.horizon
            self.horizons[answer.diagnosis, 1 / FACTOR <= ratio <= FACTOR] += 1


def measured_class(kind: str, count: int, seed: int) -> Measured:
    """Read `count` synthetic rounds of a class, easy or hard."""
    found, which = Measured(), list(CLASSES).index(kind) + 1 if kind != EASY else 0
    for i in range(count):
        rng = np.random.default_rng([seed, which, i])
        found.add(synthetic_round(rng) if kind == EASY else hard_round(kind, rng))
    return found


def measured(count: int, easy_count: int, seed: int) -> dict[str, Measured]:
    """Read `count` rounds of every hard class, and `easy_count` easy ones, by class."""
    found = {kind: measured_class(kind, count, seed) for kind in CLASSES}
    return {**found, EASY: measured_class(EASY, easy_count, seed)}


def together(found: Iterable[Measured]) -> Measured:
    total = Measured()
    for one in found:
        total.count += one.count
        total.confusion += one.confusion
        total.horizons += one.horizons
        total.possible += one.possible
    return total


def hard(found: Mapping[str, Measured]) -> Measured:
    """All hard classes together."""
    return together(one for kind, one in found.items() if kind != EASY)


# --- the page ---------------------------------------------------------------------------------------------

_WHAT = {
    "small": "1 to 3 trials",
    "mixed": "one trial learns, the others slowly or not at all",
    "clusters": "two kinds of trials, best early or late",
    "constant": "a constant rate",
    "linear": "a linear decay of 10 to 90% of the run",
    "cosine": "a cosine",
    "edges": "best at the upper bound of the learning rate, or at the highest of three in order",
    "sparse": "3 to 9 evaluations",
    "dense": "60 to 120 evaluations",
    "no examples": "no per-example losses",
    "noisy": "noise of 0.5 to 3%",
    "copies": "configurations that were run up to six times",
    EASY: "one curve times a factor, 5 to 16 trials, as before",
}


def page(found: Mapping[str, Measured]) -> str:
    """Return the measurement as a reference page."""
    all_hard = hard(found)
    rows = [
        [
            f"{kind}: {_WHAT[kind]}",
            str(one.count),
            str(one.count - one.clear),
            _share(one.right, one.clear),
            _good_horizons(one),
            _misread(one),
        ]
        for kind, one in [*found.items(), ("all but easy", all_hard)]
        if kind in _WHAT
    ]
    classes = _table(["class", "rounds", "set aside", "right", "good horizon", "misread"], rows, numbers=4)
    aside = all_hard.count - all_hard.clear
    possible = _share(all_hard.possible, aside)
    right = _share(all_hard.right, all_hard.clear)
    good = _share(all_hard.good_horizons, all_hard.horizons.total())
    return f"""\
# How often the diagnosis is right

`tests/playbook/hard_rounds.py` generates rounds with a known answer, in classes. Unless its class says
otherwise, a round has 1 to 20 complete trials and some that diverged; 10 to 50 evaluations; a constant
rate, a linear decay of 10 to 90% of the run, or a cosine; noise of 0.1 to 1% on the difference of two
evaluations; in 85% of the rounds, losses of each of {NUM_EXAMPLES} examples; and in 85% of those with a
decay, their comparison run.

The effect of a decay follows published curves (`tests/playbook/loss_curves.py`), so a run to half the steps
with the same share of decay has a different loss. The loss of a trial falls as a power of the step, stops
falling early or late, rises again early or late (overfitting), or falls slowly or not at all.

`tests/playbook/truth.py` derives diagnosis and horizon from the noiseless curves. Its definitions do
not share code with the product. A round is set aside if one of the conditions is within a factor
of {MARGIN:g} of its threshold ({EVEN_FALL_MARGIN:g} for the last quarter's share of the gain, which for
an even fall is twice the threshold), if trials whose ranking depends on noise have different answers, or if
the evaluations do not show the answer.

## By class
{classes}

Of the {all_hard.count:,} hard rounds {aside} are set aside; {possible} of these are read as one of the
possible diagnoses. Of the other {all_hard.clear}, {right} are read correctly. If a right
horizon exists, {good} of the suggestions are within a factor of {FACTOR} of it: for `too_short` the shortest
run whose last doubling is no longer worthwhile, at most three times the round or `production_steps`; for
`saturated` and `overfitting` a quarter more than the shortest run that is as good, for a cosine half the
steps or all; at a bound of the learning rate the round's own horizon.

A test requires at least {RIGHT_DIAGNOSES:.0%} of the diagnoses of all hard rounds together and of the easy
ones, {RIGHT_IN_EACH_CLASS:.0%} in each class, {RIGHT_HORIZONS:.0%} of the horizons, and compares this
page with what it measures.

## All hard classes together
{_confusion(all_hard)}

## The easy rounds
{_confusion(found[EASY])}

Before the hard rounds, this page was based on 1,000 easy ones, with a threshold of 0.1% and another
definition of `right`: 185 were set aside, 96.4% of the others were read correctly, and 93.2% of the horizons
were good. In the easy curves a step of the decay learns as much as any other, unlike in real runs: a horizon
from the stable phase of a saturated one, extended by the decay's share, is too long.

The rounds are synthetic: they show that the rules work as described, not that real curves look like these.
[The log](../log.md) has the measurements on recorded learning curves.

Written by `python -m tests.playbook.diagnoses docs/reference/diagnoses.md`.
"""


def _confusion(found: Measured) -> str:
    names = [f"`{diagnosis}`" for diagnosis in Diagnosis]
    rows = [
        [
            f"`{truth}`",
            *(str(found.confusion[truth, read] or "") for read in Diagnosis),
            _share(found.confusion[truth, truth], found.of(truth)),
            _good_horizons(found, truth),
        ]
        for truth in Diagnosis
    ]
    return _table(["it is / read as", *names, "right", "good horizon"], rows, numbers=len(names) + 2)


def _table(header: list[str], rows: list[list[str]], *, numbers: int) -> str:
    """Return a table of which `numbers` columns after the first are numbers."""
    rule = ["---", *["---:"] * numbers, *["---"] * (len(header) - 1 - numbers)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def _good_horizons(found: Measured, truth: Diagnosis | None = None) -> str:
    judged = [(good, n) for (of, good), n in found.horizons.items() if truth in (None, of)]
    whole = sum(n for _, n in judged)
    return f"{_share(sum(n for good, n in judged if good), whole)} of {whole}" if whole else ""


def _misread(found: Measured) -> str:
    wrong = [(n, truth, read) for (truth, read), n in found.confusion.items() if truth != read]
    wrong.sort(key=lambda one: (-one[0], str(one[1]), str(one[2])))
    return ", ".join(f"{n} `{truth}` as `{read}`" for n, truth, read in wrong)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""


if __name__ == "__main__":
    measurement = measured(PAGE_ROUNDS, PAGE_EASY_ROUNDS, PAGE_SEED)
    Path(sys.argv[1]).write_text(page(measurement), encoding="utf-8")
