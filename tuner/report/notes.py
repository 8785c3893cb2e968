"""The report as Markdown: a note for optuna-dashboard, and a full text to commit with the results."""

from __future__ import annotations

from collections.abc import Mapping

from tuner.playbook.findings import Finding
from tuner.report import advice, throughput
from tuner.report.markdown import code, escaped, prose, table
from tuner.report.round_report import RoundReport, describe
from tuner.report.rows import NUM_WORDS, have_answered, trial_cells, trial_headers


def round_note(report: RoundReport) -> str:
    """Conclusion, best trial, evidence and next command: what fits beside a dashboard's plots."""
    return _joined(
        _opening(report, level="##"),
        "\n".join(f"- {prose(sentence)}" for sentence in report.reading.evidence),
        "\n".join(_finding(finding) for finding in report.findings if finding.severity != "info"),
        _next(report),
    )


def round_markdown(report: RoundReport) -> str:
    """The whole report but for its plots."""
    searched = {name: describe(report.results.space[name]) for name in report.shown_names}
    return _joined(
        _opening(report, level="#"),
        _next(report),
        "## Why",
        "\n".join(f"{i}. {prose(sentence)}" for i, sentence in enumerate(report.reading.evidence, start=1)),
        "## What else stands out",
        "\n".join(_finding(finding) for finding in report.findings) or "Nothing.",
        "## All trials",
        _trials(report),
        *(["## Throughput", _throughput(report)] if report.record.throughput else []),
        "## What this holds for",
        "The same in every trial:",
        _facts(report.fixed),
        "Searched:",
        _facts(searched),
        "The run:",
        _facts(advice.setting(report)),
    ) + "\n"  # fmt: skip


def _joined(*blocks: str) -> str:
    return "\n\n".join(block for block in blocks if block)


def _opening(report: RoundReport, *, level: str) -> str:
    caution = advice.progress(report)
    adapter = report.adapters.get(report.ranked[0][0].number) if report.ranked else None
    return _joined(
        f"{level} {escaped(report.name)}: {escaped(advice.headline(report))}",
        f"You asked: {escaped(report.goal)}" if report.goal else "",
        f"**{escaped(caution)}**" if caution else "",
        prose(" ".join(advice.found(report))),
        f"Its adapter is in {code(adapter)}." if adapter else "",
        *(prose(sentence) for sentence in advice.tested(report)),
    )


def _next(report: RoundReport) -> str:
    return f"**Next:** {prose(advice.next_step(report))}\n\n```\n{report.next_command}\n```"


def _finding(finding: Finding) -> str:
    rule = advice.rule_in_words(finding.rule)
    return f"- **{escaped(rule)}** ({finding.severity}): {prose(finding.message)}"


def _trials(report: RoundReport) -> str:
    names = report.shown_names
    answers = have_answered(report.trials)
    cells = (trial_cells(trial, names, answers=answers) for trial in report.trials)
    return table(trial_headers(names, answers=answers), cells, num_words=NUM_WORDS)


def _throughput(report: RoundReport) -> str:
    measured = throughput.rows(report.record.throughput)
    return "\n".join(f"- {name}: {value} ({escaped(meaning)})" for name, value, meaning in measured)


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {escaped(name)}: {escaped(fact)}" for name, fact in facts.items())
