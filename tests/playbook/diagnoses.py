"""How often the playbook reads a round as it should, over synthetic rounds; and the page that says so.

`python -m tests.playbook.diagnoses docs/reference/diagnoses.md` measures again and writes the page.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tests.playbook.rounds import MARGIN, NUM_EXAMPLES, synthetic_round
from tuner.playbook import Diagnosis, read_round

RIGHT_DIAGNOSES = 0.95
RIGHT_HORIZONS = 0.90
FACTOR = 1.5
"""A suggestion within this factor of the true horizon is good."""

PAGE_ROUNDS, PAGE_SEED = 1000, 2
"""What the page is made of."""


@dataclass
class Measured:
    """What became of synthetic rounds that the playbook read."""

    count: int
    confusion: Counter[tuple[Diagnosis, Diagnosis]] = field(default_factory=Counter)
    """Of the clear rounds: (truth, reading)."""
    horizons: Counter[tuple[Diagnosis, bool]] = field(default_factory=Counter)
    """Of those with a true horizon: (truth, whether the suggestion is good)."""
    set_aside: int = 0
    """Rounds too close to a threshold to have a clear answer."""

    @property
    def right(self) -> int:
        """Clear rounds that were read as they should be."""
        return sum(n for (truth, reading), n in self.confusion.items() if truth == reading)

    @property
    def good_horizons(self) -> float:
        """Share of good suggestions."""
        return sum(n for (_, good), n in self.horizons.items() if good) / self.horizons.total()


def measured(count: int, seed: int) -> Measured:
    """Read so many synthetic rounds."""
    found = Measured(count)
    for i in range(count):
        synthetic = synthetic_round(np.random.default_rng([seed, i]))
        if not synthetic.is_clear:
            found.set_aside += 1
            continue
        reading = read_round(synthetic.results)
        found.confusion[synthetic.truth, reading.diagnosis] += 1
        if synthetic.true_horizon is not None:
            ratio = (reading.suggested_max_train_steps or 0) / synthetic.true_horizon
            found.horizons[synthetic.truth, 1 / FACTOR <= ratio <= FACTOR] += 1
    return found


def page(found: Measured) -> str:
    """The measurement as a reference page."""
    clear = found.confusion.total()
    names = [str(diagnosis) for diagnosis in Diagnosis]
    rows = [
        [
            f"`{truth}`",
            *(str(found.confusion[truth, read] or "") for read in Diagnosis),
            *_shares(found, truth),
        ]
        for truth in Diagnosis
    ]
    header = ["it is / read as", *(f"`{name}`" for name in names), "right", "good horizon"]
    table = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in table)
    weakest = min(Diagnosis, key=lambda truth: found.confusion[truth, truth] / _of(found, truth))
    return f"""\
# How often a round is read rightly

`tests/playbook/rounds.py` makes up rounds whose answer is known: falls that follow a power of the step,
falls that end, overfitting that begins early or late, curves that never learn, trials that diverge, decays
of 0, 20 and 40%. A round has 5 to 16 complete trials, {NUM_EXAMPLES} evaluation rows, and noise of 0.1% on
the difference of two evaluations; one in seven has 0.6 to 4%. The true diagnosis is taken from the curves
without noise, by definitions that are written down apart from the product's code.

Of {found.count:,} rounds {found.set_aside} are within a factor of {MARGIN} of a threshold and are set aside.
Of the other {clear}, {_share(found.right, clear)} are read as what they are; `{weakest}` is read least well.
Where a right horizon exists, {found.good_horizons:.1%} of the suggestions are within a factor of
{FACTOR} of it: for `too_short` the shortest run whose last doubling is worth no more than the threshold, at
most three times the round or `production_steps`; for `saturated` the settled step; for `overfitting`
the minimum.

{lines}

A test asks for at least {RIGHT_DIAGNOSES:.0%} of the diagnoses and {RIGHT_HORIZONS:.0%} of the horizons,
over all kinds together, and that this page is what it measured. The rounds are made up: they show that the
rules do what they say, not that real curves look like these. [The log](../log.md) has what was measured
on recorded learning curves.

Written by `python -m tests.playbook.diagnoses docs/reference/diagnoses.md`.
"""


def _shares(found: Measured, truth: Diagnosis) -> tuple[str, str]:
    good, bad = (found.horizons[truth, is_good] for is_good in (True, False))
    return _share(found.confusion[truth, truth], _of(found, truth)), _share(
        good, good + bad
    ) if good + bad else ""


def _of(found: Measured, truth: Diagnosis) -> int:
    return sum(n for (of, _), n in found.confusion.items() if of == truth)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(measured(PAGE_ROUNDS, PAGE_SEED)), encoding="utf-8")
