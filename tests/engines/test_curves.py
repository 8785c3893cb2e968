"""What a simulated worker replays: a table of recorded runs, and a made-up surface for dry runs."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contracts.worker import assignment, collect, ended, losses
from tuner.engines import LoraFormula, RecordedCurves, SimulatedWorker
from tuner.engines.simulated import keep_trunk_names
from tuner.playbook.schedule import trunk_end
from tuner.records import CheckpointKind, Ended, Evaluated, Saved

TABLE = RecordedCurves(
    names=("rate", "decay"),
    steps=(0, 2, 4, 6),
    eval_losses={(0.1, 1.0): (2.0, 1.5, 1.2, 1.1), (0.9, 1.0): (2.0, 1.9, math.nan, math.nan)},
    train_losses={(0.1, 1.0): (2.0, 1.4, 1.1, 0.9)},
)


def test_a_recorded_run_is_replayed_as_it_was() -> None:
    run = {"rate": 0.1, "decay": 1.0, "schedule": "constant"}
    assert [TABLE(run, step, 6).eval_loss for step in TABLE.steps] == [2.0, 1.5, 1.2, 1.1]
    assert [TABLE(run, step, 4).train_loss for step in TABLE.steps] == [None, 1.4, 1.1, 0.9]
    assert TABLE({"rate": 0.9, "decay": 1.0}, 2, 6).train_loss is None


def test_what_was_not_recorded_is_not_made_up() -> None:
    with pytest.raises(KeyError, match=r"rate.*0\.2"):
        TABLE({"rate": 0.2, "decay": 1.0}, 2, 6)
    with pytest.raises(KeyError, match="step 3"):
        TABLE({"rate": 0.1, "decay": 1.0}, 3, 6)


def test_a_table_that_does_not_fit_its_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="2 losses for 3 steps"):
        RecordedCurves(("rate",), (0, 1, 2), {(0.1,): (1.0, 2.0)}, {})
    with pytest.raises(ValueError, match="rise"):
        RecordedCurves(("rate",), (0, 2, 1), {}, {})


def test_a_worker_goes_on_along_the_recorded_run_and_stops_where_it_diverged() -> None:
    worker = SimulatedWorker(TABLE, slots=2, seconds_per_step=0.5, keep=keep_trunk_names)
    start = assignment(Path("runs"), 0, steps=4)
    good, bad = {"rate": 0.1, "decay": 1.0}, {"rate": 0.9, "decay": 1.0}
    worker.start(replace(start, hyperparameters=good, trunk_steps=(4,)))
    worker.start(replace(start, trial=1, hyperparameters=bad))
    events = collect(worker, until=lambda seen: ended(seen) == {0, 1})
    assert {e.trial: (e.outcome, e.step) for e in events if isinstance(e, Ended)} == {
        0: ("complete", 4),
        1: ("infeasible", 4),
    }
    (trunk,) = [e.checkpoint for e in events if isinstance(e, Saved)]
    assert (trunk.kind, trunk.step) == (CheckpointKind.TRUNK, 4)
    assert worker.seconds == 0.5 * (4 + 4)
    longer = replace(start, trial=2, hyperparameters=good, max_train_steps=6, resume_from=f"x/{trunk.path}")
    worker.start(longer)
    events = collect(worker, until=lambda seen: ended(seen) == {2})
    assert losses(events, 2) == {0: 2.0, 2: 1.5, 4: 1.2, 6: 1.1}
    assert worker.seconds == 0.5 * (4 + 4 + 2)


# --- the formula ----------------------------------------------------------------------------------

FORMULA = LoraFormula("a study", pace_steps=50)


def run(**changes: object) -> dict[str, object]:
    return {
        "learning_rate": 3e-4,
        "lora_r": 8,
        "lora_alpha": 16,
        "schedule": "linear",
        "warmup_steps": 5,
        "decay_steps": 20,
        **changes,
    }


def final(steps: int, **changes: object) -> float:
    return FORMULA(run(**changes), steps, steps).eval_loss  # type: ignore[arg-type]


@given(
    rate=st.floats(1e-5, 3e-3),
    horizon=st.integers(30, 200),
    longer=st.integers(1, 300),
    decay=st.integers(0, 25),
    step=st.integers(0, 200),
)
def test_a_trunk_knows_no_horizon(rate: float, horizon: int, longer: int, decay: int, step: int) -> None:
    old = run(learning_rate=rate, decay_steps=decay)
    new = {**old, "decay_steps": min(decay, 10)}
    end = trunk_end(old, horizon)
    assert end is not None
    step = min(step, end)
    assert FORMULA(old, step, horizon) == FORMULA(new, step, horizon + longer)  # type: ignore[arg-type]


def test_losses_are_those_of_the_examples() -> None:
    made = FORMULA(run(), 40, 60)  # type: ignore[arg-type]
    assert made.eval_loss == pytest.approx(math.fsum(made.example_nll) / sum(made.example_tokens))
    assert len(set(made.example_nll)) == len(made.example_nll) > 10


def test_it_is_plausible() -> None:
    """The untouched loss is everybody's; rates have an inside optimum; longer and decayed runs are better."""
    assert {FORMULA(run(lora_r=r), 0, 60).eval_loss for r in (4, 64)} == {final(0)}  # type: ignore[arg-type]
    rates = [1e-5 * 10 ** (k / 4) for k in range(12)]
    found = [final(60, learning_rate=rate) for rate in rates]
    best = found.index(min(found))
    assert 0 < best < len(rates) - 1
    assert found[0] > found[best] < found[best + 1] < found[best + 2]
    assert final(60, learning_rate=rates[best]) > final(180, learning_rate=rates[best])
    assert final(60, learning_rate=1e-3) < final(60, learning_rate=1e-3, decay_steps=0)
    assert final(60, lora_r=32) < final(60, lora_r=2)


