import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.strategies import curves, losses
from tuner.playbook import best_evaluation, settled_step
from tuner.playbook.noise import paired_standard_error, significant_among
from tuner.playbook.selection import beats_the_base, distinct, leading_trials, ranked, settled_steps
from tuner.records import Evaluation, Objective, Trial, TrialState

GRID = tuple(range(0, 101, 10))


def curve(*values: float, tokens: tuple[int, ...] = ()) -> tuple[Evaluation, ...]:
    return tuple(Evaluation(10 * i, value) for i, value in enumerate(values))


def trial(number: int, *values: float, state: TrialState = TrialState.COMPLETE) -> Trial:
    return Trial("round1", number, {"learning_rate": 1.0 + number}, state, evaluations=curve(*values))


def paired(step: int, *nll: float) -> Evaluation:
    return Evaluation(step, sum(nll) / (10 * len(nll)), example_nll=nll, example_tokens=(10,) * len(nll))


def test_the_earlier_of_equal_losses_is_best():
    assert best_evaluation(curve(3, 1, 2, 1)).step == 10


def test_what_is_not_finite_never_wins():
    assert best_evaluation(curve(3, math.nan, -math.inf, 2, math.inf)).step == 30
    assert best_evaluation(curve(math.nan, math.inf)) is None
    assert best_evaluation(()) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loss", [1e307, 1.7e308, -1e307, 1e160])
def test_a_loss_too_large_to_be_squared_counts_as_not_finite(loss):
    huge = [paired(0, loss * 10, 1.0), paired(10, 30.0, 31.0), paired(20, 20.0, loss)]
    assert best_evaluation(huge).step == settled_step(huge) == 10
    assert settled_step(curve(loss, 2, 1, loss)) == 20
    assert settled_step(curve(loss, loss)) is None


@given(st.permutations(curve(3, 1, math.nan, 2, 1)))
def test_best_does_not_depend_on_the_order(evaluations):
    assert best_evaluation(evaluations).step == 10


def test_settled_is_the_first_within_one_paired_standard_error():
    # Differences to the best: 1.0 +- 0.5 (out), 0.3 +- 0.5 (in), 0.1 +- 0.0 (out: exact, and worse).
    evaluations = (
        paired(0, 25.0, 15.0),
        paired(10, 18.0, 8.0),
        paired(20, 11.0, 11.0),
        paired(30, 10.0, 10.0),
    )
    assert [round(e.eval_loss, 3) for e in evaluations] == [2.0, 1.3, 1.1, 1.0]
    assert settled_step(evaluations) == 10


def test_many_settled_steps_at_once_are_those_of_each():
    draw = random.Random(0)

    def drawn(tokens: int, objective: Objective | None) -> tuple[Evaluation, ...]:
        falling = [(step, [draw.gauss(30 - step / 10, 2.0) for _ in range(8)]) for step in GRID]
        losses = (replace(paired(step, *nll), example_tokens=(tokens,) * 8) for step, nll in falling)
        return tuple(replace(e, metrics={"kept": e.eval_loss}, objective=objective) for e in losses)

    alike = [drawn(10, None) for _ in range(100)]
    mixed = [(), curve(3, 2, 1, 1.5), drawn(20, None), curve(math.nan), drawn(10, Objective("kept")), *alike]
    for curves_ in (alike, mixed):
        steps = settled_steps(curves_)
        assert steps == [settled_step(one) for one in curves_] == settled_steps(curves_[::-1])[::-1]
    assert len(set(steps)) > 4


def test_settled_without_examples_uses_the_spread_of_the_curve():
    assert settled_step(curve(3, 2, 1, 1, 1, 1)) == 20
    assert settled_step(curve(3, 2, 1.02, 1.05, 1.0, 1.05, 1.0)) == 20
    assert settled_step(()) is None


@given(curves(GRID))
def test_settled_is_an_evaluation_no_later_than_the_best(evaluations):
    best, settled = best_evaluation(evaluations), settled_step(evaluations)
    assert (best is None) == (settled is None)
    if best is not None:
        assert settled <= best.step
        assert settled in {evaluation.step for evaluation in evaluations}


@given(st.lists(st.floats(0.5, 5.0), min_size=1, max_size=11), st.integers(0, 3))
def test_best_and_settled_ignore_a_shift_of_the_loss(values, shift):
    # Sixteen tokens and multiples of 1/64 keep the sums exact, so that rounding breaks no tie.
    values = [round(64 * value) / 64 for value in values]

    def sixteen(i: int, loss: float) -> Evaluation:
        nll = tuple(16 * loss + (i % 3) * extra for extra in (0, 1, 4, 3))
        return Evaluation(10 * i, sum(nll) / 64, example_nll=nll, example_tokens=(16,) * 4)

    still = [sixteen(i, value) for i, value in enumerate(values)]
    moved = [sixteen(i, value + shift) for i, value in enumerate(values)]
    assert best_evaluation(moved).step == best_evaluation(still).step
    assert settled_step(moved) == settled_step(still)


