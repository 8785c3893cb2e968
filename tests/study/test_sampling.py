"""Optuna as an adviser: proposals that survive crashes, infeasible regions that are learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.config import SearchSpec
from tuner.playbook.observations import outcomes
from tuner.records import (
    AnswerScore,
    Choices,
    Condition,
    Evaluation,
    Fixed,
    Hyperparameters,
    Range,
    Space,
    Trial,
    TrialState,
    Value,
    num_points,
)
from tuner.study.points import quasi_random_point
from tuner.study.sampling import MAX_REPORTS, Advisor, StudyStorage, optuna_storage, shown_steps

SPACE: Space = {
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "lora_r": Choices((8, 16, 32)),
    "warmup_steps": Range(0, 10, integer=True),
    "target_modules": Choices(("all-linear", ("q_proj", "v_proj"))),
    "optimizer": Fixed("adamw"),
}


@pytest.fixture
def storage(tmp_path: Path) -> optuna.storages.BaseStorage:
    return optuna_storage(f"sqlite:///{tmp_path / 'tuner.db'}")


def advisor(storage: optuna.storages.BaseStorage, space: Space = SPACE, **search: Any) -> Advisor:
    return Advisor(storage, "study/round1", space, SearchSpec(**{"trials": 8, **search}), max_train_steps=10)


def proposed_points(adviser: Advisor, num: int, known: Sequence[Trial] = ()) -> list[dict[str, Value]]:
    """The next points of a round whose trials all end complete."""
    found = list(known)
    for ordinal in range(len(found), len(found) + num):
        proposal = adviser.propose(ordinal, found)
        found.append(
            trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, 1 + 0.01 * ordinal)
        )
    return [dict(done.hyperparameters) for done in found[len(known) :]]


def trial(
    number: int, optuna_trial: int, state: TrialState, chosen: Hyperparameters, loss: float = 1.0
) -> Trial:
    evaluations = (Evaluation(0, 3.0), Evaluation(5, loss))
    return Trial("round1", number, dict(chosen), state, evaluations=evaluations, optuna_trial=optuna_trial)


@pytest.mark.parametrize("sampler", ["quasi-random", "tpe", "gp", "random"])
def test_every_proposal_lies_in_the_space(storage: optuna.storages.BaseStorage, sampler: str) -> None:
    adviser = advisor(storage, sampler=sampler)
    known: list[Trial] = []
    for ordinal in range(6):
        proposal = adviser.propose(ordinal, known)
        assert set(proposal.chosen) == {"learning_rate", "lora_r", "warmup_steps", "target_modules"}
        assert all(SPACE[name].contains(value) for name, value in proposal.chosen.items())
        known.append(
            trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, 1 + 0.1 * ordinal)
        )
        adviser.tell(known[-1], max_train_steps=10)


@pytest.mark.parametrize("sampler", ["quasi-random", "tpe", "random", "gp"])
def test_a_resumed_round_repeats_no_proposal(storage: optuna.storages.BaseStorage, sampler: str) -> None:
    proposals = []
    known: list[Trial] = []
    for ordinal in range(5):
        adviser = advisor(storage, sampler=sampler)  # as a new process would
        proposal = adviser.propose(ordinal, known)
        proposals.append(tuple(proposal.chosen.values()))
        known.append(
            trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, 1 + 0.1 * ordinal)
        )
    assert len(set(proposals)) == 5


def test_quasi_random_points_do_not_depend_on_what_crashes_left(
    storage: optuna.storages.BaseStorage, tmp_path: Path
) -> None:
    undisturbed = advisor(optuna_storage(f"sqlite:///{tmp_path / 'other.db'}"))
    expected = [dict(undisturbed.propose(ordinal).chosen) for ordinal in range(4)]
    disturbed = advisor(storage)
    known: list[Trial] = []
    found = []
    for ordinal in range(4):
        disturbed.propose(ordinal)  # a crash after ask: no fact of it
        disturbed.heal(known, max_train_steps=10)
        proposal = disturbed.propose(ordinal)
        found.append(dict(proposal.chosen))
        known.append(trial(ordinal, proposal.optuna_trial, TrialState.RUNNING, proposal.chosen))
    assert found == expected


def test_quasi_random_points_cover_each_range_evenly() -> None:
    space = {"learning_rate": Range(1e-5, 1e-2, log=True), "lora_r": Choices((8, 16, 32, 64))}
    points = [quasi_random_point(space, seed=0, place=place) for place in range(16)]
    eighths = sorted(int(8 * (math.log10(float(p["learning_rate"])) + 5) / 3) for p in points)
    assert eighths == sorted([*range(8), *range(8)])
    assert all(sum(p["lora_r"] == rank for p in points) == 4 for rank in (8, 16, 32, 64))


def test_enqueued_values_come_first_and_the_sampler_fills_the_rest(
    storage: optuna.storages.BaseStorage,
) -> None:
    enqueue = [
        {"learning_rate": 2e-4, "lora_r": 16, "continues": "round0/3"},
        {"lora_r": 8, "target_modules": ["q_proj", "v_proj"]},
    ]
    for sampler in ("quasi-random", "tpe"):
        adviser = Advisor(
            storage,
            sampler,
            SPACE,
            SearchSpec(trials=8, sampler=sampler, enqueue=enqueue),
            max_train_steps=10,
        )  # type: ignore[arg-type]
        first, second = adviser.propose(0), adviser.propose(1)
        assert (first.chosen["learning_rate"], first.chosen["lora_r"]) == (2e-4, 16)
        assert (second.chosen["lora_r"], second.chosen["target_modules"]) == (8, ("q_proj", "v_proj"))
        assert set(first.chosen) == set(second.chosen) == set(SPACE) - {"optimizer"}
        assert SPACE["learning_rate"].contains(second.chosen["learning_rate"])


def test_what_is_enqueued_takes_no_place_of_the_quasi_random_sequence() -> None:
    space: Space = {"learning_rate": Range(1e-5, 1e-2, log=True), "lora_r": Choices((8, 16))}
    whole = {"learning_rate": 1e-4, "lora_r": 8}
    for enqueue in ([], [whole], [whole, {"lora_r": 16}]):
        adviser = advisor(optuna.storages.InMemoryStorage(), space, enqueue=enqueue, seed=3)
        new = [dict(adviser.propose(len(enqueue) + place).chosen) for place in range(2)]
        assert new == [quasi_random_point(space, seed=3, place=place) for place in range(2)]
    filled = adviser.propose(1).chosen
    assert filled == {**quasi_random_point(space, seed=4, place=1), "lora_r": 16}


def test_random_points_of_two_seeds_have_none_in_common() -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    advisers = [advised(space, (), sampler="random", seed=seed) for seed in range(2)]
    assert len({adviser.propose(n).chosen["learning_rate"] for adviser in advisers for n in range(3)}) == 6


def test_a_grid_gives_every_point_once_and_survives_its_last(storage: optuna.storages.BaseStorage) -> None:
    space: Space = {"learning_rate": Choices((1e-4, 1e-3)), "lora_r": Choices((8, 16))}
    adviser = Advisor(storage, "grid", space, SearchSpec(trials=9, sampler="grid"), max_train_steps=10)
    assert adviser.num_points == 4
    points = []
    for ordinal in range(4):
        proposal = adviser.propose(ordinal)
        points.append((proposal.chosen["learning_rate"], proposal.chosen["lora_r"]))
        adviser.tell(
            trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen), max_train_steps=10
        )
    assert len(set(points)) == 4


def test_a_grid_begins_after_what_is_enqueued() -> None:
    space: Space = {"learning_rate": Choices((1e-4, 1e-3)), "lora_r": Choices((8, 16))}
    enqueue = [{"learning_rate": 1e-3}]
    adviser = advisor(optuna.storages.InMemoryStorage(), space, sampler="grid", enqueue=enqueue)
    assert adviser.num_points == 4
    points = [tuple(p.values()) for p in proposed_points(adviser, 4)]
    assert points == [(1e-3, 8), (1e-4, 8), (1e-4, 16), (1e-3, 16)]


SAMPLERS = ("quasi-random", "random", "tpe", "gp", "grid")
FINITE: dict[str, Space] = {
    "two ranks": {"lora_r": Choices((4, 8)), "optimizer": Fixed("adamw")},
    "three ranks": {"lora_r": Choices((4, 8, 16))},
    "nothing searched": {"lora_r": Fixed(8)},
    "seeds": {"lora_r": Choices((4, 8)), "training_seed": Choices((0, 1, 2))},
    "names and lists": {
        "target_modules": Choices(("all-linear", ("q_proj", "v_proj"))),
        "lora_r": Choices((4, 8)),
    },
    "whole numbers": {"warmup_steps": Range(3, 9, integer=True)},
    "whole numbers by their logarithm": {"lora_r": Range(1, 12, log=True, integer=True)},
}


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_finite_space_is_gone_through_without_repeating_a_point(sampler: str, name: str) -> None:
    space = FINITE[name]
    if sampler == "grid" and any(isinstance(dimension, Range) for dimension in space.values()):
        pytest.skip("a grid has no ranges")
    adviser = advisor(optuna.storages.InMemoryStorage(), space, sampler=sampler, trials=20)
    points = proposed_points(adviser, int(num_points(space)))
    assert adviser.num_points == len(points) == len({tuple(point.items()) for point in points})
    assert all(space[key].contains(value) for point in points for key, value in point.items())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("state", list(TrialState))
def test_a_point_that_has_its_trial_is_taken_whatever_became_of_it(state: TrialState, sampler: str) -> None:
    """Those that run beside, too. A failed trial is repeated by `again` alone."""
    space: Space = {"lora_r": Choices((4, 8))}
    for rank, other in ((4, 8), (8, 4)):
        adviser = advisor(optuna.storages.InMemoryStorage(), space, sampler=sampler)
        assert adviser.propose(1, [trial(0, 0, state, {"lora_r": rank})]).chosen == {"lora_r": other}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_enqueued_is_tried_before_it_has_run(sampler: str) -> None:
    """Of two entries of one name each, and a whole one that comes last: three of four points."""
    space: Space = {"lora_r": Choices((4, 8)), "lora_dropout": Choices((0.0, 0.1))}
    enqueue = [{"lora_r": 8}, {"lora_r": 4}, {"lora_r": 8, "lora_dropout": 0}]
    for seed in range(4):
        adviser = advisor(
            optuna.storages.InMemoryStorage(), space, sampler=sampler, enqueue=enqueue, seed=seed
        )
        first, second, third, last = proposed_points(adviser, 4)
        assert first == {"lora_r": 8, "lora_dropout": 0.1}
        assert second["lora_r"] == last["lora_r"] == 4
        assert third == enqueue[2]
        assert second["lora_dropout"] != last["lora_dropout"]


def test_an_entry_whose_points_are_all_taken_is_another_point() -> None:
    """Which entry leaves which point is decided one by one, so that the last may find none."""
    space: Space = {"lora_r": Choices((4, 8)), "lora_dropout": Choices((0.0, 0.1))}
    enqueue = [{"lora_r": 4}, {"lora_r": 4}, {"lora_dropout": 0.1}, {"lora_dropout": 0.0}]
    for seed in range(6):
        points = proposed_points(
            advisor(optuna.storages.InMemoryStorage(), space, enqueue=enqueue, seed=seed), 4
        )
        assert len({tuple(sorted(point.items())) for point in points}) == 4


@pytest.mark.parametrize("sampler", ["quasi-random", "random", "tpe"])
@settings(max_examples=25, deadline=None)
@given(
    ranks=st.integers(1, 4),
    warmups=st.integers(1, 5),
    log=st.booleans(),
    seed=st.integers(0, 100),
    killed=st.integers(0, 8),
)
def test_a_killed_round_goes_on_with_the_points_that_it_would_have_tried(
    sampler: str, ranks: int, warmups: int, log: bool, seed: int, killed: int
) -> None:
    space: Space = {
        "lora_r": Choices(tuple(4 * 2**n for n in range(ranks))),
        "warmup_steps": Range(1, 1 + warmups, log=log, integer=True),
    }

    def adviser() -> Advisor:
        return advisor(optuna.storages.InMemoryStorage(), space, sampler=sampler, seed=seed)

    total = int(num_points(space))
    assert total == ranks * (warmups + 1)
    whole = proposed_points(adviser(), total)
    assert len({tuple(point.items()) for point in whole}) == total
    begun = min(killed, total)
    known = [trial(n, n, TrialState.COMPLETE, point, 1 + 0.01 * n) for n, point in enumerate(whole[:begun])]
    assert proposed_points(adviser(), total - begun, known) == whole[begun:]


@pytest.mark.parametrize("sampler", ["quasi-random", "random", "tpe", "grid"])  # gp begins with 8 anyway
def test_points_that_a_round_of_the_same_length_has_run_come_last(sampler: str) -> None:
    """Of any other length, or with other values of what is fixed, they are trials of their own."""
    space: Space = {"lora_r": Choices((4, 8, 16)), "lora_dropout": Fixed(0.1)}

    def first_of(seed: int, *, dropout: float, horizon: int) -> Value:
        ran = [
            Trial(
                "round0",
                n,
                {"lora_r": rank, "lora_dropout": dropout},
                TrialState.COMPLETE,
                evaluations=(Evaluation(5, 1.0),),
            )
            for n, rank in enumerate((4, 16))
        ]
        adviser = Advisor(
            optuna.storages.InMemoryStorage(),
            "study/round1",
            space,
            SearchSpec(trials=3, sampler=sampler, seed=seed),  # type: ignore[arg-type]
            max_train_steps=15,
            earlier=outcomes(ran, max_train_steps=horizon),
        )
        points = proposed_points(adviser, 3)
        assert {point["lora_r"] for point in points} == {4, 8, 16}
        return points[0]["lora_r"]

    others = set()
    for seed in range(6):
        assert first_of(seed, dropout=0.1, horizon=15) == 8
        others |= {first_of(seed, dropout=0.1, horizon=5), first_of(seed, dropout=0.2, horizon=15)}
    assert others - {8}


def test_a_large_space_of_whole_numbers_is_not_listed() -> None:
    space: Space = {"lora_r": Range(1, 10**9, integer=True), "warmup_steps": Range(0, 10**9, integer=True)}
    adviser = advisor(optuna.storages.InMemoryStorage(), space, enqueue=[{"lora_r": 7}])
    assert adviser.num_points == 10**9 * (10**9 + 1)
    assert len({tuple(point.items()) for point in proposed_points(adviser, 8)}) == 8


def test_a_rare_value_of_a_finite_space_is_found() -> None:
    """One that a thousand random points would mostly miss."""
    space: Space = {"lora_r": Range(1, 4000, log=True, integer=True)}
    adviser = advisor(optuna.storages.InMemoryStorage(), space)
    known = [
        trial(n, n, TrialState.COMPLETE, {"lora_r": rank})
        for n, rank in enumerate(rank for rank in range(1, 4001) if rank != 3999)
    ]
    assert adviser.propose(3999, known).chosen == {"lora_r": 3999}


def test_a_failed_trial_is_asked_again_with_the_same_values(storage: optuna.storages.BaseStorage) -> None:
    adviser = advisor(storage, sampler="tpe")
    first = adviser.propose(0)
    adviser.tell(trial(0, first.optuna_trial, TrialState.FAILED, first.chosen), max_train_steps=10)
    again = adviser.propose(1, again=first.chosen)
    assert again.chosen == first.chosen
    assert again.optuna_trial != first.optuna_trial


@pytest.mark.parametrize(("sampler", "state"), [("tpe", "PRUNED"), ("gp", "COMPLETE")])
def test_infeasible_is_told_so_that_each_sampler_learns_from_it(
    storage: optuna.storages.BaseStorage, sampler: str, state: str
) -> None:
    adviser = advisor(storage, sampler=sampler)
    good = adviser.propose(0)
    adviser.tell(trial(0, good.optuna_trial, TrialState.COMPLETE, good.chosen, 1.5), max_train_steps=10)
    bad = adviser.propose(1)
    adviser.tell(trial(1, bad.optuna_trial, TrialState.INFEASIBLE, bad.chosen, math.nan), max_train_steps=10)
    frozen = adviser.study.trials[bad.optuna_trial]
    assert frozen.state.name == state
    assert frozen.constraints["feasible"] == 1.0
    # What optuna-dashboard's best-trial card reads.
    assert frozen.system_attrs["constraints"] == [1.0]
    assert adviser.study.best_trial.number == good.optuna_trial


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tpe_learns_an_infeasible_region(seed: int) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    adviser = advisor(optuna.storages.InMemoryStorage(), space, trials=24, sampler="tpe", seed=seed)
    known: list[Trial] = []
    for ordinal in range(24):
        proposal = adviser.propose(ordinal, known)
        rate = float(proposal.chosen["learning_rate"])  # type: ignore[arg-type]
        # The loss improves towards the wall at 0.5, behind which nothing fits.
        state = TrialState.INFEASIBLE if rate > 0.5 else TrialState.COMPLETE
        known.append(trial(ordinal, proposal.optuna_trial, state, proposal.chosen, 1 - rate))
    infeasible = sum(t.state == TrialState.INFEASIBLE for t in known)
    assert infeasible <= 11  # of 10 random ones about 5; where they are not learned, most of the others


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_an_infeasible_region_of_an_earlier_round_is_kept_out_of(sampler: str) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    earlier = earlier_trials([(n / 16, math.inf if n > 8 else 2 - n / 16) for n in range(16)])
    adviser = advised(space, earlier, sampler=sampler)
    rates = [float(adviser.propose(n).chosen["learning_rate"]) for n in range(3)]  # type: ignore[arg-type]
    assert max(rates) <= 0.6


def earlier_trials(
    found: list[tuple[float, float]], *, round_name: str = "round0", **others: Any
) -> tuple[Trial, ...]:
    """Complete trials by rate and loss, with these other values; infeasible where the loss is infinite."""
    return tuple(
        Trial(
            round_name,
            number,
            {"learning_rate": rate, **others},
            TrialState.COMPLETE if math.isfinite(loss) else TrialState.INFEASIBLE,
            evaluations=(Evaluation(5, loss),),
        )
        for number, (rate, loss) in enumerate(found)
    )


def advised(space: Space, earlier: tuple[Trial, ...], **search: Any) -> Advisor:
    return Advisor(
        optuna.storages.InMemoryStorage(),
        "study/round1",
        space,
        SearchSpec(**{"trials": 8, **search}),
        max_train_steps=15,
        earlier=outcomes(earlier, max_train_steps=5),
    )


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_round_is_advised_by_earlier_ones_and_shows_none_of_their_trials(sampler: str) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    earlier = earlier_trials([(n / 20, 1 + abs(n / 20 - 0.3)) for n in range(20)])
    adviser = advised(space, earlier, sampler=sampler)
    proposals = [adviser.propose(ordinal) for ordinal in range(3)]
    rates = [float(p.chosen["learning_rate"]) for p in proposals]  # type: ignore[arg-type]
    assert sum(abs(rate - 0.3) < 0.2 for rate in rates) >= 2
    assert [p.optuna_trial for p in proposals] == [0, 1, 2]
    assert len(adviser.study.trials) == 3
    again = advised(space, earlier, sampler=sampler)
    assert [again.propose(ordinal).chosen for ordinal in range(3)] == [p.chosen for p in proposals]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_what_runs_outside_of_the_space_is_no_obstacle(sampler: str) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    earlier = earlier_trials([(n / 20, 1 + abs(n / 20 - 0.3)) for n in range(20)])
    outside = trial(0, 0, TrialState.RUNNING, {"learning_rate": 40.0})
    adviser = advised(space, earlier, sampler=sampler)
    alone = advised(space, earlier, sampler=sampler)
    assert adviser.propose(1, [outside]).chosen == alone.propose(1).chosen


RATES = (0.02, 0.13, 0.22, 0.35, 0.41, 0.58, 0.77, 0.93)


def near(best: float, *rates: float) -> list[tuple[float, float]]:
    return [(rate, 1 + abs(rate - best)) for rate in rates]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_model_is_asked_once_half_of_the_round_is_known(sampler: str) -> None:
    """Before that it is a random point; what is enqueued counts as if it were known."""
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    anywhere = advised(space, (), sampler="random").propose(7).chosen
    queue = [{"learning_rate": 0.5}] * 6
    for enqueue, known, is_random in (([], 3, True), ([], 4, False), (queue, 5, True), (queue, 6, False)):
        adviser = advised(space, earlier_trials(near(0.3, *RATES[:known])), sampler=sampler, enqueue=enqueue)
        assert (adviser.propose(7).chosen == anywhere) == is_random


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_only_what_lies_in_the_space_is_known(sampler: str) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0), "lora_r": Choices((8, 16))}
    inside = earlier_trials(near(0.3, *RATES), lora_r=8)
    beside = earlier_trials(near(0.3, 1.5, -0.2), round_name="wider", lora_r=16)
    without = earlier_trials(near(0.3, 0.3), round_name="other")
    alone, among = (
        advised(space, known, sampler=sampler).propose(8).chosen
        for known in (inside, (*inside, *beside, *without))
    )
    assert among == alone


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_what_runs_beside_is_kept_away_from_and_what_is_complete_is_learned_from(sampler: str) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    earlier = earlier_trials(near(0.3, *RATES))

    def proposed(*trials: Trial, seed: int = 0, known: tuple[Trial, ...] = ()) -> float:
        outcomes_before = (*outcomes(earlier, max_train_steps=5), *outcomes(known, max_train_steps=15))
        search = SearchSpec(trials=8, sampler=sampler, seed=seed)  # type: ignore[arg-type]
        storage = optuna.storages.InMemoryStorage()
        adviser = Advisor(storage, "study", space, search, max_train_steps=15, earlier=outcomes_before)
        return float(adviser.propose(12, trials).chosen["learning_rate"])  # type: ignore[arg-type]

    def of_round(state: TrialState, *rates: float) -> list[Trial]:
        return [
            trial(n, n, state, {"learning_rate": rate}, 1 + abs(rate - 0.3)) for n, rate in enumerate(rates)
        ]

    alone = proposed()
    running = of_round(TrialState.RUNNING, alone)
    assert abs(alone - 0.3) < 0.15
    assert abs(proposed(*running) - alone) > 1e-3
    assert proposed(*running, seed=1) != proposed(*running)
    assert abs(proposed(*of_round(TrialState.RUNNING, 0.9, 0.91, 0.92)) - 0.3) < 0.15
    complete = of_round(TrialState.COMPLETE, 0.29, 0.31, 0.3)
    assert proposed(*complete) == proposed(known=tuple(complete))


def test_telling_and_reporting_again_changes_nothing(storage: optuna.storages.BaseStorage) -> None:
    adviser = advisor(storage)
    proposal = adviser.propose(0)
    done = trial(0, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, 1.25)
    for _ in range(2):
        for evaluation in done.evaluations:
            if adviser.study.trials[0].state == optuna.trial.TrialState.RUNNING:
                adviser.report(done, evaluation, (0, 5))
        adviser.tell(done, max_train_steps=10)
    frozen = adviser.study.trials[0]
    assert frozen.value == 1.25
    assert frozen.intermediate_values == {0: 3.0, 5: 1.25}
    assert frozen.user_attrs["best_step"] == 5
    assert frozen.user_attrs["best_step_fraction"] == 0.5


def test_a_loss_that_is_not_finite_is_not_shown() -> None:
    adviser = advisor(optuna.storages.InMemoryStorage())
    proposal = adviser.propose(0)
    running = trial(0, proposal.optuna_trial, TrialState.RUNNING, proposal.chosen)
    for step, loss in ((0, 3.0), (5, math.nan), (10, math.inf)):
        adviser.report(running, Evaluation(step, loss), (0, 5, 10))
    assert adviser.study.trials[0].intermediate_values == {0: 3.0}


def test_the_objective_is_the_best_evaluation_and_not_the_last(storage: optuna.storages.BaseStorage) -> None:
    adviser = advisor(storage)
    proposal = adviser.propose(0)
    curve = (Evaluation(0, 3.0), Evaluation(5, 1.0), Evaluation(10, 2.0))
    done = Trial("round1", 0, dict(proposal.chosen), TrialState.COMPLETE, evaluations=curve, optuna_trial=0)
    adviser.tell(done, max_train_steps=10)
    assert adviser.study.best_value == 1.0


def test_healing_ends_zombies_and_tells_what_was_not_told(storage: optuna.storages.BaseStorage) -> None:
    adviser = advisor(storage)
    told = adviser.propose(0)
    adviser.propose(1)  # asked, never recorded
    adviser.study.enqueue_trial({"learning_rate": 1e-3})  # enqueued, never asked
    running = adviser.propose(2)
    facts = [
        trial(0, told.optuna_trial, TrialState.COMPLETE, told.chosen),
        trial(1, running.optuna_trial, TrialState.WAITING, running.chosen),
    ]
    advisor(storage).heal(facts, max_train_steps=10)
    states = {t.number: t.state.name for t in adviser.study.trials}
    assert states.pop(told.optuna_trial) == "COMPLETE"
    assert states.pop(running.optuna_trial) == "RUNNING"
    assert set(states.values()) == {"FAIL"}


def test_at_most_twenty_evaluations_of_a_trial_are_shown() -> None:
    planned = tuple(range(0, 1001, 5))
    shown = shown_steps(planned)
    assert len(shown) == MAX_REPORTS
    assert {0, 1000} <= shown <= set(planned)
    assert shown_steps((0, 5, 10)) == {0, 5, 10}


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_answers_as_the_objective_are_maximised_and_shown_as_they_are(sampler: str) -> None:
    """Whatever the losses say: here they fall where answers get worse."""
    space: Space = {"learning_rate": Range(0.0, 1.0)}

    def answering(round: str, number: int, rate: float, optuna_trial: int | None = None) -> Trial:
        score = AnswerScore(5, "exact_match", 1 - abs(rate - 0.7), 0.01, 50, is_objective=True)
        evaluations, values = (Evaluation(5, 1 + rate),), {"learning_rate": rate}
        state = TrialState.COMPLETE
        return Trial(
            round,
            number,
            values,
            state,
            evaluations=evaluations,
            optuna_trial=optuna_trial,
            answer_score=score,
        )

    earlier = tuple(answering("round0", n, n / 20) for n in range(20))
    adviser = Advisor(
        optuna.storages.InMemoryStorage(),
        "study/round1",
        space,
        SearchSpec(trials=8, sampler=sampler),
        max_train_steps=15,
        earlier=outcomes(earlier, max_train_steps=5),
        objective="answers",
    )
    proposals = [adviser.propose(ordinal) for ordinal in range(3)]
    rates = [float(p.chosen["learning_rate"]) for p in proposals]  # type: ignore[arg-type]
    assert sum(abs(rate - 0.7) < 0.2 for rate in rates) >= 2
    adviser.tell(answering("round1", 0, 0.6, proposals[0].optuna_trial), max_train_steps=15)
    diverged = trial(1, proposals[1].optuna_trial, TrialState.INFEASIBLE, proposals[1].chosen)
    adviser.report(diverged, diverged.evaluations[0], (0, 5))
    adviser.tell(diverged, max_train_steps=15)
    told, infeasible, _ = adviser.study.trials
    assert (adviser.study.direction.name, adviser.study.metric_names) == ("MAXIMIZE", ["answer score"])
    assert told.value == pytest.approx(0.9)
    assert told.user_attrs["answers"] == "50 by exact_match"
    assert (infeasible.state.name, infeasible.value) == ("PRUNED", None)
    assert adviser.study.best_trial.number == told.number


def test_equal_answers_are_parted_by_their_losses() -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    score = AnswerScore(5, "exact_match", 0.5, 0.01, 50, is_objective=True)
    found = earlier_trials([(n / 20, 1 + abs(n / 20 - 0.7)) for n in range(20)])
    equal = outcomes([replace(t, answer_score=score) for t in found], max_train_steps=5)
    adviser = Advisor(
        optuna.storages.InMemoryStorage(),
        "study",
        space,
        SearchSpec(trials=8, sampler="tpe"),
        max_train_steps=5,
        earlier=equal,
        objective="answers",
    )
    rates = [float(adviser.propose(n).chosen["learning_rate"]) for n in range(3)]  # type: ignore[arg-type]
    assert all(abs(rate - 0.7) < 0.2 for rate in rates)


def test_optuna_takes_the_database_that_the_facts_are_in(tmp_path: Path) -> None:
    """However the round file writes its URL: a driver that is not ours may not be installed."""
    url = f"sqlite+pysqlite:///{tmp_path}/deeper/../tuner.db"
    for storage in (optuna_storage(url), StudyStorage(url, "tiny")):
        assert storage.url == f"sqlite:///{tmp_path}/tuner.db"
        storage.engine.dispose()


CONDITIONAL: Space = {
    "optimizer": Choices(("adamw", "lion")),
    "adam_beta1": Choices((0.8, 0.9), only_with=Condition("optimizer", ("adamw",))),
    "lion_beta1": Choices((0.9, 0.95, 0.99), only_with=Condition("optimizer", ("lion",))),
    "lora_r": Choices((8, 16)),
}


@pytest.mark.parametrize("sampler", ["quasi-random", "random", "grid", "tpe", "gp"])
def test_a_point_has_what_counts_with_its_choices_and_all_are_tried_once(
    storage: optuna.storages.BaseStorage, sampler: str
) -> None:
    adviser = advisor(storage, CONDITIONAL, sampler=sampler, trials=10)
    points = proposed_points(adviser, int(adviser.num_points))
    assert len({tuple(sorted(point.items())) for point in points}) == len(points) == (2 + 3) * 2
    for point in points:
        own = "adam_beta1" if point["optimizer"] == "adamw" else "lion_beta1"
        assert set(point) == {"optimizer", "lora_r", own}
    told = adviser.study.get_trials()
    assert all(set(trial.params) == set(point) for trial, point in zip(told, points, strict=True))
