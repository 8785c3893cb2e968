"""Which comparison runs a round owes, and that `study check` never counts too few."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.playbook.strategies import heavy, rounds
from tuner.playbook import RoundResults
from tuner.playbook.comparison_runs import (
    ComparisonRun,
    branch_hyperparameters,
    branches_left,
    comparison_runs,
    expected_runs,
    owed_branches,
)
from tuner.playbook.results import BranchResult
from tuner.playbook.selection import leading_trials
from tuner.records import Branch, Checkpoint, CheckpointKind, Evaluation, Trial, TrialState

STEPS = tuple(range(0, 101, 10))
LINEAR = {"schedule": "linear", "decay_steps": 40, "warmup_steps": 5}
COSINE = {"schedule": "cosine", "warmup_steps": 5}
CONSTANT = {"schedule": "constant", "warmup_steps": 5}
RULES = ("auto", True, False)


def trial_of(number=0, *, floor=2.0, kept=(30, 43, 60), losses=None, state=TrialState.COMPLETE, **schedule):
    """A trial that falls to the end, with stable checkpoints at these steps."""
    losses = losses or [floor + math.exp(-step / 40) for step in STEPS]
    return Trial(
        "round1",
        number,
        {"learning_rate": 1e-4 * (1 + number), **(schedule or LINEAR)},
        state,
        evaluations=tuple(Evaluation(step, loss) for step, loss in zip(STEPS, losses, strict=True)),
        checkpoints=tuple(Checkpoint(CheckpointKind.TRUNK, step, f"t/{step}", 1, "0") for step in kept),
    )


def round_of(*trials, name="round1", horizon=100):
    return RoundResults(name, horizon, 10, {}, trials, workload="w")


BEST, SECOND = trial_of(1), trial_of(0, floor=2.1)


@pytest.mark.parametrize(
    ("trial", "by_auto", "by_true"),
    [
        (trial_of(), [(50, 30)], [(50, 30), (71, 43)]),
        # Its checkpoints were given up, or it continues from a later step.
        (trial_of(kept=(60,)), [(50, 0)], [(50, 0)]),
        (trial_of(kept=(43, 60)), [(50, 0)], [(50, 0), (71, 43)]),
        (trial_of(kept=(), **COSINE), [(50, 0)], [(50, 0)]),
        # The decay of the half would begin within the warmup, that of the root after it.
        (trial_of(**{**LINEAR, "warmup_steps": 35}), [(50, 0)], [(50, 0), (71, 43)]),
        (trial_of(**{**LINEAR, "decay_steps": 95}), [(50, 0)], [(50, 0)]),
        # Warmup takes all of the half.
        (trial_of(**{**LINEAR, "warmup_steps": 50}), [], []),
        (trial_of(**{**COSINE, "warmup_steps": 50}), [], []),
        # The rate is constant to the end.
        (trial_of(**CONSTANT), [], []),
        (trial_of(**{**LINEAR, "decay_steps": 0}), [], []),
    ],
)
def test_a_run_starts_from_a_stable_checkpoint_or_from_scratch(trial, by_auto, by_true):
    for rule, expected in (("auto", by_auto), (True, by_true), (False, [])):
        owed = owed_branches(round_of(trial), rule=rule)
        assert [(branch.max_train_steps, branch.from_step) for branch in owed] == expected


def test_auto_runs_the_best_trial_and_true_all_leading_ones():
    results = round_of(SECOND, BEST)
    assert owed_branches(results, rule="auto") == (Branch(1, 50, 30),)
    assert [branch.trial for branch in owed_branches(results, rule=True)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "trials",
    [
        (),
        (trial_of(state=TrialState.PRUNED),),
        (trial_of(state=TrialState.INFEASIBLE),),
        (trial_of(state=TrialState.RUNNING),),
        # It never beats the base model; it is best in its first tenth; it overfits.
        (trial_of(losses=[2.0 + step / 100 for step in STEPS]),),
        (trial_of(losses=[3.0, *(2.0 + step / 100 for step in STEPS[1:])]),),
        (trial_of(losses=[2.0 + abs(step - 40) / 40 for step in STEPS]),),
    ],
)
def test_auto_makes_none_where_the_gain_decides_nothing(trials):
    overfits = [replace(t, evaluations=tuple(_trained(e) for e in t.evaluations)) for t in trials]
    assert owed_branches(round_of(*overfits), rule="auto") == ()


def _trained(evaluation):
    return replace(evaluation, train_loss=3.0 - evaluation.step / 100)


def test_a_sweep_makes_none():
    assert owed_branches(replace(round_of(BEST), is_sweep=True), rule=True) == ()


@pytest.mark.parametrize(
    ("horizon", "is_owed"), [(38, True), (40, False), (50, False), (62, False), (64, True)]
)
def test_an_earlier_round_close_to_the_half_makes_it_unnecessary(horizon, is_owed):
    decay = {"decay_steps": round(0.4 * horizon)}
    twin = replace(BEST, hyperparameters={**BEST.hyperparameters, **decay})
    earlier = [replace(round_of(twin), name="round0", max_train_steps=horizon)]
    assert bool(owed_branches(round_of(BEST), earlier, rule="auto")) is is_owed
    assert owed_branches(round_of(BEST), earlier, rule=True)


def test_a_new_best_trial_owes_one_again_and_one_that_has_ended_is_not_made_twice():
    ended = Branch(0, 50, 30, state="complete")
    assert branches_left(round_of(SECOND), rule="auto", begun=[ended]) == ()
    left = branches_left(round_of(SECOND, BEST), rule="auto", begun=[ended])
    assert left == (Branch(1, 50, 30),)


def test_one_that_has_begun_goes_on_as_it_began():
    begun = Branch(1, 50, 30, checkpoint=Checkpoint(CheckpointKind.LAST, 40, "b", 1, "0"))
    gone = replace(BEST, checkpoints=())
    assert branches_left(round_of(gone), rule="auto", begun=[begun]) == (begun,)


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [(LINEAR, 20), ({**LINEAR, "decay_steps": 33}, 16), ({**LINEAR, "decay_steps": 1}, 1)],
)
@pytest.mark.parametrize("start", [0, 30])
def test_the_decay_keeps_its_share_of_the_run(schedule, decay, start):
    assert branch_hyperparameters(Branch(0, 50, start), schedule, 100) == {**schedule, "decay_steps": decay}


@pytest.mark.parametrize("schedule", [COSINE, {**COSINE, "decay_steps": 40}])
def test_a_cosine_is_the_same_to_the_shorter_horizon(schedule):
    assert branch_hyperparameters(Branch(0, 50, 0), schedule, 100) == schedule


@given(
    horizon=st.integers(1, 500),
    warmup=st.integers(0, 300),
    decay=st.integers(0, 500),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
)
def test_a_run_is_within_the_trial_and_longer_than_its_warmup(horizon, warmup, decay, schedule):
    hyperparameters = {"schedule": schedule, "warmup_steps": warmup, "decay_steps": decay}
    one, all_of_them = (comparison_runs(hyperparameters, horizon, rule=rule) for rule in ("auto", True))
    assert set(one) <= set(all_of_them)
    assert len(one) <= 1
    assert len({run.max_train_steps for run in all_of_them}) == len(all_of_them) <= 2
    for run in all_of_them:
        assert run.from_step == 0 or run.from_step >= warmup
        assert warmup < run.max_train_steps <= horizon
        assert run.num_steps == run.max_train_steps - run.from_step > 0
    assert bool(one) == bool(all_of_them), "none where T/2 lies within the warmup"
    if one:
        assert one[0].num_steps <= round(horizon / 2) == one[0].max_train_steps


@heavy
@given(rounds(), st.sampled_from(RULES), st.booleans())
def test_a_plan_counts_the_most_there_can_be(results, rule, have_checkpoints):
    """Whether the trials kept their checkpoints or not."""
    results = replace(results, trials=tuple(_keeping(t, results, have_checkpoints) for t in results.trials))
    owed = owed_branches(results, rule=rule)
    assert len(owed) <= 2 * len(leading_trials(results.trials, results.max_train_steps))
    steps = sum(branch.max_train_steps - branch.from_step for branch in owed)
    plans = [
        expected_runs(
            len(results.trials),
            trial.hyperparameters,
            results.max_train_steps,
            rule=rule,
            num_kept=None if have_checkpoints else 0,
        )
        for trial in results.trials
    ]
    assert steps <= max((sum(run.num_steps for run in plan) for plan in plans), default=0)


def _keeping(trial, results, have_checkpoints):
    runs = comparison_runs(trial.hyperparameters, results.max_train_steps, rule=True)
    kept = {run.from_step for run in runs} if have_checkpoints else ()
    checkpoints = tuple(Checkpoint(CheckpointKind.TRUNK, step, f"t/{step}", 1, "0") for step in kept)
    return replace(trial, checkpoints=checkpoints)


@heavy
@given(rounds(min_trials=1), st.sampled_from(["auto", True]))
def test_what_has_run_never_decides_what_is_owed(results, rule):
    before = owed_branches(replace(results, branches=()), rule=rule)
    assume(before)
    ran = tuple(
        BranchResult(b.trial, b.max_train_steps, (Evaluation(b.max_train_steps, 0.5),)) for b in before
    )
    assert owed_branches(replace(results, branches=ran), rule=rule) == before


def test_without_checkpoints_a_plan_has_the_half_from_scratch_for_each_leading_trial():
    assert expected_runs(24, LINEAR, 100, rule="auto", num_kept=3) == (ComparisonRun(30, 50),)
    assert expected_runs(24, LINEAR, 100, rule="auto", num_kept=0) == (ComparisonRun(0, 50),)
    mixed = expected_runs(24, LINEAR, 100, rule=True, num_kept=5)
    assert sorted(run.num_steps for run in mixed) == [20] * 5 + [28] * 5 + [50]
    assert expected_runs(24, LINEAR, 100, rule=False) == expected_runs(0, LINEAR, 100, rule="auto") == ()
