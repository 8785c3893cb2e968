import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.playbook.rows import exact, round_of, trial_of
from tests.playbook.strategies import heavy, rounds
from tuner.errors import InputError, TunerError
from tuner.playbook import Diagnosis, NextRound, RoundResults, plan_next_round, read_round
from tuner.playbook.promotion import num_trials, proposed_seeds
from tuner.playbook.schedule import decay_length, tiny_rate_share
from tuner.records import (
    Checkpoint,
    CheckpointKind,
    Choices,
    Fixed,
    Range,
    Space,
    TimesSqrtRank,
    Trial,
    TrialState,
    complete_hyperparameters,
    searched,
)

GRID = tuple(range(0, 61, 5))
SPACE: Space = {
    "learning_rate": Range(1e-5, 3e-3, log=True),
    "lora_r": Choices((8, 16, 32)),
    "lora_alpha": TimesSqrtRank(4.0),
    "weight_decay": Range(0.0, 0.1),
    "batch_size": Fixed(8),
    "warmup_steps": Fixed(5),
    "schedule": Fixed("linear"),
    "decay_steps": Fixed(24),
    "training_seed": Fixed(0),
}


def falling(step: int) -> float:
    return 2.0 + (step + 5) ** -0.5


def point(i: int) -> dict:
    """Better trials have higher numbers of neither: rate, rank and decay follow the number."""
    return {"learning_rate": 3e-4 * 1.1**i, "lora_r": (16, 16, 32)[i % 3], "weight_decay": 0.02 + 0.01 * i}


def a_trial(i: int, space: Space = SPACE, *, state: TrialState = TrialState.COMPLETE, **chosen) -> Trial:
    values = complete_hyperparameters(space, {**point(i), **chosen})
    run = trial_of(i, lambda s: falling(s) * (1 + i / 100), steps=GRID, state=state)
    trunk = Checkpoint(CheckpointKind.TRUNK, 36, "trunk/step-000036", 1, "0")
    return replace(run, hyperparameters=values, checkpoints=(trunk,))


def results_of(*trials: Trial, space: Space = SPACE, **fields) -> RoundResults:
    return round_of(*trials, max_train_steps=60, evaluate_every=5, space=space, **fields)


def eight(space: Space = SPACE, **chosen) -> RoundResults:
    return results_of(*(a_trial(i, space, **chosen) for i in range(8)), space=space)


def without_edges(results: RoundResults) -> RoundResults:
    """The round where every number of it is at its limit, so that nothing is widened."""
    limits = dict.fromkeys(results.space, (math.inf, -math.inf))
    return replace(results, limits=limits)


def plan(results: RoundResults, horizon: int | None = 120, **options) -> NextRound:
    return plan_next_round(results, read_round(results), to="round2", max_train_steps=horizon, **options)


def test_the_top_three_go_on_from_their_trunks_as_they_are():
    promoted = plan(eight())
    assert [(entry.trial, entry.from_step, entry.reason) for entry in promoted.enqueue] == [
        (0, 36, None),
        (1, 36, None),
        (2, 36, None),
    ]
    assert promoted.enqueue[1].hyperparameters == point(1)
    assert promoted.enqueue[0].round == "round1"
    assert (promoted.from_round, promoted.to_round) == ("round1", "round2")
    assert len(plan(eight(), top=5).enqueue) == 5


def test_the_suggested_horizon_is_taken_unless_another_is_given():
    assert plan(eight(), None).max_train_steps == read_round(eight()).suggested_max_train_steps == 180
    promoted = plan(eight(), 240)
    assert promoted.max_train_steps == 240
    assert any("suggests 180" in note for note in promoted.notes)
    assert any("three times" in note for note in promoted.notes)


def test_every_hyperparameter_has_a_change_with_tier_and_reason():
    promoted = plan(eight())
    assert list(promoted.changes) == list(SPACE) == list(promoted.space)
    assert all(change.reason for change in promoted.changes.values())
    assert promoted.changes["batch_size"].to_dimension == Fixed(8)
    assert promoted.changes["lora_alpha"].to_dimension == TimesSqrtRank(4.0)
    assert promoted.evaluate_every == 5


def test_the_learning_rate_moves_with_the_horizon():
    change = plan(eight()).changes["learning_rate"]
    centre = 3e-4 * 2**-0.25
    assert change.to_dimension.low == pytest.approx(centre / 3, rel=0.05)
    assert change.to_dimension.high == pytest.approx(centre * 3, rel=0.05)
    assert change.tier == "might"
    same = plan(eight(), 60).changes["learning_rate"].to_dimension
    assert same == Range(1e-4, 9e-4, log=True)


