"""Whole studies, simulated: every one ends by itself, whatever its curves, schedule, noise and bounds are."""

import functools
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest

from tests.playbook.rounds import SPACE, evaluation_grid, noisy_trial
from tuner.playbook import Diagnosis, Reading, RoundResults, plan_next_round, read_round
from tuner.playbook.gain import wants_comparison
from tuner.playbook.restarts import Enough, next_horizon
from tuner.playbook.results import BranchResult
from tuner.records import Fixed, Range, Space, Trial, Value

BEST_RATE = 1e-3
PACE = 60
"""Steps in which a run at the best rate gains half of what it can."""
SHAPES = ("learning", "saturating", "overfitting", "small rates", "flat")
SHARES = (0.2, 0.4, 0.7, 0.9)
SCHEDULES = (("constant", 0.0), *(("linear", share) for share in SHARES), ("cosine", 0.0))


@dataclass(frozen=True)
class Study:
    """One simulated study: what its file says, and the surface that it is run on."""

    shape: str
    schedule: str
    decay_share: float
    noise: float
    num_trials: int
    horizon: int
    production_steps: int | None

    @classmethod
    def number(cls, seed: int, rng: np.random.Generator) -> "Study":
        schedule, share = SCHEDULES[seed % len(SCHEDULES)]
        horizon = int(rng.integers(20, 200))
        return cls(
            shape=SHAPES[seed % len(SHAPES)],
            schedule=schedule,
            decay_share=share,
            noise=float(10 ** rng.uniform(-3, -2)),
            num_trials=(1, 3, 8)[seed % 3],
            horizon=horizon,
            production_steps=None if rng.random() < 0.5 else int(horizon * rng.uniform(1, 40)),
        )

    @property
    def space(self) -> Space:
        high = 1e-4 if self.shape == "small rates" else 3e-3
        decay = int(self.horizon * self.decay_share)
        return {
            **SPACE,
            "learning_rate": Range(high / 100, high, log=True),
            "schedule": Fixed(self.schedule),
            "decay_steps": Fixed(decay),
        }

    def curve(self, hyperparameters: dict[str, Value], horizon: int):
        """The loss by step of a run to a horizon."""
        ratio = float(hyperparameters["learning_rate"]) / BEST_RATE
        decay = int(hyperparameters["decay_steps"])

        def at(steps: np.ndarray) -> np.ndarray:
            progress = steps * min(ratio, ratio**-0.5) / PACE
            learned = 0.5 * (1 - (1 + progress) ** -0.7)
            if self.shape == "saturating":
                learned = 0.5 * (1 - np.exp(-8 * progress))
            if self.shape == "flat":
                learned = np.zeros_like(progress)
            over = 0.2 * np.maximum(0, progress - 2) / 10 if self.shape == "overfitting" else 0.0
            cooled = np.clip((steps - (horizon - decay)) / decay, 0, 1) if decay else np.zeros_like(progress)
            if self.schedule == "cosine":
                cooled = (1 - np.cos(math.pi * steps / horizon)) / 2
            return 2.0 * (1 - learned + over - 0.03 * cooled * (learned > 0.01))

        return at


