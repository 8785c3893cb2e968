"""The readings of rounds whose answer is known: a smoke test, and the whole measurement."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.playbook.diagnoses import (
    EASY,
    FACTOR,
    PAGE_EASY_ROUNDS,
    PAGE_ROUNDS,
    PAGE_SEED,
    RIGHT_DIAGNOSES,
    RIGHT_HORIZONS,
    RIGHT_IN_EACH_CLASS,
    Measured,
    hard,
    measured,
    measured_class,
    page,
    together,
)
from tests.playbook.hard_rounds import CLASSES
from tests.playbook.loss_curves import Runs
from tests.playbook.rounds import synthetic_round
from tests.playbook.truth import Case, TrueTrial, answer, majority_probability
from tuner.playbook import Diagnosis, read_round

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "diagnoses.md"


def check_together(found: Mapping[str, Measured]) -> None:
    for name, one in (("hard", hard(found)), (EASY, found[EASY])):
        good = f"{one.good_horizons} of {one.horizons.total()} horizons"
        print(f"{name}: {one.right} of {one.clear} right, {good}")
        assert one.right_share >= RIGHT_DIAGNOSES, (name, one.confusion)


def check_horizons(one: Measured, least: float) -> None:
    assert one.good_horizons >= least * one.horizons.total(), one.horizons


def check_class(found: Mapping[str, Measured], *kinds: str) -> None:
    for kind in kinds:
        assert found[kind].right_share >= RIGHT_IN_EACH_CLASS, (kind, found[kind].confusion)


def test_readings_of_a_few_rounds_of_every_class():
    found = measured(9, 40, seed=1)
    assert set(found) == {*CLASSES, EASY}
    check_together(found)
    check_horizons(together(found.values()), RIGHT_HORIZONS - 0.1)


@pytest.mark.parametrize("kind", ["small", "mixed"])
def test_readings_of_what_newcomers_bring(kind):
    check_class({kind: measured_class(kind, 60, seed=1)}, kind)


@pytest.mark.acceptance
def test_readings_by_class_are_those_of_the_page():
    found = measured(PAGE_ROUNDS, PAGE_EASY_ROUNDS, PAGE_SEED)
    check_together(found)
    check_class(found, *CLASSES)
    check_horizons(hard(found), RIGHT_HORIZONS)
    check_horizons(found[EASY], RIGHT_HORIZONS)
    every = together(found.values())
    assert {truth for truth, _ in every.confusion} == set(Diagnosis)
    assert all(one.clear > 0.25 * one.count for one in found.values())
    assert PAGE.read_text(encoding="utf-8") == page(found), "stale: python -m tests.playbook.diagnoses"


def test_noise_hides_gains_and_makes_none_up():
    """Noise of 0.5% to 10%, judged by what a perfect evaluation would say."""
    confusion: Counter = Counter()
    horizons, kept = [], []
    for i in range(220):
        rng = np.random.default_rng([3, i])
        noise = float(np.exp(rng.uniform(np.log(0.005), np.log(0.1))))
        synthetic = synthetic_round(rng, noise=noise, judged_with=1e-6)
        truth, true_horizon = synthetic.answer.diagnosis, synthetic.answer.horizon
        if not synthetic.answer.is_clear or truth not in (Diagnosis.SATURATED, Diagnosis.TOO_SHORT):
            continue
        reading = read_round(synthetic.results)
        confusion[truth, reading.diagnosis] += 1
        if truth == Diagnosis.TOO_SHORT:
            assert true_horizon is not None
            suggested, now = reading.suggested_max_train_steps, synthetic.results.max_train_steps
            horizons.append(1 / FACTOR <= (suggested or 0) / true_horizon <= FACTOR)
            kept.append(1 / FACTOR <= now / true_horizon <= FACTOR)
    print(confusion, f"{np.mean(horizons):.1%} of {len(horizons)} horizons, {np.mean(kept):.1%} if kept")
    saturated = sum(n for (truth, _), n in confusion.items() if truth == Diagnosis.SATURATED)
    assert saturated > 20
    assert confusion[Diagnosis.SATURATED, Diagnosis.TOO_SHORT] <= 0.02 * saturated
    assert np.mean(horizons) > np.mean(kept) + 0.2


# --- the truth itself -------------------------------------------------------------------------------------

STEPS = tuple(range(0, 101, 5))


def case_of(*curves, rates=None, noise=0.001, schedule="constant", share=0.0, **fields) -> Case:
    trials = tuple(
        TrueTrial(Runs(curve, schedule, share), rate)
        for curve, rate in zip(curves, rates or [1e-4 / (i + 1) for i in range(len(curves))], strict=True)
    )
    return Case(trials, STEPS, 5, noise, highest_rate=3e-3, lowest_rate=1e-5, **fields)


@pytest.mark.parametrize(
    ("curve", "fields", "diagnosis"),
    [
        (lambda t: 2 + 0 * t, {}, Diagnosis.NO_LEARNING),
        (lambda t: 2 - np.minimum(t, 4) / 10 + t / 100, {}, Diagnosis.TOO_LONG),
        (lambda t: 2 - np.minimum(t, 40) / 50 + t / 200, {}, Diagnosis.OVERFITTING),
        (lambda t: 2 - t / 200, {"schedule": "cosine"}, Diagnosis.UNDETERMINED),
        (
            lambda t: 2 - np.minimum(t, 33) / 66,
            {"schedule": "cosine", "has_comparison": True},
            Diagnosis.RIGHT,
        ),
        (lambda t: 2 - t / 200, {"schedule": "linear", "share": 0.2}, Diagnosis.TOO_SHORT),
        (lambda t: 2 - t / 200, {"schedule": "linear", "share": 0.6}, Diagnosis.UNDETERMINED),
        (lambda t: 2 - t / 2000, {"noise": 0.03}, Diagnosis.NO_LEARNING),
        (lambda t: 2 - np.minimum(t, 30) / 50 - t / 1e6, {}, Diagnosis.SATURATED),
        (lambda t: 2 - np.minimum(t, 66) / 100, {}, Diagnosis.RIGHT),
        (lambda t: 2 - t / 200, {}, Diagnosis.TOO_SHORT),
    ],
)
def test_truth_of_curves_that_leave_no_doubt(curve, fields, diagnosis):
    found = answer(case_of(curve, **fields))
    assert found.diagnosis == diagnosis
    assert found.is_clear


def test_truth_is_not_clear_within_the_margin_and_nothing_complete_is_undetermined():
    just_worthwhile = answer(case_of(lambda t: 2 - np.minimum(t, 30) / 50 - t / 100 * 0.02))
    assert not just_worthwhile.is_clear
    assert answer(case_of()).diagnosis == Diagnosis.UNDETERMINED


def test_trials_that_never_learn_do_not_lead():
    learns, never = (lambda t: 2 - t / 200), (lambda t: 2 + 0 * t)
    rates = [1e-4 * (i + 1) for i in range(8)]
    assert answer(case_of(learns, *[never] * 7, rates=rates)) == answer(case_of(learns))


def test_an_edge_keeps_the_horizon():
    speeds = [1.0, 0.6, 0.3]
    curves = [lambda t, speed=speed: 2 - speed * t / 200 for speed in speeds]
    in_order = answer(case_of(*curves, rates=[4e-5, 3e-5, 2e-5]))
    assert in_order.is_edge
    assert in_order.horizon == STEPS[-1]
    for rates, diverged in (([3e-5, 4e-5, 2e-5], ()), ([4e-5, 3e-5, 2e-5], (1e-3,))):
        inside = answer(case_of(*curves, rates=rates, diverged_rates=diverged))
        assert not inside.is_edge
        assert inside.horizon == 3 * STEPS[-1]


def test_majority_probability_is_that_of_jeffreys_prior():
    assert majority_probability(1, 1) == pytest.approx(0.5 + 1 / math.pi, abs=1e-3)
    assert majority_probability(2, 4) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_runs_count_steps_by_their_rate(schedule):
    """The end of a run against the sum of its multipliers, step by step."""
    runs = Runs(lambda rates: rates, schedule, 0.4)
    multipliers = {
        "constant": np.ones(100_000),
        "linear": np.minimum(1, (1 - (np.arange(100_000) + 0.5) / 100_000) / 0.4),
        "cosine": (1 + np.cos(np.pi * (np.arange(100_000) + 0.5) / 100_000)) / 2,
    }[schedule]
    assert float(runs.final(100.0)) == pytest.approx(100 * multipliers.mean(), rel=1e-6)


@pytest.mark.parametrize(("share", "lower"), [(0.1, 0.054), (0.4, 0.069), (0.8, 0.076)])
def test_decays_add_what_was_published(share, lower):
    """Llama-124M, 50,000 steps: how much lower than the constant run at the same sum of rates."""
    stable = 3.1
    runs = Runs(lambda t: np.where(t > 0, stable, 10.8), "linear", share, 0.0286, 20_000)
    assert 1 - float(runs.final(50_000.0)) / stable == pytest.approx(lower, abs=0.006)
