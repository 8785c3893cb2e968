"""Answer scores wherever people look: who leads by them, and that horizons still go by losses."""

from __future__ import annotations

import dataclasses
import io

import pytest

from tests.report.test_card import card
from tests.report.test_live import open_on
from tests.report.test_tables import shown
from tuner.records import Answered, AnswerScore
from tuner.report import advice, round_markdown, summary, trials_table
from tuner.report.board import Board
from tuner.report.card import model_card
from tuner.report.documents import trial_document
from tuner.report.format import answer_score, answers_in_words
from tuner.report.html import html_page
from tuner.report.round_report import RoundReport
from tuner.report.tables import trial_page

from . import synthetic

SCORE = AnswerScore(60, "metrics.py:overlap", 0.4218, 0.0712, 50, is_objective=True)


def answering(means: dict[int, float], *, is_objective: bool, round: str = "round1") -> RoundReport:
    """The synthetic round, in which trial 6 has the lowest loss, with these answer scores."""
    report = synthetic.report()
    scored = tuple(
        dataclasses.replace(
            trial,
            round=round,
            answer_score=dataclasses.replace(SCORE, mean=means[trial.number], is_objective=is_objective),
        )
        if trial.number in means
        else trial
        for trial in report.results.trials
    )
    return dataclasses.replace(report, results=dataclasses.replace(report.results, trials=scored))


MEANS = {number: 0.1 * number for number in range(6)} | {6: 0.05}


def test_a_score_in_words() -> None:
    assert answers_in_words(SCORE) == "0.422 ± 0.0712, the mean of 50 answers by metrics.py:overlap"
    alone = dataclasses.replace(SCORE, standard_error=None, num_examples=1)
    assert answers_in_words(alone) == "0.422, the mean of 1 answer by metrics.py:overlap"
    assert answer_score(None) == "-"


def test_the_best_is_the_best_of_the_objective() -> None:
    report = answering(MEANS, is_objective=True)
    assert report.ranked[0][0].number == 5
    assert report.reading.leading[0].trial.number != 5
    first, *more = advice.found(report)
    assert "is trial 5: answers that score 0.5 ± 0.0712, the mean of 50 answers" in first
    assert "The runner-up, trial 4, has 0.4 ± 0.0712 and loss" in more[-1]
    assert "the horizon are based on losses" in more[-1]
    names = {name: (value, against) for name, value, against in advice.key_numbers(report)}
    assert names["answer score"] == ("0.5 ± 0.0712", "50 answers by metrics.py:overlap")
    assert "its evaluation loss" in names
    for text in (shown(summary(report)), round_markdown(report), html_page(report)):
        assert "0.5 ± 0.0712" in text


def test_beside_the_loss_they_rank_nothing() -> None:
    report = answering(MEANS, is_objective=False)
    assert [t.number for t, _ in report.ranked] == [t.number for t, _ in synthetic.report().ranked]
    assert "is trial 6: answers that score 0.05 ± 0.0712" in advice.found(report)[0]
    assert "behind with" in advice.found(report)[-1]
    assert "best evaluation loss" in {name for name, *_ in advice.key_numbers(report)}


@pytest.mark.parametrize(
    ("theirs", "is_objective", "said"),
    [
        (0.6, True, "An earlier trial, round0/5, is still better: answers that score 0.6 ± 0.0712, loss"),
        (0.4, True, None),
        (0.6, False, None),
    ],
)
def test_an_earlier_trial_is_better_by_the_same_objective_alone(
    theirs: float, is_objective: bool, said: str | None
) -> None:
    earlier = answering(MEANS | {5: theirs}, is_objective=is_objective, round="round0")
    found = advice.still_better(answering(MEANS, is_objective=True), [earlier])
    assert [sentence.startswith(said or "-") for sentence in found] == ([True] if said else [])


def test_a_trial_shows_its_score_and_one_without_has_no_column() -> None:
    plain = synthetic.trial(3, 3e-4)
    scored = dataclasses.replace(plain, answer_score=SCORE)
    line = "0.422 ± 0.0712, the mean of 50 answers by metrics.py:overlap, at step 60"
    assert line in shown(trial_page(scored, max_train_steps=60, adapter=None))
    assert trial_document(scored, adapter=None)["answers"] == {
        "score": 0.4218,
        "standard_error": 0.0712,
        "step": 60,
        "metric": "metrics.py:overlap",
        "examples": 50,
        "is_objective": True,
    }
    header, *rows = shown(trials_table([plain, dataclasses.replace(scored, number=4)])).splitlines()
    assert "answers  best loss" in header
    assert ["0.422 ± 0.0712" in row for row in rows] == [True, False]
    assert "answers" not in shown(trials_table([plain]))


def test_a_card_has_the_score() -> None:
    made = card()
    trial = dataclasses.replace(made.trial, answer_score=dataclasses.replace(SCORE, metric="exact_match"))
    text = model_card(dataclasses.replace(made, trial=trial))
    assert "0.422 ± 0.0712, the mean of 50 answers by exact" in text
    assert "Answer score" not in model_card(made)


def test_a_running_round_says_the_score_and_who_leads_by_it() -> None:
    low, high = (synthetic.trial(n, rate) for n, rate in ((0, 2.8e-4), (1, 1.2e-5)))
    board = Board(trials_total=2, max_train_steps=60)
    board.sync([low, high])
    assert board.best is board.rows[0]
    out = io.StringIO()
    view = open_on(out, terminal=False)
    view.trials([low, high])
    for trial, mean in ((0, 0.1), (1, 0.2)):
        said = Answered("round1", trial, 1, dataclasses.replace(SCORE, mean=mean))
        board.take(said, now=1.0)
        view.event(said)
    assert board.best is board.rows[1]
    assert out.getvalue().splitlines()[-1].startswith("trial 1  answers 0.2 ± 0.0712, the mean of 50 answers")
