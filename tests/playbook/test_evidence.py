import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.test_horizon import seen
from tuner.playbook import Diagnosis
from tuner.playbook.curves import LateDrop
from tuner.playbook.evidence import evidence, examples_to_settle, trials_to_settle
from tuner.playbook.gain import Gain, GainSource
from tuner.playbook.horizon import Signs, diagnose, suggest
from tuner.playbook.noise import Scale
from tuner.playbook.selection import LeadingTrial
from tuner.records import Direction, Evaluation, Objective

EARLIER = Gain(0.03, 0.0, GainSource.EARLIER_ROUND, trial=0, from_steps=50, to_steps=100)


def with_examples(signs: Signs, count: int) -> Signs:
    def evaluated(lead: LeadingTrial) -> LeadingTrial:
        return replace(lead, best=replace(lead.best, example_nll=(1.0,) * count, example_tokens=(1,) * count))

    return replace(signs, leading=tuple(map(evaluated, signs.leading)))


def said(signs: Signs) -> list[str]:
    diagnosis = diagnose(signs)
    return list(evidence(signs, diagnosis, suggest(signs, diagnosis)))


def undetermined(now: int, max_examples: int | None, *, gain: float = 0.03, noise: float = 0.03) -> str:
    return said(replace(with_examples(seen(gain=gain, noise=noise), now), max_examples=max_examples))[2]


def test_the_examples_that_settle_a_gain_of_this_size():
    # Twice the noise is 6%, twice the gain: four times the examples.
    assert examples_to_settle(with_examples(seen(gain=0.03, noise=0.03), 48)) == 200
    # Of a gain below 1%, up or down, it is to become 1%: 36 times as many.
    for gain in (0.005, -0.005):
        assert examples_to_settle(with_examples(seen(gain=gain, noise=0.03), 48)) == 1800


def test_where_max_examples_limits_it_is_to_be_raised():
    message = undetermined(48, 48)
    assert "About 200 evaluation examples instead of 48 would settle a gain of this size" in message
    assert (
        "set evaluation.max_examples to 200 in the next round file, with as many rows in data.eval" in message
    )


def test_where_rows_are_few_they_are_to_be_added():
    assert "add rows to data.eval, which has 48." in undetermined(48, 500)
    assert "add rows to data.eval, which has 48." in undetermined(48, None)
    both = undetermined(48, 100)
    assert "add rows to data.eval, which has 48, and set evaluation.max_examples to 200" in both


def test_no_number_of_examples_settles_what_they_do_not_show():
    assert "per-example losses are unknown" in said(with_examples(seen(gain=0.03, noise=0.03), 0))[2]
    by_seeds = replace(with_examples(seen(gain=0.03, noise=0.005), 48), noise=0.03)
    assert examples_to_settle(by_seeds) is None
    assert "seeds differ by as much" in said(by_seeds)[2]


@pytest.mark.parametrize(
    ("gain", "advice"),
    [
        (0.006, ", 1.5 times as many. That should cut the loss by about 0.26%."),
        (0.007, ", 2 times as many. That should cut the loss by about 0.49%."),
        (0.03, ", 3 times as many, the most for one round. That should cut the loss by about 3%."),
    ],
)
def test_more_steps_are_advised_with_what_they_should_bring(gain, advice):
    assert said(seen(gain=gain, noise=0.0))[-1].endswith(advice)


def test_a_gain_over_more_than_a_doubling_is_said_to_be_rescaled():
    for from_steps, is_rescaled in ((33, True), (49, False), (50, False)):
        signs = replace(seen(gain=0.03, noise=0.0), gain=replace(EARLIER, from_steps=from_steps))
        assert (f"(rescaled from {from_steps} to 100)" in said(signs)[1]) is is_rescaled


@given(
    gain=st.floats(-0.2, 0.2),
    by_examples=st.floats(0.001, 0.2),
    by_seeds=st.floats(0, 0.1),
    now=st.integers(2, 5000),
)
def test_with_so_many_examples_the_same_gain_is_no_longer_undetermined(gain, by_examples, by_seeds, now):
    noise = math.hypot(by_examples, by_seeds)
    signs = replace(with_examples(seen(gain=gain, noise=by_examples), now), noise=noise)
    needed = examples_to_settle(signs)
    if signs.is_hidden and needed is not None:
        assert needed >= now
        assert not replace(signs, noise=math.hypot(by_examples * math.sqrt(now / needed), by_seeds)).is_hidden


