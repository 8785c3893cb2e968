import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.loss_curves import Runs, learning
from tests.playbook.rows import exact, round_of, trial_of
from tests.playbook.strategies import heavy, rounds
from tuner.playbook import Diagnosis, RoundResults
from tuner.playbook.curves import LateDrop, Rise
from tuner.playbook.gain import Gain, GainSource, seed_spread
from tuner.playbook.horizon import Signs, diagnose, puts_the_edge_first, signs, suggest
from tuner.playbook.results import BranchResult
from tuner.playbook.selection import LeadingTrial
from tuner.records import Trial


def seen(
    best_steps=(100,) * 5,
    *,
    gain=0.02,
    ratio=0.7,
    noise=0.0,
    horizon=100,
    every=10,
    production=None,
    rise=None,
    late=None,
    small_rates=False,
    widenings=0,
    **hyperparameters,
) -> Signs:
    """Signs written down directly: leading trials that settle at their best step.

    `late` is what the best trial fell by in the last quarter, of a constant rate; unless it is given, 0.4 of
    the gain where its best step is late, and nothing where it is not.
    """
    leading = []
    for number, step in enumerate(best_steps):
        evaluations = tuple(exact(s, 1.0 + abs(s - step) / horizon) for s in range(0, horizon + 1, every))
        trial = Trial("round1", number, hyperparameters, evaluations=evaluations)
        leading.append(LeadingTrial(trial, exact(step, 1.0), step / horizon))
    source = GainSource.STABLE_PHASE
    known = None if gain is None else Gain(gain, noise, source, 0, horizon // 2, horizon, ratio)
    if late is None:
        is_late = bool(best_steps) and best_steps[0] >= 0.75 * horizon
        late = LateDrop(0.4 * (gain or 0.0) if is_late else 0.0, 0.0)
    return Signs(
        horizon, every, production, tuple(leading), known, noise, rise, late=late, late_by_rate=late,
        num_complete=max(1, len(leading)), has_small_rates=small_rates, num_widenings=widenings,
    )  # fmt: skip


RISE = Rise(best_step=50, last_step=100, amount=0.1, standard_error=0.01, train_loss_falls=True)


def answer(signs: Signs) -> tuple[Diagnosis, int | None]:
    diagnosis = diagnose(signs)
    suggestion = suggest(signs, diagnosis)
    return diagnosis, suggestion.steps if suggestion else None


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        (seen(()), (Diagnosis.NO_LEARNING, None)),
        (replace(seen(()), num_complete=0), (Diagnosis.UNDETERMINED, None)),
        (seen((10, 10, 10)), (Diagnosis.TOO_LONG, 20)),
        (seen((5,) * 5, rise=RISE, every=5), (Diagnosis.TOO_LONG, 10)),
        (seen((40,) * 5, rise=RISE, noise=0.02), (Diagnosis.OVERFITTING, 50)),
        (seen((40,) * 5, rise=RISE, gain=None), (Diagnosis.OVERFITTING, 50)),
        (seen((80,) * 5, rise=RISE, gain=0.1), (Diagnosis.OVERFITTING, 100)),
        (seen(gain=None), (Diagnosis.UNDETERMINED, 150)),
        (seen(noise=None), (Diagnosis.UNDETERMINED, 150)),
        (seen(noise=0.0101), (Diagnosis.UNDETERMINED, 150)),
        (seen(noise=0.02, gain=0.039), (Diagnosis.UNDETERMINED, 150)),
        (seen(noise=0.02, gain=0.05), (Diagnosis.TOO_SHORT, 200)),
        (seen((70,) * 5, noise=0.02, gain=-0.039), (Diagnosis.UNDETERMINED, 150)),
        (seen((70,) * 5, noise=0.02, gain=-0.05), (Diagnosis.SATURATED, 90)),
        (seen((10, 10, 20), gain=0.0), (Diagnosis.SATURATED, 30)),
        (seen(gain=0.005), (Diagnosis.SATURATED, 100)),
        (seen(gain=0.0051), (Diagnosis.TOO_SHORT, 150)),
        # A majority is evidence, never a veto: the best trial's own fall is enough.
        (seen((100, 50, 50, 50, 50)), (Diagnosis.TOO_SHORT, 300)),
        (seen((100,)), (Diagnosis.TOO_SHORT, 300)),
        # Its curve says nothing: then consistently late trials do, of which 3 in 5 are too few.
        (replace(seen((100, 100, 100, 100, 50)), late=None), (Diagnosis.TOO_SHORT, 300)),
        (replace(seen((100, 100, 100, 50, 50)), late=None), (Diagnosis.UNDETERMINED, 150)),
        (seen((70,) * 5), (Diagnosis.RIGHT, 100)),
        (seen((70,)), (Diagnosis.RIGHT, 100)),
        # Consistently late, but the last quarter brought a fifth of the gain at most.
        (seen((100,) * 5, late=LateDrop(0.0039, 0.0)), (Diagnosis.RIGHT, 100)),
        (seen((100,) * 5, late=LateDrop(0.0019, 0.0009)), (Diagnosis.RIGHT, 100)),
        (seen((100,) * 5, late=LateDrop(0.0029, 0.001)), (Diagnosis.TOO_SHORT, 300)),
    ],
)
def test_diagnosis_and_suggestion(signs, expected):
    assert answer(signs) == expected


