"""Losses of different lengths are made comparable by what is known at both, never taken as they are."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.playbook.observations import observations, outcomes
from tuner.records import Evaluation, Trial, TrialState


def trial(rate, losses, state=TrialState.COMPLETE, **more):
    evaluations = tuple(Evaluation(5 * place, loss) for place, loss in enumerate(losses))
    return Trial("r", int(1000 * rate), {"learning_rate": rate, **more}, state, evaluations=evaluations)


def objectives(*rounds):
    found = [o for horizon, trials in rounds for o in outcomes(trials, max_train_steps=horizon)]
    return {each.hyperparameters["learning_rate"]: each.objective for each in observations(found)}


SHORT = [trial(0.1, [3.0, 2.0]), trial(0.2, [3.0, 2.2]), trial(0.3, [3.0, 2.5])]


def test_a_short_run_is_moved_by_what_the_runs_known_at_both_horizons_gained():
    longer = [trial(0.1, [3.0, 2.0, 1.9]), trial(0.2, [3.0, 2.2, 1.5]), trial(0.4, [3.0, 2.6, 2.4])]
    assert objectives((5, SHORT), (10, longer)) == pytest.approx({0.1: 1.9, 0.2: 1.5, 0.3: 2.1, 0.4: 2.4})
    # Coming back to the short horizon changes nothing of that.
    assert objectives((5, SHORT[:2]), (10, longer), (5, SHORT[2:]))[0.3] == pytest.approx(2.1)


def test_without_a_run_at_both_the_best_ones_are_taken_to_be_alike():
    assert objectives((5, SHORT), (10, [trial(0.4, [3.0, 2.6, 1.0])]))[0.1] == pytest.approx(1.0)


def test_the_longest_run_of_a_configuration_speaks_whatever_its_decay():
    again = trial(0.1, [3.0, 2.0, 1.9], decay_steps=4)
    assert objectives((5, [trial(0.1, [3.0, 2.0], decay_steps=2)]), (10, [again])) == {0.1: 1.9}
    diverged = trial(0.1, [3.0, 2.0, math.nan], TrialState.INFEASIBLE)
    assert objectives((5, SHORT), (10, [diverged]))[0.1] == math.inf
    later = [trial(0.1, [3.0, 1.8])]
    assert objectives((5, [trial(0.1, [3.0, 2.0])]), (5, later)) == {0.1: 1.8}, "of two, the later one"


def test_only_results_teach():
    states = [TrialState.WAITING, TrialState.RUNNING, TrialState.FAILED]
    assert objectives((5, [trial(0.1 * n, [3.0, 1.0], s) for n, s in enumerate(states)])) == {}
    assert objectives((5, [trial(0.1, [math.nan])])) == {}


def test_a_pruned_trial_is_expected_to_gain_what_complete_ones_gained_from_there():
    complete = [trial(0.1, [3.0, 2.0, 1.5]), trial(0.2, [3.0, 2.0, 1.3]), trial(0.3, [3.0, 2.0, 1.9])]
    pruned = trial(0.4, [3.0, 2.4], TrialState.PRUNED)
    assert objectives((10, [*complete, pruned]))[0.4] == pytest.approx(1.9)
    assert objectives((10, [pruned]))[0.4] == 2.4


@given(
    st.lists(st.tuples(st.floats(0.5, 3), st.floats(0.1, 2)), min_size=2, max_size=8),
    st.floats(-0.4, 5),
    st.randoms(use_true_random=False),
)
def test_order_within_a_length_is_kept_and_a_shift_of_one_length_changes_no_order(pairs, shift, random):
    short = [trial(n / 10, [4.0, first]) for n, (first, _) in enumerate(pairs)]
    longer = [trial(n / 10, [9.0, 9.0, second]) for n, (_, second) in enumerate(pairs[:-1])]
    moved = [trial(n / 10, [9.0, 9.0, second + shift]) for n, (_, second) in enumerate(pairs[:-1])]
    before, after = objectives((5, short), (10, longer)), objectives((5, short), (10, moved))
    assert after == pytest.approx({rate: objective + shift for rate, objective in before.items()})
    shuffled = objectives((5, random.sample(short, len(short))), (10, random.sample(longer, len(longer))))
    assert shuffled == pytest.approx(before)
