"""Advice from curves that tuner did not make: the same rules, whatever made the runs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tuner
from tests.playbook.test_quickstart_round import recorded_round
from tuner.errors import InputError
from tuner.playbook import read_round

GRID = range(0, 501, 10)


def power(scale: float = 1.5):
    return [(step, 2.0 + scale * (step + 5) ** -0.4) for step in GRID]


def test_runs_that_still_fall_are_too_short():
    advice = tuner.advise(
        [power(), power(1.6)], max_train_steps=500, schedule="linear", decay_steps=200, warmup_steps=20
    )
    assert (advice.diagnosis, advice.suggested_max_train_steps) == ("too_short", 1500)
    assert 0.0 < advice.gain(750) < advice.gain(1000) < advice.gain(1500) < 0.2
    assert advice.gain(500) == 0.0
    assert str(advice).count("\n") == len(advice.evidence) - 1
    assert "too_short" in {finding.rule for finding in advice.findings}


def test_a_gain_that_nothing_shows_is_none():
    advice = tuner.advise([power()], max_train_steps=500, schedule="cosine")
    assert (advice.diagnosis, advice.suggested_max_train_steps) == ("undetermined", 750)
    assert advice.gain(1000) is None


def test_runs_that_are_flat_need_no_more_steps():
    flat = [(step, 3.0 if step == 0 else 2.0 + 1e-4 * (step // 10 % 2)) for step in GRID]
    advice = tuner.advise([flat], max_train_steps=500)
    assert advice.diagnosis in ("saturated", "too_long")
    assert advice.suggested_max_train_steps < 500


def test_production_steps_bound_the_suggestion_and_copies_count_once():
    advice = tuner.advise(
        [power(), power()],
        max_train_steps=500,
        production_steps=600,
        hyperparameters=[{"learning_rate": 1e-4}, {"learning_rate": 1e-4}],
    )
    assert advice.suggested_max_train_steps == 600
    assert len(advice.reading.leading) == 1


def test_a_round_and_its_curves_read_alike():
    """But for what the losses of single examples add, which curves do not have."""
    results = recorded_round(is_compared=False)
    curves = [[(e.step, e.eval_loss) for e in trial.evaluations] for trial in results.trials]
    advice = tuner.advise(curves, max_train_steps=45, schedule="linear", decay_steps=15, warmup_steps=1)
    reading = read_round(results)
    assert (advice.diagnosis, advice.suggested_max_train_steps) == (
        reading.diagnosis,
        reading.suggested_max_train_steps,
    )
    assert advice.reading.gain == pytest.approx(reading.gain)


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=30), st.sampled_from(["constant", "cosine"]))
def test_any_curve_gives_an_answer(losses, schedule):
    curve = [(10 * (i + 1), loss) for i, loss in enumerate(losses)]
    advice = tuner.advise([curve], max_train_steps=curve[-1][0], schedule=schedule)
    assert advice.evidence
    assert advice.suggested_max_train_steps is None or advice.suggested_max_train_steps >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curves": [[]]}, "curve 0: empty"),
        ({"curves": [power(), [(10, 1.0), (10, 2.0)]]}, "curve 1: steps must rise"),
        ({"curves": [[(1000, 1.0)]]}, "max_train_steps is 500; pass the horizon"),
        ({"curves": [[1.0, 2.0]]}, r"expects \(step, loss\) pairs"),
        ({"schedule": "wsd"}, "expects one of constant, linear, cosine, inverse_sqrt; did you mean linear"),
        ({"schedule": "muon"}, "schedule='muon': expects one of constant, linear, cosine, inverse_sqrt$"),
        ({"schedule": "linear", "decay_steps": 501}, "decay_steps=501: expects a whole number from 0 to 500"),
        ({"curves": [[(1.5, 1.0)]]}, "curve 0: steps must be whole numbers of updates; got 1.5"),
        ({"curves": []}, "pass a list of"),
        ({"curves": 3}, "pass a list of"),
        ({"max_train_steps": 0}, "expects a whole number of at least 1; pass the steps of the runs"),
        ({"max_train_steps": "500"}, "max_train_steps='500': expects a whole number"),
        ({"warmup_steps": None}, "warmup_steps=None: expects a whole number from 0 to 500"),
        ({"decay_steps": 2.5}, "decay_steps=2.5: .*; pass 0 for runs without one"),
        ({"production_steps": -5}, "production_steps=-5: .*; None sets no limit"),
        ({"worthwhile_gain": 1.0}, "expects a share of the loss"),
        ({"worthwhile_gain": "1%"}, "pass 0.005 for 0.5%"),
        ({"hyperparameters": [{"lora_r": [8, 16]}]}, "hyperparameters of curve 0: expects names with"),
        ({"hyperparameters": [{}, {}]}, "2 for 1 curves"),
    ],
)
def test_what_cannot_be_read_is_refused(changes, message):
    arguments = {"curves": [power()], "max_train_steps": 500, **changes}
    with pytest.raises(InputError, match=message):
        tuner.advise(arguments.pop("curves"), **arguments)


def test_log_does_nothing_outside_of_a_training_command():
    assert tuner.log(10, eval_loss=2.0) is None


def test_steps_of_a_table_are_read_as_they_are():
    curve = [(np.int64(step), np.float32(loss)) for step, loss in power()]
    floats = [(float(step), loss) for step, loss in power()]
    for each in (curve, floats):
        assert tuner.advise([each], max_train_steps=np.int64(500)).evidence


@pytest.mark.parametrize("horizon", ["1000", 499, 1000.5, float("nan")])
def test_a_gain_is_that_of_a_longer_horizon(horizon):
    with pytest.raises(InputError, match="pass a longer horizon"):
        tuner.advise([power()], max_train_steps=500).gain(horizon)
