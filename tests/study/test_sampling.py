"""Optuna's study of a round: proposals that survive crashes, infeasible regions that are learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.event import listen

from tuner.config import SearchSpec
from tuner.playbook.observations import outcomes
from tuner.records import (
    AnswerScore,
    Choices,
    Condition,
    Direction,
    Evaluation,
    Fixed,
    Hyperparameters,
    Objective,
    Range,
    Space,
    Trial,
    TrialState,
    Value,
    num_points,
)
from tuner.study.proposals import RoundSampler, distributions
from tuner.study.samplers.points import quasi_random_point
from tuner.study.sampling import MAX_REPORTS, RoundStudy, StudyStorage, optuna_storage, shown_steps

ANSWERS = Objective("answers", Direction.MAXIMIZE, "trial", is_relative_to_gained=True)
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


def new_study(storage: optuna.storages.BaseStorage, space: Space = SPACE, **search: Any) -> RoundStudy:
    return RoundStudy(
        storage, "study/round1", space, SearchSpec(**{"trials": 8, **search}), max_train_steps=10
    )


def proposed_points(round_study: RoundStudy, num: int, known: Sequence[Trial] = ()) -> list[dict[str, Value]]:
    """The next points of a round whose trials all end complete."""
    found = list(known)
    for ordinal in range(len(found), len(found) + num):
        proposal = round_study.propose(ordinal, found)
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
    round_study = new_study(storage, sampler=sampler)
    known: list[Trial] = []
    for ordinal in range(6):
        proposal = round_study.propose(ordinal, known)
        assert set(proposal.chosen) == {"learning_rate", "lora_r", "warmup_steps", "target_modules"}
        assert all(SPACE[name].contains(value) for name, value in proposal.chosen.items())
        known.append(
            trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, 1 + 0.1 * ordinal)
        )
        round_study.tell(known[-1], max_train_steps=10)


@pytest.mark.parametrize("sampler", ["quasi-random", "tpe", "random", "gp"])
def test_a_resumed_round_repeats_no_proposal(storage: optuna.storages.BaseStorage, sampler: str) -> None:
    proposals = []
    known: list[Trial] = []
    for ordinal in range(5):
        round_study = new_study(storage, sampler=sampler)  # as a new process would
        proposal = round_study.propose(ordinal, known)
        proposals.append(tuple(proposal.chosen.values()))
        known.append(
            trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, 1 + 0.1 * ordinal)
        )
    assert len(set(proposals)) == 5


def test_quasi_random_points_do_not_depend_on_what_crashes_left(
    storage: optuna.storages.BaseStorage, tmp_path: Path
) -> None:
    undisturbed = new_study(optuna_storage(f"sqlite:///{tmp_path / 'other.db'}"))
    expected = [dict(undisturbed.propose(ordinal).chosen) for ordinal in range(4)]
    disturbed = new_study(storage)
    known: list[Trial] = []
    found = []
    for ordinal in range(4):
        disturbed.propose(ordinal)  # a crash after ask: no fact of it
        disturbed.recover(known, max_train_steps=10)
        proposal = disturbed.propose(ordinal)
        found.append(dict(proposal.chosen))
        known.append(trial(ordinal, proposal.optuna_trial, TrialState.RUNNING, proposal.chosen))
    assert found == expected


def test_quasi_random_points_cover_each_range_evenly() -> None:
    space = {"learning_rate": Range(1e-5, 1e-2, log=True), "lora_r": Choices((8, 16, 32, 64))}
    points = [quasi_random_point(distributions(space), seed=0, place=place) for place in range(16)]
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
        round_study = RoundStudy(
            storage,
            sampler,
            SPACE,
            SearchSpec(trials=8, sampler=sampler, enqueue=enqueue),
            max_train_steps=10,
        )  # type: ignore[arg-type]
        first, second = round_study.propose(0), round_study.propose(1)
        assert (first.chosen["learning_rate"], first.chosen["lora_r"]) == (2e-4, 16)
        assert (second.chosen["lora_r"], second.chosen["target_modules"]) == (8, ("q_proj", "v_proj"))
        assert set(first.chosen) == set(second.chosen) == set(SPACE) - {"optimizer"}
        assert SPACE["learning_rate"].contains(second.chosen["learning_rate"])


def test_what_is_enqueued_takes_no_place_of_the_quasi_random_sequence() -> None:
    space: Space = {"learning_rate": Range(1e-5, 1e-2, log=True), "lora_r": Choices((8, 16))}
    whole = {"learning_rate": 1e-4, "lora_r": 8}
    for enqueue in ([], [whole], [whole, {"lora_r": 16}]):
        round_study = new_study(optuna.storages.InMemoryStorage(), space, enqueue=enqueue, seed=3)
        new = [dict(round_study.propose(len(enqueue) + place).chosen) for place in range(2)]
        assert new == [quasi_random_point(distributions(space), seed=3, place=place) for place in range(2)]
    filled = round_study.propose(1).chosen
    assert filled == {**quasi_random_point(distributions(space), seed=4, place=1), "lora_r": 16}


def test_random_points_of_two_seeds_have_none_in_common() -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    round_studies = [study_after(space, (), sampler="random", seed=seed) for seed in range(2)]
    assert (
        len(
            {
                round_study.propose(n).chosen["learning_rate"]
                for round_study in round_studies
                for n in range(3)
            }
        )
        == 6
    )


def test_a_grid_gives_every_point_once_and_survives_its_last(storage: optuna.storages.BaseStorage) -> None:
    space: Space = {"learning_rate": Choices((1e-4, 1e-3)), "lora_r": Choices((8, 16))}
    round_study = RoundStudy(storage, "grid", space, SearchSpec(trials=9, sampler="grid"), max_train_steps=10)
    assert round_study.num_points == 4
    points = []
    for ordinal in range(4):
        proposal = round_study.propose(ordinal)
        points.append((proposal.chosen["learning_rate"], proposal.chosen["lora_r"]))
        round_study.tell(
            trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen), max_train_steps=10
        )
    assert len(set(points)) == 4


def test_a_grid_begins_after_what_is_enqueued() -> None:
    space: Space = {"learning_rate": Choices((1e-4, 1e-3)), "lora_r": Choices((8, 16))}
    enqueue = [{"learning_rate": 1e-3}]
    round_study = new_study(optuna.storages.InMemoryStorage(), space, sampler="grid", enqueue=enqueue)
    assert round_study.num_points == 4
    points = [tuple(p.values()) for p in proposed_points(round_study, 4)]
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
    round_study = new_study(optuna.storages.InMemoryStorage(), space, sampler=sampler, trials=20)
    points = proposed_points(round_study, int(num_points(space)))
    assert round_study.num_points == len(points) == len({tuple(point.items()) for point in points})
    assert all(space[key].contains(value) for point in points for key, value in point.items())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("state", list(TrialState))
def test_a_point_that_has_its_trial_is_taken_whatever_became_of_it(state: TrialState, sampler: str) -> None:
    """Those that run beside, too. A failed trial is repeated by `again` alone."""
    space: Space = {"lora_r": Choices((4, 8))}
    for rank, other in ((4, 8), (8, 4)):
        round_study = new_study(optuna.storages.InMemoryStorage(), space, sampler=sampler)
        assert round_study.propose(1, [trial(0, 0, state, {"lora_r": rank})]).chosen == {"lora_r": other}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_enqueued_is_tried_before_it_has_run(sampler: str) -> None:
    """Of two entries of one name each, and a whole one that comes last: three of four points."""
    space: Space = {"lora_r": Choices((4, 8)), "lora_dropout": Choices((0.0, 0.1))}
    enqueue = [{"lora_r": 8}, {"lora_r": 4}, {"lora_r": 8, "lora_dropout": 0}]
    for seed in range(4):
        round_study = new_study(
            optuna.storages.InMemoryStorage(), space, sampler=sampler, enqueue=enqueue, seed=seed
        )
        first, second, third, last = proposed_points(round_study, 4)
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
            new_study(optuna.storages.InMemoryStorage(), space, enqueue=enqueue, seed=seed), 4
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

    def round_study() -> RoundStudy:
        return new_study(optuna.storages.InMemoryStorage(), space, sampler=sampler, seed=seed)

    total = int(num_points(space))
    assert total == ranks * (warmups + 1)
    whole = proposed_points(round_study(), total)
    assert len({tuple(point.items()) for point in whole}) == total
    begun = min(killed, total)
    known = [trial(n, n, TrialState.COMPLETE, point, 1 + 0.01 * n) for n, point in enumerate(whole[:begun])]
    assert proposed_points(round_study(), total - begun, known) == whole[begun:]


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
        round_study = RoundStudy(
            optuna.storages.InMemoryStorage(),
            "study/round1",
            space,
            SearchSpec(trials=3, sampler=sampler, seed=seed),  # type: ignore[arg-type]
            max_train_steps=15,
            earlier=outcomes(ran, max_train_steps=horizon),
        )
        points = proposed_points(round_study, 3)
        assert {point["lora_r"] for point in points} == {4, 8, 16}
        return points[0]["lora_r"]

    others = set()
    for seed in range(6):
        assert first_of(seed, dropout=0.1, horizon=15) == 8
        others |= {first_of(seed, dropout=0.1, horizon=5), first_of(seed, dropout=0.2, horizon=15)}
    assert others - {8}


def test_a_large_space_of_whole_numbers_is_not_listed() -> None:
    space: Space = {"lora_r": Range(1, 10**9, integer=True), "warmup_steps": Range(0, 10**9, integer=True)}
    round_study = new_study(optuna.storages.InMemoryStorage(), space, enqueue=[{"lora_r": 7}])
    assert round_study.num_points == 10**9 * (10**9 + 1)
    assert len({tuple(point.items()) for point in proposed_points(round_study, 8)}) == 8


def test_a_rare_value_of_a_finite_space_is_found() -> None:
    """One that a thousand random points would mostly miss."""
    space: Space = {"lora_r": Range(1, 4000, log=True, integer=True)}
    round_study = new_study(optuna.storages.InMemoryStorage(), space)
    known = [
        trial(n, n, TrialState.COMPLETE, {"lora_r": rank})
        for n, rank in enumerate(rank for rank in range(1, 4001) if rank != 3999)
    ]
    assert round_study.propose(3999, known).chosen == {"lora_r": 3999}


def test_a_failed_trial_is_asked_again_with_the_same_values(storage: optuna.storages.BaseStorage) -> None:
    round_study = new_study(storage, sampler="tpe")
    first = round_study.propose(0)
    round_study.tell(trial(0, first.optuna_trial, TrialState.FAILED, first.chosen), max_train_steps=10)
    again = round_study.propose(1, again=first.chosen)
    assert again.chosen == first.chosen
    assert again.optuna_trial != first.optuna_trial


@pytest.mark.parametrize(("sampler", "state"), [("tpe", "PRUNED"), ("gp", "COMPLETE")])
def test_infeasible_is_told_so_that_each_sampler_learns_from_it(
    storage: optuna.storages.BaseStorage, sampler: str, state: str
) -> None:
    round_study = new_study(storage, sampler=sampler)
    good = round_study.propose(0)
    round_study.tell(trial(0, good.optuna_trial, TrialState.COMPLETE, good.chosen, 1.5), max_train_steps=10)
    bad = round_study.propose(1)
    round_study.tell(
        trial(1, bad.optuna_trial, TrialState.INFEASIBLE, bad.chosen, math.nan), max_train_steps=10
    )
    frozen = round_study.study.trials[bad.optuna_trial]
    assert frozen.state.name == state
    assert frozen.constraints["feasible"] == 1.0
    # What optuna-dashboard's best-trial card reads.
    assert frozen.system_attrs["constraints"] == [1.0]
    assert round_study.study.best_trial.number == good.optuna_trial


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tpe_learns_an_infeasible_region(seed: int) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    round_study = new_study(optuna.storages.InMemoryStorage(), space, trials=24, sampler="tpe", seed=seed)
    known: list[Trial] = []
    for ordinal in range(24):
        proposal = round_study.propose(ordinal, known)
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
    round_study = study_after(space, earlier, sampler=sampler)
    rates = [float(round_study.propose(n).chosen["learning_rate"]) for n in range(3)]  # type: ignore[arg-type]
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


def study_after(space: Space, earlier: tuple[Trial, ...], **search: Any) -> RoundStudy:
    return RoundStudy(
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
    round_study = study_after(space, earlier, sampler=sampler)
    proposals = [round_study.propose(ordinal) for ordinal in range(3)]
    rates = [float(p.chosen["learning_rate"]) for p in proposals]  # type: ignore[arg-type]
    assert sum(abs(rate - 0.3) < 0.2 for rate in rates) >= 2
    assert [p.optuna_trial for p in proposals] == [0, 1, 2]
    assert len(round_study.study.trials) == 3
    again = study_after(space, earlier, sampler=sampler)
    assert [again.propose(ordinal).chosen for ordinal in range(3)] == [p.chosen for p in proposals]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_what_runs_outside_of_the_space_is_no_obstacle(sampler: str) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    earlier = earlier_trials([(n / 20, 1 + abs(n / 20 - 0.3)) for n in range(20)])
    outside = trial(0, 0, TrialState.RUNNING, {"learning_rate": 40.0})
    round_study = study_after(space, earlier, sampler=sampler)
    alone = study_after(space, earlier, sampler=sampler)
    assert round_study.propose(1, [outside]).chosen == alone.propose(1).chosen


RATES = (0.02, 0.13, 0.22, 0.35, 0.41, 0.58, 0.77, 0.93)


def near(best: float, *rates: float) -> list[tuple[float, float]]:
    return [(rate, 1 + abs(rate - best)) for rate in rates]


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_a_model_is_asked_once_half_of_the_round_is_known(sampler: str) -> None:
    """Before that it is a random point; what is enqueued counts as if it were known."""
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    anywhere = study_after(space, (), sampler="random").propose(7).chosen
    queue = [{"learning_rate": 0.5}] * 6
    for enqueue, known, is_random in (([], 3, True), ([], 4, False), (queue, 5, True), (queue, 6, False)):
        round_study = study_after(
            space, earlier_trials(near(0.3, *RATES[:known])), sampler=sampler, enqueue=enqueue
        )
        assert (round_study.propose(7).chosen == anywhere) == is_random


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_only_what_lies_in_the_space_is_known(sampler: str) -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0), "lora_r": Choices((8, 16))}
    inside = earlier_trials(near(0.3, *RATES), lora_r=8)
    beside = earlier_trials(near(0.3, 1.5, -0.2), round_name="wider", lora_r=16)
    without = earlier_trials(near(0.3, 0.3), round_name="other")
    alone, among = (
        study_after(space, known, sampler=sampler).propose(8).chosen
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
        round_study = RoundStudy(storage, "study", space, search, max_train_steps=15, earlier=outcomes_before)
        return float(round_study.propose(12, trials).chosen["learning_rate"])  # type: ignore[arg-type]

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
    round_study = new_study(storage)
    proposal = round_study.propose(0)
    done = trial(0, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, 1.25)
    for _ in range(2):
        for evaluation in done.evaluations:
            if round_study.study.trials[0].state == optuna.trial.TrialState.RUNNING:
                round_study.report(done, evaluation, (0, 5))
        round_study.tell(done, max_train_steps=10)
    frozen = round_study.study.trials[0]
    assert frozen.value == 1.25
    assert frozen.intermediate_values == {0: 3.0, 5: 1.25}
    assert frozen.user_attrs["best_step"] == 5
    assert frozen.user_attrs["best_step_fraction"] == 0.5


def test_the_last_evaluation_of_a_step_is_shown_as_it_is_recorded(
    storage: optuna.storages.BaseStorage,
) -> None:
    round_study = new_study(storage)
    proposal = round_study.propose(0)
    running = trial(0, proposal.optuna_trial, TrialState.RUNNING, proposal.chosen)
    for loss in (3.0, 2.5):  # by an attempt that was interrupted, and by the next
        round_study.report(running, Evaluation(5, loss), (0, 5))
    assert round_study.study.trials[0].intermediate_values == {5: 2.5}


def test_an_evaluation_is_one_call_to_optunas_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reads or writes rows: reading a trial takes six statements."""
    kind, called = optuna.storages.InMemoryStorage, list[str]()
    round_study = new_study(kind())
    proposal = round_study.propose(0)
    running = trial(0, proposal.optuna_trial, TrialState.RUNNING, proposal.chosen)
    round_study.report(running, Evaluation(0, 3.0), (0, 5, 10))
    for name in ("get_trial", "get_all_trials", "get_trial_id_from_study_id_trial_number"):
        monkeypatch.setattr(kind, name, lambda *_, name=name, **__: called.append(name))
    for step in (5, 10):
        round_study.report(running, Evaluation(step, 2.0), (0, 5, 10))
    assert called == []


