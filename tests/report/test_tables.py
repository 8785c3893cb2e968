from __future__ import annotations

import dataclasses
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tuner.records import Continuation, TrialState, added_up
from tuner.report import (
    RoundPlan,
    advice,
    plan_table,
    round_status,
    status_table,
    summary,
    trial_page,
    trials_table,
)
from tuner.report.terminal import Column, FittedTable, column, fitting

from . import synthetic


def shown(renderable: RenderableType, *, width: int = 120, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, force_terminal=False)
    console.print(renderable)
    file.flush()
    file.seek(0)
    return file.read()


class TestFitting:
    columns = (
        column("a", ["1"], rank=1),
        column("bb", ["22"], rank=0),
        column("c", ["words that wrap"], rank=2, min_width=6),
    )

    @pytest.mark.parametrize(
        ("width", "names"),
        [(1, ["bb"]), (4, ["bb"]), (5, ["a", "bb"]), (12, ["a", "bb"]), (13, ["a", "bb", "c"])],
    )
    def test_columns_of_high_rank_go_first(self, width: int, names: list[str]) -> None:
        assert [column.name for column in fitting(self.columns, width)] == names

    def test_words_wrap_and_numbers_do_not(self) -> None:
        lines = shown(FittedTable(self.columns), width=13).splitlines()
        assert [line.split() for line in lines] == [
            ["a", "bb", "c"],
            ["1", "22", "words"],
            ["that"],
            ["wrap"],
        ]


_CELLS = st.one_of(
    st.text("ab1é好\n\t\a ", max_size=6),
    st.builds(Text, st.text("ab好\n ", max_size=5), style=st.sampled_from(["", "green", "bold red"])),
)


@st.composite
def _tables(draw: st.DrawFn) -> tuple[list[Column], list[str]]:
    num_rows = draw(st.integers(0, 4))
    cells = st.lists(_CELLS, min_size=num_rows, max_size=num_rows)
    columns = [
        Column(draw(st.text("ab_ ", max_size=6)), tuple(draw(cells)), rank, draw(st.booleans()), width)
        for rank, width in enumerate(draw(st.lists(st.sampled_from([None, 2, 5]), min_size=1, max_size=4)))
    ]
    return columns, draw(st.lists(st.sampled_from(["", "bold"]), min_size=num_rows, max_size=num_rows))


@given(_tables(), st.integers(8, 60))
def test_lines_that_need_no_wrapping_are_those_of_richs_table(
    made: tuple[list[Column], list[str]], width: int
) -> None:
    columns, styles = made
    expected = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for each in fitting(columns, width):
        expected.add_column(
            Text(each.name),
            justify="right" if each.is_number else "left",
            no_wrap=each.min_width is None,
        )
    rows = list(zip(*(each.cells for each in fitting(columns, width)), strict=True))
    for cells, style in zip(rows, styles, strict=True):
        expected.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells), style=style)
    for colour in (False, True):
        assert visible(FittedTable(columns, row_styles=styles), width, colour) == visible(
            expected, width, colour
        )


