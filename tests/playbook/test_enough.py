import math
from dataclasses import replace

import pytest
from hypothesis import given

from tests.playbook.rows import round_of, trial_of
from tests.playbook.strategies import heavy, rounds
from tuner.playbook import Diagnosis, Reading, RoundResults, read_round
from tuner.playbook.restarts import Enough, next_horizon


def falling_round(horizon: int = 100, **fields) -> RoundResults:
    steps = tuple(range(0, horizon + 1, 5))
    trials = [
        trial_of(i, lambda s, i=i: (2.0 + (s + 5) ** -0.5) * (1 + i / 1000), steps=steps) for i in range(6)
    ]
    return round_of(*trials, evaluate_every=5, max_train_steps=horizon, **fields)


def diagnosed(diagnosis: Diagnosis, *, suggested: int | None = 150, results: RoundResults | None = None):
    results = results or falling_round()
    reading = replace(read_round(results), diagnosis=diagnosis, suggested_max_train_steps=suggested)
    return results, reading


def test_a_horizon_that_is_too_short_asks_for_another_round_while_it_may_be_paid_for():
    def follows(**fields):
        results = falling_round(**fields)
        return next_horizon(results, read_round(results))

    assert follows() == 300
    assert follows(production_steps=120) == 120
    assert "production_steps, 100, does not allow longer" in follows(production_steps=100).reason


@pytest.mark.parametrize("diagnosis", sorted(set(Diagnosis) - {Diagnosis.TOO_SHORT, Diagnosis.UNDETERMINED}))
def test_other_diagnoses_end_the_study(diagnosis):
    assert isinstance(next_horizon(*diagnosed(diagnosis, suggested=100)), Enough)


@pytest.mark.parametrize("diagnosis", [Diagnosis.NO_LEARNING, Diagnosis.UNDETERMINED])
def test_a_round_that_suggests_nothing_has_failed(diagnosis):
    ended = next_horizon(*diagnosed(diagnosis, suggested=None))
    assert isinstance(ended, Enough)
    assert ended.taught_nothing
    assert not next_horizon(*diagnosed(Diagnosis.RIGHT, suggested=100)).taught_nothing


@pytest.mark.parametrize("diagnosis", [Diagnosis.TOO_SHORT, Diagnosis.SATURATED, Diagnosis.UNDETERMINED])
def test_an_edge_that_is_widened_asks_for_another_round_at_the_same_horizon(diagnosis):
    results, reading = diagnosed(diagnosis, suggested=100)
    assert next_horizon(results, replace(reading, widens_rates=True)) == 100


def test_the_second_undetermined_in_a_row_ends_the_study():
    """A cosine without a comparison run cannot tell what a doubling is worth."""

    def cosine(horizon: int) -> RoundResults:
        trial = trial_of(
            0, lambda s: 2.0 + (s + 5) ** -0.5, steps=range(0, horizon + 1, 5), schedule="cosine"
        )
        return round_of(trial, evaluate_every=5, max_train_steps=horizon)

    first, second = cosine(100), cosine(150)
    assert next_horizon(first, read_round(first)) == 150
    other_work = replace(first, workload="another", name="round0")
    assert next_horizon(second, read_round(second), [other_work]) == 225
    second = replace(cosine(800), name="round2")
    ended = next_horizon(second, read_round(second), [first])
    assert isinstance(ended, Enough)
    assert not ended.taught_nothing
    assert "The next horizon to try is 1200 steps" in ended.reason
    assert next_horizon(second, read_round(second), [falling_round()]) == 900


def test_a_horizon_of_one_step_is_not_blamed_on_production_steps():
    """Half as long again is no whole step more."""
    trial = trial_of(0, [3.0, 2.0], steps=[0, 1], schedule="cosine")
    results = round_of(trial, evaluate_every=1, max_train_steps=1)
    ended = next_horizon(results, read_round(results))
    assert isinstance(ended, Enough)
    assert "production_steps" not in ended.reason


def test_without_a_bound_rounds_go_to_nine_times_the_first_horizon():
    results = falling_round(400)
    reading = read_round(results)
    assert reading.suggested_max_train_steps > 900
    assert next_horizon(results, reading, [falling_round(100)]) == 900
    assert next_horizon(results, reading, [falling_round(100)], has_deadline=True) > 900
    paid = replace(results, production_steps=5000)
    assert next_horizon(paid, read_round(paid), [falling_round(100)]) > 900
    ended = next_horizon(results, reading, [falling_round(40)])
    assert isinstance(ended, Enough)
    assert "9 times the first horizon" in ended.reason


@heavy
@given(rounds())
def test_another_round_is_longer_than_the_last_unless_an_edge_is_widened(results):
    reading: Reading = read_round(results)
    follows = next_horizon(results, reading)
    if not isinstance(follows, Enough):
        cap = results.production_steps or math.inf
        assert follows > results.max_train_steps or (reading.widens_rates and follows <= cap)
