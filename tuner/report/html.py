"""The HTML report: one self-contained file that starts with the conclusion."""

from __future__ import annotations

import base64
import gzip
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path

from tuner.errors import StorageError
from tuner.playbook.results import Finding
from tuner.records import Trial, TrialState
from tuner.report import advice, format, plots, space_plots
from tuner.report.page import SCRIPT, STYLE
from tuner.report.round_report import (
    NUM_WORDS,
    RoundReport,
    describe,
    have_answered,
    metric_of,
    trial_headers,
    trial_rows,
)
from tuner.whole import written_whole

_BANNER = (
    '<p class="banner"><strong>Dry run.</strong> A formula makes the losses up and nothing was trained: this '
    "page shows what a report looks like, not what your model does.</p>"
)
_ENOUGH_TRIALS = 50
"""Below this number of complete trials, importances vary much from one round to the next."""
_BANNER = (
    '<p class="banner"><strong>Dry run.</strong> A formula makes the losses up and nothing was trained: this '
    "page shows what a report looks like, not what your model does.</p>"
)
_ENOUGH_TRIALS = 50
"""Below this number of complete trials, importances vary much from one round to the next."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def write_html(path: Path, report: RoundReport, *, earlier: Sequence[RoundReport] = ()) -> None:
    """Write the page of a round and of the study's earlier rounds, atomically.

    Raises StorageError if the file cannot be written.
    """
    write_page(path, html_page(report, earlier=earlier))


def write_page(path: Path, text: str) -> None:
    """Write a page atomically. Raises StorageError if the file cannot be written."""
    try:
        with written_whole(path) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"{path}: the report cannot be written: {error.strerror}; set --html to a file elsewhere"
        ) from error


def html_page(report: RoundReport, *, earlier: Sequence[RoundReport] = ()) -> str:
    """Return the page as text: the conclusion of `report`, then `earlier` rounds, the latest first."""
    title = report.study if earlier else report.name
    lineage = [_lineage([*earlier, report])] if earlier else []
    body = "\n".join(
        (
            _article(report, _opening(report, earlier), *lineage),
            *(_article(other, _round_opening(other)) for other in reversed(earlier)),
        )
    )
    return page_around(f"{title}: tuner report", body, is_dry_run=report.is_dry_run)


def page_around(title: str, body: str, *, is_dry_run: bool) -> str:
    """Return a self-contained page: look, banner of a dry run, body, and the script that draws its plots."""
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style></head><body>{_BANNER if is_dry_run else ''}<main>",
            body,
            "<footer>Made by tuner. Losses are nats per target token; a step is one optimizer "
            "update.</footer></main>",
            *_scripts(),
            "</body></html>",
        )
    )


@cache
def _scripts() -> tuple[str, str]:
    """Return plotly, compressed, and the page's own script, which unpacks it: 5 MB would be 2 MB."""
    from plotly.offline import get_plotlyjs  # slow import (half a second)

    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()
    return f'<script type="text/plain" id="plotly">{packed}</script>', f"<script>{SCRIPT}</script>"


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
            f'<p class="goal">{format.goal_label(report.goal)}: {escape(report.goal)}</p>'
            if report.goal
            else "",
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
    where = (
        f"<p>Its {report.kept} is in <code>{escape(adapter)}</code>.{_again(report)}</p>" if adapter else ""
    )
    tested = "".join(f"<p>{_prose(sentence)}</p>" for sentence in advice.tested(report))
    return f'<p class="lede">{escape(first)}</p><p>{escape(" ".join(more))}</p>{where}{tested}'


def _again(report: RoundReport) -> str:
    if report.is_dry_run:
        return ""
    command = f"tuner trial reproduce {report.record.name}/{report.ranked[0][0].number}"
    return f" This command trains it again and compares the curves: <code>{escape(command)}</code>."


def _tiles(report: RoundReport) -> str:
    tiles = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(number)}</dd>"
        f'<dd class="detail">{escape(detail)}</dd></div>'
        for label, number, detail in advice.key_numbers(report)
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _lineage(reports: Sequence[RoundReport]) -> str:
    """Render a row of numbers for each round, and its conclusion below them over the whole width."""
    *headers, said = advice.LINEAGE_HEADERS
    kinds = ["number" if place in (1, 3, 4, 5) else "" for place in range(len(headers))]
    body = "".join(
        f"<tr>{_cells('td', cells[:-1], kinds, headers)}</tr>"
        f'<tr class="said"><td class="words" colspan="{len(headers)}" data-header="{said}">'
        f"{escape(cells[-1])}</td></tr>"
        for cells in advice.lineage_rows(reports)
    )
    head = _cells("th", headers, kinds)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    held = "".join(f"<p>{escape(sentence)}</p>" for sentence in advice.held(reports))
    return f'<section><h2>How the study went</h2><div class="wide whole">{table}</div>{held}</section>'


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
    trials, steps, names = report.results.trials, report.max_train_steps, report.shown_names
    many = len(report.ranked) > plots.MANY_TRIALS
    curves = [
        (
            "Best step of each trial. Best steps mostly in the last quarter mean that the horizon was too "
            "short; in the first tenth, that it was too long.",
            plots.best_steps_figure(trials, max_train_steps=steps),
        ),
        (
            "Evaluation loss during training. The best ten trials are lines, the bands hold all of them."
            if many
            else "Evaluation loss during training. The best trial is drawn thick, infeasible ones dotted.",
            plots.curves_figure(trials, max_train_steps=steps),
        ),
        ("The end of the same curves.", plots.ends_figure(trials, max_train_steps=steps)),
    ]
    drawn = "".join(figure_block(caption, figure.to_json()) for caption, figure in curves)
    return f"<section><h2>The curves</h2>{drawn}</section>{_space_plots(report) if names else ''}"


