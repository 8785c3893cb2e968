import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.playbook.rounds import NUM_EXAMPLES, noisy_trial
from tests.playbook.rows import round_of, trial_of
from tests.playbook.strategies import heavy, rounds
from tuner.playbook import Diagnosis, Severity, read_round
from tuner.playbook.gain import GainSource
from tuner.playbook.reading import Cost
from tuner.records import Fixed, TrialState

GRID = tuple(range(0, 101, 5))


def falling(step: int) -> float:
    return 2.0 + (step + 5) ** -0.5


def too_short_round(**fields):
    trials = [trial_of(i, lambda s, i=i: falling(s) * (1 + i / 1000), steps=GRID) for i in range(6)]
    return round_of(*trials, evaluate_every=5, **fields)


def rules(reading):
    return [finding.rule for finding in reading.findings]


def test_a_reading_carries_all_that_a_report_needs():
    reading = read_round(too_short_round(seconds_per_step=36.0))
    assert reading.diagnosis == Diagnosis.TOO_SHORT
    assert reading.suggested_max_train_steps == 300
    assert reading.suggestion_interval == (300, 300)
    assert reading.cost == Cost(steps=300, epochs=None, hours=3.0)
    assert reading.gain_source == GainSource.STABLE_PHASE
    assert reading.gain == pytest.approx((falling(50) - falling(100)) / falling(50), rel=0.03)
    assert reading.noise == 0.0
    assert [lead.trial.number for lead in reading.leading] == [0, 1, 2, 3, 4]
    assert rules(reading)[0] == "too_short"


def test_the_evidence_says_the_numbers():
    evidence = read_round(too_short_round()).evidence
    assert evidence[0].startswith("All 5 leading trials were best at the last step (100). The best, trial 0,")
    assert evidence[1].startswith("Doubling the steps (50 to 100) cut the loss by 1.8%")
    assert evidence[1].endswith(" +- 0% (trial 0, from its own evaluations, without a decay).")
    assert evidence[2].startswith("The best trial's loss still fell by ")
    assert evidence[2].endswith("in the last quarter: more steps will help.")
    assert evidence[3].startswith("Train for 300 steps next, 3 times as many, the most for one round. That")
    assert evidence[3].endswith("should cut the loss by about 2.1%.")


def test_epochs_need_rows_and_batch_size():
    results = round_of(trial_of(0, falling, steps=GRID, batch_size=8), evaluate_every=5, train_rows=400)
    assert read_round(results).cost == Cost(300, epochs=6.0, hours=None)
    assert read_round(replace(results, train_rows=0)).cost.epochs is None


def test_compute_bound_needs_a_falling_train_loss_and_a_cap_that_binds():
    reading = read_round(too_short_round(production_steps=200))
    assert reading.compute_bound is True
    (said,) = [f.message for f in reading.findings if f.rule == "compute_bound"]
    assert "still falls at step 100, and run.production_steps limits runs to 200." in said
    assert reading.suggested_max_train_steps == 200
    assert reading.evidence[-1] == "Train for 200 steps next, the most that run.production_steps allows."
    at_the_cap = read_round(too_short_round(production_steps=100)).evidence[-1]
    assert at_the_cap == "Keep 100 steps: run.production_steps does not allow longer runs."
    assert read_round(too_short_round(production_steps=2000)).compute_bound is None
    assert read_round(too_short_round()).compute_bound is None


@pytest.mark.parametrize(("lowest", "compute_bound"), [(0.051, True), (0.05, False)])
def test_a_training_set_is_fitted_at_a_twentieth_of_a_nat(lowest, compute_bound):
    results = too_short_round(production_steps=100)
    trials = tuple(
        replace(
            t,
            evaluations=tuple(
                replace(e, train_loss=lowest + (100 - e.step) / 1000 if e.step else None)
                for e in t.evaluations
            ),
        )
        for t in results.trials
    )
    assert read_round(replace(results, trials=trials)).compute_bound is compute_bound


def test_saturated_or_fitted_is_not_compute_bound():
    flat = [trial_of(i, lambda s: 2.0 + math.exp(-s / 5), steps=GRID) for i in range(5)]
    reading = read_round(round_of(*flat, evaluate_every=5, production_steps=100))
    assert reading.diagnosis == Diagnosis.SATURATED
    assert reading.compute_bound is False
    results = too_short_round(production_steps=100)
    fitted = tuple(
        replace(
            t,
            evaluations=tuple(
                replace(e, train_loss=e.train_loss and e.train_loss / 100) for e in t.evaluations
            ),
        )
        for t in results.trials
    )
    assert read_round(replace(results, trials=fitted)).compute_bound is False


def test_a_round_without_a_complete_trial_suggests_nothing():
    failed = trial_of(0, falling, steps=GRID, state=TrialState.FAILED)
    infeasible = trial_of(1, falling, steps=GRID, state=TrialState.INFEASIBLE)
    reading = read_round(round_of(failed, infeasible, evaluate_every=5))
    assert reading.diagnosis == Diagnosis.UNDETERMINED
    assert reading.suggested_max_train_steps is None
    assert reading.cost is None
    assert reading.leading == ()
    assert "No trial completed" in reading.evidence[0]
    assert {"undetermined", "infeasible_share"} <= set(rules(reading))