def visible(table: RenderableType, width: int, colour: bool) -> list[tuple[str, str]]:
    """Return each character with its style, as far as it can be seen."""
    console = Console(file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor")
    found = [
        (character, "" if character.isspace() else str(segment.style or ""))
        for segment in console.render(table)
        for character in segment.text
    ]
    return [(character, "" if style == "none" else style) for character, style in found]


class TestStatus:
    def test_rounds_and_where_the_best_adapter_is(self) -> None:
        first = round_status(
            "round1",
            max_train_steps=60,
            trials=synthetic.trials(),
            promised=8,
            is_running=False,
            adapters={6: "runs/round1/trial-0006/best"},
        )
        second = round_status(
            "round2", max_train_steps=180, trials=[], promised=5, is_running=True, adapters={}
        )
        second = dataclasses.replace(second, seconds_left=400.0)
        lines = shown(status_table("alpaca", [first, second])).splitlines()
        assert lines[0] == "alpaca"
        assert lines[2].split() == [
            "round1", "60", "complete", "7", "complete,", "1", "infeasible", "1.3734", "6", "60",
        ]  # fmt: skip
        assert lines[3].split() == ["round2", "180", "running", "5", "waiting", "-", "-", "-"]
        assert lines[4] == "best: round1/6, adapter in runs/round1/trial-0006/best"
        assert lines[5] == "round2: about 6 min 40 s left at the pace so far"
        assert len(lines) == 6, "of rounds without throughput nothing is said"

    def test_a_line_on_the_throughput_of_a_round_that_has_it(self) -> None:
        work = added_up(synthetic.WORK)
        rounds = [
            round_status(
                name,
                max_train_steps=60,
                trials=[],
                promised=1,
                is_running=False,
                adapters={},
                throughput=given,
            )
            for name, given in (("round1", None), ("round2", work))
        ]
        lines = shown(status_table("alpaca", rounds)).splitlines()
        assert lines[-1].startswith("round2: 3,000 tokens/s, 2 trial-steps/s, packing factor 3.5")
        assert not any(line.startswith("round1:") for line in lines)

    def test_the_best_is_that_of_the_latest_round_that_has_one(self) -> None:
        rounds = [
            round_status(name, max_train_steps=60, trials=trials, promised=1, is_running=False, adapters={})
            for name, trials in (
                ("round1", synthetic.trials()),
                ("round2", synthetic.trials()[2:3]),
                ("round3", ()),
            )
        ]
        assert "best: round2/2, its adapter is missing" in shown(status_table("alpaca", rounds))

    def test_a_study_that_has_not_begun(self) -> None:
        assert shown(status_table("alpaca", [])) == "alpaca: no round has started\n"


class TestTrials:
    def test_best_first_within_a_round(self) -> None:
        carried = synthetic.trial(0, 5e-4, round="round2", continues=Continuation("round1", 5, 35))
        lines = shown(trials_table([*synthetic.trials(), carried])).splitlines()
        assert [line.split()[0] for line in lines[1:]] == [
            *(f"round1/{number}" for number in (6, 5, 4, 3, 2, 1, 0, 7)),
            "round2/0",
        ]
        assert lines[8].endswith("infeasible  evaluation loss is nan at step 20")
        assert "continues round1/5@35" in lines[9]
        assert lines[0].split()[:3] == ["trial", "learning_rate", "lora_r"]

    def test_a_narrow_terminal_breaks_no_word(self) -> None:
        lines = shown(trials_table(synthetic.trials()), width=40).splitlines()
        assert len(lines) == 9
        assert lines[1].split() == ["round1/6", "0.00091", "1.3734"]

    def test_the_best_complete_trial_stands_out(self) -> None:
        console = Console(
            file=io.StringIO(), width=120, force_terminal=True, color_system="standard", record=True
        )
        lost = dataclasses.replace(synthetic.trials()[7], round="round2")
        console.print(trials_table([*synthetic.trials(), lost]))
        bold = [
            line for line in console.export_text(styles=True).splitlines()[1:] if line.startswith("\x1b[1m")
        ]
        assert len(bold) == 1
        assert "round1/6" in bold[0]

    def test_no_trials(self) -> None:
        assert "best loss" in shown(trials_table([]))


class TestTrialPage:
    def test_what_came_of_it(self) -> None:
        text = shown(trial_page(synthetic.trials()[6], max_train_steps=60, adapter="runs/best"))
        assert "round1/6  complete" in text
        assert "1.3734 at step 60 of 60 (100%)" in text
        assert "runs/best" in text
        assert "60 steps in 1 attempt" in text
        assert "★" in text
        assert "decay_steps" in text

    def test_an_infeasible_trial_says_why(self) -> None:
        text = shown(trial_page(synthetic.trials()[7], max_train_steps=60, adapter=None))
        assert "evaluation loss is nan at step 20" in text
        assert "▲ off the scale" in text
        assert "2.1000 at step 5 of 60" in text

    def test_a_waiting_trial(self) -> None:
        trial = synthetic.trial(0, 1e-4, state=TrialState.WAITING, evaluations=())
        assert "no evaluation yet" in shown(trial_page(trial, max_train_steps=60, adapter=None))

    def test_terminals_that_know_ascii_only(self) -> None:
        page = trial_page(synthetic.trials()[6], max_train_steps=60, adapter=None)
        assert shown(page, encoding="ascii", width=70).isascii()

    def test_user_text_is_not_markup(self) -> None:
        trial = dataclasses.replace(synthetic.trials()[7], reason="[red]bad[/red] :smile:")
        assert "[red]bad[/red] :smile:" in shown(trial_page(trial, max_train_steps=60, adapter=None))
        assert "[red]bad[/red] :smile:" in shown(trials_table([trial]))


def test_plan() -> None:
    plan = RoundPlan(
        trials=8, max_train_steps=60, epochs=1.25, train_rows=400, eval_rows=40, tokens=123_456,
        evaluation_share=0.21, checkpoint_bytes=123_000_000,
    )  # fmt: skip
    text = shown(plan_table(plan, title="round1.yaml", remarks=["3 rows were cut"]))
    for part in (
        "8 trials x 60 steps = 480",
        "1.25 epochs",
        "123,456",
        "123 MB",
        "21% of the work",
        "3 rows were cut",
    ):
        assert part in text
    assert "memory" not in text
    assert "branches" not in text
    assert "row lengths" not in text
    counted = dataclasses.replace(plan, token_lengths={"p50": 40, "p90": 61, "p99": 90, "max": 102})
    lengths = "half up to 40 tokens, 90% up to 61, 99% up to 90, longest 102"
    assert lengths in shown(plan_table(counted, title=""))
    branching = dataclasses.replace(plan, branches=10, branch_steps=120)
    assert "10 after the last trial, 120 steps: 25% more" in shown(plan_table(branching, title=""))
    measured = dataclasses.replace(plan, peak_memory_bytes=2_300_000_000, hours=1.7)
    assert "2.3 GB" in shown(plan_table(measured, title=""))
    assert "about 1 h 42 min" in shown(plan_table(measured, title=""))


class TestSummary:
    def test_it_opens_with_the_conclusion_and_ends_with_the_next_step(self) -> None:
        report = synthetic.report()
        lines = shown(summary(report), width=100).splitlines()
        assert lines[:2] == ["alpaca-smollm2/round1", "60 steps are too few. Train for 180 next."]
        assert " ".join(" ".join(lines).split()).endswith(advice.next_step(report))
        assert report.next_command not in lines[-1], "its caller says it last, once"
        text = " ".join(" ".join(lines).split())
        for sentence in (*report.reading.evidence, *(finding.message for finding in report.findings)):
            assert sentence.split(". ")[0][:60] in text
        assert "Goal: Learning rate and rank" in text
        assert "You asked: Which rank?" in shown(summary(synthetic.report(goal="Which rank?")))
        assert "Its adapter: runs/round1/trial-0006/best" in text
        assert "lora_alpha 16" in text
        assert "and 3 trials more" in text

    def test_a_narrow_terminal_crops_nothing(self) -> None:
        text = "".join(shown(summary(synthetic.report()), width=30).split())
        assert "runs/round1/trial-0006/best" in text
        assert text.endswith("".join(advice.next_step(synthetic.report()).split()))

    def test_a_later_round_shows_how_the_study_went(self) -> None:
        first = synthetic.report()
        later = synthetic.trials("round2", max_train_steps=180)[:1]
        report = synthetic.report(round="round2", max_train_steps=180, trials_of_round=later, promised=1)
        text = shown(summary(report, earlier=[first]))
        assert "How the study went" in text
        assert "An earlier trial, round1/6, is still better" in text
        assert "too few to say whether the order held" in text

    def test_the_lineage_says_cost_best_step_and_what_was_carried(self) -> None:
        reports = synthetic.two_rounds()
        lines = [
            " ".join(line.split())
            for line in shown(summary(reports[1], earlier=reports[:1]), width=200).splitlines()
        ]
        start = lines.index("How the study went")
        assert lines[start + 1] == ("round steps trials best loss at step steps run carried over conclusion")
        assert lines[start + 2].startswith("round1 60 7 complete, 1 infeasible 1.3734 60 440 - 60 steps")
        assert lines[start + 3].startswith(
            "round2 180 3 complete 1.3126 180 432 3 of round1, 108 steps saved"
        )
        text = " ".join(" ".join(lines).split())
        assert (
            "3 trials of round1 ran in round2 too. The rank correlation of their losses in both is 0.50 (1: "
            "the same order, -1: reversed). The best in round1, trial 6, is number 2 of the 3 in round2."
            in text
        )

    @pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
    def test_the_conclusion_on_each_round_is_whole_at_any_width(self, width: int) -> None:
        """Other columns go, and its words wrap."""
        *earlier, last = reports = synthetic.two_rounds()
        lines = shown(summary(last, earlier=earlier), width=width).splitlines()
        start = next(i for i, line in enumerate(lines) if line.endswith("How the study went"))
        column = lines[start + 1].index("conclusion")
        text = " ".join(line[column:].strip() for line in lines[start + 2 : start + 12])
        for report in reports:
            assert advice.headline(report) in text

    def test_throughput_is_shown_where_there_is_one(self) -> None:
        assert "Throughput" not in shown(summary(synthetic.report()))
        text = shown(summary(synthetic.report(throughputs=synthetic.WORK)), width=100)
        section = text.split("\nThroughput\n")[1].split("\nHolds for\n")[0].splitlines()
        assert [line.split()[:2] for line in section if line][:2] == [
            ["tokens/s", "3,000"],
            ["trial-steps/s", "2"],
        ]
        assert len([line for line in section if line]) == 6

    def test_nothing_complete(self) -> None:
        text = shown(summary(synthetic.report(trials_of_round=[], promised=8)))
        assert "Nothing to conclude yet" in text
        assert "0 of 8 trials" in text
        assert "Leading trials" not in text
