from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.studies import history, round_file
from tuner.records import (
    AnswerScore,
    Attempt,
    Evaluation,
    RoundBegun,
    RoundRecord,
    Throughput,
    Trial,
    TrialState,
)
from tuner.store import MemoryStore
from tuner.study.results import (
    as_written_now,
    earlier_outcomes,
    keep_unwritten_rule,
    num_branches_left,
    recorded_rule,
    round_results,
    seconds_per_step,
)


@pytest.mark.parametrize(
    ("work", "share"),
    [
        ((), 0.4),
        ((Throughput("a"),), 0.4),
        ((Throughput("a", 8.0, 1.0, 1.0), Throughput("b", 8.0, 1.0, 1.0)), 0.1),
        ((Throughput("a", 1.0, 0.0, 0.0),), 0.0),
    ],
    ids=["nothing measured", "no time yet", "measured", "measured to be none"],
)
def test_what_evaluation_took_replaces_what_was_expected(
    tmp_path: Path, work: tuple[Throughput, ...], share: float
) -> None:
    spec = round_file(tmp_path).spec.model_dump(mode="json")
    record = RoundRecord("round1", 8, spec, begun_at=0.0, evaluation_share=0.4)
    assert round_results(replace(record, throughputs=work), ()).evaluation_share == pytest.approx(share)


def test_earlier_answers_count_where_they_were_asked_alike(tmp_path: Path) -> None:
    """Which of loss and answers was the objective then makes no difference."""
    store = MemoryStore()
    asked = {
        "round1": ", answers: {max_examples: 9, objective: false}",
        "round2": ", answers: {max_examples: 8}",
        "round3": "",
        "round4": ", answers: {max_examples: 9, objective: true}",
    }
    score = AnswerScore(4, "exact_match", 0.5, 0.1, 9)
    for number, (name, evaluation) in enumerate(asked.items()):
        spec = round_file(tmp_path, evaluation=evaluation).spec.model_dump(mode="json")
        record = RoundRecord(name, 8, spec, begun_at=float(number), workload="same")
        made = (Evaluation(4, 1.0),)
        done = Trial(name, 0, {}, TrialState.COMPLETE, evaluations=made, answer_score=score)
        store.record(RoundBegun(record), *history(done))
    now = store.rounds()[-1]
    assert [(o.loss, o.score) for o in earlier_outcomes(store, now)] == [
        (1.0, 0.5),
        (1.0, None),
        (1.0, None),
    ]


def test_a_steps_seconds_are_those_of_attempts_whose_end_was_seen() -> None:
    attempts = (
        Attempt(1, 0, 30, 0.0, 86_400.0, "interrupted"),  # its end is when the next process began
        Attempt(2, 20, 20, 86_400.0, 86_450.0, "died"),
        Attempt(3, 20, 60, 86_450.0, 86_470.0, "stopped"),
        Attempt(4, 60, 90, 86_480.0),
    )
    assert seconds_per_step([Trial("round1", 0, {}, attempts=attempts)]) == pytest.approx(20 / 40)
    assert seconds_per_step([Trial("round1", 0, {}, attempts=attempts[:2])]) is None


ABSENT = "absent"


@pytest.mark.parametrize(
    ("recorded", "written", "rule"),
    [
        # A version that knew no such key, or had another default: a finished round stays finished.
        (ABSENT, ABSENT, False),
        (False, ABSENT, False),
        (False, "auto", "auto"),
        (ABSENT, "auto", "auto"),
        (False, "true", True),
        (True, ABSENT, "auto"),
        (True, "false", False),
        ("auto", ABSENT, "auto"),
        ("auto", "true", True),
        ("auto", "false", False),
    ],
)
def test_a_begun_round_makes_the_comparison_runs_that_its_file_names(
    tmp_path: Path, recorded: object, written: str, rule: object
) -> None:
    key = "" if written == ABSENT else f"run: {{decay_branches: {written}}}"
    file = round_file(tmp_path, run=key)
    spec = file.spec.model_dump(mode="json")
    spec["run"]["decay_branches"] = recorded
    if recorded == ABSENT:
        del spec["run"]["decay_branches"]
    record = RoundRecord("round1", 8, spec, begun_at=0.0)
    assert keep_unwritten_rule(file, record).spec.run.decay_branches == rule
    assert recorded_rule(as_written_now(record, file)) == rule


def test_a_round_that_has_not_begun_makes_them_by_default(tmp_path: Path) -> None:
    assert keep_unwritten_rule(round_file(tmp_path), None).spec.run.decay_branches == "auto"


@pytest.mark.parametrize(("rule", "owed"), [(ABSENT, 0), (False, 0), ("auto", 1), (True, 2)])
def test_a_finished_round_whose_file_now_names_them_is_open(tmp_path: Path, rule: object, owed: int) -> None:
    """Its trials have kept no checkpoint to start from: to the half from scratch."""
    spec = round_file(tmp_path).spec.model_dump(mode="json")
    spec["run"] = {} if rule == ABSENT else {"decay_branches": rule}
    record = RoundRecord("round1", 8, spec, begun_at=0.0)
    curve = tuple(Evaluation(step, 4.0 - step / 8) for step in (0, 2, 4, 6, 8))
    store = MemoryStore()
    store.record(RoundBegun(record))
    for number in range(2):
        hyperparameters = {"learning_rate": 0.1 + number, "schedule": "linear", "decay_steps": 3}
        done = Trial("round1", number, hyperparameters, TrialState.COMPLETE, evaluations=curve)
        store.record(*history(done))
    assert num_branches_left(store, record) == owed