def test_a_loss_that_is_not_finite_is_not_shown() -> None:
    round_study = new_study(optuna.storages.InMemoryStorage())
    proposal = round_study.propose(0)
    running = trial(0, proposal.optuna_trial, TrialState.RUNNING, proposal.chosen)
    for step, loss in ((0, 3.0), (5, math.nan), (10, math.inf)):
        round_study.report(running, Evaluation(step, loss), (0, 5, 10))
    assert round_study.study.trials[0].intermediate_values == {0: 3.0}


def test_the_objective_is_the_best_evaluation_and_not_the_last(storage: optuna.storages.BaseStorage) -> None:
    round_study = new_study(storage)
    proposal = round_study.propose(0)
    curve = (Evaluation(0, 3.0), Evaluation(5, 1.0), Evaluation(10, 2.0))
    done = Trial("round1", 0, dict(proposal.chosen), TrialState.COMPLETE, evaluations=curve, optuna_trial=0)
    round_study.tell(done, max_train_steps=10)
    assert round_study.study.best_value == 1.0


def test_healing_ends_zombies_and_tells_what_was_not_told(storage: optuna.storages.BaseStorage) -> None:
    round_study = new_study(storage)
    told = round_study.propose(0)
    round_study.propose(1)  # asked, never recorded
    round_study.study.enqueue_trial({"learning_rate": 1e-3})  # enqueued, never asked
    running = round_study.propose(2)
    facts = [
        trial(0, told.optuna_trial, TrialState.COMPLETE, told.chosen),
        trial(1, running.optuna_trial, TrialState.WAITING, running.chosen),
    ]
    new_study(storage).recover(facts, max_train_steps=10)
    states = {t.number: t.state.name for t in round_study.study.trials}
    assert states.pop(told.optuna_trial) == "COMPLETE"
    assert states.pop(running.optuna_trial) == "RUNNING"
    assert set(states.values()) == {"FAIL"}