@pytest.mark.parametrize(("late", "of"), [(2, 2), (4, 5), (6, 8), (8, 10), (13, 20)])
def test_consistently_late_is_what_leaves_little_doubt_of_a_majority(late, of):
    def diagnosis(number: int) -> Diagnosis:
        return diagnose(replace(seen((100,) * number + (50,) * (of - number)), late=None))

    assert diagnosis(late) == Diagnosis.TOO_SHORT
    assert diagnosis(late - 1) == Diagnosis.UNDETERMINED


@pytest.mark.parametrize(
    ("signs", "is_first"),
    [
        (seen(small_rates=True), True),
        (seen(small_rates=True, gain=0.0), True),
        (seen(small_rates=True, gain=None), True),
        (seen(small_rates=True, widenings=1), True),
        (seen(small_rates=True, widenings=2), False),
        (seen(), False),
        (seen((70,) * 5, small_rates=True), False),
        (seen((10,) * 5, small_rates=True), False),
        (seen((40,) * 5, small_rates=True, rise=RISE), False),
    ],
)
def test_an_edge_of_the_learning_rate_comes_first_where_it_may_mislead(signs, is_first):
    diagnosis = diagnose(signs)
    assert puts_the_edge_first(signs, diagnosis) is is_first
    if is_first:
        assert suggest(signs, diagnosis).steps == 100


def test_the_noise_is_that_of_the_gain_and_that_between_seeds_in_quadrature():
    def repeated(seed: int) -> Trial:
        run = trial_of(
            seed, lambda s: falling_by(s) * (1 + 0.02 * seed), learning_rate=1e-4, training_seed=seed
        )
        blurred = tuple(
            replace(e, example_nll=exact(e.step, e.eval_loss, spread=0.1).example_nll) if e.step == 50 else e
            for e in run.evaluations
        )
        return replace(run, evaluations=blurred)

    results = round_of(repeated(0), repeated(1))
    found = signs(results)
    between_seeds = seed_spread(results.trials)
    assert min(found.gain.standard_error, between_seeds) > 0.01
    assert found.noise**2 == pytest.approx(found.gain.standard_error**2 + between_seeds**2)


def falling_by(step: int) -> float:
    return 2.0 - step / 200


def test_the_rise_is_the_best_trials():
    turning = trial_of(0, lambda s: 1.0 + abs(s - 50) / 100)
    falling = trial_of(1, lambda s: 3.0 - s / 100)
    assert signs(round_of(turning, falling)).rise is not None
    assert (
        signs(
            round_of(
                falling, replace(turning, evaluations=trial_of(0, lambda s: 5 + abs(s - 50)).evaluations)
            )
        ).rise
        is None
    )


def test_twice_the_noise_is_the_threshold_of_saturation():
    assert diagnose(seen(gain=0.0079, noise=0.004)) == Diagnosis.SATURATED
    assert diagnose(seen(gain=0.0081, noise=0.004)) == Diagnosis.TOO_SHORT
    assert diagnose(replace(seen(gain=0.0081), worthwhile_gain=0.01)) == Diagnosis.SATURATED