def test_the_learning_rate_does_not_reach_where_all_diverged():
    diverged = a_trial(8, state=TrialState.INFEASIBLE, learning_rate=6e-4)
    results = results_of(*(a_trial(i, learning_rate=3e-4) for i in range(5)), diverged)
    assert plan(results, 60).changes["learning_rate"].to_dimension.high == pytest.approx(6e-4)
    below = a_trial(8, state=TrialState.INFEASIBLE, learning_rate=2e-4)
    results = results_of(*(a_trial(i, learning_rate=3e-4) for i in range(5)), below)
    assert plan(results, 60).changes["learning_rate"].to_dimension.high == pytest.approx(9e-4)


def test_a_fixed_learning_rate_stays_but_is_advised_on():
    space = {**SPACE, "learning_rate": Fixed(1e-4)}
    change = plan(eight(space), 120).changes["learning_rate"]
    assert change.to_dimension == Fixed(1e-4)
    assert "0.84 times" in change.reason
    assert plan(eight(space), 60).changes["learning_rate"].reason == "fixed, as before"


def test_architecture_is_fixed_where_the_leading_agree():
    assert plan(eight()).changes["lora_r"].to_dimension == Choices((16, 32))
    agreed = plan(eight(lora_r=16)).changes["lora_r"]
    assert agreed.to_dimension == Fixed(16)
    assert "agree" in agreed.reason


def test_what_might_transfer_is_searched_around_the_leading():
    # The leading five use 0.02 to 0.06: a quarter of that on both sides.
    assert plan(eight()).changes["weight_decay"].to_dimension == Range(0.01, 0.07)


def test_a_searched_warmup_is_fixed_or_a_list_where_the_enqueued_disagree():
    space = {**SPACE, "warmup_steps": Choices((0, 5, 10))}
    agreed = results_of(*(a_trial(i, space, warmup_steps=5) for i in range(5)), space=space)
    assert plan(agreed).changes["warmup_steps"].to_dimension == Fixed(5)
    mixed = results_of(*(a_trial(i, space, warmup_steps=(10, 5, 5, 0, 0)[i]) for i in range(5)), space=space)
    mixed = without_edges(mixed)
    change = plan(mixed).changes["warmup_steps"]
    assert change.to_dimension == Choices((5, 10))
    assert "widened" in change.reason
    assert plan(mixed, top=1).changes["warmup_steps"].to_dimension == Fixed(10)
    assert plan(mixed, 30, decay="steps").space["decay_steps"] == Fixed(20), (
        "the longest warmup has to fit as well"
    )


@pytest.mark.parametrize(
    ("horizon", "decay", "expected"),
    [(120, "steps", 24), (180, "steps", 36), (120, "share", 48), (60, "steps", 24)],
)
def test_a_fixed_decay_is_recut(horizon, decay, expected):
    promoted = plan(eight(), horizon, decay=decay)
    assert promoted.space["decay_steps"] == Fixed(expected)
    assert promoted.decay == decay


def test_a_searched_decay_is_recut_and_searched_again():
    space = {**SPACE, "decay_steps": Range(12, 30, integer=True)}
    results = results_of(*(a_trial(i, space, decay_steps=20 + i) for i in range(5)), space=space)
    promoted = plan(results, 120, decay="steps")
    assert promoted.space["decay_steps"] == Range(24, 30, integer=True)
    assert promoted.enqueue[0].hyperparameters["decay_steps"] == 24
    shared = plan(results, 120, top=3)
    assert shared.space["decay_steps"] == Range(24, 60, integer=True)
    assert shared.enqueue[2].hyperparameters["decay_steps"] == 44


@pytest.mark.parametrize("horizon", [30, 60, 90, 180, None])
def test_a_cosine_promotion_leaves_decay_steps_alone(horizon):
    space = {**SPACE, "schedule": Fixed("cosine")}
    promoted = plan(eight(space), horizon)
    change = promoted.changes["decay_steps"]
    assert change.to_dimension == change.from_dimension
    said = (*promoted.notes, *(f.message for f in promoted.findings), change.reason)
    assert not any("decay_steps" in text or "rescaled" in text for text in said)


def test_a_cosine_starts_over_and_too_many_steps_at_a_tiny_rate_are_warned_of():
    space = {**SPACE, "schedule": Fixed("cosine")}
    promoted = plan(eight(space), 90)
    assert "depends on the horizon" in promoted.enqueue[0].reason
    (finding,) = [f for f in promoted.findings if f.rule == "tiny_rate"]
    assert finding.numbers["share"] > 0.5
    assert not [f for f in plan(eight(space), 180).findings if f.rule == "tiny_rate"]