def _space_plots(report: RoundReport) -> str:
    trials, names, space = report.results.trials, report.shown_names, report.results.space
    wide = []
    if len(names) > 1:
        wide.append(
            figure_block(
                "Each line is a trial, from its hyperparameters to its result; the best is at the top.",
                space_plots.parallel_figure(trials, names, space).to_json(),
                num_columns=len(names) + 1,
            )
        )
    if report.importance:
        complete = format.count(len(report.ranked), "complete trial")
        rough = " So few trials give a rough order only." if len(report.ranked) < _ENOUGH_TRIALS else ""
        wide.append(
            figure_block(
                f"Importance: the share of each hyperparameter in what parts the best of {complete} from the "
                f"others, by Optuna's PED-ANOVA.{rough}",
                space_plots.importance_figure(report.importance).to_json(),
            )
        )
    by_name = "".join(
        figure_block(
            f"Best result by {name}; infeasible trials are crosses.",
            space_plots.hyperparameter_figure(trials, name, space.get(name)).to_json(),
        )
        for name in names
    )
    return f'<section><h2>The search space</h2>{"".join(wide)}<div class="grid">{by_name}</div></section>'


_COLUMN_REM = 5
"""Width that a column of a plot with several needs, for its name."""


def figure_block(caption: str, figure_json: str, *, num_columns: int = 0) -> str:
    """Render a plot; plotly escapes <, so its content cannot end the script.

    A plot with many columns scrolls where the screen is too narrow for their names.
    """
    width = f' style="min-width: {num_columns * _COLUMN_REM}rem"' if num_columns else ""
    plot = f'<div class="plot"{width}><script type="application/json">{figure_json}</script></div>'
    around = f'<div class="scroll">{plot}</div>' if num_columns else plot
    return f"<figure><figcaption>{escape(caption)}</figcaption>{around}</figure>"


def _trials(report: RoundReport) -> str:
    names = report.shown_names
    answers, metric = have_answered(report.trials), metric_of(report.trials)
    headers = trial_headers(names, answers=answers, metric=metric)
    rows = trial_rows(report.trials, names, answers=answers, metric=metric)
    leader = report.ranked[0][0] if report.ranked else None
    styles = ["best" if trial is leader else _style(trial) for trial in report.trials]
    numbers = range(1, len(headers) - NUM_WORDS)
    shown = len(rows) if len(rows) <= plots.MANY_TRIALS else plots.NUM_HIGHLIGHTED
    table = _table(headers, rows[:shown], numbers=numbers, styles=styles[:shown])
    if rows[shown:]:
        rest = _table(headers, rows[shown:], numbers=numbers, styles=styles[shown:])
        others = format.count(len(rows) - shown, "other trial")
        table += (
            f"<details><summary>The {others}: {format.counts(report.counts)} in all</summary>{rest}</details>"
        )
    return f"<section><h2>All trials</h2>{table}</section>"


def _style(trial: Trial) -> str:
    return "" if trial.state is TrialState.COMPLETE else "lost"


def _throughput(report: RoundReport) -> str:
    rows = report.throughput_rows
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
) -> str:
    """Render a table; `numbers` are the positions of number columns, the last column is prose."""
    kinds = ["number" if position in numbers else "" for position in range(len(headers) - 1)] + ["words"]
    body = "".join(
        f'<tr class="{style}">{_cells("td", row, kinds, headers)}</tr>'
        for row, style in zip(rows, styles or [""] * len(rows), strict=True)
    )
    head = _cells("th", headers, kinds)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(tag: str, texts: Sequence[str], kinds: Sequence[str], headers: Sequence[str] = ()) -> str:
    """Render a row's cells; body cells carry their header, shown when the head is hidden."""
    named = [f' data-header="{escape(header)}"' for header in headers] or [""] * len(texts)
    cells = zip(texts, kinds, named, strict=True)
    return "".join(
        f'<{tag} class="{kind}"{name}>{_breakable(text) if tag == "th" else escape(text)}</{tag}>'
        for text, kind, name in cells
    )


def _breakable(name: str) -> str:
    """Escape a hyperparameter's name, which may be broken after its underscores if it is long."""
    return escape(name) if len(name) <= space_plots.SHORT_NAME else escape(name).replace("_", "_<wbr>")