def test_one_trial_is_not_spoken_of_as_many():
    (first, _, conclusion, _) = said(seen((100,)))
    assert first == "Trial 0 reached 1.0000 at step 100 of 100."
    assert conclusion == "The best trial's loss still fell by 0.8% in the last quarter: more steps will help."
    (_, _, conclusion, _) = said(replace(seen((100,) * 2), late=None))
    assert conclusion == "2 of 2 leading trials were best in the last quarter: more steps will help."


@pytest.mark.parametrize(
    ("best_steps", "expected"),
    [
        ((100, 100), "Both leading trials were best at the last step (100)."),
        ((100,) * 5, "All 5 leading trials were best at the last step (100)."),
        (
            (100,) * 39 + (80,),
            "39 of 40 leading trials were best at the last step (100), the other at step 80.",
        ),
        (
            (100, 30, 80),
            "1 of 3 leading trials was best at the last step (100), the others at steps 30 to 80.",
        ),
        ((40, 30, 80), "The 3 leading trials were best at steps 30 to 80 of 100, the median at 40."),
        ((40, 40), "The 2 leading trials were best at step 40 of 100."),
    ],
)
def test_best_steps_are_summed_up(best_steps, expected):
    assert said(seen(best_steps))[0].startswith(expected)


def test_an_earlier_settled_step_is_named():
    signs = seen((100,) * 5)
    losses = {60: (20.0, 20.0), 80: (12.0, 9.0), 100: (10.0, 10.0)}
    evaluations = tuple(
        Evaluation(step, sum(nll) / 20, example_nll=nll, example_tokens=(10, 10))
        for step, nll in losses.items()
    )
    first = signs.leading[0]
    leading = (replace(first, trial=replace(first.trial, evaluations=evaluations)), *signs.leading[1:])
    said_first = said(replace(signs, leading=leading))[0]
    assert said_first.endswith(", and was within one standard error of that from step 80 on.")


@pytest.mark.parametrize(
    ("gain", "worth", "conclusion"),
    [
        (0.05, "cut the loss by 5% +- 4%", "more steps will help"),
        (0.0005, "cut the loss by 0.05%", "no more than 0.5% (run.worthwhile_gain)"),
        (-0.05, "raised the loss by 5% +- 4%", "more steps do not help"),
    ],
)
def test_a_gain_is_said_by_its_sign(gain, worth, conclusion):
    sentences = said(seen(gain=gain, noise=0.02 if abs(gain) > 0.04 else 0.0))
    assert worth in sentences[1]
    assert conclusion in sentences[2]


def test_a_threshold_that_the_noise_sets_is_said_to_be_so():
    assert "no more than 0.8% (twice the noise)" in said(seen(gain=0.001, noise=0.004))[2]


def test_a_gain_of_unknown_noise_says_what_would_tell():
    sentences = said(seen(gain=0.05, noise=None))
    assert "with unknown noise" in sentences[1]
    assert "set a smaller evaluation.every_steps, or repeat the best trial with other seeds" in sentences[2]


def test_trials_that_would_settle_it_are_counted():
    signs = replace(seen((100, 100, 100, 50)), late=None)
    assert trials_to_settle(signs) == 1
    assert "3 of 4 leading trials were best in the last quarter; about 1 more leading trial" in said(signs)[2]


def test_a_small_learning_rate_at_the_end_is_no_evidence_that_a_trial_was_done():
    slowed = replace(seen((70,), gain=0.1, late=LateDrop(0.004, 0.004)), late_by_rate=LateDrop(0.06, 0.0))
    assert diagnose(slowed) == Diagnosis.UNDETERMINED
    assert said(slowed)[2] == (
        "The last quarter of the steps cut the loss by 0.4%, but at a small learning rate: over the last "
        "quarter of its summed learning rate, the best trial's loss fell by 6%. A longer run would show "
        "whether it has converged."
    )
    metric = replace(slowed, objective=Objective("m", Direction.MAXIMIZE), scale=Scale(0.3))
    assert (
        "trial's m rose by 6% of what the best trial gained over the base model. A longer" in said(metric)[2]
    )
    assert diagnose(replace(slowed, late_by_rate=LateDrop(0.03, 0.0))) == Diagnosis.RIGHT
    assert diagnose(replace(slowed, late_by_rate=None)) != Diagnosis.RIGHT


def test_an_edge_keeps_the_horizon_and_says_why_and_gives_up_after_two_rounds():
    first = said(seen(small_rates=True))
    assert first[-1].endswith("Try higher rates at 100 steps first.")
    assert not any("Train for" in sentence for sentence in first)
    last = said(seen(small_rates=True, widenings=2))
    assert "Train for 300 steps" in last[-2]
    assert "still at the upper end, after 2 rounds" in last[-1]
