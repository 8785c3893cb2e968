"""When a run counts as the same run again."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tuner.playbook.reproduction import (
    Agreement,
    Changed,
    Pair,
    Reproduction,
    changed,
    pairs,
    tolerance,
)
from tuner.records import Evaluation, Trial, TrialState

LOSSES = (5.0, 4.0, 3.0)


def curve(*losses: float) -> tuple[Evaluation, ...]:
    return tuple(Evaluation(2 * number, loss) for number, loss in enumerate(losses))


def found(*losses: float, **changes: object) -> Reproduction:
    """A trial with `LOSSES`, and these again."""
    trial = Trial("round1", 7, {}, TrialState.COMPLETE, evaluations=curve(*LOSSES))
    made = Reproduction(
        trial=trial,
        from_step=0,
        to_step=4,
        pairs=pairs(trial.evaluations, curve(*losses), from_step=0, to_step=4),
        tolerance=1e-4,
        ended_as=TrialState.COMPLETE,
        reason=None,
        changed=(),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "agreement", "first", "largest"),
    [
        (LOSSES, Agreement.EQUAL, None, None),
        ((5.0, 4.0003, 3.0), Agreement.WITHIN_TOLERANCE, None, 2),
        ((5.0, 4.0005, 3.1), Agreement.DIFFERS, 2, 4),
        ((5.0, 4.0), Agreement.DIFFERS, 4, 4),  # it ended earlier
        ((5.0, math.nan, 3.0), Agreement.DIFFERS, 2, 2),
    ],
)
def test_the_verdict_follows_the_losses(
    losses: tuple[float, ...], agreement: Agreement, first: int | None, largest: int | None
) -> None:
    made = found(*losses)
    assert made.agreement is agreement
    assert (made.first_beyond and made.first_beyond.step) == first
    assert (made.largest and made.largest.step) == largest


def test_losses_that_are_no_numbers_are_the_same_again() -> None:
    assert Pair(2, math.nan, math.nan).difference == Pair(2, math.inf, math.inf).difference == 0.0
    assert Pair(2, math.nan, math.inf).difference == math.inf


@pytest.mark.parametrize(
    ("ended_as", "reason", "is_alike"),
    [
        (TrialState.INFEASIBLE, "diverged: loss 9.124 at step 4", True),
        (TrialState.INFEASIBLE, "diverged: loss 9.123 at step 6", False),
        (TrialState.COMPLETE, None, False),
        (TrialState.RUNNING, None, False),
        (None, None, True),
    ],
)
def test_an_infeasible_trial_ends_again_for_the_same_reason(
    ended_as: TrialState | None, reason: str | None, is_alike: bool
) -> None:
    made = found(*LOSSES)
    trial = replace(made.trial, state=TrialState.INFEASIBLE, reason="diverged: loss 9.123 at step 4")
    made = replace(made, trial=trial, ended_as=ended_as, reason=reason)
    assert made.agreement is (Agreement.EQUAL if is_alike else Agreement.DIFFERS)


def test_what_was_inherited_is_not_compared() -> None:
    wrong_before = curve(1.0, *LOSSES[1:])
    assert [p.step for p in pairs(curve(*LOSSES), wrong_before, from_step=2, to_step=4)] == [4]
    assert [p.step for p in pairs(curve(*LOSSES), wrong_before, from_step=0, to_step=2)] == [0, 2]


def test_rounding_grows_with_what_is_rounded() -> None:
    def of(dtype: str, quantization: str = "none", *, amplifies_rounding: bool = False) -> float:
        return tolerance(dtype=dtype, quantization=quantization, amplifies_rounding=amplifies_rounding)

    assert of("float32") == of("float32", "nf4") == 1e-4
    assert of("float32", amplifies_rounding=True) == 1e-3
    assert of("float32") < of("bfloat16") < of("bfloat16", "nf4") == of("float32", "int8")


def test_every_attempt_counts_in_what_was_different() -> None:
    then = [{"torch": "2.12", "slots": "1"}, {"torch": "2.13", "slots": "1"}]
    assert changed(then, {"torch": "2.13", "slots": "1"}) == (Changed("torch", "2.12, 2.13", "2.13"),)
    assert changed([{"torch": "2.13"}], {"torch": "2.13"}) == ()
    assert changed([{"torch": "2.13"}], {"threads": "2"}) == (Changed("threads", "-", "2"),)
    assert changed([], {"torch": "2.13"}) == (Changed("torch", None, "2.13"),)
