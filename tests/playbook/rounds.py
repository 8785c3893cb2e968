"""Rounds with a known answer, easy ones: copies of one curve times a factor, at a constant rate in effect.

`truth` reads the answer off the noise-free curves; trials get paired noise for each evaluation example.
`hard_rounds` has the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tests.playbook.loss_curves import Curve, Runs
from tests.playbook.truth import Answer, Case, TrueTrial, answer
from tuner.playbook import RoundResults
from tuner.records import Evaluation, Fixed, Hyperparameters, Range, Space, Trial, TrialState

NUM_EXAMPLES = 120

LEARNING_RATES = Range(1e-5, 3e-3, log=True)
SPACE: Space = {
    "learning_rate": LEARNING_RATES,
    "batch_size": Fixed(8),
    "warmup_steps": Fixed(0),
    "schedule": Fixed("constant"),
    "decay_steps": Fixed(0),
    "training_seed": Fixed(0),
}


def noisy_trial(
    number: int,
    curve: Curve,
    steps: tuple[int, ...],
    rng: np.random.Generator,
    *,
    noise: float,
    hyperparameters: Hyperparameters | None = None,
    state: TrialState = TrialState.COMPLETE,
    train_slope: float = -1.0,
    round_name: str = "round1",
    has_examples: bool = True,
) -> Trial:
    """A trial whose evaluations differ from the curve by example noise.

    `noise` is the standard error of the difference of two evaluations, relative to the loss.
    """
    tokens = np.random.default_rng(1).integers(20, 60, NUM_EXAMPLES)
    difficulty = np.random.default_rng(2).normal(0.0, 0.3, NUM_EXAMPLES)
    difficulty -= np.average(difficulty, weights=tokens)
    losses = curve(np.array(steps, dtype=np.float64))
    weights = tokens / tokens.sum()
    each = noise / math.sqrt(2) / math.sqrt(float((weights**2).sum()))
    evaluations = []
    for i, (step, loss) in enumerate(zip(steps, losses, strict=True)):
        nll = tokens * (loss + difficulty + rng.normal(0.0, each * abs(loss), NUM_EXAMPLES))
        evaluations.append(
            Evaluation(
                step,
                float(nll.sum() / tokens.sum()),
                train_loss=None if step == 0 else float(2.0 + train_slope * i / len(steps)),
                learning_rate=None if step == 0 else 1e-4,
                example_nll=tuple(nll.tolist()) if has_examples else (),
                example_tokens=tuple(tokens.tolist()) if has_examples else (),
            )
        )
    chosen = {name: d.value for name, d in SPACE.items() if isinstance(d, Fixed)}
    chosen |= {"learning_rate": 3e-4 * 1.01**number, **(hyperparameters or {})}
    return Trial(round_name, number, chosen, state, evaluations=tuple(evaluations))


@dataclass(frozen=True)
class SyntheticRound:
    results: RoundResults
    answer: Answer


def synthetic_round(
    rng: np.random.Generator, *, noise: float | None = None, judged_with: float | None = None
) -> SyntheticRound:
    """A random round of a random kind, at a constant rate or with a linear decay.

    `judged_with` is the noise by which the truth is judged, where that is not the round's own: almost
    none gives the answer that a perfect evaluation would.
    """
    horizon = int(rng.integers(60, 1200))
    every = max(1, horizon // int(rng.integers(16, 41)))
    steps = evaluation_grid(horizon, every)
    if noise is None:
        noise = float(rng.uniform(0.006, 0.04)) if rng.random() < 0.15 else 0.001
    judged_with = judged_with or noise
    family = _FAMILIES[int(rng.integers(len(_FAMILIES)))](rng, horizon)
    decay = int(horizon * float(rng.choice([0.0, 0.2, 0.4])))
    schedule = {"schedule": "linear" if decay else "constant", "decay_steps": decay}
    count = int(rng.integers(5, 17))
    curves = [_worse(family, 1.0 + 0.004 * i * float(rng.uniform(0.5, 1.5))) for i in range(count)]
    trials = [
        noisy_trial(i, curve, steps, rng, noise=noise, hyperparameters=schedule)
        for i, curve in enumerate(curves)
    ]
    trials += [diverged_trial(count + i, steps) for i in range(int(rng.integers(0, 3)))]
    production = int(horizon * rng.uniform(1.2, 10)) if rng.random() < 0.5 else None
    results = RoundResults(
        "round1",
        horizon,
        every,
        SPACE,
        tuple(trials[i] for i in rng.permutation(len(trials))),
        10_000,
        production,
        workload="w",
    )
    true_trials = tuple(
        TrueTrial(Runs(curve, "linear" if decay else "constant", decay / horizon), 3e-4 * 1.01**i)
        for i, curve in enumerate(curves)
    )
    case = Case(
        true_trials,
        steps,
        every,
        judged_with,
        LEARNING_RATES.high,
        LEARNING_RATES.low,
        tuple(float(str(t.hyperparameters["learning_rate"])) for t in trials[count:]),
        production_steps=production,
    )
    return SyntheticRound(results, answer(case))


def evaluation_grid(horizon: int, every: int) -> tuple[int, ...]:
    return (*range(0, horizon, every), horizon)


def diverged_trial(number: int, steps: tuple[int, ...]) -> Trial:
    """An infeasible trial that was the best of all before it diverged."""
    losses = [0.1, *(5.0 + i for i in range(len(steps) - 1))]
    return Trial(
        "round1",
        number,
        {"learning_rate": 3e-3},
        TrialState.INFEASIBLE,
        reason="diverged",
        evaluations=tuple(Evaluation(step, loss) for step, loss in zip(steps, losses, strict=True)),
    )


# --- families of curves ---------------------------------------------------------------------------


def _power(rng: np.random.Generator, horizon: int) -> Curve:
    """a + b t^-c, from far too short to saturated."""
    floor, exponent = rng.uniform(0.8, 2.0), rng.uniform(0.3, 1.5)
    share = math.exp(rng.uniform(math.log(0.0008), math.log(0.4)))
    start = 0.02 * horizon
    return lambda t: floor * (1 + share * ((t + start) / horizon) ** -exponent)


def _saturating(rng: np.random.Generator, horizon: int) -> Curve:
    """An exponential approach that is done within the horizon."""
    floor, share = rng.uniform(0.8, 2.0), rng.uniform(0.1, 0.6)
    pace = rng.uniform(0.02, 0.085) * horizon
    return lambda t: floor * (1 + share * np.exp(-t / pace))


def _overfitting(rng: np.random.Generator, horizon: int) -> Curve:
    """A fall, and a rise from somewhere in the first six tenths of the horizon."""
    floor, share = rng.uniform(0.8, 2.0), rng.uniform(0.1, 0.6)
    turn = rng.uniform(0.04, 0.6)
    slope = math.exp(rng.uniform(math.log(0.002), math.log(0.3)))

    def curve(t: np.ndarray) -> np.ndarray:
        x = t / horizon
        return floor * (1 + share * np.exp(-4 * x / turn) + slope * np.maximum(0, x - turn) ** 1.5)

    return curve


def _short_lived(rng: np.random.Generator, horizon: int) -> Curve:
    """Best within the first few evaluations, then up for good."""
    floor, drop, slope = rng.uniform(0.8, 2.0), rng.uniform(0.1, 0.6), rng.uniform(0.1, 2.0)
    turn = rng.uniform(0.02, 0.09)
    return lambda t: floor * (1 + drop * np.exp(-6 * t / horizon / turn) + slope * t / horizon)


def _levelling(rng: np.random.Generator, horizon: int) -> Curve:
    """A straight fall that stops in mid-run and then only just rises: gain, but no late best step."""
    floor, drop = rng.uniform(0.8, 2.0), rng.uniform(0.02, 0.3)
    turn = rng.uniform(0.52, 0.65)
    creep = rng.uniform(0.0, 0.0013) / (1 - turn)

    def curve(t: np.ndarray) -> np.ndarray:
        x = t / horizon
        return floor * (1 + drop * np.maximum(0, turn - x) + creep * np.maximum(0, x - turn))

    return curve


def _rising(rng: np.random.Generator, horizon: int) -> Curve:
    """Never better than the untouched model."""
    floor, slope = rng.uniform(0.8, 2.0), rng.uniform(0.002, 0.5)
    return lambda t: floor * (1 + slope * np.sqrt(t / horizon))


_FAMILIES = (_power, _power, _power, _saturating, _overfitting, _short_lived, _levelling, _rising)


def _worse(curve: Curve, factor: float) -> Curve:
    return lambda t: factor * curve(t)
