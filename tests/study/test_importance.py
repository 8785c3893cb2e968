"""Importance: what decides the results comes first, and odd rounds have none."""

from __future__ import annotations

from dataclasses import replace

from tests.report import synthetic
from tuner.study.dashboard import MIN_TRIALS, importance


def test_the_hyperparameter_that_decides_comes_first() -> None:
    found = importance(synthetic.large_report(120).results)
    assert next(iter(found)) == "learning_rate"
    assert found["learning_rate"] > 0.5
    assert abs(sum(found.values()) - 1) < 1e-6
    assert set(found) == {
        "learning_rate",
        "lora_r",
        "weight_decay",
        "schedule",
        "target_modules",
        "lora_dropout",
    }
    assert importance(synthetic.large_report(120).results) == found, "the same facts, the same numbers"


def test_too_few_trials_or_hyperparameters_have_none() -> None:
    results = synthetic.large_report(120).results
    few = [t for t in results.trials if t.state.value == "complete"][: MIN_TRIALS - 1]
    assert importance(replace(results, trials=tuple(few))) == {}
    one = {name: d for name, d in results.space.items() if name == "learning_rate"}
    assert importance(replace(results, space=one)) == {}


def test_enqueued_values_outside_of_the_space_are_left_out() -> None:
    results = synthetic.large_report(60).results
    odd = tuple(synthetic.with_hyperparameters(t, {"lora_r": 99}) for t in results.trials[:5])
    assert set(importance(replace(results, trials=(*odd, *results.trials[5:])))) >= {
        "learning_rate",
        "lora_r",
    }
