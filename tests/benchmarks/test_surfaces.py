"""The surfaces know no horizon before the decay, and a contest charges every step; a few seconds of both."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.config.rounds import spec_of
from tuner.config import new_round
from tuner.playbook.schedule import can_continue

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FULL = 1080


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Iterator[None]:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def contest_of(surface: str = "B", *, seed: int = 0, budget: int = 10) -> Any:
    from replay.contest import Contest
    from surfaces import SURFACES

    return Contest(SURFACES[surface], seed, budget)


def play(method: str, contest: Any) -> Any:
    from replay.task import ReplayOver
    from surfaces import METHODS

    with pytest.raises(ReplayOver):
        METHODS[method](contest)
    return contest


def point(**changes: Any) -> dict[str, Any]:
    """Hyperparameters near the best ones of both surfaces."""
    usual = {
        "learning_rate": 1.5e-4,
        "lora_r": 16,
        "lora_dropout": 0.05,
        "warmup_steps": 20,
        "batch_size": 16,
    }
    return {**usual, "schedule": "linear", **changes}


# --- the surfaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", ["A", "B"])
@settings(deadline=None)
@given(
    rate=st.floats(1e-5, 3e-3),
    rank=st.sampled_from([4, 8, 16, 32, 64]),
    dropout=st.floats(0, 0.2),
    warmup=st.integers(0, 60),
    batch=st.sampled_from([8, 16, 32]),
    horizons=st.tuples(st.integers(120, FULL), st.integers(120, FULL)).filter(
        lambda pair: pair[0] <= pair[1]
    ),
)
def test_a_stable_phase_knows_no_horizon(
    surface: str, rate: float, rank: int, dropout: float, warmup: int, batch: int, horizons: tuple[int, int]
) -> None:
    shape = {"learning_rate": rate, "lora_r": rank, "lora_dropout": dropout}
    old, new = (
        point(**shape, warmup_steps=warmup, batch_size=batch, decay_steps=round(0.4 * horizon))
        for horizon in horizons
    )
    contest = contest_of(surface)
    end = horizons[0] - old["decay_steps"]
    assert can_continue(old, horizons[0], new, horizons[1], end) is None
    steps = np.arange(end + 1)
    before, after = (
        contest.surface.losses(h, steps, horizon) for h, horizon in zip((old, new), horizons, strict=True)
    )
    assert np.array_equal(before, after, equal_nan=True)
    evaluations = [
        contest.evaluation(h, end, horizon) for h, horizon in zip((old, new), horizons, strict=True)
    ]
    assert repr(evaluations[0]) == repr(evaluations[1])


@pytest.mark.parametrize("surface", ["A", "B"])
def test_every_name_matters_and_names_interact(surface: str) -> None:
    from replay.contest import true_loss

    on = contest_of(surface).surface

    def best_rate(**changes: Any) -> float:
        rates = np.geomspace(1e-5, 3e-3, 200).tolist()
        return float(min(rates, key=lambda rate: true_loss(on, point(learning_rate=rate, **changes))))

    for name, values in on.space().items():
        tried = getattr(values, "values", None) or np.linspace(values.low, values.high, 5).tolist()
        losses = [true_loss(on, point(**{name: value})) for value in tried]
        assert max(losses) > 1.001 * min(losses), name
    assert best_rate(lora_r=64) < 0.8 * best_rate(lora_r=8)
    assert best_rate(batch_size=32) > 1.2 * best_rate(batch_size=8)
    assert best_rate(warmup_steps=60) > best_rate(warmup_steps=0)
    gain = [
        true_loss(on, point(batch_size=b)) - true_loss(on, point(batch_size=b, lora_dropout=0.1))
        for b in (8, 32)
    ]
    assert gain[1] > gain[0] + 0.001
    assert math.isnan(true_loss(on, point(learning_rate=0.3)))


def test_noise_is_of_the_run_and_the_figure_has_none() -> None:
    from replay.contest import Ended, full_run, true_loss

    contest = contest_of(seed=1)
    run = full_run(contest.surface, point())
    truth = true_loss(contest.surface, point())
    observed = [contest_of(seed=seed).evaluation(run, FULL, FULL).eval_loss for seed in range(200)]
    assert np.mean(observed) == pytest.approx(truth, rel=0.001)
    assert np.std(observed) / truth == pytest.approx(math.hypot(0.002, 0.0015), rel=0.2)
    assert contest.evaluation(run, 0, FULL).eval_loss == contest.surface.base_loss
    contest.ended += [
        Ended(point(lora_r=4), 360, 0.1),
        Ended(point(), FULL, 0.7),
        Ended(point(lora_r=8), FULL, 0.8),
    ]
    assert contest.figure() == truth


# --- the methods ----------------------------------------------------------------------------------


def test_every_step_is_charged_and_a_diverged_run_stops() -> None:
    from replay.task import ReplayOver

    contest = contest_of(budget=2)
    contest.run(point(), start=0, end=120)
    contest.run(point(), start=120, end=FULL)
    assert (contest.spent, len(contest.ended)) == (FULL, 1)
    assert contest.run(point(learning_rate=0.3), start=0, end=FULL) == math.inf
    assert contest.spent == FULL + contest.surface.every_steps
    with pytest.raises(ReplayOver):
        contest.run(point(lora_r=8), start=0, end=FULL)
    assert (contest.spent, len(contest.ended)) == (FULL + contest.surface.every_steps, 1)


def test_the_default_path_goes_on_from_trunks_and_charges_the_rest() -> None:
    """24 trials of T/9; then each trial from the trunk of the one it continues, and comparison runs."""
    from replay.contest import Contest

    charges: list[int] = []

    class Recording(Contest):
        def charge(self, steps: int) -> None:
            super().charge(steps)
            charges.append(steps)

    contest = play("tuner", Recording(contest_of().surface, 0, 10))
    every = contest.surface.every_steps
    # Trials are charged from evaluation to evaluation, comparison runs whole: T/2 with a decay of 40%.
    comparisons = [at for at, steps in enumerate(charges) if steps > every]
    assert [charges[at] for at in comparisons] == [0.4 * 60, 0.4 * 180, 0.4 * 540]

    short, middle, full = ([r.point for r in contest.ended if r.horizon == h] for h in (120, 360, FULL))
    carried = sum(point in short for point in middle)
    assert 1 <= carried <= 3
    assert 1 <= sum(point in middle for point in full) <= 3
    first, second = sum(charges[: comparisons[0]]), sum(charges[comparisons[0] + 1 : comparisons[1]])
    assert first == 120 * len(short) + every * (24 - len(short))  # B diverges before the first evaluation
    assert 0 <= second - (360 * len(middle) - carried * (120 - 48)) <= 2 * every
    assert sum(charges) == contest.spent <= contest.budget_steps < contest.spent + every


@pytest.mark.parametrize("method", ["tuner", "two-rounds", "optuna-halving", "tpe", "quasi-random", "random"])
def test_a_method_repeats_itself_and_keeps_to_its_budget(method: str) -> None:
    first, again, other = (play(method, contest_of(seed=seed, budget=7)) for seed in (3, 3, 4))
    assert (first.spent, first.ended) == (again.spent, again.ended)
    assert first.ended != other.ended
    assert first.budget_steps - FULL < first.spent <= first.budget_steps
    assert first.figure() < 1.1 * 0.76


def test_the_first_round_is_that_of_study_new() -> None:
    from replay.contest import FIRST_TRIALS

    spec = spec_of(new_round(study="s", model="m", data="d.jsonl", train_rows=2880, eval="e.jsonl"))
    assert spec.run.production_steps == 1100
    assert (spec.max_train_steps, spec.search.trials) == (math.ceil(1100 / 9), FIRST_TRIALS)


# --- the page -------------------------------------------------------------------------------------


def test_differences_are_paired_by_seed() -> None:
    from surfaces import paired_excess

    reference = [1.0, 2.0, 1.5, 0.5]
    mean, low, high = paired_excess([1.01 * loss for loss in reference], reference)
    assert (mean, low, high) == pytest.approx((0.01, 0.01, 0.01))
    mean, low, high = paired_excess([1.02, 2.0, 1.5, 0.5], reference)
    assert mean == pytest.approx(0.005)
    assert low <= mean <= high


def test_the_script_writes_its_page(tmp_path: Path) -> None:
    arguments = ["--seeds", "2", "--surfaces", "A", "--methods", "tpe,random", "--jobs", "1"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "surfaces.py"), *arguments, "--output", str(tmp_path / "page.md")],
        text=True,
        capture_output=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text()
    assert page.strip() == done.stdout.strip()
    assert page.count("| tpe | 2 |") == page.count("| random | 2 |") == 2
    assert "--surfaces A --methods tpe,random" in page
