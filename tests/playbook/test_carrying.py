"""The edges, the shares and the counts of a promotion, over all kinds of rounds."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.playbook.strategies import heavy, rounds
from tests.playbook.test_promotion import SPACE, a_trial, eight, plan, results_of
from tuner.errors import InputError
from tuner.methods.table import HYPERPARAMETERS
from tuner.playbook import RoundResults, plan_next_round, read_round
from tuner.playbook.edges import Edge
from tuner.playbook.promotion import num_carried_over
from tuner.playbook.selection import beats_the_base
from tuner.records import (
    Choices,
    Condition,
    Evaluation,
    Fixed,
    Range,
    Space,
    TrialState,
    complete_hyperparameters,
    searched,
)

RATES = (1e-5, 2e-5, 3e-5, 5e-5, 1e-4)
LIMITS = {
    "learning_rate": (0.0, None),
    "lora_r": (1, None),
    "lora_dropout": (0.0, 1.0),
    "weight_decay": (0.0, None),
    "warmup_steps": (0, None),
    "decay_steps": (0, None),
}


def with_best_at(name: str, values: tuple, dimension, **fields) -> RoundResults:
    """Five trials, the first the best, with these values of one hyperparameter; rates mid-range."""
    space: Space = {**SPACE, name: dimension}
    trials = [a_trial(i, space, **{name: values[i]}) for i in range(len(values))]
    return results_of(*trials, space=space, limits=LIMITS, **fields)


def small_rates(*, dimension=None, rates: tuple = tuple(reversed(RATES))) -> RoundResults:
    """The best trial has the highest rate, at the upper bound."""
    return with_best_at("learning_rate", rates, dimension or Range(1e-5, 1e-4, log=True))


def test_higher_rates_come_first_at_the_same_horizon_and_nothing_else_changes():
    results = small_rates()
    reading = read_round(results)
    assert reading.widens_rates
    promoted = plan_next_round(results, reading, to="round2")
    assert promoted.max_train_steps == results.max_train_steps
    changed = {n for n, c in promoted.changes.items() if c.to_dimension != c.from_dimension}
    assert changed == {"learning_rate"}
    assert promoted.space["learning_rate"] == Range(1e-5, 1e-3, log=True)
    assert "10 times" in promoted.changes["learning_rate"].reason
    assert [entry.from_step for entry in promoted.enqueue] == [60, 60], "complete facts"
    assert promoted.trials_total == len(results.trials)
    assert "narrowed" not in promoted.sampler_reason


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ((1e-5, 3e-5, 1e-4), (3.2e-4, 1e-3)),
        ((1e-5, 1e-4), (1e-3,)),
        ((1e-6, 2e-5, 1e-4), (1e-3,)),
        ((9e-5, 9.9e-5, 1e-4), (1.6e-4, 2.5e-4, 4e-4, 6.3e-4, 1e-3)),
    ],
)
def test_a_list_of_rates_goes_on_to_ten_times_the_highest(listed, expected):
    best_first = tuple(reversed(listed))
    results = small_rates(dimension=Choices(listed), rates=best_first)
    reading = replace(read_round(results), widens_rates=True, suggested_max_train_steps=60)
    promoted = plan_next_round(results, reading, to="round2")
    assert promoted.space["learning_rate"] == Choices((*listed, *expected))


def test_a_given_horizon_goes_on_and_widens_the_rates_as_any_edge():
    results = small_rates()
    promoted = plan_next_round(results, read_round(results), to="round2", max_train_steps=120)
    rates = promoted.space["learning_rate"]
    assert rates.high == pytest.approx(1e-3)
    assert rates.low == pytest.approx(1e-4 / 3, rel=0.05), "narrowed below, around a centre that did not move"
    assert "upper bound" in promoted.changes["learning_rate"].reason


def test_the_centre_moves_down_where_the_best_rate_is_not_at_the_upper_bound():
    assert "moved by 0.84" in plan(eight(), 120).changes["learning_rate"].reason


@pytest.mark.parametrize(
    ("name", "values", "dimension", "expected"),
    [
        ("weight_decay", (0.1, 0.09, 0.08, 0.09, 0.1), Range(0.001, 0.1, log=True), (0.063, 1.0)),
        ("weight_decay", (0.1, 0.09, 0.08, 0.09, 0.1), Range(0.02, 0.1), (0.075, 0.18)),
        ("weight_decay", (0.02, 0.03, 0.04, 0.03, 0.02), Range(0.02, 0.1, log=True), (0.002, 0.048)),
        ("lora_dropout", (0.5, 0.4, 0.4, 0.4, 0.5), Range(0.1, 0.5), (0.37, 0.9)),
        ("lora_dropout", (0.9, 0.8, 0.8, 0.8, 0.9), Range(0.1, 0.9), (0.77, 0.95)),
    ],
)
def test_a_range_is_widened_on_the_side_of_the_best_trial_alone(name, values, dimension, expected):
    change = plan(with_best_at(name, values, dimension), 120).changes[name]
    new = change.to_dimension
    assert (new.low, new.high) == pytest.approx(expected, rel=0.03)
    assert new.log == dimension.log
    assert "bound" in change.reason


@pytest.mark.parametrize(
    ("name", "values", "dimension", "expected"),
    [
        ("lora_r", (16, 16, 16, 16, 16), Choices((4, 8, 16)), Choices((16, 32))),
        ("lora_r", (4, 8, 8, 8, 8), Choices((16, 8, 4)), Choices((8, 4, 2))),
        ("lora_r", (1, 2, 2, 2, 2), Choices((1, 2, 4)), Choices((1, 2))),
        ("lora_r", (8, 8, 8, 8, 8), Choices((4, 8, 16)), Fixed(8)),
        ("lora_r", (8, 8, 8, 8, 8), Choices((4, 8)), Fixed(8)),
        ("warmup_steps", (10, 10, 5, 5, 0), Choices((0, 5, 10)), Choices((0, 5, 10, 20))),
        ("warmup_steps", (20, 20, 20, 20, 20), Choices((5, 10, 20)), Choices((20, 40))),
        ("warmup_steps", (30, 30, 30, 30, 30), Choices((10, 20, 30)), Choices((30, 45))),
    ],
)
def test_a_list_gets_its_next_value_and_is_not_fixed(name, values, dimension, expected):
    assert plan(with_best_at(name, values, dimension), 120).space[name] == expected


@pytest.mark.parametrize(("initialisation", "ranks"), [("orthogonal", {2, 4}), ("gaussian", {1, 2, 4})])
def test_a_list_of_ranks_stays_even_where_the_initialisation_needs_it(initialisation, ranks):
    space = {**SPACE, "lora_r": Choices((2, 4, 8)), "lora_init": Fixed(initialisation)}
    trials = [a_trial(i, space, lora_r=2 if i < 3 else 4) for i in range(5)]
    promoted = plan(results_of(*trials, space=space, limits=LIMITS), 120).space["lora_r"]
    assert set(promoted.values) == ranks


def test_warmup_and_decay_are_widened_only_as_far_as_the_horizon_has_room():
    results = with_best_at("warmup_steps", (30, 30, 29, 29, 29), Range(0, 30, integer=True))
    assert plan(results, 120).space["warmup_steps"] == Range(27, 60, integer=True)
    assert plan(results, 60).space["warmup_steps"] == Range(27, 36, integer=True)
    decays = with_best_at("decay_steps", (50, 50, 50, 50, 50), Choices((10, 30, 50)))
    assert plan(decays, 120).space["decay_steps"] == Choices((20, 60, 100))
    assert max(plan(decays, 240).space["decay_steps"].values) <= 235


@heavy
@given(rounds(min_trials=1), st.data())
def test_whatever_is_at_an_edge_every_plan_fits_and_holds_what_is_enqueued(results, data):
    """Edges are given, at whatever side of whatever is searched; the values need not be there."""
    names = list(searched(results.space))
    assume(names)
    name = data.draw(st.sampled_from(names))
    dimension = results.space[name]
    sides = ["lower", "upper"]
    side = data.draw(st.sampled_from(sides))
    numeric = isinstance(dimension, Range) or all(isinstance(v, (int, float)) for v in dimension.values)
    assume(numeric and name not in ("batch_size", "training_seed"))
    bounds = (
        (dimension.low, dimension.high)
        if isinstance(dimension, Range)
        else (min(dimension.values), max(dimension.values))
    )
    bound = bounds[sides.index(side)]
    assume(bound != 0 and (isinstance(dimension, Range) or len(dimension.values) > 1))
    results = replace(results, limits=LIMITS)
    reading = replace(read_round(results), edges=(Edge(name, side, bound, bound),))
    horizon = data.draw(st.integers(results.evaluate_every, 4 * results.max_train_steps))
    try:
        promoted = plan_next_round(results, reading, to="round2", max_train_steps=horizon)
    except InputError:
        assume(False)
    for entry in promoted.enqueue:
        assert all(promoted.space[n].contains(v) for n, v in entry.hyperparameters.items())
        assert set(entry.hyperparameters) == set(searched(promoted.space))
    for each, (lowest, highest) in LIMITS.items():
        new = promoted.space.get(each)
        values = (new.low, new.high) if isinstance(new, Range) else getattr(new, "values", ())
        assert all(lowest <= v and (highest is None or v < highest) for v in values)


@heavy
@given(rounds(min_trials=1), st.integers(1, 4))
def test_only_the_best_that_beat_the_base_model_are_carried_over(results, multiple):
    try:
        promoted = plan(results, multiple * results.max_train_steps)
    except InputError:
        assume(False)
    carried = [results.trial(entry.trial) for entry in promoted.enqueue]
    assert all(trial.state == TrialState.COMPLETE and beats_the_base(trial) for trial in carried)
    assert len(carried) <= num_carried_over(len(results.results))
    if searched(promoted.space):
        most = max(len(results.results) or len(results.trials), len(carried) + 1)
        assert len(carried) < promoted.trials_total <= most


@given(st.integers(0, 200))
def test_three_or_half_of_a_small_round_are_carried_over(count):
    assert num_carried_over(count) == (3 if count >= 6 else max(1, count // 2))


def test_a_round_of_three_promotes_one_and_tries_two_new_ones():
    promoted = plan(results_of(*(a_trial(i) for i in range(3))), 180)
    assert (len(promoted.enqueue), promoted.trials_total) == (1, 3)


def test_trials_that_never_beat_the_base_model_stay_behind():
    never = [
        replace(a_trial(i), evaluations=(Evaluation(0, 1.0), *a_trial(i).evaluations[1:])) for i in range(3)
    ]
    assert {entry.trial for entry in plan(results_of(*never, a_trial(5), a_trial(6)), top=5).enqueue} == {
        5,
        6,
    }
    none = plan(results_of(*never))
    assert none.enqueue == ()
    assert none.space["learning_rate"] == SPACE["learning_rate"]


@given(horizon=st.integers(50, 500), share=st.floats(0.1, 0.9), multiple=st.floats(0.5, 3.0))
def test_the_share_of_the_decay_is_kept(horizon, share, multiple):
    decay, longer = round(share * horizon), round(multiple * horizon)
    space = {**SPACE, "decay_steps": Fixed(decay), "warmup_steps": Fixed(0)}
    results = replace(
        results_of(*(a_trial(i, space) for i in range(5)), space=space), max_train_steps=horizon
    )
    new = plan(results, longer).space["decay_steps"].value
    assert abs(new / longer - decay / horizon) <= 0.5 / longer + 1e-9


# --- what the user adds -----------------------------------------------------------------------------


def test_an_added_idea_is_searched_beside_the_incumbents_value():
    space = {**SPACE, "lora_dropout": Fixed(0.0)}
    promoted = plan(eight(space), added={"lora_dropout": Choices((0.05, 0.1))})
    change = promoted.changes["lora_dropout"]
    assert set(change.to_dimension.values) == {0.0, 0.05, 0.1}
    assert change.reason.startswith("added by --add")
    assert [entry.hyperparameters["lora_dropout"] for entry in promoted.enqueue] == [0.0] * 3
    assert [entry.from_step for entry in promoted.enqueue] == [36] * 3
    assert any("more steps may be needed" in note for note in promoted.notes)


def test_a_logarithmic_range_beside_zero_becomes_a_list():
    space = {**SPACE, "weight_decay": Fixed(0.0)}
    trials = [a_trial(i, space) for i in range(6)]
    trials = [replace(t, hyperparameters={**t.hyperparameters, "weight_decay": 0.0}) for t in trials]
    promoted = plan(results_of(*trials, space=space), added={"weight_decay": Range(1e-4, 1e-1, log=True)})
    values = promoted.space["weight_decay"].values
    assert values == (0.0, 1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1)
    assert "list" in promoted.changes["weight_decay"].reason


def test_another_optimizer_may_need_fewer_steps():
    space = {**SPACE, "optimizer": Fixed("adamw")}
    notes = plan(eight(space), added={"optimizer": Choices(("adamw", "adamw_8bit"))}).notes
    assert any("may need fewer steps" in note for note in notes)
    assert not any("fewer steps" in note for note in plan(eight(space)).notes)


def test_regularisation_before_the_training_set_is_fitted_will_hardly_help():
    space = {**SPACE, "lora_dropout": Fixed(0.0), "weight_decay": Fixed(0.0)}
    added = {"lora_dropout": Choices((0.0, 0.05))}

    def says_so(results: RoundResults) -> bool:
        return any("will probably not help yet" in note for note in plan(results, added=added).notes)

    results = eight(space)
    assert says_so(results)
    fitted = tuple(
        replace(t, evaluations=tuple(replace(e, train_loss=0.01 if e.step else None) for e in t.evaluations))
        for t in results.trials
    )
    assert not says_so(replace(results, trials=fitted))


def test_a_smaller_batch_than_before_may_need_more_steps():
    before = replace(eight({**SPACE, "batch_size": Fixed(16)}), name="round0")
    assert any("from 16 to 8" in note for note in plan(eight(), earlier=[before]).notes)
    assert not any("batch size" in note for note in plan(eight(), earlier=[eight()]).notes)


# --- what is searched again -------------------------------------------------------------------------


def overturned(*, factors: tuple = (1.0, 0.9, 0.8, 0.7)) -> tuple[RoundResults, RoundResults]:
    """A round, and a longer and narrowed one in which its order is turned round by these factors."""
    wide: Space = {**SPACE, "weight_decay": Fixed(0.0)}
    first = replace(results_of(*(a_trial(i, wide) for i in range(4)), space=wide), max_train_steps=30)
    narrow: Space = {**wide, "learning_rate": Range(2e-4, 9e-4, log=True), "lora_r": Fixed(16)}
    trials = [
        replace(
            trial,
            evaluations=tuple(
                replace(
                    e, eval_loss=e.eval_loss * factor, example_nll=tuple(n * factor for n in e.example_nll)
                )
                if e.step
                else e
                for e in trial.evaluations
            ),
        )
        for trial, factor in zip(first.trials, factors, strict=True)
    ]
    return first, replace(results_of(*trials, space=narrow), name="round2")


def test_what_was_narrowed_comes_back_where_the_earlier_order_did_not_hold():
    first, second = overturned()
    promoted = plan(second, earlier=[first])
    (finding,) = [f for f in promoted.findings if f.rule == "agreement"]
    assert finding.numbers["rank_correlation"] == pytest.approx(-1.0)
    assert promoted.space["learning_rate"].high >= SPACE["learning_rate"].high
    assert promoted.space["lora_r"] == SPACE["lora_r"]
    assert promoted.space["weight_decay"] == Fixed(0.0)
    assert "learning_rate, lora_r" in finding.message
    assert "stays fixed" in finding.message


def test_an_optimizer_that_comes_back_brings_its_own_hyperparameters():
    """As they were searched, or fixed at another value than the default."""
    muon, lion = Condition("optimizer", ("muon",)), Condition("optimizer", ("lion",))
    first, second = overturned()
    own = {
        "muon_momentum": Range(0.8, 0.99, only_with=muon),
        "lion_beta1": Fixed(0.5, only_with=lion),
        "lion_beta2": Fixed(HYPERPARAMETERS["lion_beta2"].default, only_with=lion),
    }
    wide = {**first.space, "optimizer": Choices(("adamw", "muon", "lion")), **own}
    promoted = plan(
        replace(second, space={**second.space, "optimizer": Fixed("adamw")}),
        earlier=[replace(first, space=wide)],
    )
    assert promoted.space["optimizer"] == wide["optimizer"]
    assert promoted.space["muon_momentum"] == own["muon_momentum"]
    assert promoted.space["lion_beta1"] == own["lion_beta1"]
    assert "lion_beta2" not in promoted.changes
    assert promoted.changes["muon_momentum"].from_dimension is None
    (finding,) = [f for f in promoted.findings if f.rule == "agreement"]
    assert "optimizer, muon_momentum, lion_beta1" in finding.message


def test_where_all_was_fixed_before_as_well_the_finding_says_why_nothing_comes_back():
    first, second = overturned()
    (finding,) = [
        f
        for f in plan(second, earlier=[replace(first, space=second.space)]).findings
        if f.rule == "agreement"
    ]
    assert "Nothing is searched again" in finding.message


def test_an_order_that_held_or_changed_within_the_noise_re_opens_nothing():
    first, held = overturned(factors=(1.0, 1.0, 1.0, 1.0))
    assert not [f for f in plan(held, earlier=[first]).findings if f.rule == "agreement"]
    _, swapped = overturned(factors=(1.0, 0.9, 0.8, 0.7))
    reading = replace(read_round(swapped), noise=0.5)
    promoted = plan_next_round(swapped, reading, to="round3", max_train_steps=120, earlier=[first])
    assert not [f for f in promoted.findings if f.rule == "agreement"]
    assert not [f for f in plan(swapped).findings if f.rule == "agreement"], "nothing to compare with"


def test_a_point_of_every_plan_is_complete():
    values = complete_hyperparameters(plan(eight()).space, plan(eight()).enqueue[0].hyperparameters)
    assert not any(isinstance(v, float) and math.isnan(v) for v in values.values())
