"""A study in passes climbs over the horizons it knows, with what no longer round has taken up."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.playbook import RoundResults, plan_next_round, read_round
from tuner.playbook.restarts import (
    LongerRound,
    Restart,
    following,
    left_behind,
    num_carried,
    plan_restart,
    points_left,
)
from tuner.records import Choices, Evaluation, Fixed, Range, Trial, TrialState

SPACE = {"learning_rate": Range(1e-5, 1.0, log=True), "schedule": Fixed("constant"), "warmup_steps": Fixed(0)}


def results(name, horizon, losses, *, state=TrialState.COMPLETE):
    """A round whose trials are told apart by their rate: {rate: loss at the horizon}."""
    steps = [horizon * place // 4 for place in range(5)]
    trials = tuple(
        Trial(
            name,
            number,
            {"learning_rate": rate, "schedule": "constant", "warmup_steps": 0},
            state,
            evaluations=tuple(Evaluation(s, loss + 1 - s / horizon) for s in steps),
        )
        for number, (rate, loss) in enumerate(losses.items())
    )
    return RoundResults(name, horizon, horizon // 4, SPACE, trials)


FIRST = results("round1", 20, {0.1: 1.0, 0.2: 1.1, 0.3: 1.2, 0.4: 1.3, 0.5: 1.4, 0.6: 1.5})
SECOND = results("round2", 60, {0.1: 0.8, 0.2: 0.7})
THIRD = results("round3", 90, {0.2: 0.6})
AGAIN = results("round4", 20, {0.15: 1.25, 0.25: 0.9, 0.35: 1.4})


def rates(trials):
    return [trial.hyperparameters["learning_rate"] for trial in trials]


def test_a_round_is_climbed_from_while_it_asks_for_more():
    step = following([FIRST], longer=60, passes=2)
    assert isinstance(step, LongerRound)
    assert (step.max_train_steps, step.top, rates(step.candidates)[:2]) == (60, 2, [0.1, 0.2])
    assert following([FIRST], longer=None, passes=1) is None
    assert following([FIRST], longer=None, passes=2) == Restart(2)


def test_a_later_pass_climbs_over_the_same_horizons_with_what_all_passes_left():
    assert following([FIRST, SECOND, THIRD], longer=None, passes=2) == Restart(2)
    step = following([FIRST, SECOND, THIRD, AGAIN], longer=None, passes=2)
    assert isinstance(step, LongerRound)
    assert (step.max_train_steps, step.top) == (60, 1)
    # 0.1 and 0.2 went on in the first pass; 0.3 was just behind then.
    assert [(t.round, r) for t, r in zip(step.candidates, rates(step.candidates), strict=True)][:2] == [
        ("round4", 0.25),
        ("round1", 0.3),
    ]
    fifth = results("round5", 60, {0.25: 0.9})
    step = following([FIRST, SECOND, THIRD, AGAIN, fifth], longer=None, passes=2)
    assert isinstance(step, LongerRound)
    assert (step.max_train_steps, rates(step.candidates)) == (90, [0.1, 0.25])
    sixth = results("round6", 90, {0.1: 0.6})
    assert following([FIRST, SECOND, THIRD, AGAIN, fifth, sixth], longer=None, passes=2) is None


def test_no_pass_begins_at_points_that_have_all_run():
    """A list is exhausted by those inside it, each once, whatever became of them."""
    listed = {**SPACE, "learning_rate": Choices((0.1, 0.2, 0.3))}
    losses = {0.1: 1.0, 0.2: 1.1, 0.3: 1.2}
    for rates, left in (((0.1, 0.2), 1), ((0.1, 0.2, 0.7), 1), ((0.1, 0.2, 0.3), 0)):
        first = replace(results("round1", 20, {rate: losses.get(rate, 2.0) for rate in rates}), space=listed)
        assert points_left([first, replace(SECOND, space=listed), first]) == left
        assert following([first], longer=None, passes=2) == (Restart(2) if left else None)
    assert points_left([FIRST]) == math.inf


def test_where_nothing_is_left_to_go_on_with_the_pass_is_over():
    infeasible = results("round1", 20, {0.1: 1.0}, state=TrialState.INFEASIBLE)
    assert following([infeasible], longer=60, passes=2) == Restart(2)
    assert following([infeasible], longer=60, passes=1) is None
    assert left_behind([infeasible], max_train_steps=20) == ()


def test_what_is_planned_holds_all_that_is_carried_and_names_where_it_ran():
    rounds = [FIRST, SECOND, THIRD, AGAIN]
    step = following(rounds, longer=None, passes=2)
    assert isinstance(step, LongerRound)
    planned = plan_next_round(
        AGAIN,
        read_round(AGAIN),
        to="round5",
        max_train_steps=60,
        top=2,
        candidates=step.candidates,
        adds_trials=False,
    )
    assert [(t.round, t.trial) for t in planned.enqueue] == [("round4", 1), ("round1", 2)]
    assert planned.trials_total == 2
    assert all(
        planned.space["learning_rate"].contains(t.hyperparameters["learning_rate"]) for t in planned.enqueue
    )


def test_a_round_begun_anew_is_the_first_one_sampled_from_what_was_learned():
    planned = plan_restart(FIRST, THIRD, read_round(THIRD), to="round4", trials=6, number=2)
    assert (planned.max_train_steps, planned.trials_total, planned.sampler) == (20, 6, "tpe")
    assert (planned.from_round, planned.enqueue, planned.space) == ("round3", (), SPACE)
    by_gp = plan_restart(
        replace(FIRST, sampler="gp"), THIRD, read_round(THIRD), to="round4", trials=6, number=2
    )
    assert by_gp.sampler == "gp"
    assert all(c.from_dimension == c.to_dimension for c in planned.changes.values())


@given(st.integers(0, 200))
def test_a_third_and_at_least_one_goes_on(count):
    assert num_carried(count) == max(1, round(count / 3))
    assert num_carried(count) <= max(1, count)


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_there_are_as_many_rounds_of_the_first_horizon_as_passes(passes):
    rounds, number = [FIRST], 1
    while (
        step := following(rounds, longer=60 if rounds[-1].max_train_steps == 20 else None, passes=passes)
    ) is not None:
        number += 1
        horizon = step.max_train_steps if isinstance(step, LongerRound) else 20
        carried = (
            dict.fromkeys(rates(step.candidates[: step.top]), 0.5)
            if isinstance(step, LongerRound)
            else {number / 100: 1.0}
        )
        rounds.append(results(f"round{number}", horizon, carried))
        assert number < 20
    assert sum(r.max_train_steps == 20 for r in rounds) == passes
