from __future__ import annotations

import dataclasses
import math

import pytest

from tuner.playbook import Diagnosis, Finding, Severity
from tuner.records import (
    Attempt,
    Branch,
    Choices,
    Continuation,
    Direction,
    FinalScore,
    Fixed,
    Objective,
    Range,
    TimesSqrtRank,
    Trial,
    TrialState,
)
from tuner.report import advice
from tuner.report.round_report import RoundReport, describe

from . import synthetic


def with_reading(diagnosis: Diagnosis, suggested: int | None) -> RoundReport:
    """A round of 60 steps of which the playbook would say this."""
    report = synthetic.report()
    reading = dataclasses.replace(report.reading, diagnosis=diagnosis, suggested_max_train_steps=suggested)
    return dataclasses.replace(report, reading=reading)


@pytest.mark.parametrize(
    ("diagnosis", "suggested", "headline", "next_step"),
    [
        (Diagnosis.TOO_SHORT, 180, "60 steps are too few. Train for 180 next.", "a round of 180 steps"),
        (
            Diagnosis.TOO_SHORT,
            60,
            "60 steps are too few, but run.production_steps",
            "another round of 60 steps",
        ),
        (Diagnosis.TOO_LONG, 20, "60 steps are far too many. 20 would do.", "a round of 20 steps"),
        (Diagnosis.SATURATED, 40, "60 steps are more than enough. 40 would do.", "a round of 40 steps"),
        (Diagnosis.SATURATED, 60, "60 steps are enough.", "another round of 60 steps"),
        (Diagnosis.RIGHT, 60, "60 steps are about right.", "search closer"),
        (Diagnosis.OVERFITTING, 40, "The best trial overfits, so more steps will not help. 40", "more data"),
        (Diagnosis.UNDETERMINED, 60, "This round cannot tell", "another round of 60 steps"),
        (Diagnosis.UNDETERMINED, 90, "Unclear whether more steps would help. When in doubt", "a round of 90"),
        (Diagnosis.NO_LEARNING, None, "No trial beat the base model", "Do not train longer"),
    ],
)
def test_each_diagnosis_in_words(
    diagnosis: Diagnosis, suggested: int | None, headline: str, next_step: str
) -> None:
    report = with_reading(diagnosis, suggested)
    assert advice.headline(report).startswith(headline)
    assert next_step in advice.next_step(report)


def test_an_edge_of_the_learning_rate_comes_before_the_horizon() -> None:
    report = with_reading(Diagnosis.TOO_SHORT, 60)
    edge = dataclasses.replace(report, reading=dataclasses.replace(report.reading, widens_rates=True))
    assert advice.headline(edge).startswith("The learning rates may all be too small: try higher ones at 60")
    assert advice.next_step(edge) == "Search higher learning rates in another round of 60 steps."


def test_a_gain_of_unknown_noise_is_said_to_be_so() -> None:
    report = with_reading(Diagnosis.UNDETERMINED, 60)
    unknown = dataclasses.replace(report, reading=dataclasses.replace(report.reading, noise=None))
    (said,) = [what for name, _, what in advice.key_numbers(unknown) if name == "gain of the last doubling"]
    assert said.startswith("noise unknown")


def test_what_was_found_has_the_numbers() -> None:
    report = synthetic.report()
    (best, second), text = report.ranked[:2], " ".join(advice.found(report))
    assert (
        f"trial {best[0].number}: evaluation loss {best[1].eval_loss:.4f} at step {best[1].step} of 60"
        in text
    )
    assert "base model's 2.4310" in text
    assert "7 complete, 1 infeasible" in text
    assert "learning_rate 0.00091, lora_r 8" in text
    assert f"trial {second[0].number}" in text