def test_a_tiny_rate_is_warned_of_beyond_half_of_what_the_horizon_gains():
    results = eight({**SPACE, "schedule": Fixed("cosine")})
    hyperparameters = results.trials[0].hyperparameters
    shares = {
        horizon: tiny_rate_share(hyperparameters, old=hyperparameters, old_horizon=60, new_horizon=horizon)
        for horizon in range(95, 115)
    }
    assert 0.5 in shares.values()
    assert any(0.45 < share < 0.5 for share in shares.values())
    assert any(0.5 < share < 0.55 for share in shares.values())
    for horizon, share in shares.items():
        assert any(f.rule == "tiny_rate" for f in plan(results, horizon).findings) == (share > 0.5)


def test_a_tiny_rate_is_that_of_the_best_trial():
    space = {**SPACE, "schedule": Choices(("linear", "cosine"))}

    def rules(best: str, others: str) -> list[str]:
        trials = [a_trial(i, space, schedule=best if i == 0 else others) for i in range(5)]
        return [finding.rule for finding in plan(results_of(*trials, space=space), 70).findings]

    assert "tiny_rate" in rules("cosine", "linear")
    assert "tiny_rate" not in rules("linear", "cosine")


def test_late_best_steps_want_the_decay_tuned_again():
    def says_so(results: RoundResults) -> bool:
        return any("also retune decay_steps" in note for note in plan(results).notes)

    assert says_so(eight())
    early = tuple(
        replace(t, evaluations=(exact(0, 3.0), *(exact(s, 2.0) for s in GRID[1:]))) for t in eight().trials
    )
    assert not says_so(results_of(*early))
    for schedule in ("cosine", "constant"):
        assert not says_so(eight({**SPACE, "schedule": Fixed(schedule)}))
    assert not says_so(eight({**SPACE, "decay_steps": Fixed(0)}))


def test_names_of_adams_that_few_trials_cannot_tell_apart_are_said():
    space = {**SPACE, "adam_beta1": Choices((0.8, 0.9))}
    found = [f.rule for f in plan(eight(space, adam_beta1=0.8), top=1).findings]
    assert "too_many_names" not in found, "the leading trials agree, so that it is fixed"
    mixed = results_of(*(a_trial(i, space, adam_beta1=(0.8, 0.9)[i % 2]) for i in range(8)), space=space)
    narrowed = plan(mixed)
    assert "adam_beta1" in searched(narrowed.space)
    assert narrowed.trials_total < 10
    assert "too_many_names" in [f.rule for f in narrowed.findings]


def test_trials_that_failed_do_not_count():
    failed = [a_trial(8 + i, state=TrialState.FAILED) for i in range(8)]
    assert plan(results_of(*eight().trials, *failed), 60).trials_total == 8


def test_the_same_horizon_leaves_nothing_to_run_for_the_enqueued():
    promoted = plan(eight(), 60)
    assert [entry.from_step for entry in promoted.enqueue] == [60, 60, 60]
    assert promoted.trials_total == 8


def test_a_shorter_horizon_keeps_of_the_decay_what_the_warmup_leaves():
    change = plan(eight(), 25).changes["decay_steps"]
    assert change.to_dimension == Fixed(10)
    assert change.reason == "rescaled: the same share of the run as before, 40%"
    change = plan(eight(), 25, decay="steps").changes["decay_steps"]
    assert change.to_dimension == Fixed(20)
    assert change.reason == "rescaled: all steps that the warmup leaves of 25"


def test_a_few_more_steps_at_the_peak_are_none_at_a_tiny_rate():
    assert not [f for f in plan(eight(), 61).findings if f.rule == "tiny_rate"]


def test_a_shorter_horizon_goes_on_from_an_earlier_trunk_or_afresh():
    results = eight()
    promoted = plan(results, 45, decay="steps")
    assert promoted.enqueue[0].from_step is None
    assert "decays from step 21" in promoted.enqueue[0].reason
    earlier = Checkpoint(CheckpointKind.TRUNK, 20, "trunk/step-000020", 1, "0")
    trials = tuple(replace(t, checkpoints=(*t.checkpoints, earlier)) for t in results.trials)
    assert plan(replace(results, trials=trials), 45, decay="steps").enqueue[0].from_step == 20