@pytest.mark.parametrize(
    ("gain", "ratio", "expected"),
    [
        (0.0061, 0.7, 150),  # x 0.7^0.585 = 0.81
        (0.0063, 0.7, 200),
        (0.0070, 0.7, 200),  # x 0.7
        (0.0080, 0.7, 300),  # 2.5 would do, but is none of the multiples
        (0.0085, 0.7, 300),  # x 0.7^1.585 = 0.57
        (0.1, 0.7, 300),
        (0.0098, 0.5, 200),
        (0.0098, 0.9, 300),
        (0.5, 0.0, 150),
    ],
)
def test_too_short_takes_the_smallest_multiple_that_saturates(gain, ratio, expected):
    assert answer(seen(gain=gain, ratio=ratio)) == (Diagnosis.TOO_SHORT, expected)


def test_floor_is_warmup_and_an_interval_before_the_decay():
    too_long = seen((2, 5), every=5, schedule="linear", warmup_steps=7, decay_steps=40)
    assert answer(too_long) == (Diagnosis.TOO_LONG, 20)  # (7 + 5) / 0.6, at an evaluation
    assert answer(replace(too_long, production_steps=15)) == (Diagnosis.TOO_LONG, 15)


def test_floor_is_that_of_the_most_demanding_leading_trial_and_never_above_the_horizon():
    signs = seen((5, 5), every=5, schedule="linear", warmup_steps=50, decay_steps=50)
    assert signs.floor == 100
    assert seen((5,), every=5, schedule="linear", decay_steps=100).floor == 100
    assert seen((5,), every=5, schedule="cosine", warmup_steps=7, decay_steps=40).floor == 12


def test_production_steps_cap_and_say_so():
    signs = seen(gain=0.05, production=250)
    suggestion = suggest(signs, diagnose(signs))
    assert (suggestion.steps, suggestion.is_capped) == (250, True)
    assert not suggest(replace(signs, production_steps=300), Diagnosis.TOO_SHORT).is_capped
    assert suggest(replace(signs, production_steps=60), Diagnosis.RIGHT).steps == 60


def test_saturated_takes_the_ninetieth_percentile_of_the_settled_steps():
    # Percentile 90 of 20, 30, 40, 50, 60 is 56; times 1.25 is 70.
    assert answer(seen((20, 30, 40, 50, 60), gain=0.0)) == (Diagnosis.SATURATED, 70)
    interval = suggest(seen((20, 30, 40, 50, 60), gain=0.0), Diagnosis.SATURATED)
    assert (interval.low, interval.high) == (50, 80)
    # Percentile 90 of 20, 20, 20, 20, 100 is 68; times 1.25 is 85.
    assert answer(seen((20, 20, 20, 20, 100), gain=0.0)) == (Diagnosis.SATURATED, 90)


def test_the_interval_of_too_long_is_twice_the_first_and_the_last_best_step():
    suggestion = suggest(seen((5, 2, 10), every=1), Diagnosis.TOO_LONG)
    assert (suggestion.low, suggestion.steps, suggestion.high) == (4, 20, 20)


def test_the_interval_of_too_short_is_that_of_the_gain_with_twice_its_noise():
    suggestion = suggest(seen(gain=0.0080, noise=0.0006), Diagnosis.TOO_SHORT)
    assert (suggestion.low, suggestion.steps, suggestion.high) == (200, 300, 300)


def with_curve(losses, *, steps=tuple(range(0, 101, 5)), **hyperparameters) -> RoundResults:
    return round_of(trial_of(0, losses, steps=steps, **hyperparameters), evaluate_every=5)


def test_under_a_linear_decay_the_stable_phase_settles_and_is_lengthened_by_the_share():
    def settled_at_20(step: int) -> float:
        return 2.0 + max(0, 20 - step) / 20 - 0.002 * max(0, step - 60) / 40

    found = signs(with_curve(settled_at_20, schedule="linear", decay_steps=40))
    assert diagnose(found) == Diagnosis.SATURATED
    assert suggest(found, Diagnosis.SATURATED).steps == 45  # 1.25 x 20 / 0.6, at an evaluation