def test_a_crash_in_the_middle_of_telling_is_healed_without_a_warning(
    storage: optuna.storages.BaseStorage, recwarn: pytest.WarningsRecorder
) -> None:
    round_study = new_study(storage)
    told = round_study.propose(0)
    handle = optuna.Trial(round_study.study, round_study.study.trials[0]._trial_id)
    handle.set_constraint("feasible", 0.0)
    recwarn.clear()
    facts = [trial(0, told.optuna_trial, TrialState.COMPLETE, told.chosen)]
    new_study(storage).recover(facts, max_train_steps=10)
    assert round_study.study.trials[0].state.name == "COMPLETE"
    assert not recwarn.list


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
    round_study = RoundStudy(
        optuna.storages.InMemoryStorage(),
        "study/round1",
        space,
        SearchSpec(trials=8, sampler=sampler),
        max_train_steps=15,
        earlier=outcomes(earlier, max_train_steps=5),
        objective=ANSWERS,
    )
    proposals = [round_study.propose(ordinal) for ordinal in range(3)]
    rates = [float(p.chosen["learning_rate"]) for p in proposals]  # type: ignore[arg-type]
    assert sum(abs(rate - 0.7) < 0.2 for rate in rates) >= 2
    round_study.tell(answering("round1", 0, 0.6, proposals[0].optuna_trial), max_train_steps=15)
    diverged = trial(1, proposals[1].optuna_trial, TrialState.INFEASIBLE, proposals[1].chosen)
    round_study.report(diverged, diverged.evaluations[0], (0, 5))
    round_study.tell(diverged, max_train_steps=15)
    told, infeasible, _ = round_study.study.trials
    assert (round_study.study.direction.name, round_study.study.metric_names) == (
        "MAXIMIZE",
        ["answer score"],
    )
    assert told.value == pytest.approx(0.9)
    assert told.user_attrs["answers"] == "50 by exact_match"
    assert (infeasible.state.name, infeasible.value) == ("PRUNED", None)
    assert round_study.study.best_trial.number == told.number


