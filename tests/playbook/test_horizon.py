import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.rows import exact, round_of, trial_of
from tests.playbook.strategies import heavy, rounds
from tuner.playbook import Diagnosis, RoundResults
from tuner.playbook.curves import Rise
from tuner.playbook.gain import Gain, GainSource, seed_spread
from tuner.playbook.horizon import Signs, diagnose, signs, suggest
from tuner.playbook.selection import LeadingTrial
from tuner.records import Trial


def seen(
    best_steps=(100,) * 5,
    *,
    gain=0.01,
    previous=None,
    noise=0.0,
    horizon=100,
    every=10,
    production=None,
    rise=None,
    **hyperparameters,
) -> Signs:
    """Signs written down directly: leading trials that settle at their best step."""
    leading = []
    for number, step in enumerate(best_steps):
        evaluations = tuple(exact(s, 1.0 + abs(s - step) / horizon) for s in range(0, horizon + 1, every))
        trial = Trial("round1", number, hyperparameters, evaluations=evaluations)
        leading.append(LeadingTrial(trial, exact(step, 1.0), step, step / horizon))
    known = None if gain is None else Gain(gain, noise, previous, GainSource.TRUNK, 0, horizon // 2, horizon)
    return Signs(horizon, every, production, tuple(leading), known, noise, rise)


RISE = Rise(best_step=50, last_step=100, amount=0.1, standard_error=0.01, train_loss_falls=True)


def answer(signs: Signs) -> tuple[Diagnosis, int | None]:
    diagnosis = diagnose(signs)
    suggestion = suggest(signs, diagnosis)
    return diagnosis, suggestion.steps if suggestion else None


@pytest.mark.parametrize(
    ("signs", "expected"),
    [
        (seen((0, 0, 0)), (Diagnosis.NO_LEARNING, None)),
        (seen((0, 0, 10)), (Diagnosis.TOO_LONG, 20)),
        (seen((10, 10, 10)), (Diagnosis.TOO_LONG, 20)),
        (seen((10, 10, 20), gain=0.0), (Diagnosis.SATURATED, 30)),
        (seen(gain=None), (Diagnosis.UNDETERMINED, 100)),
        (seen(noise=0.0051), (Diagnosis.UNDETERMINED, 100)),
        (seen(noise=0.005, gain=0.0101), (Diagnosis.TOO_SHORT, 150)),
        (seen(noise=0.02, gain=0.039), (Diagnosis.UNDETERMINED, 100)),
        (seen(noise=0.02, gain=0.05), (Diagnosis.TOO_SHORT, 200)),
        (seen((70,) * 5, noise=0.02, gain=0.05), (Diagnosis.RIGHT, 100)),
        (seen((70,) * 5, noise=0.02, gain=-0.039), (Diagnosis.UNDETERMINED, 100)),
        (seen((70,) * 5, noise=0.02, gain=-0.05), (Diagnosis.SATURATED, 90)),
        (seen(gain=0.001), (Diagnosis.SATURATED, 100)),
        (seen(gain=0.0011), (Diagnosis.TOO_SHORT, 150)),
        (seen((100, 100, 100, 100, 50), gain=0.0011), (Diagnosis.TOO_SHORT, 150)),
        (seen((100, 100, 100, 50, 50), gain=0.0011), (Diagnosis.RIGHT, 100)),
        (seen((70,) * 5), (Diagnosis.RIGHT, 100)),
        (seen((80,) * 5, gain=0.05), (Diagnosis.TOO_SHORT, 300)),
        (seen((75,) * 5), (Diagnosis.TOO_SHORT, 300)),
        (seen((5,) * 5, rise=RISE, every=5), (Diagnosis.TOO_LONG, 10)),
        (seen((0,) * 5, rise=RISE, gain=None), (Diagnosis.NO_LEARNING, None)),
        (seen((40,) * 5, rise=RISE, noise=0.02), (Diagnosis.OVERFITTING, 50)),
        (seen((40,) * 5, rise=RISE, gain=None), (Diagnosis.OVERFITTING, 50)),
        (seen((80,) * 5, rise=RISE, gain=0.1), (Diagnosis.OVERFITTING, 100)),
        (seen(()), (Diagnosis.UNDETERMINED, None)),
    ],
)
def test_diagnosis_and_suggestion(signs, expected):
    assert answer(signs) == expected


@pytest.mark.parametrize(("late", "of"), [(4, 5), (6, 8), (8, 10), (13, 20)])
def test_consistently_late_is_what_leaves_little_doubt_of_a_majority(late, of):
    assert diagnose(seen((100,) * late + (50,) * (of - late))) == Diagnosis.TOO_SHORT
    assert diagnose(seen((100,) * (late - 1) + (50,) * (of - late + 1))) == Diagnosis.RIGHT


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
    assert diagnose(seen(gain=0.0039, noise=0.002)) == Diagnosis.SATURATED
    assert diagnose(seen(gain=0.0041, noise=0.002)) == Diagnosis.TOO_SHORT


@pytest.mark.parametrize(
    ("gain", "previous", "expected"),
    [
        (0.00122, None, 150),  # x 0.7^0.585 = 0.81
        (0.00125, None, 200),
        (0.0014, None, 200),  # x 0.7
        (0.0016, None, 300),  # 2.5 would do, but is none of the multiples
        (0.0017, None, 300),  # x 0.7^1.585 = 0.57
        (0.002, 0.004, 200),  # exactly the threshold
        (0.1, None, 300),
        (0.0019, 0.0038, 200),  # x 0.5
        (0.0019, 0.0020, 300),  # x 0.9, the clip
    ],
)
def test_too_short_takes_the_smallest_multiple_that_saturates(gain, previous, expected):
    assert answer(seen(gain=gain, previous=previous)) == (Diagnosis.TOO_SHORT, expected)


def test_floor_is_warmup_and_decay_and_an_interval():
    too_long = seen((2, 5), every=5, schedule="linear", warmup_steps=7, decay_steps=40)
    assert answer(too_long) == (Diagnosis.TOO_LONG, 55)  # 7 + 40 + 5, at an evaluation
    assert answer(replace(too_long, production_steps=30)) == (Diagnosis.TOO_LONG, 30)


def test_floor_is_that_of_the_most_demanding_leading_trial_and_never_above_the_horizon():
    signs = seen((5, 5), every=5, schedule="linear", warmup_steps=50, decay_steps=50)
    assert signs.floor == 100
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


def test_the_interval_of_too_short_is_that_of_the_gain_give_or_take_twice_its_noise():
    suggestion = suggest(seen(gain=0.0017, noise=0.0002), Diagnosis.TOO_SHORT)
    assert (suggestion.low, suggestion.steps, suggestion.high) == (200, 300, 300)


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
    if not found.leading or diagnosis == Diagnosis.NO_LEARNING:
        assert suggestion is None
        return
    cap = results.production_steps or math.inf
    for steps in (suggestion.low, suggestion.steps, suggestion.high):
        assert 1 <= steps <= min(3 * results.max_train_steps, cap)
        assert steps >= min(found.floor, cap)
    assert suggestion.low <= suggestion.steps <= suggestion.high
    if diagnosis != Diagnosis.TOO_SHORT:
        assert suggestion.steps <= results.max_train_steps
    else:
        assert suggestion.steps >= min(1.5 * results.max_train_steps, cap)
    for steps in (suggestion.low, suggestion.steps, suggestion.high):
        assert steps % results.evaluate_every == 0 or steps in (results.max_train_steps, cap)
    if diagnosis in (Diagnosis.RIGHT, Diagnosis.UNDETERMINED):
        assert suggestion.steps == min(results.max_train_steps, cap)


@heavy
@given(rounds(), st.randoms())
def test_the_order_of_the_trials_does_not_matter(results, random):
    shuffled = replace(results, trials=tuple(random.sample(results.trials, len(results.trials))))
    assert repr(signs(shuffled)) == repr(signs(results))


@given(
    gain=st.floats(0, 0.1),
    more=st.floats(0, 0.1),
    previous=st.none() | st.floats(0.001, 0.2),
    noise=st.floats(0, 0.006),
)
def test_more_gain_never_shortens_the_next_round(gain, more, previous, noise):
    less_steps = answer(seen(gain=gain, previous=previous, noise=noise))[1]
    more_steps = answer(seen(gain=gain + more, previous=previous, noise=noise))[1]
    assert less_steps <= more_steps


@given(gain=st.floats(-0.1, 0.1), noise=st.floats(0, 0.005), less=st.floats(0, 1))
def test_less_noise_never_hides_a_gain(gain, noise, less):
    before = diagnose(seen(gain=gain, noise=noise))
    after = diagnose(seen(gain=gain, noise=noise * less))
    assert not (before == Diagnosis.TOO_SHORT and after != Diagnosis.TOO_SHORT)


GAINS, NOISES = st.floats(-0.5, 0.5), st.floats(0, 0.2)


def is_undetermined(gain: float, noise: float) -> bool:
    diagnosis, steps = answer(seen(gain=gain, noise=noise))
    assert diagnosis != Diagnosis.UNDETERMINED or steps == 100
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
    [(52, 5, 155), (60, 5, 180), (7, 7, 21), (19, 10, 50), (9, 10, 20), (3, 10, 9)],
)
def test_a_longer_horizon_is_at_an_evaluation_and_within_three_times(horizon, every, expected):
    signs = seen((horizon,) * 5, gain=0.1, horizon=horizon, every=every)
    assert suggest(signs, Diagnosis.TOO_SHORT).steps == expected


def test_a_horizon_off_the_grid_is_kept_as_it_is():
    assert answer(seen((20,) * 5, horizon=52, every=5)) == (Diagnosis.RIGHT, 52)
    assert answer(seen((52,) * 5, horizon=52, every=5, gain=0.1, production=98)) == (Diagnosis.TOO_SHORT, 98)


@given(st.integers(0, 5), st.floats(0.002, 0.1))
def test_more_late_trials_never_turn_too_short_into_right(late, gain):
    order = [Diagnosis.RIGHT, Diagnosis.TOO_SHORT]
    fewer = diagnose(seen((100,) * late + (50,) * (5 - late), gain=gain))
    more = diagnose(seen((100,) * min(5, late + 1) + (50,) * max(0, 4 - late), gain=gain))
    assert order.index(more) >= order.index(fewer)


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
