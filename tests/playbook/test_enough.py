from dataclasses import replace

import pytest
from hypothesis import given

from tests.playbook.rows import round_of, trial_of
from tests.playbook.strategies import heavy, rounds
from tuner.playbook import Diagnosis, read_round
from tuner.playbook.enough import enough


def reading(**fields):
    trials = [
        trial_of(i, lambda s, i=i: (2.0 + (s + 5) ** -0.5) * (1 + i / 1000), steps=tuple(range(0, 101, 5)))
        for i in range(6)
    ]
    return read_round(round_of(*trials, evaluate_every=5, **fields))


def test_a_horizon_that_is_too_short_asks_for_another_round_while_it_may_be_paid_for():
    assert enough(reading(), max_train_steps=100) is None
    assert enough(reading(production_steps=120), max_train_steps=100) is None
    assert "production_steps" in (enough(reading(production_steps=100), max_train_steps=100) or "")


@pytest.mark.parametrize("diagnosis", sorted(set(Diagnosis) - {Diagnosis.TOO_SHORT}))
def test_every_other_diagnosis_ends_the_study(diagnosis):
    assert enough(replace(reading(), diagnosis=diagnosis), max_train_steps=100)


@heavy
@given(rounds())
def test_another_round_is_longer_than_the_last(results):
    read = read_round(results)
    if enough(read, max_train_steps=results.max_train_steps) is None:
        assert read.suggested_max_train_steps > results.max_train_steps