def test_leading_are_the_best_five_or_a_quarter():
    few = [trial(i, 9, 1 + i) for i in range(8)]
    assert [lead.trial.number for lead in leading_trials(few, 10)] == [0, 1, 2, 3, 4]
    many = [trial(i, 9, 1 + i) for i in range(21)]
    assert len(leading_trials(many, 10)) == 6
    assert [lead.fraction for lead in leading_trials(few[:1], 20)] == [0.5]


def test_only_complete_trials_with_a_finite_loss_lead():
    others = [s for s in TrialState if s != TrialState.COMPLETE]
    trials = [trial(i, 0.1, 0.1, state=state) for i, state in enumerate(others)]
    trials += [trial(10, math.nan), trial(11), trial(12, 3.0, 2.0)]
    assert [t.number for t, _ in ranked(trials)] == [12]
    assert [lead.trial.number for lead in leading_trials(trials, 10)] == [12]


def test_what_never_beats_the_base_model_does_not_lead():
    never, learns = trial(0, 2.0, 2.1, 2.2), trial(1, 9.0, 5.0, 4.0)
    assert [lead.trial.number for lead in leading_trials([never, learns], 20)] == [1]
    assert leading_trials([never], 20) == ()
    assert not beats_the_base(trial(0, 2.0, 2.0))
    assert beats_the_base(Trial("round1", 0, {}, evaluations=(Evaluation(10, 5.0),))), "nothing to beat"


def test_the_base_model_is_beaten_by_more_than_two_standard_errors():
    """Per-example losses whose mean falls by `drop`, with a spread of a known paired standard error."""

    def run(drop: float) -> Trial:
        base = [20.0, 20.0, 20.0, 20.0]
        noise = [1.0, -1.0, 1.0, -1.0]
        after = [b - 10 * drop + n for b, n in zip(base, noise, strict=True)]
        return Trial("round1", 0, {}, evaluations=(paired(0, *base), paired(10, *after)))

    error = paired_standard_error(*run(0.5).evaluations)
    assert not beats_the_base(run(1.99 * error))
    assert beats_the_base(run(2.01 * error))


def test_a_single_lucky_evaluation_does_not_beat_the_base_model():
    lucky = [2.0, *(2.3,) * 6, 1.9, *(2.3,) * 6]
    evaluations = tuple(
        paired(step, *(10 * loss,) * 4) for step, loss in zip((0, *range(100, 113)), lucky, strict=True)
    )
    assert best_evaluation(evaluations).step == 106
    assert not beats_the_base(Trial("round1", 0, {}, evaluations=evaluations))


def test_the_best_of_many_evaluations_has_to_stand_out_more():
    """Losses around 2, each with a standard error of 0.1 to the base; the best of 20 or of one among them."""

    def run(count: int, drop: float, *, up_and_down: float = 0.2) -> Trial:
        restless = [2.0 + up_and_down * (i % 2) for i in range(count - 7)]
        around = 2.0 - drop + 1e-3
        later = [*restless, *[around] * 3, 2.0 - drop, *[around] * 3] if count > 1 else [2.0 - drop]
        noise = (math.sqrt(3), -math.sqrt(3), math.sqrt(3), -math.sqrt(3))
        evaluations = [paired(0, *(20.0,) * 4)]
        evaluations += [paired(i, *(10 * loss + n for n in noise)) for i, loss in enumerate(later, 1)]
        error = paired_standard_error(evaluations[0], evaluations[-1])
        assert error == pytest.approx(0.1)
        return Trial("round1", 0, {}, evaluations=tuple(evaluations))

    assert beats_the_base(run(1, 0.201))
    assert not beats_the_base(run(20, 0.201))
    assert not beats_the_base(run(20, 0.30))
    assert beats_the_base(run(20, 0.31))
    assert beats_the_base(run(20, 0.21, up_and_down=0.0)), "all luck is that of the examples"
    assert significant_among(1) == pytest.approx(2.0)


def test_copies_of_a_run_lead_once():
    copies = [replace(trial(i, 9, 1), hyperparameters={"lora_r": 8}) for i in range(4)]
    assert [lead.trial.number for lead in leading_trials([*copies, trial(9, 9, 2)], 10)] == [0, 9]
    reseeded = [replace(copy, hyperparameters={"training_seed": i}) for i, copy in enumerate(copies)]
    assert len(leading_trials(reseeded, 10)) == 4


@given(st.lists(losses, max_size=10), st.randoms())
def test_ranking_does_not_depend_on_the_order(values, random):
    trials = [trial(i, value) for i, value in enumerate(values)]
    shuffled = random.sample(trials, len(trials))
    assert ranked(trials) == ranked(shuffled)


def test_the_order_of_hyperparameters_makes_no_other_configuration():
    values = {"learning_rate": 1.0, "lora_r": 2}
    copies = [
        Trial("round1", number, dict(own))
        for number, own in enumerate((values.items(), [*values.items()][::-1]))
    ]
    other = Trial("round1", 2, {"learning_rate": 2, "lora_r": 1})
    assert [trial.number for trial in distinct([*copies, other])] == [0, 2]
