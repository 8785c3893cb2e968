"""Rounds of every kind, the impossible-looking ones included, for property tests."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.playbook.rounds import evaluation_grid
from tuner.playbook import RoundResults
from tuner.playbook.results import BranchResult
from tuner.records import (
    Checkpoint,
    CheckpointKind,
    Choices,
    Condition,
    Evaluation,
    Fixed,
    Range,
    Space,
    TimesSqrtRank,
    Trial,
    TrialState,
    complete_hyperparameters,
    possible,
)

heavy = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
"""For properties of whole rounds, of which each takes some milliseconds to draw."""

losses = st.one_of(
    st.floats(0.05, 12.0),
    st.sampled_from([0.0, 1.0, 1.0, 2.0]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.sampled_from([1e307, -1.7e308, 1e160, 1e99, 5e-324, 1e-160]),
)


@st.composite
def curves(draw: st.DrawFn, steps: tuple[int, ...]) -> tuple[Evaluation, ...]:
    """Evaluations at some of the steps: smooth, jagged, tied or not finite, with examples or without."""
    kept = draw(st.sets(st.sampled_from(steps))) if draw(st.booleans()) else set(steps)
    tokens = draw(st.sampled_from([(), (3, 5), (10, 20, 30, 7)]))
    smooth = draw(st.booleans())
    start, slope = draw(st.floats(0.5, 5.0)), draw(st.floats(-1.0, 1.0))
    evaluations = []
    for step in sorted(kept):
        loss = start * math.exp(slope * step / steps[-1]) if smooth else draw(losses)
        nll = tuple(loss * count * (1 + 0.01 * ((step + i) % 3)) for i, count in enumerate(tokens))
        train = draw(st.one_of(st.none(), st.floats(0.01, 9.0))) if step else None
        evaluations.append(
            Evaluation(
                step, loss, train, None, draw(st.integers(0, 3)), example_nll=nll, example_tokens=tokens
            )
        )
    return tuple(evaluations)


@st.composite
def spaces(draw: st.DrawFn, max_train_steps: int) -> Space:
    """A search space of LoRA's names, each fixed or searched, legal for the horizon."""
    third = max(1, max_train_steps // 3)
    warmup = [
        Fixed(0),
        Fixed(third // 2),
        Choices((0, third // 4, third // 2)),
        Range(0, third, integer=True),
    ]
    decay = [Fixed(0), Fixed(third), Choices((1, third, third + 1)), Range(0, third, integer=True)]
    rate = [Fixed(1e-4), Choices((1e-4, 3e-4, 1e-3)), Range(1e-5, 3e-3, log=True), Range(1e-5, 3e-3)]
    alpha = [Fixed(16), TimesSqrtRank(4.0), Choices((16, 32, 64))]
    shape = [Fixed("linear"), Choices(("linear", "sqrt"))]
    with_decay = Condition("schedule", ("linear",))
    schedules = [Fixed(name) for name in ("linear", "constant", "cosine", "inverse_sqrt")]
    space: Space = {
        "learning_rate": draw(st.sampled_from(rate)),
        "lora_r": draw(
            st.sampled_from([Fixed(8), Choices((8, 16, 32)), Range(4, 64, log=True, integer=True)])
        ),
        "lora_alpha": draw(st.sampled_from(alpha)),
        "target_modules": draw(st.sampled_from([Fixed("all-linear"), Choices((("q",), ("q", "v")))])),
        "batch_size": draw(st.sampled_from([Fixed(8), Choices((4, 8))])),
        "warmup_steps": draw(st.sampled_from(warmup)),
        "schedule": draw(st.sampled_from(schedules)),
        "decay_steps": replace(draw(st.sampled_from(decay)), only_with=with_decay),
        "decay_shape": replace(draw(st.sampled_from(shape)), only_with=with_decay),
        "weight_decay": draw(st.sampled_from([Fixed(0.0), Range(0.0, 0.1)])),
        "training_seed": draw(st.sampled_from([Fixed(0), Choices((0, 1, 2))])),
    }
    return possible(space)


def values_of(dimension: Choices | Range) -> st.SearchStrategy[object]:
    if isinstance(dimension, Choices):
        return st.sampled_from(dimension.values)
    if dimension.integer:
        return st.integers(math.ceil(dimension.low), math.floor(dimension.high))
    return st.floats(dimension.low, dimension.high)


@st.composite
def rounds(draw: st.DrawFn, *, min_trials: int = 0) -> RoundResults:
    """A round with any number of trials in any state."""
    every = draw(st.integers(1, 20))
    horizon = draw(st.integers(every, 40 * every))
    steps = evaluation_grid(horizon, every)
    space = draw(spaces(horizon))
    trials = []
    for number in range(draw(st.integers(min_trials, 12))):
        chosen = {n: draw(values_of(d)) for n, d in space.items() if isinstance(d, (Choices, Range))}
        kept = draw(st.sets(st.sampled_from(steps), max_size=2))
        trials.append(
            Trial(
                "round1",
                number,
                complete_hyperparameters(space, chosen),
                draw(st.sampled_from([TrialState.COMPLETE] * 4 + list(TrialState))),
                evaluations=draw(curves(steps)),
                checkpoints=tuple(Checkpoint(CheckpointKind.TRUNK, s, f"trunk/{s}", 1, "0") for s in kept),
            )
        )
    branches = tuple(
        BranchResult(trial.number, horizon // 2, draw(curves(steps)))
        for trial in trials[:2]
        if horizon > 1 and draw(st.booleans())
    )
    return RoundResults(
        "round1",
        horizon,
        every,
        space,
        tuple(trials),
        train_rows=draw(st.sampled_from([0, 100, 10_000])),
        production_steps=draw(st.one_of(st.none(), st.integers(1, 5 * horizon))),
        evaluation_share=draw(st.floats(0.0, 1.0)),
        workload="w",
        branches=branches,
        seconds_per_step=draw(st.one_of(st.none(), st.floats(0.01, 10.0))),
    )
