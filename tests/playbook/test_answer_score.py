"""Answers as the objective: the mean and its error, ranks, and what horizons are still read from."""

from dataclasses import replace

import pytest

from tuner.playbook.observations import Outcome, observations, outcomes
from tuner.playbook.promotion import incumbents, proposed_seeds
from tuner.playbook.results import RoundResults, answer_score
from tuner.playbook.selection import leading_trials, ranked, ranked_by_curve, trial_score
from tuner.records import AnswerScore, Direction, Evaluation, Fixed, Objective, Trial, TrialState

ANSWERS = Objective("answers", Direction.MAXIMIZE, "trial", is_relative_to_gained=True)


def test_the_mean_and_its_standard_error():
    score = answer_score([0.0, 1.0, 1.0, 1.0], step=20, metric="exact_match", is_objective=True)
    assert score == AnswerScore(20, "exact_match", 0.75, pytest.approx(0.25), 4, is_objective=True)
    assert answer_score([2.5], step=0, metric="m.py:f", is_objective=False).standard_error is None
    with pytest.raises(ValueError, match="finite"):
        answer_score([float("inf")], step=0, metric="m", is_objective=False)


def trial(number, loss, mean=None, *, error=0.0, is_objective=True, state=TrialState.COMPLETE, horizon=10):
    evaluations = (Evaluation(0, 3.0), Evaluation(horizon, loss))
    score = None if mean is None else AnswerScore(horizon, "exact_match", mean, error, 50, is_objective)
    values = {"learning_rate": 0.1 * (number + 1), "training_seed": 0}
    return Trial("round1", number, values, state, evaluations=evaluations, answer_score=score)


TRIALS = (trial(0, 1.0, 0.2), trial(1, 2.0, 0.5), trial(2, 1.5, 0.5), trial(3, 1.9, -4.0), trial(4, 9.0, 0.0))


def numbers(pairs):
    return [found.number for found, _ in pairs]


def test_trials_are_ranked_by_answers_where_they_are_the_objective_and_ties_go_by_the_loss():
    assert numbers(ranked(TRIALS)) == [2, 1, 0, 4, 3]
    beside = [replace(t, answer_score=replace(t.answer_score, is_objective=False)) for t in TRIALS]
    assert numbers(ranked(beside)) == numbers(ranked_by_curve(TRIALS)) == [0, 2, 3, 1, 4]
    assert [trial_score(t) for t in (TRIALS[1], beside[1], trial(0, 1.0))] == [0.5, None, None]
    assert [t.number for t in incumbents(TRIALS, 2)] == [2, 1]


def test_horizons_are_read_from_losses_all_the_same():
    # The last one answers, but its loss is above that of the base model.
    assert [lead.trial.number for lead in leading_trials(TRIALS, 10)] == [0, 2, 3, 1]


@pytest.mark.parametrize(("error", "is_close"), [(0.1, True), (0.01, False)])
def test_other_seeds_are_proposed_where_answers_do_not_part_the_best_two(error, is_close):
    space = {"training_seed": Fixed(0)}
    close = (trial(0, 1.0, 0.5, error=error), trial(1, 8.0, 0.4, error=error))
    seeds = proposed_seeds(RoundResults("round1", 10, 5, space, close), noise=0.0)
    assert bool(seeds) == is_close


def objectives(found):
    return {round(10 * each.hyperparameters["learning_rate"]) - 1: each.objective for each in found}


def test_a_sampler_learns_from_answers_moved_by_what_they_gained_between_horizons():
    short = outcomes([trial(0, 1.0, 0.2), trial(1, 2.0, 0.5), trial(2, 1.5, 0.5)], max_train_steps=10)
    longer = outcomes([trial(1, 0.5, 0.8, horizon=20)], max_train_steps=20)
    found = observations([*short, *longer], objective=ANSWERS)
    assert objectives(found) == pytest.approx({0: -0.5, 1: -0.8, 2: -0.8})
    # Equal answers are parted by the loss, moved by what the loss gained.
    assert [each.loss for each in found] == pytest.approx([-0.5, 0.5, 0.0])
    assert objectives(observations([*short, *longer])) == pytest.approx({0: -0.5, 1: 0.5, 2: 0.0})


def test_without_answers_there_is_nothing_to_learn_but_what_is_infeasible():
    silent = Outcome({"learning_rate": 0.1}, ("a",), 10, 1.0, is_measured=True)
    diverged = outcomes([trial(3, float("nan"), state=TrialState.INFEASIBLE)], max_train_steps=10)
    assert objectives(observations([silent, *diverged], objective=ANSWERS)) == {3: float("inf")}
