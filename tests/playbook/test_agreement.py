from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.rows import round_of, trial_of
from tests.playbook.strategies import heavy, rounds
from tuner.playbook.reopening import MIN_RANKED, carried_over, rank_correlation
from tuner.playbook.results import RoundResults
from tuner.records import Continuation, Trial, TrialState

numbers = st.lists(st.integers(-5, 5).map(float), max_size=8)
"""Few values, so that many tie."""


def run(number: int, loss: float, *, rate: float, **fields: object) -> Trial:
    return replace(trial_of(number, [4.0, loss], steps=(0, 100), learning_rate=rate), **fields)


def earlier(*losses: float, name: str = "round1", **fields: object) -> RoundResults:
    """A round of 50 steps whose trial i has the rate i + 1 and this loss."""
    trials = (run(i, loss, rate=i + 1.0, round=name) for i, loss in enumerate(losses))
    return round_of(*trials, name=name, max_train_steps=50, **fields)


def later(*losses: float, **fields: object) -> RoundResults:
    """The same configurations at 100 steps, numbered from the last."""
    last = len(losses) - 1
    trials = (run(last - i, loss, rate=i + 1.0, round="round2") for i, loss in enumerate(losses))
    return round_of(*trials, name="round2", **fields)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3], [2, 1, 3], 0.5),
        ([1, 2, 3, 4, 5], [1, 2, 3, 5, 4], 0.9),
        ([1, 1, 2], [1, 2, 3], 0.8660254037844387),
        ([1, 2, 1e300], [1, 2, 3], 1.0),
        ([1, 2], [1, 2], None),
        ([], [], None),
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_rank_correlation(one, other, expected):
    assert rank_correlation(one, other) == (None if expected is None else pytest.approx(expected))


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), max_size=8), st.randoms())
def test_properties_of_the_rank_correlation(pairs, random):
    one, other = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
    found = rank_correlation(one, other)
    ties = len(set(one)) < 2 or len(set(other)) < 2
    assert (found is None) == (len(pairs) < MIN_RANKED or ties)
    if found is not None:
        assert -1.0 <= found <= 1.0
        assert rank_correlation(other, one) == pytest.approx(found)
        assert rank_correlation([x**3 for x in one], [5 * y + 1 for y in other]) == pytest.approx(found)
        assert rank_correlation([-x for x in one], other) == pytest.approx(-found)
        shuffled = random.sample(pairs, len(pairs))
        again = rank_correlation([float(x) for x, _ in shuffled], [float(y) for _, y in shuffled])
        assert again == pytest.approx(found)


@given(numbers)
def test_anything_agrees_with_itself(values):
    assert rank_correlation(values, values) in (None, pytest.approx(1.0))


def test_what_was_carried_and_whether_its_order_held():
    over = carried_over(later(2.0, 1.5, 1.0), [earlier(2.5, 3.0, 3.5)])
    assert over.from_round == "round1"
    assert over.trials == ((2, 0), (1, 1), (0, 2))
    assert over.compared == ((0, 2), (1, 1), (2, 0))
    assert over.rank_correlation == pytest.approx(-1.0)
    assert over.place_of_the_best == 3
    held = carried_over(later(1.0, 1.5, 2.0), [earlier(2.5, 3.0, 3.5)])
    assert (held.rank_correlation, held.place_of_the_best) == (pytest.approx(1.0), 1)


def test_nothing_is_carried_without_earlier_rounds_or_common_trials():
    assert carried_over(later(1.0, 2.0), []) is None
    other = round_of(run(0, 2.0, rate=9.0), max_train_steps=50)
    assert carried_over(later(1.0, 2.0), [other]) is None
    assert carried_over(round_of(), [earlier(1.0)]) is None


def test_two_trials_are_too_few_for_an_order():
    over = carried_over(later(1.0, 2.0), [earlier(1.0, 2.0)])
    assert over.rank_correlation is None
    assert len(over.compared) == 2
    assert over.place_of_the_best == 1


def test_a_trial_that_goes_on_names_its_source():
    going_on = run(0, 1.0, rate=77.0, continues=Continuation("round1", 1, 30))
    over = carried_over(round_of(going_on, name="round2"), [earlier(2.0, 3.0)])
    assert over.trials == ((1, 0),)


def test_the_latest_round_that_gave_anything_counts():
    empty = round_of(run(0, 2.0, rate=9.0), max_train_steps=50, name="round1b")
    over = carried_over(later(1.0, 2.0), [earlier(1.0, 2.0, name="round0"), earlier(1.0, 2.0), empty])
    assert over.from_round == "round1"


def test_a_decay_that_was_re_cut_makes_no_other_trial():
    recut = [
        replace(t, hyperparameters={**t.hyperparameters, "decay_steps": 40}) for t in later(1.0, 2.0).trials
    ]
    assert len(carried_over(round_of(*recut, name="round2"), [earlier(1.0, 2.0)]).trials) == 2


def test_infeasible_trials_are_carried_and_not_compared_failed_ones_are_neither():
    states = [TrialState.COMPLETE, TrialState.INFEASIBLE, TrialState.FAILED]
    ran = later(1.0, 1.5, 2.0)
    lost = [replace(trial, state=state) for trial, state in zip(ran.trials, states, strict=True)]
    over = carried_over(round_of(*lost, name="round2"), [earlier(1.0, 2.0, 3.0)])
    assert over.trials == ((1, 1), (0, 2))
    assert over.compared == ((0, 2),)


def test_the_repetition_of_a_failed_trial_is_the_source():
    first = earlier(1.0, 2.0)
    failed = replace(first.trials[0], number=0, state=TrialState.FAILED)
    again = replace(first.trials[0], number=5)
    over = carried_over(later(1.0, 2.0), [replace(first, trials=(failed, first.trials[1], again))])
    assert over.trials == ((1, 0), (5, 1))
    assert carried_over(later(1.0, 2.0), [replace(first, trials=(failed,))]) is None


def test_the_same_horizon_on_the_same_workload_is_nothing_new():
    first = replace(earlier(1.0, 2.0, 3.0), max_train_steps=100)
    over = carried_over(later(1.0, 2.0, 3.0), [first])
    assert (len(over.trials), over.compared, over.rank_correlation) == (3, (), None)
    elsewhere = carried_over(later(1.0, 2.0, 3.0, workload="other"), [first])
    assert elsewhere.rank_correlation == pytest.approx(1.0)


@heavy
@given(rounds(), st.lists(rounds(), max_size=2), st.randoms())
def test_the_order_of_trials_means_nothing(now, before, random):
    shuffled = replace(now, trials=tuple(random.sample(now.trials, len(now.trials))))
    over = carried_over(now, before)
    assert carried_over(shuffled, before) == over
    if over is not None:
        assert set(over.compared) <= set(over.trials)
        assert over.rank_correlation is None or -1.0 <= over.rank_correlation <= 1.0
