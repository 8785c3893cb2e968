from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tuner.errors import StorageError
from tuner.report import RoundReport, advice, write_html
from tuner.report.html import html_page

from . import synthetic

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'n' </script>"


class Page(HTMLParser):
    """Tags with their attributes, text outside scripts, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
        elif self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    @property
    def figures(self) -> list[dict[str, object]]:
        kinds = [attributes.get("type") for tag, attributes in self.tags if tag == "script"]
        return [
            json.loads(s) for s, kind in zip(self.scripts, kinds, strict=True) if kind == "application/json"
        ]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(html_page(synthetic.report()))


def test_the_page_is_well_formed_and_loads_nothing(page: Page) -> None:
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_inlined_once(page: Page) -> None:
    assert len([script for script in page.scripts if len(script) > 1_000_000]) == 1
    assert len(page.figures) == 6, "best steps, curves, their end, all hyperparameters, and each of two"
    data = [script for script in page.scripts if script.startswith('{"data"')]
    assert len(data) == 6
    assert not any("<" in script for script in data), "nothing in a figure can end its script"


def test_it_opens_with_the_conclusion(page: Page) -> None:
    order = [
        "60 steps are too few. Train for 180 next.",
        "Goal: Learning rate and rank for Alpaca on SmolLM2",
        "The best of 8 trials (7 complete, 1 infeasible) is trial 6: evaluation loss 1.3734 at step 60 of 60",
        "runs/round1/trial-0006/best",
        "tuner study promote --to round2",
        "Why",
        "What else stands out",
        "The curves",
        "All trials",
        "What this holds for",
        "Made by tuner. Losses are nats per target token",
    ]
    places = [page.text.find(part) for part in order]
    assert -1 not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)


def test_every_sentence_and_number_of_the_reading_is_there(page: Page) -> None:
    report = synthetic.report()
    for sentence in report.reading.evidence:
        assert sentence in page.text
    for finding in report.findings:
        assert finding.message.replace("`", "") in page.text
    for _, best in report.ranked:
        assert f"{best.eval_loss:.4f}" in page.text
    for fact in ("adamw_8bit", "2 CPU cores", "2.13.0", "400 training rows", "1e-5 to 0.003, logarithmic"):
        assert fact in page.text


def hostile_report() -> RoundReport:
    trials = [dataclasses.replace(trial, reason=HOSTILE) for trial in synthetic.trials()]
    report = synthetic.report(trials_of_round=trials, goal=HOSTILE)
    return dataclasses.replace(
        report,
        study=HOSTILE,
        next_command=HOSTILE,
        adapters={6: HOSTILE},
        environment={HOSTILE: HOSTILE},
    )


def test_user_text_is_shown_as_text() -> None:
    hostile = Page(html_page(hostile_report()))
    assert len(hostile.scripts) == 8, "six figures, plotly and the page's own"
    assert hostile.text.count(" ".join(HOSTILE.split())) >= 6
    assert len(hostile.figures) == 6


def test_a_study_of_two_rounds_concludes_from_the_last() -> None:
    first = synthetic.report()
    later = synthetic.trials("round2", max_train_steps=180)[3:6]
    second = synthetic.report(round="round2", max_train_steps=180, trials_of_round=later, promised=3)
    text = html_page(second, earlier=[first])
    study = Page(text)
    assert [tag for tag, _ in study.tags].count("article") == 2
    assert [tag for tag, _ in study.tags].count("h1") == 1
    assert "How the study went" in study.text
    assert study.text.index("alpaca-smollm2 / round2") < study.text.index("alpaca-smollm2 / round1")
    assert len(study.figures) == 12
    assert study.text.count(second.next_command) == 1
    assert "ran in round2 too. The rank correlation of their losses in both is" in study.text
    assert "Throughput" not in study.text


def test_side_by_side_axes_take_the_width_that_their_names_need() -> None:
    """So that three of them fit on a telephone, and seven scroll."""
    for report, columns in ((synthetic.report(), 3), (synthetic.large_report(50), 7)):
        assert f'<div class="scroll"><div class="plot" style="min-width: {5 * columns}rem">' in html_page(
            report
        )


def test_a_short_name_is_not_broken_in_a_table() -> None:
    page = html_page(synthetic.report())
    assert "lora_r</th>" in page
    assert "learning_<wbr>rate</th>" in page


def test_the_conclusion_on_each_round_is_seen_without_scrolling() -> None:
    """Cells of its table wrap; where it is narrow each has a line of its own, with its column's name."""
    first, second = synthetic.two_rounds()
    text = html_page(second, earlier=[first])
    table = text.split('<div class="wide whole"><table>')[1].split("</table>")[0]
    for report in (first, second):
        assert f'colspan="7" data-header="conclusion">{advice.headline(report)}</td>' in table
    rules = dict(re.findall(r"^\s*([^{}@]+) \{([^}]+)\}$", text.split("</style>")[0], re.MULTILINE))
    assert "white-space: normal" in rules[".whole td, .whole th"]
    assert "min-width: 0" in rules[".whole td.words"]
    narrow = text.split("@media (max-width: 60rem) {")[1].split("@media")[0]
    assert "display: block; width: auto" in narrow


def test_each_round_shows_its_own_throughput() -> None:
    first, second = synthetic.report(), synthetic.report(round="round2", throughputs=synthetic.WORK)
    page = Page(html_page(second, earlier=[first]))
    assert page.text.count("Throughput") == 1
    assert "tokens/s 3,000 training tokens" in " ".join(page.text.replace("3,000", " 3,000 ").split())


@pytest.mark.parametrize("promised", [0, 8])
def test_a_round_without_a_trial(promised: int) -> None:
    empty = Page(html_page(synthetic.report(trials_of_round=[], promised=promised)))
    assert "Nothing to conclude yet: no trial is complete." in empty.text


class TestWriting:
    def test_the_file_is_replaced_and_no_draft_is_left(self, tmp_path: Path) -> None:
        path = tmp_path / "report.html"
        path.write_text("old")
        write_html(path, synthetic.report())
        assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("place", ["missing/report.html", "file/report.html", "folder"])
    def test_a_place_that_cannot_be_written(self, tmp_path: Path, place: str) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        with pytest.raises(StorageError, match="cannot be written"):
            write_html(tmp_path / place, synthetic.report())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
