"""The readings of rounds whose answer is known: a smoke test, and the whole measurement."""

from collections import Counter

import numpy as np
import pytest

from tests.playbook.rounds import synthetic_round
from tuner.playbook import Diagnosis, read_round

RIGHT_DIAGNOSES = 0.95
RIGHT_HORIZONS = 0.90
FACTOR = 1.5


def measured(count: int, seed: int) -> tuple[Counter, float, int]:
    """(truth, diagnosis) pairs of the clear rounds, the share of good suggestions, rounds set aside."""
    confusion: Counter = Counter()
    good = []
    set_aside = 0
    for i in range(count):
        synthetic = synthetic_round(np.random.default_rng([seed, i]))
        if not synthetic.is_clear:
            set_aside += 1
            continue
        reading = read_round(synthetic.results)
        confusion[synthetic.truth, reading.diagnosis] += 1
        if synthetic.true_horizon is not None:
            ratio = (reading.suggested_max_train_steps or 0) / synthetic.true_horizon
            good.append(1 / FACTOR <= ratio <= FACTOR)
    return confusion, sum(good) / len(good), set_aside


def check(count: int, seed: int) -> None:
    confusion, horizons, set_aside = measured(count, seed)
    right = sum(n for (truth, diagnosis), n in confusion.items() if truth == diagnosis)
    print(f"{right} of {confusion.total()} right, {set_aside} aside, {horizons:.1%} of the horizons")
    assert {truth for truth, _ in confusion} == set(Diagnosis)
    assert set_aside < 0.3 * count
    assert right >= RIGHT_DIAGNOSES * confusion.total(), confusion
    assert horizons >= RIGHT_HORIZONS


def test_noise_hides_gains_and_makes_none_up():
    """Noise of 0.5% to 10%, judged by what a perfect evaluation would say."""
    confusion: Counter = Counter()
    horizons, kept = [], []
    for i in range(400):
        rng = np.random.default_rng([3, i])
        noise = float(np.exp(rng.uniform(np.log(0.005), np.log(0.1))))
        synthetic = synthetic_round(rng, noise=noise, judged_with=1e-6)
        if not synthetic.is_clear or synthetic.truth not in (Diagnosis.SATURATED, Diagnosis.TOO_SHORT):
            continue
        reading = read_round(synthetic.results)
        confusion[synthetic.truth, reading.diagnosis] += 1
        if synthetic.truth == Diagnosis.TOO_SHORT:
            suggested, now = reading.suggested_max_train_steps, synthetic.results.max_train_steps
            horizons.append(1 / FACTOR <= suggested / synthetic.true_horizon <= FACTOR)
            kept.append(1 / FACTOR <= now / synthetic.true_horizon <= FACTOR)
    print(confusion, f"{np.mean(horizons):.1%} of {len(horizons)} horizons, {np.mean(kept):.1%} if kept")
    saturated = sum(n for (truth, _), n in confusion.items() if truth == Diagnosis.SATURATED)
    assert saturated > 30
    assert confusion[Diagnosis.SATURATED, Diagnosis.TOO_SHORT] <= 0.02 * saturated
    assert np.mean(horizons) > np.mean(kept) + 0.2


def test_readings_of_150_synthetic_rounds():
    check(150, seed=1)


@pytest.mark.slow
def test_readings_of_1000_synthetic_rounds():
    check(1000, seed=2)
