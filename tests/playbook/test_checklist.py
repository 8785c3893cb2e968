import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.rounds import noisy_trial
from tests.playbook.rows import round_of, trial_of
from tuner.playbook import RoundResults, Severity
from tuner.playbook.checklist import checklist, doubling_of_trials
from tuner.playbook.curves import periodicity
from tuner.playbook.edges import position
from tuner.playbook.results import Finding, percent
from tuner.playbook.selection import leading_trials
from tuner.records import Choices, Evaluation, Fixed, Range, TimesSqrtRank, TrialState

GRID = tuple(range(0, 401, 10))
RATE = Range(1e-5, 1e-3, log=True)
INFEASIBLE = TrialState.INFEASIBLE


def findings(results: RoundResults, *, noise: float = 0.001) -> dict[str, Finding]:
    leading = leading_trials(results.trials, results.max_train_steps)
    found = checklist(results, leading, noise=noise)
    return {finding.rule: finding for finding in found}


def falling(step: int) -> float:
    return 2.0 + math.exp(-step / 30)


def noisy_round(formula, **fields) -> RoundResults:
    rng = np.random.default_rng(0)
    trials = [
        noisy_trial(i, formula, GRID, rng, noise=0.001, hyperparameters={"batch_size": 8}) for i in range(5)
    ]
    return round_of(*trials, max_train_steps=400, **fields)


def by_rate(*rates: float, states=None, losses=None, space=RATE) -> RoundResults:
    trials = [
        trial_of(
            i,
            [3.0, losses[i] if losses else 2.0 + i / 10],
            steps=[0, 100],
            learning_rate=rate,
            state=states[i] if states else TrialState.COMPLETE,
        )
        for i, rate in enumerate(rates)
    ]
    return round_of(*trials, space={"learning_rate": space})


def test_a_healthy_round_has_no_findings():
    results = noisy_round(lambda t: 2.0 + np.exp(-t / 30))
    assert findings(results, noise=0.01) == {}


def test_positions_are_logarithmic_where_the_range_is():
    assert position(RATE, 1e-4) == pytest.approx(0.5)
    assert position(Range(0, 0.2), 0.05) == pytest.approx(0.25)
    assert position(RATE, 0.0) == 0.0


@pytest.mark.parametrize(
    ("rate", "side"), [(1.2e-5, "lower"), (8e-4, "upper"), (1.3e-5, None), (7.9e-4, None)]
)
def test_boundary_is_within_five_percent_of_the_range(rate, side):
    found = findings(by_rate(rate)).get("boundary")
    assert (found is None) == (side is None)
    assert side is None or f"{side} bound" in found.message


def test_zero_is_a_natural_bound():
    trial = trial_of(0, falling, steps=GRID, weight_decay=0.0)
    results = round_of(trial, max_train_steps=400, space={"weight_decay": Range(0.0, 0.1)})
    assert "boundary" not in findings(results)


def test_only_searched_ranges_have_boundaries():
    assert "boundary" not in findings(by_rate(1e-5, space=Fixed(1e-5)))
    assert "boundary" not in findings(by_rate(1e-5, space=Choices((1e-5, 1e-4))))


def test_unstable_edge_is_the_best_trial_below_infeasible_ones():
    states = [TrialState.COMPLETE, TrialState.COMPLETE, INFEASIBLE, INFEASIBLE]
    edge = by_rate(1e-4, 2e-4, 4e-4, 8e-4, states=states, losses=[2.1, 2.0, 9, 9])
    assert findings(edge)["unstable_edge"].numbers == {"edge": 2e-4, "infeasible_above": 2}
    assert "boundary" not in findings(edge)
    close = by_rate(
        1e-4,
        9e-4,
        9.5e-4,
        states=[TrialState.COMPLETE, TrialState.COMPLETE, INFEASIBLE],
        losses=[2.1, 2.0, 9],
    )
    assert "unstable_edge" in findings(close)
    assert "boundary" not in findings(close), "beyond that bound nothing trains"
    inside = by_rate(1e-4, 2e-4, 4e-4, 8e-4, states=states, losses=[2.0, 2.1, 9, 9])
    assert "unstable_edge" not in findings(inside)
    assert "unstable_edge" not in findings(by_rate(1e-4, 2e-4, losses=[2.1, 2.0]))
    mixed = by_rate(1e-4, 2e-4, 4e-4, states=[TrialState.COMPLETE, INFEASIBLE, TrialState.COMPLETE])
    assert "unstable_edge" not in findings(mixed)


