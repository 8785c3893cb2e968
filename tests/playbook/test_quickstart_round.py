"""A real round, the quickstart's of 45 steps, and what smaller rounds of its trials would have said."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.playbook import Diagnosis, RoundResults, read_round
from tuner.playbook.gain import GainSource
from tuner.playbook.results import BranchResult
from tuner.records import Choices, Evaluation, Fixed, Range, Trial, TrialState

RECORDED = json.loads((Path(__file__).parent / "quickstart_round.json").read_text())
"""Losses of each evaluation row, in nats, of eight trials and of the best one's comparison run."""
BEST = 6


def evaluation(step: int, nll: list[float], train_loss: float | None = None) -> Evaluation:
    tokens = RECORDED["tokens"]
    return Evaluation(
        step, sum(nll) / sum(tokens), train_loss, example_nll=tuple(nll), example_tokens=tuple(tokens)
    )


def recorded_round(*, is_compared: bool = True) -> RoundResults:
    fixed = {"schedule": "linear", "decay_steps": 15, "warmup_steps": 1, "batch_size": 8, "training_seed": 0}
    trials = []
    for number, run in enumerate(RECORDED["trials"]):
        curve = tuple(evaluation(e["step"], e["nll"], e["train_loss"]) for e in run["curve"])
        values = {**fixed, "learning_rate": run["learning_rate"], "lora_r": run["lora_r"]}
        trials.append(Trial("round1", number, values, TrialState.COMPLETE, evaluations=curve))
    half = RECORDED["branch"]
    branch = BranchResult(
        half["trial"], half["max_train_steps"], (evaluation(half["max_train_steps"], half["nll"]),)
    )
    space = {name: Fixed(value) for name, value in fixed.items()}
    space |= {"learning_rate": Range(3e-4, 1e-1, log=True), "lora_r": Choices((4, 8, 16))}
    return RoundResults(
        "round1", 45, 5, space, tuple(trials), production_steps=300, workload="w",
        branches=(branch,) if is_compared else (),
    )  # fmt: skip


def test_the_round_reads_as_it_did_when_it_ran():
    reading = read_round(recorded_round())
    assert (reading.diagnosis, reading.suggested_max_train_steps) == (Diagnosis.TOO_SHORT, 135)
    assert (reading.gain_source, len(reading.leading)) == (GainSource.COMPARISON, 5)
    assert reading.gain == pytest.approx(0.31, abs=0.01)


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("is_compared", [True, False])
def test_no_smaller_round_with_its_best_trial_keeps_the_horizon(size, is_compared):
    """Its next round of 135 steps was 32% better; rules that asked for a majority kept 25 of 35 of four."""
    whole = recorded_round(is_compared=is_compared)
    count = 0
    for trials in itertools.combinations(whole.trials, size):
        if all(trial.number != BEST for trial in trials):
            continue
        reading = read_round(replace(whole, trials=trials))
        assert reading.diagnosis == Diagnosis.TOO_SHORT
        # The highest of three rates in order is tried beyond first.
        assert reading.suggested_max_train_steps == (45 if reading.widens_rates else 135)
        count += 1
    assert count > 0