def test_equal_answers_are_parted_by_their_losses() -> None:
    space: Space = {"learning_rate": Range(0.0, 1.0)}
    score = AnswerScore(5, "exact_match", 0.5, 0.01, 50, is_objective=True)
    found = earlier_trials([(n / 20, 1 + abs(n / 20 - 0.7)) for n in range(20)])
    equal = outcomes([replace(t, answer_score=score) for t in found], max_train_steps=5)
    round_study = RoundStudy(
        optuna.storages.InMemoryStorage(),
        "study",
        space,
        SearchSpec(trials=8, sampler="tpe"),
        max_train_steps=5,
        earlier=equal,
        objective=ANSWERS,
    )
    rates = [float(round_study.propose(n).chosen["learning_rate"]) for n in range(3)]  # type: ignore[arg-type]
    assert all(abs(rate - 0.7) < 0.2 for rate in rates)


def test_optuna_takes_the_database_that_the_facts_are_in(tmp_path: Path) -> None:
    """However the round file writes its URL: a driver that is not ours may not be installed."""
    url = f"sqlite+pysqlite:///{tmp_path}/deeper/../tuner.db"
    for storage in (optuna_storage(url), StudyStorage(url, "tiny")):
        assert storage.url == f"sqlite:///{tmp_path}/tuner.db"
        storage.engine.dispose()


