from __future__ import annotations

import dataclasses

from tuner.report import round_markdown, round_note
from tuner.report.notes import prose

from . import synthetic


def test_the_note_is_short_and_complete() -> None:
    report = synthetic.report()
    note = round_note(report)
    assert note.startswith("## alpaca-smollm2/round1: 60 steps are too few. Train for 180 next.")
    for sentence in report.reading.evidence:
        assert f"- {sentence}" in note
    assert "`runs/round1/trial-0006/best`" in note
    assert note.endswith("```\ntuner study promote --to round2\n```")
    assert "All trials" not in note


def test_the_whole_report_lists_every_trial_and_what_it_holds_for() -> None:
    report = synthetic.report()
    lines = round_markdown(report).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 8
    assert len({row.count("|") for row in rows}) == 1
    assert rows[2].startswith("| 6 | 0.00091 | 8 | 1.3734 | 60 |")
    assert rows[-1].endswith("| infeasible | evaluation loss is nan at step 20 |")
    assert "- lora_alpha: 16" in lines
    assert "- torch: 2.13.0" in lines
    for finding in report.findings:
        assert any(prose(finding.message) in line for line in lines)


def test_throughput_is_listed_where_there_is_one() -> None:
    lines = round_markdown(synthetic.report(throughputs=synthetic.WORK)).splitlines()
    start = lines.index("## Throughput")
    assert lines[start + 2] == "- tokens/s: 3,000 (training tokens per second of a worker's training time)"
    assert "## Throughput" not in round_markdown(synthetic.report())


def test_user_text_is_not_markdown() -> None:
    reason = "a | b <b>*bold*</b> `code` _x_ snake_case\nsecond line"
    trials = [dataclasses.replace(trial, reason=reason) for trial in synthetic.trials()]
    text = round_markdown(synthetic.report(trials_of_round=trials, goal="# [link](x)"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 10
    escaped = r"a \| b \<b\>\*bold\*\</b\> \`code\` \_x\_ snake_case second line"
    assert all(row.endswith(f"| {escaped} |") for row in rows[2:])
    assert r"Goal: \# \[link\](x)" in text


def test_commands_in_a_finding_stay_code() -> None:
    report = synthetic.shaped_report(lambda step: 2 + 0.01 * step)
    assert "`tuner study check ROUND.yaml --show 5`" in round_note(report)


def test_a_round_without_a_trial() -> None:
    empty = synthetic.report(trials_of_round=[], promised=8)
    assert "Nothing to conclude yet" in round_note(empty)
    assert "Nothing to conclude yet" in round_markdown(empty)