def test_a_saturated_cosine_keeps_its_horizon_unless_a_comparison_run_was_as_good():
    saturated = with_curve(lambda step: 2.0 + 0.9**step, schedule="cosine")
    as_good = replace(saturated, branches=(BranchResult(0, 50, (exact(50, 2.001),)),))
    assert answer(signs(as_good)) == (Diagnosis.SATURATED, 50)
    worse = replace(saturated, branches=(BranchResult(0, 50, (exact(50, 2.2),)),))
    assert answer(signs(worse))[1] != 50
    assert answer(signs(saturated)) == (Diagnosis.UNDETERMINED, 150)


def test_overfitting_is_found_before_saturation_and_suggests_alike():
    def u_shaped(step: int) -> float:
        return 1.0 + ((step - 40) / 100) ** 2

    results = round_of(*(trial_of(i, u_shaped) for i in range(5)))
    found = signs(results)
    diagnosis = diagnose(found)
    assert diagnosis == Diagnosis.OVERFITTING
    assert suggest(found, diagnosis).steps == 50


@heavy
@given(rounds())
def test_every_suggestion_keeps_its_bounds(results):
    found = signs(results)
    diagnosis = diagnose(found)
    suggestion = suggest(found, diagnosis)
    if not found.leading:
        assert diagnosis in (Diagnosis.NO_LEARNING, Diagnosis.UNDETERMINED)
        assert suggestion is None
        return
    cap = results.production_steps or math.inf
    for steps in (suggestion.low, suggestion.steps, suggestion.high):
        assert 1 <= steps <= min(3 * results.max_train_steps, cap)
        assert steps >= min(found.floor, cap)
    assert suggestion.low <= suggestion.steps <= suggestion.high
    most = {Diagnosis.TOO_SHORT: 3, Diagnosis.UNDETERMINED: 1.5}.get(diagnosis, 1)
    for steps in (suggestion.low, suggestion.steps, suggestion.high):
        assert steps <= most * results.max_train_steps
        on_grid = steps % results.evaluate_every == 0
        assert on_grid or steps in (results.max_train_steps, cap, math.floor(most * results.max_train_steps))
    if puts_the_edge_first(found, diagnosis) or diagnosis == Diagnosis.RIGHT:
        assert suggestion.steps == min(results.max_train_steps, cap)
    elif diagnosis in (Diagnosis.TOO_SHORT, Diagnosis.UNDETERMINED):
        assert suggestion.steps >= min(math.floor(1.5 * results.max_train_steps), cap)


@heavy
@given(rounds(), st.randoms())
def test_the_order_of_the_trials_does_not_matter(results, random):
    shuffled = replace(results, trials=tuple(random.sample(results.trials, len(results.trials))))
    assert repr(signs(shuffled)) == repr(signs(results))


@given(gain=st.floats(0.005, 0.1), more=st.floats(0, 0.1), ratio=st.floats(0, 0.9), noise=st.floats(0, 0.005))
def test_more_gain_never_shortens_the_next_round(gain, more, ratio, noise):
    less_steps = answer(seen(gain=gain, ratio=ratio, noise=noise))[1]
    more_steps = answer(seen(gain=gain + more, ratio=ratio, noise=noise))[1]
    assert less_steps <= more_steps


@given(gain=st.floats(-0.1, 0.1), noise=st.floats(0, 0.005), less=st.floats(0, 1))
def test_less_noise_never_hides_a_gain(gain, noise, less):
    before = diagnose(seen(gain=gain, noise=noise))
    after = diagnose(seen(gain=gain, noise=noise * less))
    assert not (before == Diagnosis.TOO_SHORT and after != Diagnosis.TOO_SHORT)


GAINS, NOISES = st.floats(-0.5, 0.5), st.floats(0, 0.2)


def is_undetermined(gain: float, noise: float) -> bool:
    diagnosis, steps = answer(seen(gain=gain, noise=noise))
    assert diagnosis != Diagnosis.UNDETERMINED or steps == 150
    return diagnosis == Diagnosis.UNDETERMINED


@given(GAINS, st.floats(0, 1))
def test_a_gain_beyond_twice_its_noise_is_never_undetermined(gain, share):
    assert not is_undetermined(gain, share * abs(gain) / 2)