PUBLISHED: dict[float | str, float] = {0.0: 3.108, 0.2: 2.968, 0.4: 2.955, 0.6: 2.951, "cosine": 2.955}
"""Final loss by decay share: 124M Llama, 50,000 steps, Hägele et al. 2024 (arXiv:2405.18392)."""


def best_by_decay(horizon: int) -> dict[float | str, float]:
    """Mean final loss over studies by decay, at the rate that is best with a decay of 40%."""

    def mean_loss(rate: float, decay: float | str) -> float:
        shape = (
            {"schedule": "cosine"} if decay == "cosine" else {"decay_steps": round(horizon * float(decay))}
        )
        losses = [
            study(run(learning_rate=rate * study._best_rate, **shape), horizon, horizon).eval_loss  # type: ignore[arg-type]
            for study in map(partial(LoraFormula, pace_steps=50), "abcdefgh")
        ]
        return math.fsum(losses) / len(losses)

    best = min((10 ** (k / 10) for k in range(-6, 4)), key=lambda rate: mean_loss(rate, 0.4))
    return {decay: mean_loss(best, decay) for decay in PUBLISHED}


@pytest.mark.parametrize("paces", [6, 10, 20])
def test_decays_are_worth_what_was_published(paces: int) -> None:
    found = best_by_decay(50 * paces)
    assert found[0.0] > found[0.2] > found[0.4] > found[0.6]
    excess = {decay: loss / found[0.4] - 1 for decay, loss in found.items()}
    published = {decay: loss / PUBLISHED[0.4] - 1 for decay, loss in PUBLISHED.items()}
    assert excess[0.0] == pytest.approx(published[0.0], abs=0.011)
    assert excess[0.2] == pytest.approx(published[0.2], abs=0.0015)
    assert excess[0.6] == pytest.approx(published[0.6], abs=0.0008)
    assert excess["cosine"] == pytest.approx(published["cosine"], abs=0.002)


def test_a_decay_is_worth_by_its_share_not_its_length() -> None:
    """One that is kept in steps when the horizon trebles is worse than one that is kept in share."""
    kept = [final(600, learning_rate=2e-4, decay_steps=steps) for steps in (80, 120, 240)]
    assert kept[0] > kept[1] > kept[2]


def test_a_decay_takes_noise_away_as_it_goes_on() -> None:
    losses = [FORMULA(run(decay_steps=120), step, 300).eval_loss for step in range(180, 301, 30)]  # type: ignore[arg-type]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.04 * losses[0]


def test_the_best_rate_falls_with_the_horizon() -> None:
    rates = [10 ** (k / 10) for k in range(-50, -29)]
    best = [
        min(rates, key=lambda rate: final(steps, learning_rate=rate, decay_steps=0.4 * steps))
        for steps in (50, 400, 3200)
    ]
    assert best == sorted(best, reverse=True)
    assert 0.2 < best[2] / best[0] < 0.7


def test_many_steps_overfit() -> None:
    constant = run(schedule="constant", learning_rate=FORMULA._best_rate)
    losses = [FORMULA(constant, step, 20_000).eval_loss for step in (100, 3_000, 20_000)]  # type: ignore[arg-type]
    assert losses[0] > losses[1] < losses[2]


def test_a_rate_far_too_high_diverges_and_another_study_has_another_surface() -> None:
    assert math.isnan(final(10, learning_rate=1.0))
    other = LoraFormula("another study", pace_steps=50)
    assert other(run(), 60, 60).eval_loss != final(60)  # type: ignore[arg-type]
    again = LoraFormula("a study", pace_steps=50)
    assert again(run(), 60, 60) == FORMULA(run(), 60, 60)  # type: ignore[arg-type]


def test_a_simulated_run_diverges_in_the_worker_too() -> None:
    worker = SimulatedWorker(FORMULA, slots=1, keep=keep_trunk_names)
    wild = replace(assignment(Path("runs"), 0), hyperparameters=run(learning_rate=1.0))  # type: ignore[arg-type]
    worker.start(wild)
    events = collect(worker, until=lambda seen: ended(seen) == {0})
    assert [e.outcome for e in events if isinstance(e, Ended)] == ["infeasible"]
    assert [e.evaluation.step for e in events if isinstance(e, Evaluated)] == [0, 2]