def test_a_base_that_could_not_be_measured_is_not_compared_with() -> None:
    losses = [synthetic.evaluation(0, math.nan), synthetic.evaluation(5, 2.0)]
    report = synthetic.report(trials_of_round=[synthetic.trial(0, 1e-4, evaluations=losses)], promised=1)
    assert "base model" not in " ".join(advice.found(report))
    assert advice.key_numbers(report)[0] == ("best evaluation loss", "2.0000", "trial 0")


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.0, 2.0, 3.0], "is 1.00 (1: the same order, -1: reversed). The best in round1, trial 0, is still"),
        ([3.0, 2.0, 1.0], "-1.00 (1: the same order, -1: reversed). The best in round1, trial 0, is number"),
        ([2.0, 2.0, 2.0], "3 trials of round1 ran in round2 too, all with equal losses."),
        ([1.0, 2.0], "2 trials of round1 ran in round2 too: too few to say whether the order held."),
        ([1.0], "1 trial of round1 ran in round2 too: too few to say whether the order held."),
    ],
)  # fmt: skip
def test_whether_the_order_of_an_earlier_round_held(losses: list[float], said: str) -> None:
    def run(number: int, loss: float, round: str) -> Trial:
        evaluations = [synthetic.evaluation(0, 4.0), synthetic.evaluation(50, loss)]
        return synthetic.trial(number, 1e-4 * (number + 1), round=round, evaluations=evaluations)

    before = [run(number, 1.0 + number, "round1") for number in range(3)]
    after = [run(number, loss, "round2") for number, loss in enumerate(losses)]
    first = synthetic.report(trials_of_round=before)
    second = synthetic.report(round="round2", max_train_steps=180, trials_of_round=after)
    (sentence,) = advice.held([first, second])
    assert said in sentence
    same = synthetic.report(round="round2", trials_of_round=after)
    assert advice.held([first, same]) == (), "the same horizon again is no test of the first"
    assert advice.lineage_rows([first, same])[1][6] == f"{len(losses)} of round1"


def test_the_order_by_a_metric_is_not_one_of_losses() -> None:
    accuracy = Objective("token_accuracy", Direction.MAXIMIZE, is_relative_to_gained=True)

    def run(number: int, round: str) -> Trial:
        evaluation = dataclasses.replace(synthetic.evaluation(50, 2.0), objective=accuracy)
        measured = dataclasses.replace(evaluation, metrics={"token_accuracy": 0.5 + 0.1 * number})
        return synthetic.trial(number, 1e-4 * (number + 1), round=round, evaluations=[measured])

    before, after = ([run(number, round) for number in range(3)] for round in ("round1", "round2"))
    first = synthetic.report(trials_of_round=before)
    second = synthetic.report(round="round2", max_train_steps=180, trials_of_round=after)
    (sentence,) = advice.held([first, second])
    assert "rank correlation of their values of token_accuracy in both is 1.00" in sentence


def test_no_trial_beats_the_base_model() -> None:
    report = synthetic.shaped_report(lambda step: 2 + 0.01 * step)
    assert advice.found(report) == ("None of 5 trials (5 complete) beat the base model's 2.0000.",)
    assert advice.headline(report) == "Training did not help: no trial beat the base model."


def test_a_loss_above_the_base_model_is_not_praised() -> None:
    late = [synthetic.evaluation(5, 3.0), synthetic.evaluation(10, 3.1)]
    trials = [synthetic.trial(0, 1e-4, evaluations=late), synthetic.trials()[7]]
    report = synthetic.report(trials_of_round=trials, promised=2)
    assert report.base_loss == pytest.approx(2.431)
    said = " ".join(advice.found(report))
    assert "The base model was not evaluated" in said
    assert said.count("base model") == 1, "nothing is compared with it"


def test_the_last_doubling_is_a_key_number_only_where_the_diagnosis_rests_on_it() -> None:
    assert "gain of the last doubling" in [name for name, _, _ in advice.key_numbers(synthetic.report())]
    overfitting = synthetic.overfitting_report()
    assert overfitting.reading.gain is not None
    names = [name for name, _, _ in advice.key_numbers(overfitting)]
    assert names == ["best evaluation loss", "its best step", "steps for the next round"]


def test_nothing_complete() -> None:
    report = synthetic.report(trials_of_round=[synthetic.trials()[7]], promised=1)
    assert advice.headline(report) == "Nothing to conclude yet: no trial is complete."
    assert advice.found(report) == ("1 trial so far: 1 infeasible.",)
    assert advice.key_numbers(report) == []
    assert "Find out why" in advice.next_step(report)


def test_a_round_without_points_for_all_its_trials_says_so() -> None:
    report = synthetic.report(promised=12)
    two = dataclasses.replace(
        report.results, space={"lora_r": Choices((4, 8))}, trials=synthetic.trials()[:2]
    )
    exhausted = dataclasses.replace(report, results=two)
    assert (exhausted.num_promised, exhausted.is_finished) == (2, True)
    assert advice.progress(exhausted) == (
        "The search space has 2 points, so the round ended after 2 of 12 trials."
    )
    one = dataclasses.replace(report, results=dataclasses.replace(two, trials=two.trials[:1]))
    assert (
        advice.progress(one) == "Preliminary: 1 of 2 trials are done; the others may change the conclusion."
    )


def test_an_unfinished_round_says_so() -> None:
    report = synthetic.report(promised=12)
    assert not report.is_finished
    assert (
        advice.progress(report)
        == "Preliminary: 8 of 12 trials are done; the others may change the conclusion."
    )
    assert advice.next_step(report).startswith("Finish the round first")
    assert advice.progress(synthetic.report()) is None


