"""Pruners decide from the same step of other trials, and never of what is not theirs to decide."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.playbook.pruning import MIN_COMPLETE, reason_to_prune, rungs
from tuner.records import Continuation, Evaluation, Trial, TrialState

HORIZON, EVERY = 36, 4


def trial(number, losses, state=TrialState.RUNNING, **more):
    evaluations = tuple(Evaluation(EVERY * place, loss) for place, loss in enumerate(losses))
    return Trial("round1", number, {"warmup_steps": 2}, state, evaluations=evaluations, **more)


def complete(number, level):
    return trial(number, [3.0, *[level] * 9], TrialState.COMPLETE)


def decide(one, others, pruner):
    return reason_to_prune(one, others, pruner=pruner, max_train_steps=HORIZON, evaluate_every=EVERY)


MEDIAN_OF_ONE_TO_FIVE = [complete(number, 1.0 + number / 10) for number in range(MIN_COMPLETE)]


def test_the_median_is_of_complete_trials_at_the_same_step():
    assert decide(trial(9, [3.0, 1.2]), MEDIAN_OF_ONE_TO_FIVE, "median") is None
    reason = decide(trial(9, [3.0, 1.21]), MEDIAN_OF_ONE_TO_FIVE, "median")
    assert reason == "its best loss up to step 4, 1.2100, is above the median of 5 trials, 1.2000"
    reason = decide(trial(9, [3.0, 1.200004]), MEDIAN_OF_ONE_TO_FIVE, "median")
    assert reason == "its best loss up to step 4, 1.200004, is above the median of 5 trials, 1.200000"
    assert decide(trial(9, [3.0, 1.0, 1.5]), MEDIAN_OF_ONE_TO_FIVE, "median") is None
    assert decide(trial(9, [3.0, 2.0]), MEDIAN_OF_ONE_TO_FIVE[1:], "median") is None
    late = [
        replace(t, evaluations=(*t.evaluations[:1], *trial(0, [2.5] * 9).evaluations[1:]))
        for t in MEDIAN_OF_ONE_TO_FIVE
    ]
    assert decide(trial(9, [3.0, 2.0]), late, "median") is None


def test_a_third_of_those_on_a_rung_go_on():
    assert rungs(HORIZON, evaluate_every=EVERY) == (4, 12)
    others = [trial(number, [3.0, 1.0 + number / 10]) for number in range(5)]
    assert decide(trial(9, [3.0, 1.05]), others, "halving") is None
    reason = decide(trial(9, [3.0, 1.15]), others, "halving")
    assert reason == "its best loss up to step 4, 1.1500, is not among the best 2 of 6 trials"
    assert decide(trial(9, [3.0, 1.1]), others, "halving") is None  # ties go on
    assert decide(trial(9, [3.0, 2.0, 2.0]), others, "halving") is None  # step 8 is no rung
    assert decide(trial(9, [3.0, 2.0]), [], "halving") is None  # whoever comes first goes on


@pytest.mark.parametrize(
    ("horizon", "every", "expected"), [(36, 4, (4, 12)), (8, 2, (2, 4)), (8, 4, (4,)), (5, 5, ())]
)
def test_rungs_are_evaluations_before_the_horizon(horizon, every, expected):
    assert rungs(horizon, evaluate_every=every) == expected


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_what_is_not_decided(pruner):
    others = [*MEDIAN_OF_ONE_TO_FIVE, complete(6, 1.0)]
    poor = trial(9, [3.0, 2.0])
    assert decide(poor, others, pruner) is not None
    assert decide(poor, others, "none") is None
    assert decide(replace(poor, continues=Continuation("round0", 1, 4)), others, pruner) is None
    assert decide(replace(poor, hyperparameters={"warmup_steps": 4}), others, pruner) is None
    assert decide(trial(9, [3.0]), others, pruner) is None
    assert decide(trial(9, [2.0] * 10), others, pruner) is None
    assert decide(trial(9, [3.0, math.nan]), others, pruner) is None
    assert decide(poor, [poor, *others[:1]], pruner if pruner == "median" else "none") is None


@given(
    st.lists(st.floats(0.5, 3.0), min_size=1, max_size=12),
    st.sampled_from(["median", "halving"]),
    st.randoms(),
)
def test_the_best_is_never_pruned_and_order_has_no_meaning(levels, pruner, random):
    others = [complete(number, level) for number, level in enumerate(levels)]
    assert decide(trial(99, [3.0, min(levels)]), others, pruner) is None
    one = trial(99, [3.0, levels[0]])
    shuffled = random.sample(others, len(others))
    assert decide(one, others, pruner) == decide(one, shuffled, pruner)
