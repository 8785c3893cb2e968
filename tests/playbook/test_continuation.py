from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.rows import exact, trial_of
from tuner.playbook import can_continue
from tuner.playbook.schedule import continuation_step, evaluation_steps, inherited_evaluations, multiplier
from tuner.records import Checkpoint, CheckpointKind

LINEAR = {
    "learning_rate": 1e-4,
    "schedule": "linear",
    "warmup_steps": 5,
    "decay_steps": 24,
    "training_seed": 0,
}


def longer(**changes):
    return {**LINEAR, "decay_steps": 36, **changes}


@pytest.mark.parametrize("step", [5, 20, 36])
def test_a_longer_run_goes_on_from_the_trunk(step):
    assert can_continue(LINEAR, 60, longer(), 180, step) is None


@pytest.mark.parametrize(
    ("new", "new_horizon", "step", "reason"),
    [
        (longer(), 180, 4, "within the warmup"),
        (longer(), 180, 37, "earlier run decays from step 36"),
        (longer(), 60, 25, "new run decays from step 24"),
        (longer(learning_rate=2e-4), 180, 36, "learning_rate differ"),
        (longer(training_seed=1, learning_rate=2e-4), 180, 36, "learning_rate, training_seed differ"),
        (longer(schedule="constant"), 180, 36, "schedule differ"),
        (longer(), 180, 61, "not one of the 60 steps"),
    ],
)
def test_why_a_run_starts_afresh(new, new_horizon, step, reason):
    assert reason in can_continue(LINEAR, 60, new, new_horizon, step)


def test_a_missing_name_is_a_difference():
    assert "use_dora differ" in can_continue(LINEAR, 60, longer(use_dora=True), 180, 36)


def test_cosine_never_goes_on_to_another_horizon():
    cosine = {**LINEAR, "schedule": "cosine"}
    assert "depends on the horizon" in can_continue(cosine, 60, cosine, 180, 36)
    assert can_continue(cosine, 60, cosine, 60, 36) is None


def test_constant_goes_on_from_its_last_step():
    constant = {**LINEAR, "schedule": "constant"}
    assert can_continue(constant, 60, {**constant, "decay_steps": 99}, 180, 60) is None


def test_the_same_run_goes_on_from_anywhere():
    assert can_continue(LINEAR, 60, dict(LINEAR), 60, 60) is None
    assert can_continue(LINEAR, 60, dict(LINEAR), 60, 2) is None


def test_another_workload_is_another_run():
    assert "data" in can_continue(LINEAR, 60, LINEAR, 60, 36, same_workload=False)


@given(
    horizon=st.integers(1, 120),
    other=st.integers(1, 120),
    step=st.integers(0, 130),
    data=st.data(),
)
def test_where_a_run_may_go_on_all_earlier_rates_are_equal(horizon, other, step, data):
    warmup = data.draw(st.integers(0, min(horizon, other)))
    old, new = (
        {"schedule": "linear", "warmup_steps": warmup, "decay_steps": data.draw(st.integers(0, h - warmup))}
        for h in (horizon, other)
    )
    if can_continue(old, horizon, new, other, step) is None:
        for i in range(step):
            assert multiplier(i, old, horizon) == multiplier(i, new, other)


def checkpoint(step: int, kind: CheckpointKind = CheckpointKind.TRUNK) -> Checkpoint:
    return Checkpoint(kind, step, f"trunk/step-{step:06d}", 1, "0")


def test_the_latest_usable_trunk_is_taken():
    trial = replace(
        trial_of(0, [3.0, 2.0], steps=[0, 60], **LINEAR),
        checkpoints=(checkpoint(12), checkpoint(36), checkpoint(50), checkpoint(60, CheckpointKind.LAST)),
    )
    assert continuation_step(trial, 60, {**trial.hyperparameters, "decay_steps": 36}, 180) == (36, None)
    assert continuation_step(trial, 60, {**trial.hyperparameters, "decay_steps": 30}, 60) == (12, None)


def test_without_a_usable_trunk_it_starts_afresh_and_says_why():
    trial = trial_of(0, [3.0, 2.0], steps=[0, 60], **LINEAR)
    assert continuation_step(trial, 60, trial.hyperparameters, 180) == (None, "no trunk checkpoint was kept")
    late = replace(trial, checkpoints=(checkpoint(50),))
    step, reason = continuation_step(late, 60, trial.hyperparameters, 180)
    assert step is None
    assert "decays from step 36" in reason


def test_an_unchanged_trial_at_the_same_horizon_has_nothing_left_to_run():
    trial = trial_of(0, [3.0, 2.0], steps=[0, 60], **LINEAR)
    assert continuation_step(trial, 60, trial.hyperparameters, 60) == (60, None)


def test_inherited_evaluations_are_on_the_new_grid_and_not_after_the_step():
    evaluations = [exact(step, 2.0) for step in (0, 5, 10, 15, 20, 25, 30)]
    inherited = inherited_evaluations(evaluations, 20, evaluation_steps(100, 10))
    assert [e.step for e in inherited] == [0, 10, 20]


def test_what_no_schedule_of_the_run_knows_is_no_difference():
    """Trials of earlier versions have `decay_steps` beside a cosine."""
    before = {**LINEAR, "schedule": "cosine"}
    now = {name: value for name, value in before.items() if name != "decay_steps"}
    assert can_continue(before, 60, now, 60, 60) is None
    assert "depends on the horizon" in can_continue(before, 60, now, 180, 36)
