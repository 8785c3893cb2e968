"""When a longer round overturns the order of an earlier one, and what then comes back into the search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from tuner.playbook.agreement import carried_over
from tuner.playbook.findings import Finding, Severity
from tuner.playbook.precision import SIGNIFICANT, paired_standard_error
from tuner.playbook.results import RoundResults
from tuner.playbook.selection import best_evaluation
from tuner.playbook.tiers import Tier, tier_of
from tuner.records import Choices, Dimension, Range, Trial

MIN_RANK_CORRELATION = 0.5
"""Below it the order of an earlier round has not held. Ranks of short and long runs agree so little at six
times the length (3,819 AlgoPerf runs), twice what a round may be lengthened."""


@dataclass(frozen=True, slots=True)
class OverturnedOrder:
    """An earlier round whose order of trials did not hold in a later one."""

    earlier: RoundResults
    later: str
    rank_correlation: float
    num_trials: int


def overturned_order(
    results: RoundResults, earlier: Sequence[RoundResults], *, noise: float | None = None
) -> OverturnedOrder | None:
    """Return the earlier round whose order of trials did not hold; None where it held or nothing shows it.

    At least three trials are complete in both, their rank correlation is below 0.5, and one of them is now
    significantly worse than one that was behind it; `noise` is relative to the loss. Rule: Deep Learning
    Tuning Playbook, "Deciding how long to train when training is compute-bound" (what transfers to longer
    runs); the numbers are this project's decision.
    """
    found = carried_over(results, earlier)
    if found is None or found.rank_correlation is None or found.rank_correlation >= MIN_RANK_CORRELATION:
        return None
    order = [trial for _, number in found.compared if (trial := results.trial(number)) is not None]
    if not any(_is_worse(one, other, noise or 0.0) for one, other in combinations(order, 2)):
        return None
    before = next(other for other in reversed(earlier) if other.name == found.from_round)
    return OverturnedOrder(before, results.name, found.rank_correlation, len(found.compared))


def reopened_space(results: RoundResults, overturned: OverturnedOrder) -> dict[str, Dimension]:
    """Return what the earlier round searched, and promotion then narrowed or fixed, as it was there.

    Of what might transfer or is likely to; warmup and initialisation stay. Rule: this project's decision,
    "agreement".
    """
    before = overturned.earlier.space
    return {
        name: before[name]
        for name, now in results.space.items()
        if tier_of(name) in (Tier.MIGHT, Tier.LIKELY)
        and isinstance(before.get(name), (Choices, Range))
        and before[name] != now
    }


def reopening_findings(
    overturned: OverturnedOrder | None, reopened: Mapping[str, Dimension], *, widens_rates: bool
) -> Iterator[Finding]:
    """What was re-opened since an earlier order did not hold, or why nothing was.

    Rule: this project's decision, "agreement".
    """
    if overturned is None:
        return
    name, correlation = overturned.earlier.name, overturned.rank_correlation
    if widens_rates:
        done = "Higher learning rates come first, so nothing is re-opened yet."
    elif reopened:
        done = f"Searched again as in {name}: {', '.join(reopened)}. What {name} held fixed stays fixed."
    else:
        done = f"Nothing is re-opened: what is fixed now was fixed in {name} as well."
    yield Finding(
        "agreement",
        Severity.WARNING,
        f"The order of the {overturned.num_trials} trials carried over from {name} did not hold in "
        f"{overturned.later} (rank correlation {correlation:.2f}). {done}",
        {"rank_correlation": correlation, "trials": float(overturned.num_trials)},
    )


def _is_worse(one: Trial, other: Trial, noise: float) -> bool:
    """Whether a trial is worse than another by more than two standard errors."""
    first, second = best_evaluation(one.evaluations), best_evaluation(other.evaluations)
    if first is None or second is None:
        return False
    error = max(noise * second.eval_loss, paired_standard_error(first, second) or 0.0)
    return first.eval_loss - second.eval_loss > SIGNIFICANT * error
