"""Objectives other than the loss: their decisions are those of the same numbers, minimised or maximised."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.playbook import Diagnosis, best_evaluation, read_round, settled_step
from tuner.playbook.curves import late_drop
from tuner.playbook.gain import Gain, GainSource
from tuner.playbook.noise import loss_error, paired_standard_error
from tuner.playbook.observations import observations, outcomes
from tuner.playbook.promotion import plan_next_round
from tuner.playbook.pruning import reason_to_prune
from tuner.playbook.reading import Reading
from tuner.playbook.results import BranchResult, RoundResults
from tuner.playbook.selection import objective_value, ranked, scale_of
from tuner.records import LOSS, Direction, Evaluation, Fixed, Objective, Range, Trial, TrialState

T, EVERY = 48, 4
UP = Objective("m", Direction.MAXIMIZE, is_relative_to_gained=True)
DOWN = Objective("m", Direction.MINIMIZE, is_relative_to_gained=True)
COST = Objective("m", Direction.MINIMIZE)
SPACE = {
    "learning_rate": Range(1e-5, 1e-2, log=True),
    "schedule": Fixed("constant"),
    "warmup_steps": Fixed(0),
    "batch_size": Fixed(8),
    "training_seed": Fixed(0),
}


@st.composite
def rounds(draw: st.DrawFn) -> RoundResults:
    """A round of curves of the loss, without single examples, at a constant rate."""
    trials = []
    for number in range(draw(st.integers(1, 6))):
        gained = draw(st.floats(0.0, 1.0))
        pace = draw(st.floats(2.0, 60.0))
        jitter = draw(st.lists(st.floats(-0.01, 0.01), min_size=T // EVERY, max_size=T // EVERY))
        losses = [
            2.0,
            *(2.0 - gained * (1 - math.exp(-EVERY * i / pace)) + j for i, j in enumerate(jitter, 1)),
        ]
        curve = tuple(Evaluation(EVERY * i, loss, train_loss=loss) for i, loss in enumerate(losses))
        known = {name: d.value for name, d in SPACE.items() if isinstance(d, Fixed)}
        rate = 1e-4 * (number + 1)
        trials.append(
            Trial("r", number, {"learning_rate": rate, **known}, TrialState.COMPLETE, evaluations=curve)
        )
    return RoundResults("r", T, EVERY, SPACE, tuple(trials))


def measured_by(results: RoundResults, objective: Objective, value: Callable[[float], float]) -> RoundResults:
    """The same round whose evaluations are ranked by a function of their losses."""

    def by(evaluation: Evaluation) -> Evaluation:
        metrics = {objective.metric: value(evaluation.eval_loss)}
        return replace(evaluation, metrics=metrics, objective=objective)

    trials = (replace(t, evaluations=tuple(map(by, t.evaluations))) for t in results.trials)
    return replace(results, trials=tuple(trials), objective=objective)


def decisions(results: RoundResults) -> dict[str, object]:
    """All that a round decides, its words aside; statistics to ten digits."""
    reading: Reading = read_round(results)
    planned = None
    if reading.suggested_max_train_steps is not None:
        following = plan_next_round(results, reading, to="r2")
        planned = (following.max_train_steps, following.trials_total, [e.trial for e in following.enqueue])
    order = [(trial.number, best.step) for trial, best in ranked(results.trials)]
    middle = [replace(t, evaluations=t.evaluations[:4], state=TrialState.RUNNING) for t in results.trials]
    return {
        "diagnosis": reading.diagnosis,
        "suggestion": reading.suggested_max_train_steps,
        "gain": None if reading.gain is None else pytest.approx(reading.gain, rel=1e-6, abs=1e-9),
        "noise": None if reading.noise is None else pytest.approx(reading.noise, rel=1e-6, abs=1e-9),
        "rules": [finding.rule for finding in reading.findings],
        "order": order,
        "settled": [settled_step(trial.evaluations) for trial in results.trials],
        "planned": planned,
        "pruned": [
            reason_to_prune(t, results.trials, pruner=rule, max_train_steps=T, evaluate_every=EVERY)
            is not None
            for t in middle
            for rule in ("median", "halving")
        ],
        "learned": [
            observation.hyperparameters["learning_rate"]
            for observation in sorted(
                observations(outcomes(results.trials, max_train_steps=T), objective=results.objective),
                key=lambda observation: observation.objective,
            )
        ],
    }


@settings(max_examples=60, deadline=None)
@given(rounds())
def test_a_maximised_metric_decides_as_its_negative_does_when_that_is_minimised(
    results: RoundResults,
) -> None:
    up = measured_by(results, UP, lambda loss: 1 - loss / 4)
    down = measured_by(results, DOWN, lambda loss: loss / 4 - 1)
    assert decisions(up) == decisions(down)


@settings(max_examples=60, deadline=None)
@given(rounds(), st.floats(0.1, 8.0), st.floats(-5.0, 5.0))
def test_scale_and_origin_of_a_maximised_metric_decide_nothing(
    results: RoundResults, scale: float, origin: float
) -> None:
    # A power of two keeps every order to the digit.
    factor = 2.0 ** round(math.log2(scale))
    plain = measured_by(results, UP, lambda loss: -loss)
    moved = measured_by(results, UP, lambda loss: -loss * factor)
    assert decisions(plain) == decisions(moved)
    shifted = measured_by(results, UP, lambda loss: origin - loss)
    assert [t.number for t, _ in ranked(plain.trials)] == [t.number for t, _ in ranked(shifted.trials)]
    one, other = scale_of(plain.trials), scale_of(shifted.trials)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.gained == pytest.approx(other.gained, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(rounds())
def test_a_minimised_metric_without_an_upper_bound_decides_as_a_loss_does(results: RoundResults) -> None:
    assert decisions(results) == decisions(measured_by(results, COST, lambda loss: loss))


def curve(*values: float, objective: Objective = UP) -> tuple[Evaluation, ...]:
    return tuple(
        Evaluation(EVERY * i, 2.0, train_loss=2.0, metrics={"m": value}, objective=objective)
        for i, value in enumerate(values)
    )


def trial(number: int, *values: float, objective: Objective = UP) -> Trial:
    hyperparameters = {name: d.value for name, d in SPACE.items() if isinstance(d, Fixed)}
    return Trial(
        "r",
        number,
        {"learning_rate": 1e-4 * (number + 1), **hyperparameters},
        TrialState.COMPLETE,
        evaluations=curve(*values, objective=objective),
    )


def test_the_best_step_is_the_highest_evaluation_and_the_earlier_of_equals() -> None:
    best = best_evaluation(curve(0.4, 0.6, 0.7, 0.7, math.nan))
    assert best is not None
    assert (best.step, best.value, best.cost) == (2 * EVERY, 0.7, -0.7)


def test_an_evaluation_that_lacks_the_metric_never_wins() -> None:
    lacking = Evaluation(4, 0.1).by(UP)
    assert math.isnan(lacking.value)
    assert best_evaluation([lacking]) is None
    assert best_evaluation([lacking, *curve(0.4)]) == curve(0.4)[0]


def test_an_evaluation_is_restated_by_another_objective_where_it_has_its_number() -> None:
    counted = Evaluation(4, 1.5, example_nll=(6.0,), example_tokens=(4,), correct_tokens=3)
    accuracy = Objective("token_accuracy", Direction.MAXIMIZE, is_relative_to_gained=True)
    assert counted.by(accuracy).value == 0.75
    assert counted.by(accuracy).by(LOSS).value == 1.5
    assert counted.by(LOSS) is counted


def test_the_gain_of_a_maximised_metric_is_relative_to_what_the_best_trial_gained_over_the_base() -> None:
    """From 0.60 at half the steps to 0.66 at all of them, where the base has 0.40."""
    values = (0.40, 0.5, 0.53, 0.56, 0.58, 0.59, 0.60, 0.61, 0.62, 0.63, 0.64, 0.65, 0.66)
    results = RoundResults(
        "r",
        T,
        EVERY,
        SPACE,
        (trial(0, *values), trial(1, 0.40, *(0.45 for _ in values[1:]))),
        branches=(BranchResult(0, T // 2, curve(*values[:7])),),
        objective=UP,
    )
    reading = read_round(results)
    assert reading.gain == pytest.approx((0.66 - 0.60) / (0.66 - 0.40))
    assert reading.gain_source == GainSource.COMPARISON
    assert "raised m by 23% of what the best trial gained over the base model" in " ".join(reading.evidence)
    assert "reached m 0.6600" in reading.evidence[0]


def test_the_last_quarter_of_such_a_metric_is_relative_to_the_gained_too() -> None:
    """From 0.6 to 0.7 in the last quarter, where the base has 0.4 and the best 0.7."""
    steep = curve(0.4, 0.5, 0.6, 0.7)
    quarter = late_drop(steep, 2 * EVERY, scale_of([trial(0, 0.4, 0.5, 0.6, 0.7)]))
    assert quarter is not None
    assert quarter.relative == pytest.approx(0.1 / 0.3)


SETTLED = (0.40, 0.45, 0.5, 0.55, 0.60, 0.65, 0.70, 0.72, 0.74, 0.7401, 0.7402, 0.7401, 0.7402)
"""It gains to the middle of the run, and stays in its last quarter."""
WAVERING = (0.40, 0.45, 0.5, 0.55, 0.60, 0.65, 0.68, 0.70, 0.72, 0.70, 0.73, 0.72, 0.74)


@pytest.mark.parametrize(
    ("values", "diagnosis", "said"),
    [
        (SETTLED, Diagnosis.RIGHT, "The last quarter of the steps raised m by"),
        (WAVERING, Diagnosis.UNDETERMINED, "best trial's m neither clearly rises at the end nor"),
    ],
    ids=["right", "undetermined"],
)
def test_what_is_said_of_such_a_metric_is_not_said_of_the_loss(
    values: tuple[float, ...], diagnosis: Diagnosis, said: str
) -> None:
    branch = BranchResult(0, T // 2, curve(*values[:6], 0.6))
    results = RoundResults("r", T, EVERY, SPACE, (trial(0, *values),), branches=(branch,), objective=UP)
    reading = read_round(results)
    assert reading.diagnosis == diagnosis
    assert any(said in sentence for sentence in reading.evidence), reading.evidence
    assert not any("loss" in sentence for sentence in reading.evidence), reading.evidence


def test_losses_of_single_examples_say_nothing_of_how_certain_another_metric_is() -> None:
    """The losses agree to the digit, so that paired errors of them would be 0."""
    values = (0.4, 0.60, 0.62, 0.61, 0.63, 0.62, 0.631)
    known = [replace(e, example_nll=(2.0, 2.0), example_tokens=(1, 1)) for e in curve(*values)]
    assert settled_step(known) == settled_step(curve(*values)) == 4 * EVERY
    assert paired_standard_error(known[1], known[2]) is None
    error = loss_error(known[1])
    assert error == 0.0, "that of the loss is known all the same"


def test_doublings_of_such_a_metric_are_a_series_of_differences() -> None:
    gain = Gain(0.2, 0.01, GainSource.COMPARISON, 0, 24, 48, ratio=0.5, is_linear=True)
    assert gain.at(2.0) == pytest.approx(0.1)
    assert gain.to(4.0) == pytest.approx(0.1 + 0.05)


def test_a_metric_of_which_nothing_was_gained_teaches_no_horizon() -> None:
    results = RoundResults("r", T, EVERY, SPACE, (trial(0, 0.4, *(0.3 for _ in range(12))),), objective=UP)
    assert scale_of(results.trials) is None
    reading = read_round(results)
    assert (reading.diagnosis.value, reading.gain) == ("no_learning", None)


def test_the_value_told_is_that_of_a_complete_trial() -> None:
    assert objective_value(trial(0, 0.4, 0.6, 0.5)) == 0.6
    assert objective_value(replace(trial(0, 0.4, 0.6), state=TrialState.INFEASIBLE)) is None


def test_a_trial_is_pruned_by_its_best_value_and_told_so() -> None:
    peers = [trial(n, 0.4, 0.6, 0.7) for n in range(1, 6)]
    poor = replace(trial(0, 0.4, 0.5), state=TrialState.RUNNING)
    said = reason_to_prune(poor, peers, pruner="median", max_train_steps=T, evaluate_every=EVERY)
    assert said == "its best m up to step 4, 0.5000, is below the median of 5 trials, 0.6000"
    good = replace(trial(0, 0.4, 0.65), state=TrialState.RUNNING)
    assert reason_to_prune(good, peers, pruner="median", max_train_steps=T, evaluate_every=EVERY) is None


def test_a_round_says_where_earlier_ones_ranked_by_something_else() -> None:
    now = RoundResults("r2", T, EVERY, SPACE, (trial(0, 0.4, 0.6),), objective=UP)
    before = replace(now, name="r1", objective=LOSS)
    (finding,) = [f for f in read_round(now, [before]).findings if f.rule == "objective_changed"]
    assert "r2 ranks its trials by m, r1 by eval_loss" in finding.message
    assert not [f for f in read_round(now, [now]).findings if f.rule == "objective_changed"]
