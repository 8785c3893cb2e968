"""Two studies side by side: what may be said of them, and what not."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from tuner.records import Fixed
from tuner.report import RoundReport, format
from tuner.report.comparison import Compared, comparison_page, comparison_summary

from . import synthetic


def compared(one: RoundReport, other: RoundReport) -> Compared:
    return Compared(("old", "new"), ([one], [other]))


def test_the_better_study_is_named_with_the_noise_of_the_difference() -> None:
    one = synthetic.report()
    other = synthetic.report(trials_of_round=synthetic.trials()[:6])
    said = compared(one, other).headline()
    assert said.startswith("old is better by 0.")
    assert "by the same evaluation rows" in said
    assert compared(other, one).headline().startswith("new is better by")


def test_equal_studies_are_equally_good() -> None:
    assert "equally good" in compared(synthetic.report(), synthetic.report()).headline()


def test_other_data_cannot_be_compared() -> None:
    one = synthetic.report()
    other = replace(one, record=replace(one.record, workload="another", train_rows=123))
    found = compared(one, other)
    assert "cannot be compared" in found.headline()
    assert ("training rows", "400", "123") in found.differences()


def test_what_a_study_searches_and_what_it_does_not_have() -> None:
    first, second = synthetic.two_rounds()
    space = dict(second.results.space)
    space |= {"lora_r": Fixed(8), "extra.beta": Fixed(0.1)}
    del space["warmup_steps"]
    trials = tuple(
        replace(trial, hyperparameters={**trial.hyperparameters, "lora_r": 8})
        for trial in second.results.trials
    )
    other = replace(second, results=replace(second.results, space=space, trials=trials))
    found = {name: sides for name, *sides in Compared(("a", "b"), ([first], [other])).differences()}
    assert found["lora_r"] == ["searched", "8"]
    assert found["extra.beta"] == [format.NOTHING, "0.1"]
    assert found["warmup_steps"] == ["5", format.NOTHING]


def test_a_study_without_a_result() -> None:
    found = compared(synthetic.report(), synthetic.report(trials_of_round=[]))
    assert found.headline().startswith("Nothing to compare yet")
    assert "has no complete trial" in comparison_page(found)


@pytest.mark.parametrize("width", [40, 120])
def test_the_terminal_shows_both_sides(width: int) -> None:
    first, second = synthetic.two_rounds()
    out = io.StringIO()
    Console(file=out, width=width).print(
        comparison_summary(Compared(("old", "new"), ([first], [first, second])))
    )
    text = " ".join(out.getvalue().split())
    assert "old new" in text
    for word in ("best loss", "best step", "learning_rate", "steps run"):
        assert word in text


def test_names_are_text_in_the_page() -> None:
    report = synthetic.report()
    page = comparison_page(Compared(("<script>a", "b"), ([report], [report])))
    assert "<script>a" not in page
