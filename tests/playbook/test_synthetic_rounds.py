"""The readings of rounds whose answer is known: a smoke test, and the whole measurement."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.playbook.diagnoses import (
    FACTOR,
    PAGE_ROUNDS,
    PAGE_SEED,
    RIGHT_DIAGNOSES,
    RIGHT_HORIZONS,
    Measured,
    measured,
    page,
)
from tests.playbook.rounds import synthetic_round
from tuner.playbook import Diagnosis, read_round

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "diagnoses.md"


def check(found: Measured) -> None:
    print(f"{found.right} of {found.confusion.total()} right, {found.good_horizons:.1%} good")
    assert {truth for truth, _ in found.confusion} == set(Diagnosis)
    assert found.set_aside < 0.3 * found.count
    assert found.right >= RIGHT_DIAGNOSES * found.confusion.total(), found.confusion
    assert found.good_horizons >= RIGHT_HORIZONS


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
    check(measured(150, seed=1))


@pytest.mark.slow
def test_readings_of_1000_synthetic_rounds_are_those_of_the_page():
    found = measured(PAGE_ROUNDS, PAGE_SEED)
    check(found)
    assert PAGE.read_text(encoding="utf-8") == page(found), "stale: python -m tests.playbook.diagnoses"
