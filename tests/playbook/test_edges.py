from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.rows import round_of, trial_of
from tuner.playbook import Diagnosis, RoundResults, read_round
from tuner.playbook.edges import Edge, edges, num_widenings, rates_may_be_too_small
from tuner.playbook.spaces import beyond_edge
from tuner.records import Choices, Range, Space, Trial, TrialState

RATES = Range(1e-5, 1e-3, log=True)
GRID = tuple(range(0, 101, 5))


def falling(step: int) -> float:
    return 2.0 + (step + 5) ** -0.5


def round_with(space: Space, *trials: Trial, **fields) -> RoundResults:
    return round_of(*trials, space=space, evaluate_every=5, **fields)


def best_at(name: str, value, **others) -> Trial:
    return trial_of(0, falling, steps=GRID, **{name: value, **others})


def by_rate(*losses_by_rate: tuple[float, float | None], **fields) -> RoundResults:
    """Trials by their rate and what their loss ends above 2; None for one that diverged."""
    trials = []
    for number, (rate, excess) in enumerate(losses_by_rate):
        state = TrialState.INFEASIBLE if excess is None else TrialState.COMPLETE
        more = excess or 0.0
        trials.append(
            trial_of(
                number,
                lambda s, m=more: falling(s) + m * (s > 0),
                steps=GRID,
                state=state,
                learning_rate=rate,
            )
        )
    return round_with({"learning_rate": RATES}, *trials, **fields)


@pytest.mark.parametrize(
    ("name", "dimension", "value", "side"),
    [
        ("learning_rate", RATES, 9e-4, "upper"),
        ("learning_rate", RATES, 1.2e-5, "lower"),
        ("learning_rate", RATES, 1e-4, None),
        ("lora_r", Choices((4, 8, 16)), 16, "upper"),
        ("lora_r", Choices((16, 4, 8)), 4, "lower"),
        ("lora_r", Choices((4, 8, 16)), 8, None),
        ("lora_r", Choices((4, 8)), 8, None),
        ("lora_r", Range(4, 64, log=True, integer=True), 64, "upper"),
        ("warmup_steps", Range(0, 20, integer=True), 20, "upper"),
        ("warmup_steps", Range(0, 20, integer=True), 0, None),
        ("weight_decay", Choices((0.0, 0.01, 0.1)), 0.0, None),
        ("lora_dropout", Choices((0.0, 0.05, 0.1)), 0.1, "upper"),
        ("lora_r", Choices((1, 2, 4)), 1, None),
        ("adam_beta1", Range(0.8, 1.0), 1.0, None),
        ("batch_size", Choices((8, 16, 32)), 32, None),
        ("optimizer", Choices(("adamw", "adamw_8bit", "sgd")), "sgd", None),
        ("use_dora", Choices((True, False)), True, None),
    ],
)
def test_edges_are_of_ranges_integers_and_lists_of_three_numbers(name, dimension, value, side):
    trial = best_at(name, value)
    limits = {"lora_r": (1, None), "adam_beta1": (0, 1), "warmup_steps": (0, None)}
    found = edges(round_with({name: dimension}, trial, limits=limits), trial)
    assert [edge.side for edge in found] == ([] if side is None else [side])


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([(1e-5, 0.3), (1e-4, 0.2), (9.9e-4, 0.1)], True),  # at the bound
        ([(1e-5, 0.3), (9.9e-4, 0.1)], True),
        ([(1e-5, 0.3), (5e-5, 0.2), (2e-4, 0.1)], True),  # in order, far from the bound
        ([(1e-5, 0.2), (5e-5, 0.3), (2e-4, 0.1)], False),
        ([(5e-5, 0.2), (2e-4, 0.1)], False),  # two are no order
        ([(1e-5, 0.3), (5e-5, 0.1), (2e-4, 0.2)], False),
        ([(1e-5, 0.3), (5e-5, 0.2), (2e-4, 0.1), (9e-4, None)], False),  # above it a trial diverged
        ([(1e-5, 0.3), (9.5e-4, 0.1), (9.9e-4, None)], False),
        ([(1e-5, 0.4), (5e-5, 0.2), (2e-4, 0.1), (2e-4, 0.3)], True),  # of one rate the best counts
    ],
)
def test_rates_may_all_be_too_small(rates, expected):
    results = by_rate(*rates)
    best = min(results.complete, key=lambda trial: trial.evaluations[-1].eval_loss)
    assert rates_may_be_too_small(results, best) is expected