@pytest.mark.parametrize(
    ("old_total", "enqueued", "new_horizon", "expected"),
    [
        (16, 3, 120, 8),
        (16, 3, 180, 5),
        (16, 3, 600, 5),
        (6, 3, 120, 5),
        (4, 3, 120, 4),
        (8, 3, 30, 8),
        (2, 2, 120, 3),
        (3, 1, 60, 3),
        (3, 1, 180, 3),
        (1, 1, 120, 2),
        (8, 3, 60, 8),
        (8, 8, 60, 9),
        (5, 0, 120, 2),
        (1, 0, 120, 1),
    ],
)
def test_number_of_trials(old_total, enqueued, new_horizon, expected):
    assert num_trials(old_total, enqueued=enqueued, old_horizon=60, new_horizon=new_horizon) == expected


def test_nothing_left_to_search_leaves_the_enqueued():
    space = {name: Fixed(value) for name, value in complete_hyperparameters(SPACE, point(0)).items()}
    promoted = plan(eight(space))
    assert searched(promoted.space) == {}
    assert promoted.trials_total == len(promoted.enqueue) == 1


def test_the_second_round_models():
    promoted = plan(eight())
    assert promoted.sampler == "tpe"
    assert promoted.sampler_reason
    assert plan(replace(eight(), sampler="gp")).sampler == "gp", "it models already"


def test_seeds_are_proposed_when_the_lead_is_within_the_noise():
    close = [replace(a_trial(i), evaluations=(exact(0, 3.0), exact(60, 2.0 + i / 1000))) for i in range(3)]
    assert proposed_seeds(results_of(*close), noise=0.001) == (1, 2)
    assert proposed_seeds(results_of(*close), noise=0.0004) == ()
    assert proposed_seeds(results_of(*close[:1]), noise=0.1) == ()
    noisy = replace(close[1], evaluations=(exact(60, 2.001, spread=0.02),))
    assert proposed_seeds(results_of(close[0], noisy), noise=0.0) == (1, 2)
    used = replace(close[2], hyperparameters={**close[2].hyperparameters, "training_seed": 1})
    assert proposed_seeds(results_of(*close[:2], used), noise=0.001) == (2, 3)


def test_a_trial_drawn_twice_is_no_runner_up():
    """Few choices repeat: what parts two runs of one configuration says nothing of another."""
    twice = [replace(a_trial(0), number=i) for i in range(2)]
    behind = replace(a_trial(5), evaluations=(exact(0, 3.0), exact(60, 2.9)))
    assert proposed_seeds(results_of(*twice), noise=0.1) == ()
    assert proposed_seeds(results_of(*twice, behind), noise=0.001) == ()


def test_the_finding_names_the_seeds():
    close = [replace(a_trial(i), evaluations=a_trial(0).evaluations) for i in range(3)]
    (finding,) = [f for f in plan(results_of(*close)).findings if f.rule == "lead_within_noise"]
    assert "training_seed 1 and 2" in finding.message


def test_infeasible_pruned_and_failed_trials_are_never_promoted():
    bad = [a_trial(i, state=state) for i, state in enumerate(list(TrialState)[3:])]
    good = [a_trial(10 + i) for i in range(2)]
    assert [entry.trial for entry in plan(results_of(*bad, *good), top=3).enqueue] == [10, 11]


def test_a_repeated_trial_is_promoted_once():
    again = replace(a_trial(0), number=7)
    assert [entry.trial for entry in plan(results_of(again, a_trial(0), a_trial(1)), top=3).enqueue] == [0, 1]


def test_no_suggestion_needs_a_given_horizon():
    nothing = results_of(a_trial(0, state=TrialState.INFEASIBLE))
    with pytest.raises(TunerError, match="--max-train-steps"):
        plan(nothing, None)
    promoted = plan(nothing, 120)
    assert promoted.enqueue == ()
    assert promoted.space["learning_rate"] == SPACE["learning_rate"]
    assert promoted.space["decay_steps"] == Fixed(48)
    assert any("nothing is enqueued" in note for note in promoted.notes)


def test_no_learning_needs_a_given_horizon():
    flat = replace(a_trial(0), evaluations=(exact(0, 2.0), exact(60, 2.0)))
    assert read_round(results_of(flat)).diagnosis == Diagnosis.NO_LEARNING
    with pytest.raises(TunerError, match="base model"):
        plan(results_of(flat), None)


@pytest.mark.parametrize("horizon", [4, 0, -10])
def test_a_horizon_needs_an_evaluation_interval(horizon):
    with pytest.raises(InputError, match="every_steps 5"):
        plan(eight(), horizon)


def test_a_horizon_must_hold_the_warmup():
    space = {**SPACE, "warmup_steps": Fixed(20), "decay_steps": Fixed(0)}
    with pytest.raises(InputError, match="warmup_steps 20 does not fit into max_train_steps 15"):
        plan(eight(space), 15)