# --- a sampler that is not tuner's ----------------------------------------------------------------


class Listener(optuna.samplers.RandomSampler):
    """Writes down what it is made with and told."""

    heard: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, seed: int, name: str = "") -> None:
        super().__init__(seed=seed)
        self.heard.append({"seed": seed, "name": name})

    def sample_independent(self, study: Any, trial: Any, *args: Any) -> Any:
        known = study.get_trials()[: trial.number]
        self.heard[-1]["told"] = [(t.params, t.value, t.constraints) for t in known if t.state.is_finished()]
        self.heard[-1]["running"] = [t.params for t in known if not t.state.is_finished()]
        self.heard[-1]["direction"] = study.direction.name
        return super().sample_independent(study, trial, *args)


LISTENER = f"{Listener.__module__}:Listener"
RATE: Space = {"learning_rate": Range(0.0, 1.0)}


def test_another_sampler_is_told_earlier_rounds_penalties_and_what_runs() -> None:
    """A value of a shorter round is carried to this one's length by what both know: here 0.5 lower."""
    Listener.heard.clear()
    earlier = earlier_trials([(0.1, 2.0), (0.2, 2.5), (0.3, math.inf), (7.0, 1.0)])
    asked = study_after(RATE, earlier, sampler=LISTENER, sampler_arguments={"name": "x"}, seed=4)
    states = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.FAILED, TrialState.INFEASIBLE)
    known = [
        trial(n, n, state, {"learning_rate": rate}, 1.5)
        for n, (state, rate) in enumerate(zip(states, (0.1, 0.5, 0.6, 0.7), strict=True))
    ]
    proposal = asked.propose(4, known)
    (heard,) = Listener.heard
    feasible, violated = {"feasible": 0.0}, {"feasible": 1.0}
    assert heard["told"] == [
        ({"learning_rate": 0.1}, 1.5, feasible),
        ({"learning_rate": 0.2}, 2.0, feasible),
        ({"learning_rate": 0.3}, 2.0, violated),
        ({"learning_rate": 0.7}, 2.0, violated),
    ]
    assert heard["running"] == [{"learning_rate": 0.5}]
    assert (heard["name"], heard["direction"]) == ("x", "MINIMIZE")
    again = study_after(RATE, earlier, sampler=LISTENER, sampler_arguments={"name": "x"}, seed=4)
    assert again.propose(4, known).chosen == proposal.chosen, "the same facts give the same proposal"
    seeds = [
        study_after(RATE, (), sampler=LISTENER, seed=s).propose(n).chosen for s, n in ((4, 4), (5, 4), (4, 5))
    ]
    assert len({each["learning_rate"] for each in seeds}) == 3
    assert len({each["seed"] for each in Listener.heard}) == 3