@pytest.mark.parametrize(("bad", "severity"), [(2, None), (3, Severity.WARNING), (8, Severity.PROBLEM)])
def test_infeasible_share_above_a_quarter(bad, severity):
    states = [INFEASIBLE] * bad + [TrialState.COMPLETE] * (8 - bad) + [TrialState.FAILED]
    found = findings(by_rate(*[1e-4] * 9, states=states)).get("infeasible_share")
    assert (found.severity if found else None) == severity


def test_the_last_doubling_of_the_trials():
    # Of the six pairs of four trials three hold the best, two the second without it, one the third.
    assert doubling_of_trials([3.0, 2.0, 2.2, 9.0]) == pytest.approx((3 * 2.0 + 2 * 2.2 + 3.0) / 6 / 2.0 - 1)
    assert doubling_of_trials([2.0, 3.0]) == pytest.approx(0.25)
    assert doubling_of_trials([2.0]) == 0.0
    assert doubling_of_trials([2.0, *[math.inf] * 7]) == 0.0
    assert doubling_of_trials([math.inf] * 4) == 0.0


@given(st.lists(st.floats(0.1, 9), min_size=2, max_size=12), st.randoms())
def test_the_last_doubling_is_the_mean_over_all_halves(losses, random):
    exact = doubling_of_trials(losses)
    assert exact == doubling_of_trials(random.sample(losses, len(losses)))
    halves = [min(half) for half in itertools.combinations(losses, len(losses) // 2)]
    assert exact == pytest.approx(sum(halves) / len(halves) / min(losses) - 1)


def test_more_trials_are_worth_less_and_less():
    losses = np.random.default_rng(0).gamma(2.0, 0.05, 1000) + 2.0
    gains = [doubling_of_trials(losses[:count].tolist()) for count in (4, 16, 64, 256, 1000, 20_000)]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] < 0.003 < 0.01 < gains[0]


def test_too_few_trials_is_a_doubling_above_noise_and_what_is_worthwhile():
    results = by_rate(*(1e-4 * 1.01**i for i in range(4)), losses=[2.0, 2.01, 2.03, 2.03])
    gain = doubling_of_trials([2.0, 2.01, 2.03, 2.03])
    assert 0.004 < gain < 0.005
    assert "too_few_trials" not in findings(results, noise=0.0)
    asking = replace(results, worthwhile_gain=0.004)
    found = findings(asking, noise=0.0)["too_few_trials"]
    assert found.numbers["gain"] == pytest.approx(gain)
    assert found.message.startswith("The best of only 2 trials would typically be 0.42% worse")
    assert "too_few_trials" not in findings(asking, noise=0.0049)


def test_copies_are_no_trials():
    results = by_rate(*[1e-4] * 8, losses=[2.0, *[2.5] * 7])
    assert "too_few_trials" not in findings(results, noise=0.0), "eight copies of one trial say nothing"


def test_overfitting_of_a_leading_trial():
    results = noisy_round(lambda t: falling_then_rising(t))
    found = findings(results)["overfitting"]
    assert found.severity == Severity.WARNING
    assert found.numbers["leading"] == 5


def falling_then_rising(t):
    return 2.0 + np.exp(-t / 30) + 0.1 * np.maximum(0, t - 200) / 200


def test_overfitting_of_others_favours_slow_training():
    good = [trial_of(i, falling, steps=GRID) for i in range(5)]
    bad = [trial_of(5 + i, lambda s: 2.5 + float(falling_then_rising(s)), steps=GRID) for i in range(2)]
    found = findings(round_of(*good, *bad, max_train_steps=400))["overfitting"]
    assert found.severity == Severity.INFO
    assert "favours slow training" in found.message
    assert found.numbers == {"leading": 0, "trials": 2}


def test_late_variance():
    found = findings(noisy_round(lambda t: 2 + 0.02 * (t / 10 % 2) + (t == 0)))["late_variance"]
    assert found.numbers == {"restless": 11, "changes": 11}
    assert "late_variance" not in findings(noisy_round(lambda t: 2 + np.exp(-t / 30)))


@pytest.mark.parametrize(
    ("tail", "changes"),
    [
        ((0.0, 0.02, 0.0, 0.0, 0.0), None),
        ((0.0, 0.02, 0.01, 0.0, 0.0), None),
        ((0.0, 0.02, 0.0, 0.02, 0.0), 4),
        ((-0.015, -0.03, -0.045, -0.03, -0.015), None),
    ],
)
def test_late_variance_turns_twice_at_least(tail, changes):
    losses = [*(3.0 - step / 400 for step in GRID[:-13]), *(2.0,) * 8, *(2.0 + more for more in tail)]
    found = findings(round_of(trial_of(0, losses, steps=GRID), max_train_steps=400)).get("late_variance")
    assert (found and found.numbers["restless"]) == changes


@pytest.mark.parametrize(
    ("schedule", "remedy"),
    [
        ("constant", "`schedule: linear`"),
        ("linear", "longer decay_steps"),
        ("cosine", "Use a lower learning_rate"),
    ],
)
def test_late_variance_says_what_smooths_this_schedule(schedule, remedy):
    trial = trial_of(0, lambda s: 2 + 0.02 * (s / 10 % 2) + (s == 0), steps=GRID, schedule=schedule)
    assert remedy in findings(round_of(trial, max_train_steps=400))["late_variance"].message


def test_train_loss_rising_is_a_problem_of_the_best_or_of_most():
    def trial(number, *, rising):
        run = trial_of(number, lambda s: falling(s) + number, steps=GRID)
        trains = [e.step / 100 if rising else 3 - e.step / 1000 for e in run.evaluations]
        return replace(
            run,
            evaluations=tuple(replace(e, train_loss=t) for e, t in zip(run.evaluations, trains, strict=True)),
        )

    def rule(*rising):
        trials = [trial(i, rising=is_rising) for i, is_rising in enumerate(rising)]
        return findings(round_of(*trials, max_train_steps=400)).get("train_loss_rising")

    assert rule(True, False, False).severity == Severity.PROBLEM
    assert "in 1 of 1 leading trial, by more" in rule(True).message
    assert rule(False, True, True) is not None
    assert rule(False, True, False) is None
    assert rule(False, True) is None


@pytest.mark.parametrize(("clipped", "fires"), [(5, False), (6, True)])
def test_clipped_is_more_than_half_of_the_updates(clipped, fires):
    trial = trial_of(0, falling, steps=GRID)
    evaluations = tuple(replace(e, clipped_updates=clipped if e.step else 0) for e in trial.evaluations)
    results = round_of(replace(trial, evaluations=evaluations), max_train_steps=400)
    assert ("clipped" in findings(results)) == fires


def test_clipped_says_which_rates_to_search():
    trial = trial_of(0, falling, steps=GRID, learning_rate=0.0098, max_grad_norm=1.0)
    evaluations = tuple(replace(e, clipped_updates=10 if e.step else 0) for e in trial.evaluations)
    message = findings(round_of(replace(trial, evaluations=evaluations), max_train_steps=400))[
        "clipped"
    ].message
    assert message.startswith("400 of the best trial's 400 updates were clipped at max_grad_norm 1,")
    assert "Search rates below its 0.0098" in message


@pytest.mark.parametrize(
    ("warmup", "severity"),
    [(20, None), (21, Severity.WARNING), (40, Severity.WARNING), (41, Severity.PROBLEM)],
)
def test_long_warmup(warmup, severity):
    results = round_of(trial_of(0, falling, steps=GRID, warmup_steps=warmup), max_train_steps=400)
    found = findings(results).get("long_warmup")
    assert (found.severity if found else None) == severity


@pytest.mark.parametrize(("warmup", "advice"), [(50, "a longer horizon."), (250, "longer horizons over the")])
def test_a_long_warmup_names_no_horizon_that_one_round_cannot_reach(warmup, advice):
    results = round_of(trial_of(0, falling, steps=GRID, warmup_steps=warmup), max_train_steps=400)
    assert advice in findings(results)["long_warmup"].message


@pytest.mark.parametrize(("share", "fires"), [(0.3, False), (0.31, True)])
def test_costly_evaluation(share, fires):
    results = round_of(trial_of(0, falling, steps=GRID), max_train_steps=400, evaluation_share=share)
    assert ("costly_evaluation" in findings(results)) == fires


@given(st.floats(0.301, 0.97), st.integers(1, 200), st.floats(0.1, 5))
def test_costly_evaluation_says_what_is_cheap_enough(share, every, tokens):
    results = round_of(trial_of(0, falling), evaluate_every=every, evaluation_share=share)
    message = findings(results)["costly_evaluation"].message
    seldom = int(message.split("Evaluating every ")[1].split()[0])

    def share_at(interval: float) -> float:
        """An evaluation costs as many `tokens` as make up the share at the present interval."""
        training = tokens * (1 - share) / share / every
        return tokens / (tokens + training * interval)

    assert share_at(seldom) <= 0.3 + 1e-9 < share_at(seldom - 1) + 2e-9
    assert ("in a longer run" in message) == (4 * seldom > 100)


def test_periodic_evaluation_has_the_epochs_period():
    def wave(t):
        return 2 + np.exp(-t / 30) + 0.02 * np.sin(2 * np.pi * t / 60)

    found = findings(noisy_round(wave, train_rows=480))["periodic_evaluation"]
    assert found.numbers["epoch_steps"] == 60
    assert "periodic_evaluation" not in findings(noisy_round(wave, train_rows=360))
    assert "periodic_evaluation" not in findings(noisy_round(wave, train_rows=0))


@pytest.mark.parametrize(("amplitude", "fires"), [(0.02, False), (0.035, True)])
def test_periodic_evaluation_is_six_tenths_of_the_variance(amplitude, fires):
    def waves(t):
        return (
            2 + np.exp(-t / 30) + amplitude * np.sin(2 * np.pi * t / 60) + 0.02 * np.sin(2 * np.pi * t / 37)
        )

    results = noisy_round(waves, train_rows=480)
    share = periodicity(results.trials[0].evaluations, 60)
    assert 0.65 < share < 0.85 if fires else 0.42 < share < 0.58
    assert ("periodic_evaluation" in findings(results)) == fires


def test_alpha_that_follows_the_rank():
    space = {"lora_r": Choices((8, 16)), "lora_alpha": Choices((16, 32))}
    doubled = [trial_of(i, falling, lora_r=r, lora_alpha=2 * r, steps=GRID) for i, r in enumerate((8, 16))]
    found = findings(round_of(*doubled, max_train_steps=400, space=space))
    assert "at 2 times the rank" in found["alpha_follows_rank"].message
    crossed = [replace(doubled[0], hyperparameters={"lora_r": 8, "lora_alpha": 32}), doubled[1]]
    found = findings(round_of(*crossed, max_train_steps=400, space=space))
    assert "independently of the rank" in found["alpha_follows_rank"].message
    for alpha in (Fixed(16), TimesSqrtRank(4.0)):
        results = round_of(*doubled, max_train_steps=400, space={**space, "lora_alpha": alpha})
        assert "alpha_follows_rank" not in findings(results)


def test_batch_size_searched():
    trial = trial_of(0, falling, steps=GRID, batch_size=8)
    searched = round_of(trial, max_train_steps=400, space={"batch_size": Choices((4, 8))})
    assert "batch_size_searched" in findings(searched)
    assert "batch_size_searched" not in findings(round_of(trial, max_train_steps=400))


def test_a_trial_of_broken_evaluations_breaks_no_rule():
    trial = trial_of(0, falling, steps=GRID)
    broken = replace(trial, number=1, evaluations=(Evaluation(0, math.nan), Evaluation(10, math.inf)))
    assert "overfitting" not in findings(round_of(trial, broken, max_train_steps=400))


@pytest.mark.parametrize(
    ("share", "text"), [(0.5, "50%"), (0.0994, "9.9%"), (0.0996, "10%"), (0.00123, "0.12%"), (-0.02, "-2%")]
)
def test_percent(share, text):
    assert percent(share) == text
