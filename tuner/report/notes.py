"""The report as Markdown: a note for optuna-dashboard, and a full text to commit with the results."""

from __future__ import annotations

import re
from collections.abc import Mapping

from tuner.playbook.findings import Finding
from tuner.report import advice, throughput
from tuner.report.round_report import RoundReport, describe
from tuner.report.rows import NUM_WORDS, trial_cells, trial_headers


def round_note(report: RoundReport) -> str:
    """Conclusion, best trial, evidence and next command: what fits beside a dashboard's plots."""
    return _joined(
        _opening(report, level="##"),
        "\n".join(f"- {_prose(sentence)}" for sentence in report.reading.evidence),
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
        "\n".join(f"{i}. {_prose(sentence)}" for i, sentence in enumerate(report.reading.evidence, start=1)),
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
        f"{level} {_escaped(report.name)}: {_escaped(advice.headline(report))}",
        f"You asked: {_escaped(report.goal)}" if report.goal else "",
        f"**{_escaped(caution)}**" if caution else "",
        _prose(" ".join(advice.found(report))),
        f"Its adapter is in {_code(adapter)}." if adapter else "",
    )


def _next(report: RoundReport) -> str:
    return f"**Next:** {_prose(advice.next_step(report))}\n\n```\n{report.next_command}\n```"


def _finding(finding: Finding) -> str:
    rule = advice.rule_in_words(finding.rule)
    return f"- **{_escaped(rule)}** ({finding.severity}): {_prose(finding.message)}"


def _trials(report: RoundReport) -> str:
    names = report.shown_names
    header = trial_headers(names)
    rows = [header, *(trial_cells(trial, names) for trial in report.trials)]
    lines = [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows]
    kinds = ["---:"] * (len(header) - NUM_WORDS) + ["---"] * NUM_WORDS
    return "\n".join([lines[0], f"|{'|'.join(kinds)}|", *lines[1:]])


def _throughput(report: RoundReport) -> str:
    measured = throughput.rows(report.record.throughput)
    return "\n".join(f"- {name}: {value} ({_escaped(meaning)})" for name, value, meaning in measured)


def _facts(facts: Mapping[str, str]) -> str:
    return "\n".join(f"- {_escaped(name)}: {_escaped(fact)}" for name, fact in facts.items())


def _prose(text: str) -> str:
    """Text in which `backquotes` mark code, all else taken literally."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line. Underscores within words mean nothing to it."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*<>\[\]|#]|(?<!\w)_|_(?!\w))", r"\\\1", one_line)


def _code(text: str) -> str:
    return f"`{' '.join(text.split()).replace('`', '')}`"