def test_another_sampler_maximises_answers_and_is_told_no_constraint_without_infeasible_trials() -> None:
    Listener.heard.clear()
    score = AnswerScore(5, "exact_match", 0.75, 0.01, 50, is_objective=True)
    known = [replace(trial(0, 0, TrialState.COMPLETE, {"learning_rate": 0.1}), answer_score=score)]
    search = SearchSpec(trials=8, sampler=LISTENER)
    storage = optuna.storages.InMemoryStorage()
    RoundStudy(storage, "study", RATE, search, max_train_steps=5, objective=ANSWERS).propose(1, known)
    assert Listener.heard[-1]["told"] == [({"learning_rate": 0.1}, 0.75, {})]
    assert Listener.heard[-1]["direction"] == "MAXIMIZE"


@pytest.mark.parametrize("sampler", [LISTENER, "optuna.samplers:TPESampler", "optuna.samplers:NSGAIISampler"])
def test_another_sampler_fills_what_an_entry_leaves_open_and_repeats_no_point(sampler: str) -> None:
    enqueue = [{"lora_r": 16, "warmup_steps": 3}]
    asked = new_study(optuna.storages.InMemoryStorage(), sampler=sampler, enqueue=enqueue)
    first, *others = proposed_points(asked, 4)
    assert (first["lora_r"], first["warmup_steps"]) == (16, 3)
    assert set(first) == set(SPACE) - {"optimizer"}
    assert all(SPACE[name].contains(value) for point in (first, *others) for name, value in point.items())
    finite = new_study(optuna.storages.InMemoryStorage(), FINITE["seeds"], sampler=sampler)
    points = proposed_points(finite, 6)
    assert len({tuple(point.items()) for point in points}) == 6