def run_round(
    study: Study,
    space: Space,
    horizon: int,
    points: list[dict[str, Value]],
    rng: np.random.Generator,
    **fields,
) -> RoundResults:
    every = max(1, study.horizon // 15)
    grid = evaluation_grid(horizon, every)

    def trial(number: int, point: dict[str, Value]) -> Trial:
        return noisy_trial(
            number, study.curve(point, horizon), grid, rng, noise=study.noise, hyperparameters=point
        )

    trials = tuple(trial(number, point) for number, point in enumerate(points))
    return RoundResults(
        max_train_steps=horizon,
        evaluate_every=every,
        space=space,
        trials=trials,
        production_steps=study.production_steps,
        workload="w",
        **fields,
    )


def compared(study: Study, results: RoundResults, earlier: list[RoundResults], rng: np.random.Generator):
    """The round with the comparison run that it needs."""
    leading = read_round(results, earlier).leading
    if not wants_comparison(results, leading, earlier):
        return results
    best, half = leading[0].trial, results.max_train_steps // 2
    point = {**best.hyperparameters, "decay_steps": int(best.hyperparameters["decay_steps"]) // 2}
    run = noisy_trial(0, study.curve(point, half), (half,), rng, noise=study.noise)
    branch = BranchResult(best.number, half, run.evaluations)
    return replace(results, branches=(branch,))


def sampled(space: Space, rng: np.random.Generator) -> dict[str, Value]:
    rates = space["learning_rate"]
    assert isinstance(rates, Range)
    rate = math.exp(rng.uniform(math.log(rates.low), math.log(rates.high)))
    return {name: d.value for name, d in space.items() if isinstance(d, Fixed)} | {"learning_rate": rate}


@functools.cache
def run_by_itself(seed: int) -> tuple[list[int], list[Reading], Enough]:
    """Horizons and readings of a study that `study auto` would run, and why it ended."""
    rng = np.random.default_rng([11, seed])
    study = Study.number(seed, rng)
    space, horizon, earlier, readings = study.space, study.horizon, [], []
    points = [sampled(space, rng) for _ in range(study.num_trials)]
    while len(readings) < 30:
        results = run_round(study, space, horizon, points, rng, name=f"round{len(readings) + 1}")
        results = compared(study, results, earlier, rng)
        reading = read_round(results, earlier)
        readings.append(reading)
        follows = next_horizon(results, reading, earlier)
        earlier.append(results)
        if isinstance(follows, Enough):
            return [r.max_train_steps for r in earlier], readings, follows
        plan = plan_next_round(results, reading, to="next", earlier=earlier[:-1], max_train_steps=follows)
        space, horizon = plan.space, plan.max_train_steps
        fixed = {name: d.value for name, d in space.items() if isinstance(d, Fixed)}
        points = [{**fixed, **entry.hyperparameters} for entry in plan.enqueue]
        points += [sampled(space, rng) for _ in range(plan.trials_total - len(points))]
    raise AssertionError(f"study {seed} did not end: {[r.max_train_steps for r in earlier]}")


@pytest.mark.parametrize("block", range(4))
def test_a_hundred_studies_end_and_repeat_no_horizon_but_for_a_widened_edge(block):
    ends = set()
    for seed in range(25 * block, 25 * block + 25):
        horizons, readings, ended = run_by_itself(seed)
        ends.add(ended.reason[:25])
        repeated = [a == b for a, b in itertools.pairwise(horizons)]
        assert horizons == sorted(horizons), seed
        assert repeated == [reading.widens_rates for reading in readings[:-1]], (seed, horizons)
        assert sum(repeated) <= 2
        assert max(horizons) <= 9 * horizons[0] or ended is not None
    assert len(ends) >= 3, "they end for different reasons"


def test_rates_that_are_all_too_small_are_raised_before_the_horizon():
    """Of the studies whose rates are all too small those with eight trials in a round, and any schedule."""
    readings = [run_by_itself(seed)[1][0] for seed in range(8, 158, 15)]
    learned = [reading for reading in readings if reading.diagnosis != Diagnosis.NO_LEARNING]
    assert len(learned) >= 7
    assert sum(reading.widens_rates for reading in learned) >= 0.7 * len(learned)


def test_without_a_bound_no_study_goes_beyond_nine_times_its_first_horizon():
    for seed in range(0, 100, 3):
        study = Study.number(seed, np.random.default_rng([11, seed]))
        horizons, _, _ = run_by_itself(seed)
        if study.production_steps is None:
            assert max(horizons) <= 9 * horizons[0]
        else:
            assert max(horizons[1:], default=0) <= study.production_steps