@given(GAINS, st.floats(0, 0.005))
def test_a_noise_of_half_a_percent_is_small_enough_for_any_gain(gain, noise):
    assert not is_undetermined(gain, noise)


@given(st.floats(-1, 1), st.floats(0.00501, 0.2))
def test_a_gain_within_twice_a_larger_noise_is_undetermined(share, noise):
    assert is_undetermined(share * 1.99 * noise, noise)


@given(GAINS, NOISES, st.floats(0, 1), st.floats(1, 10))
def test_less_noise_and_more_gain_up_or_down_never_leave_it_undetermined(gain, noise, less, more):
    if not is_undetermined(gain, noise):
        assert not is_undetermined(gain, noise * less)
        assert not is_undetermined(gain * more, noise)
        assert not is_undetermined(-gain, noise)


@pytest.mark.parametrize(
    ("horizon", "every", "expected"),
    [(52, 5, 156), (60, 5, 180), (7, 7, 21), (19, 10, 57), (9, 10, 27), (3, 10, 9)],
)
def test_a_longer_horizon_is_at_an_evaluation_and_within_three_times(horizon, every, expected):
    signs = seen((horizon,) * 5, gain=0.1, horizon=horizon, every=every)
    assert suggest(signs, Diagnosis.TOO_SHORT).steps == expected


def test_a_horizon_off_the_grid_is_kept_as_it_is():
    assert answer(seen((20,) * 5, horizon=52, every=5)) == (Diagnosis.RIGHT, 52)
    assert answer(seen((52,) * 5, horizon=52, every=5, gain=0.1, production=98)) == (Diagnosis.TOO_SHORT, 98)


@given(st.integers(1, 5), st.floats(0.006, 0.2), st.floats(0, 0.002))
def test_a_gain_worth_having_is_never_kept_while_the_best_trial_still_falls(count, gain, error):
    """However few trials there are, and wherever the others were best."""
    for others in (50, 100):
        signs = seen((100,) + (others,) * (count - 1), gain=gain, late=LateDrop(0.4 * gain, error))
        if 2 * error < 0.2 * gain:
            assert diagnose(signs) == Diagnosis.TOO_SHORT


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]), share=st.floats(0.05, 0.9),
    exponent=st.floats(0.05, 1.0), horizon=st.integers(40, 400),
)  # fmt: skip
def test_no_schedule_makes_an_even_fall_look_done(schedule, share, exponent, horizon):
    """A power of the summed rate goes on falling: no decay to a tiny rate may be taken for its end."""
    decay = round(share * horizon) if schedule == "linear" else 0
    curve = learning(3.0, 1.0, lambda x: (1 + x / 0.001) ** -exponent, float(horizon))
    runs = Runs(curve, schedule, decay / horizon)
    grid = tuple(range(0, horizon + 1, max(1, horizon // 20)))

    def run(number: int, steps: tuple[int, ...], length: int) -> Trial:
        losses = runs.loss(np.array(steps), length).tolist()
        return trial_of(number, losses, steps=steps, schedule=schedule, decay_steps=decay)

    trial = run(0, (*grid[:-1], horizon), horizon)
    half = BranchResult(0, horizon // 2, run(0, (horizon // 2,), horizon // 2).evaluations)
    found = signs(round_of(trial, max_train_steps=horizon, branches=(half,)))
    assert found.gain is not None
    assert diagnose(found) != Diagnosis.RIGHT


@given(best=st.lists(st.integers(0, 10), min_size=1, max_size=5), later=st.integers(0, 5))
def test_later_best_steps_never_shorten_a_round_that_is_too_long(best, later):
    def steps(values) -> int:
        return suggest(seen(tuple(values), every=1), Diagnosis.TOO_LONG).steps

    assert steps(best) <= steps(step + later for step in best)


@given(st.floats(0.5, 4.0))
def test_the_scale_of_the_loss_does_not_matter(scale):
    def results(factor: float) -> RoundResults:
        return round_of(*(trial_of(i, lambda s: factor * (2 + (s + 1) ** -0.5)) for i in range(5)))

    assert answer(signs(results(1.0))) == answer(signs(results(scale)))
