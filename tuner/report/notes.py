"""Render a report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from tuner.playbook.results import Finding
from tuner.report import advice, format
from tuner.report.round_report import (
    NUM_WORDS,
    RoundReport,
    describe,
    have_answered,
    metric_of,
    trial_headers,
    trial_rows,
)


def escaped(text: str) -> str:
    """Escape text for Markdown, on one line. Underscores within words need no escape."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*<>\[\]|#]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)


def prose(text: str) -> str:
    """Escape text, with `backquotes` marking code."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


def code(text: str) -> str:
    """Format text as code, on one line."""
    return f"`{' '.join(text.split()).replace('`', '')}`"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, num_words: int = 0) -> str:
    """Render a table; the last `num_words` columns are words, the others numbers."""
    lines = [f"| {' | '.join(escaped(cell) for cell in row)} |" for row in (header, *rows)]
    kinds = ["---:"] * (len(header) - num_words) + ["---"] * num_words
    return "\n".join([lines[0], f"|{'|'.join(kinds)}|", *lines[1:]])


def round_note(report: RoundReport) -> str:
    """Return a short note for a dashboard: conclusion, best trial, evidence and next command."""
    return _joined(
        _opening(report, level="##"),
        "\n".join(f"- {prose(sentence)}" for sentence in report.reading.evidence),
        "\n".join(_finding(finding) for finding in report.findings if finding.severity != "info"),
        _next(report),
    )


def round_markdown(report: RoundReport) -> str:
    """Return the full report without plots."""
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
        f"{format.goal_label(report.goal)}: {escaped(report.goal)}" if report.goal else "",
        f"**{escaped(caution)}**" if caution else "",
        prose(" ".join(advice.found(report))),
        f"Its {report.kept} is in {code(adapter)}." if adapter else "",
        *(prose(sentence) for sentence in advice.tested(report)),
    )


def _next(report: RoundReport) -> str:
    return f"**Next:** {prose(advice.next_step(report))}\n\n```\n{report.next_command}\n```"


def _finding(finding: Finding) -> str:
    rule = advice.rule_in_words(finding.rule)
    return f"- **{escaped(rule)}** ({finding.severity}): {prose(finding.message)}"


def _trials(report: RoundReport) -> str:
    names = report.shown_names
    answers, metric = have_answered(report.trials), metric_of(report.trials)
    rows = trial_rows(report.trials, names, answers=answers, metric=metric)
    return table(trial_headers(names, answers=answers, metric=metric), rows, num_words=NUM_WORDS)


def _throughput(report: RoundReport) -> str:
    measured = report.throughput_rows
    return "\n".join(f"- {name}: {value} ({escaped(meaning)})" for name, value, meaning in measured)


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {escaped(name)}: {escaped(fact)}" for name, fact in facts.items())