def test_more_than_the_production_length_is_noted():
    assert any(
        "production_steps, 100" in note for note in plan(replace(eight(), production_steps=100), 120).notes
    )
    at_the_cap = plan(replace(eight(), production_steps=120), 120).notes
    assert not any("more than run.production_steps" in note for note in at_the_cap)


@heavy
@given(rounds(min_trials=1), st.data())
def test_every_plan_is_a_round_that_can_be_run(results, data):
    horizon = data.draw(st.integers(results.evaluate_every, 4 * results.max_train_steps))
    top, decay = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["steps", "share"]))
    try:
        promoted = plan_next_round(
            results, read_round(results), to="round2", max_train_steps=horizon, top=top, decay=decay
        )
    except InputError:
        assume(False)
    names = searched(promoted.space)
    for entry in promoted.enqueue:
        assert set(entry.hyperparameters) == set(names)
        assert all(promoted.space[name].contains(value) for name, value in entry.hyperparameters.items())
        values = complete_hyperparameters(promoted.space, entry.hyperparameters)
        source = results.trial(entry.trial)
        changed = {name for name, value in values.items() if source.hyperparameters[name] != value}
        assert changed <= {"decay_steps"}
        assert values["warmup_steps"] + decay_length(values) <= horizon
        assert (entry.from_step is None) != (entry.reason is None)
        assert entry.from_step is None or entry.from_step <= min(horizon, results.max_train_steps)
    assert max(1, len(promoted.enqueue)) <= promoted.trials_total
    num_results = len(results.results) or len(results.trials)
    assert promoted.trials_total <= max(1, len(promoted.enqueue) + 1, num_results)
    assert not names or len(promoted.enqueue) < promoted.trials_total
    assert len(promoted.enqueue) <= top
    assert promoted.max_train_steps == horizon
    numbers = [(f.rule, name, n) for f in promoted.findings for name, n in f.numbers.items()]
    assert [each for each in numbers if not math.isfinite(each[2])] == []


@heavy
@given(rounds(min_trials=1), st.randoms())
def test_a_plan_does_not_depend_on_the_order_of_the_trials(results, random):
    shuffled = replace(results, trials=tuple(random.sample(results.trials, len(results.trials))))
    try:
        promoted = plan(results, 2 * results.max_train_steps)
    except InputError:
        assume(False)
    assert repr(plan(shuffled, 2 * results.max_train_steps)) == repr(promoted)


def test_a_searched_schedule_stays_searched():
    space = {**SPACE, "schedule": Choices(("linear", "cosine"))}
    results = results_of(
        *(a_trial(i, space, schedule=("linear", "cosine")[i % 2]) for i in range(5)), space=space
    )
    change = plan(results).changes["schedule"]
    assert change.to_dimension == Choices(("linear", "cosine"))
    assert "unlikely" in change.reason
    assert plan(results).space["decay_steps"] == Fixed(48)


def test_a_searched_batch_size_is_fixed_at_the_best_unless_the_enqueued_disagree():
    space = {**SPACE, "batch_size": Choices((4, 8))}
    results = results_of(*(a_trial(i, space, batch_size=(4, 4, 4, 8, 8)[i]) for i in range(5)), space=space)
    assert plan(results).changes["batch_size"].to_dimension == Fixed(4)
    assert plan(results, top=4).changes["batch_size"].to_dimension == Choices((4, 8))


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(Fixed(50), 70), (Choices((5, 60)), 60), (Range(0, 65, integer=True), 55), (TimesSqrtRank(1.0), 80)],
)
def test_a_recut_decay_leaves_room_for_any_warmup_where_nothing_is_complete(warmup, expected):
    space = {**SPACE, "warmup_steps": warmup, "decay_steps": Fixed(80)}
    results = results_of(a_trial(0, SPACE, state=TrialState.FAILED), space=space)
    assert plan(results, 120, decay="steps").space["decay_steps"] == Fixed(expected)


def test_names_that_the_playbook_does_not_know_are_narrowed():
    space = {"exponential_decay": Range(1e-6, 1.0, log=True), "learning_rate": Range(1e-8, 10, log=True)}
    trials = [
        replace(
            a_trial(i), hyperparameters={"exponential_decay": 10.0 ** -(3 + i % 2), "learning_rate": 0.01}
        )
        for i in range(5)
    ]
    promoted = plan(results_of(*trials, space=space))
    low, high = promoted.space["exponential_decay"].low, promoted.space["exponential_decay"].high
    assert 1e-6 < low < 1e-4 < 1e-3 < high < 1.0
    assert promoted.enqueue[0].from_step == 36