def test_what_another_sampler_notes_on_its_trials_comes_back_to_it(tmp_path: Path) -> None:
    """A genetic sampler breeds only from trials of which it has noted their generation, in every process."""
    url = f"sqlite:///{tmp_path / 'tuner.db'}"
    arguments = {"population_size": 4}
    known: list[Trial] = []
    for ordinal in range(12):
        asked = new_study(
            optuna_storage(url), RATE, sampler="optuna.samplers:NSGAIISampler", sampler_arguments=arguments,
            trials=12,
        )  # fmt: skip
        proposal = asked.propose(ordinal, known)
        loss = 1 + abs(float(proposal.chosen["learning_rate"]) - 0.3)  # type: ignore[arg-type]
        done = trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, loss)
        known.append(done)
        asked.tell(done, max_train_steps=10)
    attributes = [frozen.system_attrs for frozen in asked.study.get_trials()]
    generations = [
        max((v for k, v in each.items() if "generation" in k), default=None) for each in attributes
    ]
    assert generations == [0] * 4 + [1] * 4 + [2] * 4


# --- Optuna asks, and the round's sampler answers -------------------------------------------------


def test_a_trial_that_somebody_enqueued_takes_no_proposals_place(
    storage: optuna.storages.BaseStorage,
) -> None:
    """In the dashboard, or a process that died: Optuna hands those out first."""
    undisturbed = new_study(optuna.storages.InMemoryStorage())
    round_study = new_study(storage)
    round_study.study.enqueue_trial({"lora_r": 32})
    for ordinal in range(2):
        assert round_study.propose(ordinal).chosen == undisturbed.propose(ordinal).chosen
    assert [t.state.name for t in round_study.study.trials] == ["FAIL", "RUNNING", "RUNNING"]


def test_a_value_that_no_longer_lies_in_its_range_is_repeated_as_it_is() -> None:
    narrow: Space = {"learning_rate": Range(0.0, 0.1), "lora_r": Choices((8, 16))}
    again = {"learning_rate": 0.3, "lora_r": 8}
    proposal = new_study(optuna.storages.InMemoryStorage(), narrow).propose(1, again=again)
    assert proposal.chosen == again