def test_an_earlier_round_may_still_be_better_on_the_same_workload_only() -> None:
    first = synthetic.report()
    worse = synthetic.report(round="round2", trials_of_round=synthetic.trials("round2")[:3], promised=3)
    (sentence,) = advice.still_better(worse, [first])
    assert "round1/6" in sentence
    assert advice.still_better(first, [worse]) == ()
    other_data = dataclasses.replace(first, record=dataclasses.replace(first.record, workload="other"))
    assert advice.still_better(worse, [other_data]) == ()


def test_the_setting_counts_what_was_run_and_what_was_inherited() -> None:
    first = synthetic.report()
    carried = synthetic.trial(
        0, 5e-4, round="round2", max_train_steps=180, continues=Continuation("round1", 5, 35)
    )
    report = synthetic.report(
        round="round2", max_train_steps=180, trials_of_round=[carried], promised=1, earlier=[first]
    )
    facts = advice.setting(report)
    assert facts["cost"] == "145 steps run, 35 more taken over from earlier trials"
    assert facts["each trial"] == "180 steps (3.6 epochs), evaluated every 5"
    assert facts["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct (bfloat16)"
    assert facts["torch"] == "2.13.0"


def test_findings_do_not_repeat_the_evidence_and_the_serious_come_first() -> None:
    report = synthetic.report()
    assert any(finding.rule == "too_short" for finding in report.reading.findings)
    assert "too_short" not in [finding.rule for finding in report.findings]
    found = tuple(Finding("rule", severity, "message") for severity in (Severity.INFO, Severity.PROBLEM))
    shuffled = dataclasses.replace(report, reading=dataclasses.replace(report.reading, findings=found))
    assert [finding.severity for finding in shuffled.findings] == ["problem", "info"]
    assert "overfitting" in [finding.rule for finding in synthetic.overfitting_report().findings]


def test_what_was_fixed_and_what_was_searched() -> None:
    report = synthetic.report()
    assert report.shown_names == ("learning_rate", "lora_r")
    assert "learning_rate" not in report.fixed
    assert report.fixed["lora_alpha"] == "16"
    assert describe(Range(1e-5, 3e-3, log=True)) == "1e-5 to 0.003, logarithmic"
    assert describe(Choices((8, 16))) == "8, 16"
    assert describe(Fixed(("q", "v"))) == "q,v"
    assert describe(TimesSqrtRank(4.0)) == "4 x sqrt(lora_r)"


def test_counts_leave_out_states_without_trials() -> None:
    report = synthetic.report(trials_of_round=[synthetic.trial(0, 1e-4, state=TrialState.RUNNING)])
    assert report.counts == {"running": 1}


def with_test_rows(report: RoundReport) -> RoundReport:
    spec = {**report.record.spec, "data": {"test": [{"path": "test.jsonl", "format": "alpaca"}]}}
    return dataclasses.replace(report, record=dataclasses.replace(report.record, spec=spec))


def test_test_rows_are_offered_until_a_trial_is_scored_and_a_second_look_is_named() -> None:
    assert advice.tested(synthetic.report()) == ()
    report = with_test_rows(synthetic.report())
    (offer,) = advice.tested(report)
    assert "score it once on data.test with `tuner trial show best --test`" in offer
    score = FinalScore(60, 1.5, 0.03, 40, 900, "abc", 1.0)
    first = Trial("round1", 3, {}, final_score=score)
    second = Trial(
        "round2", 0, {}, final_score=dataclasses.replace(score, scored_at=2.0, standard_error=None)
    )
    scored = advice.tested(dataclasses.replace(report, scored=(first, second)))
    assert scored == (
        "round1/3: On data.test (40 rows, not used for any choice), its loss is 1.5000 ± 0.0300.",
        "round2/0: On data.test (40 rows), its loss is 1.5000. This is no longer unbiased: round1/3 had been "
        "scored on the same rows, and the best of several scores is optimistic.",
    )


def test_a_round_that_owes_comparison_runs_is_not_finished_and_their_steps_are_in_its_cost() -> None:
    report = synthetic.report()
    assert (advice.progress(report), report.is_finished) == (None, True)
    owing = dataclasses.replace(report, branches_left=1)
    assert "the comparison runs" in str(advice.progress(owing))
    branch = Branch(3, 30, 18, attempts=(Attempt(1, 18, 25, 0.0), Attempt(2, 22, 30, 0.0)))
    ran = dataclasses.replace(report, record=dataclasses.replace(report.record, branches=(branch,)))
    assert ran.executed_steps == report.executed_steps + 15
    assert "15 of them in comparison runs" in advice.setting(ran)["cost"]