def test_a_fixed_rate_is_no_edge():
    results = replace(by_rate((1e-5, 0.3), (1e-4, 0.2), (9.9e-4, 0.1)), space={})
    assert not rates_may_be_too_small(results, results.trials[2])


def test_all_rates_too_small_keep_the_horizon_and_say_why():
    """Every run falls evenly to its end, the faster the higher its rate."""
    trials = [
        trial_of(i, lambda s, i=i: 3.0 - 0.001 * (i + 1) * s, steps=GRID, learning_rate=rate)
        for i, rate in enumerate((1e-5, 1e-4, 9.9e-4))
    ]
    results = round_with({"learning_rate": RATES}, *trials)
    reading = read_round(results)
    assert (reading.diagnosis, reading.widens_rates) == (Diagnosis.TOO_SHORT, True)
    assert reading.suggested_max_train_steps == 100
    diverged = trial_of(3, lambda s: 9.0, steps=GRID, learning_rate=9.99e-4, state=TrialState.INFEASIBLE)
    unstable = read_round(replace(results, trials=(*trials, diverged)))
    assert (unstable.widens_rates, unstable.suggested_max_train_steps) == (False, 300)


def test_a_study_keeps_its_horizon_for_higher_rates_twice():
    def round_at(high: float, *, horizon: int = 100, workload: str = "w") -> RoundResults:
        space = {"learning_rate": Range(1e-5, high, log=True)}
        return round_of(max_train_steps=horizon, space=space, workload=workload)

    assert num_widenings(round_at(1e-3), []) == 0
    assert num_widenings(round_at(1e-2), [round_at(1e-3)]) == 1
    assert num_widenings(round_at(1e-1), [round_at(1e-3), round_at(1e-2)]) == 2
    assert num_widenings(round_at(1e-2), [round_at(1e-3, horizon=50)]) == 0
    assert num_widenings(round_at(1e-2), [round_at(1e-3, workload="v")]) == 0
    assert num_widenings(round_at(2e-3), [round_at(1e-3)]) == 0
    assert num_widenings(round_at(1e-2), [round_at(1e-2), round_at(1e-3)]) == 1


NONE = (None, None)


@pytest.mark.parametrize(
    ("old", "side", "limits", "expected"),
    [
        (RATES, "upper", NONE, Range(1e-5, 1e-2, log=True)),
        (RATES, "lower", NONE, Range(1e-6, 1e-3, log=True)),
        (Range(0.0, 0.1), "upper", NONE, Range(0.0, 0.2)),
        (Range(0.5, 0.6), "lower", (0, 1), Range(0.4, 0.6)),
        (Range(0.1, 0.5), "lower", (0, 1), Range(0.01, 0.5)),
        (Range(0.8, 0.95), "upper", (0, 1), Range(0.8, 0.975)),
        (Range(4, 16, integer=True), "upper", (1, None), Range(4, 28, integer=True)),
        (Range(4, 16, log=True, integer=True), "lower", (1, None), Range(1, 16, log=True, integer=True)),
        (Choices((4, 8, 16)), "upper", (1, None), Choices((4, 8, 16, 32))),
        (Choices((4, 8, 16)), "lower", (1, None), Choices((2, 4, 8, 16))),
        (Choices((0.0, 0.05, 0.1)), "upper", (0, 1), Choices((0.0, 0.05, 0.1, 0.2))),
        (Choices((0.5, 0.7, 0.9)), "upper", (0, 1), Choices((0.5, 0.7, 0.9))),
    ],
)
def test_a_dimension_is_widened_at_its_edge(old, side, limits, expected):
    assert beyond_edge(old, Edge("name", side, 0.0, 0.0), limits) == expected


@given(
    low=st.floats(1e-6, 10),
    factor=st.floats(1.1, 1000),
    log=st.booleans(),
    side=st.sampled_from(["lower", "upper"]),
)
def test_a_widened_range_holds_the_old_one_and_more(low, factor, log, side):
    old = Range(low, low * factor, log=log)
    new = beyond_edge(old, Edge("name", side, 0.0, 0.0), NONE)
    assert isinstance(new, Range)
    # The bounds that are written have two digits.
    assert new.low <= old.low * 1.05
    assert new.high >= old.high * 0.95
    assert new.high > old.high * 1.04 if side == "upper" else new.low < old.low
