"""The HTML report: one self-contained file that starts with the conclusion."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from tuner.errors import StorageError
from tuner.playbook.results import Finding
from tuner.records import Trial, TrialState
from tuner.report import advice, format, plots
from tuner.report.page import SCRIPT, STYLE
from tuner.report.round_report import (
    NUM_WORDS,
    RoundReport,
    describe,
    have_answered,
    metric_of,
    trial_cells,
    trial_headers,
)
from tuner.whole import written_whole

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def write_html(path: Path, report: RoundReport, *, earlier: Sequence[RoundReport] = ()) -> None:
    """Write the page of a round and of the study's earlier rounds, atomically.

    Raises StorageError if the file cannot be written.
    """
    try:
        with written_whole(path) as draft:
            draft.write_text(html_page(report, earlier=earlier), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: the report cannot be written: {error.strerror}") from error


def html_page(report: RoundReport, *, earlier: Sequence[RoundReport] = ()) -> str:
    """Return the page as text: the conclusion of `report`, then `earlier` rounds, the latest first."""
    from plotly.offline import get_plotlyjs  # slow import (half a second)

    title = report.study if earlier else report.name
    lineage = [_lineage([*earlier, report])] if earlier else []
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{escape(title)}: tuner report</title>",
            f"<style>{STYLE}</style></head><body><main>",
            _article(report, _opening(report, earlier), *lineage),
            *(_article(other, _round_opening(other)) for other in reversed(earlier)),
            "<footer>Made by tuner. Losses are nats per target token; a step is one optimizer "
            "update.</footer></main>",
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{SCRIPT}</script>",
            "</body></html>",
        )
    )


def _article(report: RoundReport, *opening: str) -> str:
    return "\n".join(
        (
            "<article>",
            *opening,
            _why(report),
            _findings(report.findings),
            _plots(report),
            _trials(report),
            _throughput(report),
            _holds_for(report),
            "</article>",
        )
    )


# --- the conclusion -------------------------------------------------------------------------------


def _opening(report: RoundReport, earlier: Sequence[RoundReport]) -> str:
    caution = advice.progress(report)
    return "\n".join(
        (
            f'<header><p class="eyebrow">{escape(report.study)} / {escape(report.record.name)}</p>',
            f"<h1>{escape(advice.headline(report))}</h1>",
            f'<p class="goal">You asked: {escape(report.goal)}</p>' if report.goal else "",
            f'<p class="caution">{escape(caution)}</p>' if caution else "",
            _found(report, earlier),
            "</header>",
            _tiles(report),
            f'<section class="next"><h2>Do next</h2><p>{escape(advice.next_step(report))}</p>',
            f"<pre>{escape(report.next_command)}</pre></section>",
        )
    )


def _round_opening(report: RoundReport) -> str:
    """Render an earlier round: its conclusion, without a next command."""
    return "\n".join(
        (
            f'<header><p class="eyebrow">{escape(report.study)} / {escape(report.record.name)}</p>',
            f'<h2 class="headline">{escape(advice.headline(report))}</h2>',
            _found(report, ()),
            "</header>",
            _tiles(report),
        )
    )


def _found(report: RoundReport, earlier: Sequence[RoundReport]) -> str:
    first, *more = (*advice.found(report), *advice.still_better(report, earlier))
    adapter = report.adapters.get(report.ranked[0][0].number) if report.ranked else None
    where = f"<p>Its adapter is in <code>{escape(adapter)}</code>.</p>" if adapter else ""
    tested = "".join(f"<p>{_prose(sentence)}</p>" for sentence in advice.tested(report))
    return f'<p class="lede">{escape(first)}</p><p>{escape(" ".join(more))}</p>{where}{tested}'


def _tiles(report: RoundReport) -> str:
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(number)}</dd>"
        f'<dd class="detail">{escape(detail)}</dd></div>'
        for label, number, detail in advice.key_numbers(report)
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _lineage(reports: Sequence[RoundReport]) -> str:
    table = _table(advice.LINEAGE_HEADERS, advice.lineage_rows(reports), numbers=(1, 3, 4, 5), is_whole=True)
    held = "".join(f"<p>{escape(sentence)}</p>" for sentence in advice.held(reports))
    return f"<section><h2>How the study went</h2>{table}{held}</section>"


# --- what it rests on -----------------------------------------------------------------------------


def _why(report: RoundReport) -> str:
    items = "".join(f"<li>{_prose(sentence)}</li>" for sentence in report.reading.evidence)
    return f'<section><h2>Why</h2><ol class="evidence">{items}</ol></section>'


def _findings(findings: Iterable[Finding]) -> str:
    cards = "".join(
        f'<div class="finding {escape(finding.severity)}"><h3>{escape(advice.rule_in_words(finding.rule))}'
        f'<span class="severity">{escape(finding.severity)}</span></h3><p>{_prose(finding.message)}</p></div>'
        for finding in findings
    )
    none = "<p>No other findings: search space, curves and cost look fine.</p>"
    return f"<section><h2>What else stands out</h2>{cards or none}</section>"


def _plots(report: RoundReport) -> str:
    trials, steps = report.results.trials, report.max_train_steps
    figures = [
        (
            "Best step of each trial. Best steps mostly in the last quarter mean that the horizon was too "
            "short; in the first tenth, that it was too long.",
            plots.best_steps_figure(trials, max_train_steps=steps),
        ),
        (
            "Evaluation loss during training. The best trial is drawn thick, infeasible ones dotted.",
            plots.curves_figure(trials, max_train_steps=steps),
        ),
    ]
    if "learning_rate" in report.shown_names:
        figures.append(("Best loss by learning rate.", plots.learning_rate_figure(trials)))
    drawn = "".join(_figure(caption, figure.to_json()) for caption, figure in figures)
    return f"<section><h2>The curves</h2>{drawn}</section>"


def _figure(caption: str, figure_json: str) -> str:
    """Render a plot; plotly escapes <, so its content cannot end the script."""
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><div class="plot">'
        f'<script type="application/json">{figure_json}</script></div></figure>'
    )


def _trials(report: RoundReport) -> str:
    names = report.shown_names
    answers, metric = have_answered(report.trials), metric_of(report.trials)
    headers = trial_headers(names, answers=answers, metric=metric)
    rows = [trial_cells(trial, names, answers=answers, metric=metric) for trial in report.trials]
    leader = report.ranked[0][0] if report.ranked else None
    styles = ["best" if trial is leader else _style(trial) for trial in report.trials]
    numbers = range(1, len(headers) - NUM_WORDS)
    return f"<section><h2>All trials</h2>{_table(headers, rows, numbers=numbers, styles=styles)}</section>"


def _style(trial: Trial) -> str:
    return "" if trial.state is TrialState.COMPLETE else "lost"


def _throughput(report: RoundReport) -> str:
    rows = format.throughput_rows(report.record.throughput)
    if not rows:
        return ""
    return f"<section><h2>Throughput</h2>{_table(format.THROUGHPUT_HEADERS, rows, numbers=(1,))}</section>"


def _holds_for(report: RoundReport) -> str:
    searched = {name: describe(report.results.space[name]) for name in report.shown_names}
    return "".join(
        (
            "<section><h2>What this holds for</h2>",
            "<p>These values were the same in every trial. With other values, another trial may be best and "
            "another horizon may be right.</p>",
            _facts(report.fixed),
            "<h3>Searched</h3>",
            _facts(searched),
            "<h3>The run</h3>",
            _facts(advice.setting(report)),
            "</section>",
        )
    )


# --- pieces ---------------------------------------------------------------------------------------


def _prose(text: str) -> str:
    """Escape text, with `backquotes` marking code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _facts(facts: Mapping[str, str]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    return f'<dl class="facts">{items}</dl>' if items else "<p>None.</p>"


def _table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Container[int],
    styles: Sequence[str] = (),
    is_whole: bool = False,
) -> str:
    """Render a table; `numbers` are the positions of number columns, the last column is prose.

    A whole table never scrolls: on a narrow screen, each cell takes a line.
    """
    kinds = ["number" if position in numbers else "" for position in range(len(headers) - 1)] + ["words"]
    body = "".join(
        f'<tr class="{style}">{_cells("td", row, kinds, headers)}</tr>'
        for row, style in zip(rows, styles or [""] * len(rows), strict=True)
    )
    head = _cells("th", headers, kinds)
    around = "wide whole" if is_whole else "wide"
    return f'<div class="{around}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(tag: str, texts: Sequence[str], kinds: Sequence[str], headers: Sequence[str] = ()) -> str:
    """Render a row's cells; body cells carry their header, shown when the head is hidden."""
    named = [f' data-header="{escape(header)}"' for header in headers] or [""] * len(texts)
    cells = zip(texts, kinds, named, strict=True)
    return "".join(f'<{tag} class="{kind}"{name}>{escape(text)}</{tag}>' for text, kind, name in cells)