class OnlyInEightBits(RoundSampler):
    """The round's sampler with a dimension that one optimizer alone has."""

    def active(self, point: Hyperparameters) -> dict[str, Choices | Range]:
        has_it = point.get("optimizer") == "adamw_8bit"
        return {name: d for name, d in self._space.items() if name != "adam_beta2" or has_it}


CONDITIONAL: Space = {
    "adam_beta2": Choices((0.9, 0.95, 0.99)),
    "optimizer": Choices(("adamw", "adamw_8bit")),
    "lora_r": Choices((8, 16)),
}


@pytest.mark.parametrize("sampler", [*SAMPLERS, LISTENER])
def test_a_dimension_that_a_value_activates_is_asked_in_a_second_step(sampler: str) -> None:
    """Where it is not active it is neither proposed, nor stored, nor compared: 2 points, and 2 times 3."""
    enqueue = [{"adam_beta2": 0.95, "optimizer": "adamw"}, {"optimizer": "adamw_8bit", "lora_r": 8}]
    search = SearchSpec(trials=8, sampler=sampler, enqueue=enqueue)
    asked = RoundStudy(optuna.storages.InMemoryStorage(), "study", CONDITIONAL, search, max_train_steps=10)
    asked.sampler = asked.study.sampler = OnlyInEightBits(CONDITIONAL, search, max_train_steps=10)
    points = proposed_points(asked, 8)
    assert len({tuple(sorted(point.items())) for point in points}) == 8
    for point, frozen in zip(points, asked.study.trials, strict=True):
        assert ("adam_beta2" in point) == (point["optimizer"] == "adamw_8bit")
        assert frozen.params == point
    assert points[0]["optimizer"] == "adamw"
    assert (points[1]["optimizer"], points[1]["lora_r"]) == ("adamw_8bit", 8)


def test_recovering_reads_only_the_trials_that_optuna_has_as_open(tmp_path: Path) -> None:
    """However many have ended: each of those would be a few statements, in each start of the round."""
    url = f"sqlite:///{tmp_path / 'tuner.db'}"
    first = new_study(optuna_storage(url), trials=40)
    known: list[Trial] = []
    counts = []
    for ordinal in range(30):
        proposal = first.propose(ordinal, known)
        done = trial(ordinal, proposal.optuna_trial, TrialState.COMPLETE, proposal.chosen, 1.0)
        known.append(done)
        if ordinal < 29:
            first.tell(done, max_train_steps=10)
        if ordinal in (2, 28):
            resumed = new_study(optuna_storage(url), trials=40)
            statements: list[str] = []
            listen(resumed._storage.engine, "before_cursor_execute", lambda *said: statements.append(said[2]))  # type: ignore[attr-defined] # noqa: B023
            resumed.recover(known, max_train_steps=10)
            counts.append(len(statements))
    assert counts[0] == counts[1] <= 8
    new_study(optuna_storage(url)).recover(known, max_train_steps=10)
    assert {t.state.name for t in first.study.get_trials()} == {"COMPLETE"}


BY_OPTIMIZER: Space = {
    "optimizer": Choices(("adamw", "lion")),
    "adam_beta1": Choices((0.8, 0.9), only_with=Condition("optimizer", ("adamw",))),
    "lion_beta1": Choices((0.9, 0.95, 0.99), only_with=Condition("optimizer", ("lion",))),
    "lora_r": Choices((8, 16)),
}


@pytest.mark.parametrize("sampler", ["quasi-random", "random", "grid", "tpe", "gp"])
def test_a_point_has_what_counts_with_its_choices_and_all_are_tried_once(
    storage: optuna.storages.BaseStorage, sampler: str
) -> None:
    round_study = new_study(storage, BY_OPTIMIZER, sampler=sampler, trials=10)
    points = proposed_points(round_study, int(round_study.num_points))
    assert len({tuple(sorted(point.items())) for point in points}) == len(points) == (2 + 3) * 2
    for point in points:
        own = "adam_beta1" if point["optimizer"] == "adamw" else "lion_beta1"
        assert set(point) == {"optimizer", "lora_r", own}
    told = round_study.study.get_trials()
    assert all(set(trial.params) == set(point) for trial, point in zip(told, points, strict=True))