def test_no_learning_says_where_to_look():
    reading = read_round(round_of(trial_of(0, lambda s: 2 + s / 100, steps=GRID), evaluate_every=5))
    assert reading.diagnosis == Diagnosis.NO_LEARNING
    assert reading.suggested_max_train_steps is None
    assert "check the data, the loss masks and the learning rates" in " ".join(reading.evidence)
    assert reading.findings[0].severity == Severity.PROBLEM


def test_undetermined_says_how_many_examples_would_settle_it():
    rng = np.random.default_rng(0)
    trials = [
        noisy_trial(i, lambda t: 2.0 * (1 + i / 50 + 0.2 * np.exp(-t / 5)), GRID, rng, noise=0.01)  # noqa: B023
        for i in range(5)
    ]
    reading = read_round(round_of(*trials, evaluate_every=5))
    assert reading.diagnosis == Diagnosis.UNDETERMINED
    # Twice 1% is to become 1%: four times the examples, give or take the error of the error.
    needed, now = (int(word) for word in reading.evidence[2].split() if word.isdigit())
    assert now == NUM_EXAMPLES
    assert 2.5 * NUM_EXAMPLES < needed < 6 * NUM_EXAMPLES
    assert reading.suggested_max_train_steps == 150


def test_undetermined_by_the_spread_between_seeds_cannot_be_settled_by_examples():
    seeds = [
        trial_of(
            i, lambda s, i=i: falling(s) * (1 + 0.02 * i), steps=GRID, learning_rate=1e-4, training_seed=i
        )
        for i in range(3)
    ]
    reading = read_round(round_of(*seeds, evaluate_every=5))
    assert reading.diagnosis == Diagnosis.UNDETERMINED
    assert reading.noise == pytest.approx(0.02, rel=0.05)
    assert "examples will not help: seeds differ by as much" in reading.evidence[2]


def test_nothing_measured_is_undetermined():
    reading = read_round(round_of(trial_of(0, [3.0, 2.0], steps=[0, 100]), evaluate_every=100))
    assert reading.diagnosis == Diagnosis.UNDETERMINED
    assert reading.gain is None
    assert "or, at a constant rate, a smaller evaluation.every_steps" in reading.evidence[1]
    assert reading.evidence[2].startswith("Train for 150 steps next, 1.5 times as many: when in doubt")


def test_overfitting_is_said_and_a_cosine_has_no_gain_of_its_own():
    trials = [
        trial_of(i, lambda s: 2 + ((s - 50) / 100) ** 2, steps=GRID, schedule="cosine") for i in range(5)
    ]
    reading = read_round(round_of(*trials, evaluate_every=5))
    assert reading.diagnosis == Diagnosis.OVERFITTING
    assert reading.gain is None
    assert "it overfits" in reading.evidence[1]
    assert "overfitting" in rules(reading)


def test_a_changed_workload_is_said():
    results = too_short_round()
    other = replace(results, name="round0", workload="another", max_train_steps=50)
    assert "workload_changed" in rules(read_round(results, [other]))
    same = replace(other, workload="w")
    assert "workload_changed" not in rules(read_round(results, [same]))
    (said,) = [f.message for f in read_round(results, [other]).findings if f.rule == "workload_changed"]
    assert said.startswith("Model, data, evaluation set or length differ from round0: the right horizon")


def test_a_changed_batch_size_is_said():
    """It is a hyperparameter, and no part of the fingerprint that a worker takes."""
    results = too_short_round()
    now = replace(results, space={**results.space, "batch_size": Fixed(8)})
    before = replace(now, name="round0", space={**now.space, "batch_size": Fixed(16)}, max_train_steps=50)
    (said,) = [f.message for f in read_round(now, [before]).findings if f.rule == "workload_changed"]
    assert said.startswith("The batch size differs from round0: the right horizon may have moved.")
    both = read_round(now, [replace(before, workload="another")]).findings
    assert any("differ from round0 and the batch size differs from round0" in f.message for f in both)


@pytest.mark.filterwarnings("error")
@heavy
@given(rounds(), st.lists(rounds(), max_size=2))
def test_every_round_can_be_read(results, earlier):
    reading = read_round(results, earlier)
    assert reading.evidence
    assert all("nan" not in sentence for sentence in reading.evidence)
    assert (reading.suggested_max_train_steps is None) == (reading.suggestion_interval is None)
    assert reading.noise is None or 0 <= reading.noise < math.inf
    for finding in reading.findings:
        assert finding.message.endswith(".")
        assert all(math.isfinite(number) for number in finding.numbers.values())


@pytest.mark.filterwarnings("error")
@heavy
@given(rounds(), st.randoms())
def test_a_reading_does_not_depend_on_the_order_of_the_trials(results, random):
    shuffled = replace(results, trials=tuple(random.sample(results.trials, len(results.trials))))
    assert repr(read_round(shuffled)) == repr(read_round(results))
