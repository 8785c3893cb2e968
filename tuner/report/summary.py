"""`study report` in the terminal: the page's advice in short form."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tuner.report import advice, format
from tuner.report.round_report import RoundReport
from tuner.report.tables import trials_table
from tuner.report.terminal import FittedTable, column

_LEADING_SHOWN = 5
_SEVERITY_STYLES = {"problem": "bold red", "warning": "yellow", "info": "dim"}


def summary(report: RoundReport, *, earlier: Sequence[RoundReport] = ()) -> RenderableType:
    """Render the conclusion, its evidence, the leading trials, findings, caveats and the next command.

    `earlier` are the study's earlier rounds, in order.
    """
    caution = advice.progress(report)
    adapter = report.adapters.get(report.ranked[0][0].number) if report.ranked else None
    return Group(
        Text(report.name, style="dim"),
        Text(advice.headline(report), style="bold"),
        *([Text(caution, style="yellow")] if caution else []),
        Text(),
        *([Text(f"You asked: {report.goal}", style="dim")] if report.goal else []),
        Text(" ".join((*advice.found(report), *advice.still_better(report, earlier)))),
        *([Text(f"Its adapter: {adapter}")] if adapter else []),
        *(Text(sentence) for sentence in advice.tested(report)),
        *([_headed("How the study went", _lineage([*earlier, report]))] if earlier else []),
        _headed("Why", _numbered(report.reading.evidence)),
        *([_headed("Leading trials", _leading(report))] if report.ranked else []),
        *([_headed("What else stands out", _findings(report))] if report.findings else []),
        *([_headed("Throughput", _throughput(report))] if report.record.throughput else []),
        _headed("Holds for", Text(", ".join(f"{name} {value}" for name, value in report.fixed.items()))),
        _headed("Next", Group(Text(advice.next_step(report)), Text(report.next_command, style="bold"))),
    )


def _headed(heading: str, body: RenderableType) -> RenderableType:
    return Group(Text(f"\n{heading}", style="bold"), Padding(body, (0, 0, 0, 2), expand=False))


def _lineage(reports: Sequence[RoundReport]) -> RenderableType:
    rows = advice.lineage_rows(reports)
    ranks, words = (0, 2, 7, 3, 4, 5, 6, 1), {2: 12, 6: 14, 7: 20}
    table = FittedTable(
        [
            column(name, [row[i] for row in rows], rank=ranks[i], min_width=words.get(i))
            for i, name in enumerate(advice.LINEAGE_HEADERS)
        ]
    )
    return Group(table, *(Text(sentence) for sentence in advice.held(reports)))


def _throughput(report: RoundReport) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    for name, value, meaning in format.throughput_rows(report.record.throughput):
        table.add_row(Text(name), Text(value), Text(meaning, style="dim"))
    return table


def _numbered(sentences: tuple[str, ...]) -> RenderableType:
    table = Table.grid(padding=(0, 1, 0, 0))
    for number, sentence in enumerate(sentences, start=1):
        table.add_row(Text(f"{number}."), Text(sentence))
    return table


def _leading(report: RoundReport) -> RenderableType:
    shown = [trial for trial, _ in report.ranked[:_LEADING_SHOWN]]
    others = len(report.trials) - len(shown)
    rest = Text(
        f"and {format.count(others, 'trial')} more: {format.counts(report.counts)} in all", style="dim"
    )
    table = trials_table(shown, names=report.shown_names)
    return Group(table, *([rest] if others else []))


def _findings(report: RoundReport) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for finding in report.findings:
        rule = Text(advice.rule_in_words(finding.rule), style=_SEVERITY_STYLES[finding.severity])
        table.add_row(rule, Text(finding.message))
    return table
