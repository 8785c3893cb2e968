"""Two studies side by side: which one is better, whether that can be said, and how they differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from tuner.playbook.noise import SIGNIFICANT, paired_standard_error
from tuner.playbook.selection import trial_score
from tuner.records import Direction, Evaluation, Trial
from tuner.report import format, plots
from tuner.report.html import figure_block, page_around
from tuner.report.round_report import RoundReport
from tuner.report.terminal import Column, FittedTable, column

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True)
class Compared:
    """Two studies, each by the reports on its rounds, oldest first, and the name to show it by."""

    names: tuple[str, str]
    reports: tuple[Sequence[RoundReport], Sequence[RoundReport]]

    @property
    def last(self) -> tuple[RoundReport, RoundReport]:
        """Return the report on the latest round of each."""
        one, other = self.reports
        return one[-1], other[-1]

    @property
    def best(self) -> tuple[tuple[Trial, Evaluation], tuple[Trial, Evaluation]] | None:
        """Return the best trial of each latest round; None if one has no complete trial."""
        one, other = self.last
        return (one.ranked[0], other.ranked[0]) if one.ranked and other.ranked else None

    def headline(self) -> str:
        """Say which study is better, and by how much, where their results can be compared."""
        if self.best is None:
            return "Nothing to compare yet: a study has no complete trial."
        if self.last[0].record.workload != self.last[1].record.workload:
            return "The studies differ in model, data or evaluation, so their losses cannot be compared."
        (first, one), (second, other) = self.best
        if one.objective != other.objective or (trial_score(first) is None) != (trial_score(second) is None):
            return "The studies have different objectives, so their results cannot be compared."
        values = [_value(first, one), _value(second, other)]
        if values[0] == values[1]:
            return "The best trials of both studies are equally good."
        is_higher = trial_score(first) is not None or (
            one.objective is not None and one.objective.direction == Direction.MAXIMIZE
        )
        better = values.index(max(values) if is_higher else min(values))
        share = format.percent(abs(values[0] - values[1]) / abs(values[1 - better] or 1.0))
        said = f"{self.names[better]} is better by {share}"
        return f"{said}, {_certainty(one, other) if trial_score(first) is None else 'by its answers'}."

    def rows(self) -> list[tuple[str, str, str]]:
        """Return what describes both, one row for each property."""
        columns = [_described(reports) for reports in self.reports]
        names = list(dict.fromkeys(name for described in columns for name in described))
        return [(name, *(described.get(name, format.NOTHING) for described in columns)) for name in names]  # type: ignore[misc]

    def differences(self) -> list[tuple[str, str, str]]:
        """Return the fixed settings that differ."""
        one, other = ({**_setting(report), **report.fixed, **_searched(report)} for report in self.last)
        names = dict.fromkeys((*one, *other))
        return [
            (name, one.get(name, format.NOTHING), other.get(name, format.NOTHING))
            for name in names
            if one.get(name) != other.get(name)
        ]


def _value(trial: Trial, best: Evaluation) -> float:
    score = trial_score(trial)
    return best.value if score is None else score


def _certainty(one: Evaluation, other: Evaluation) -> str:
    error = paired_standard_error(one, other)
    if error is None:
        return "and nothing is known of the noise of this difference"
    noise = SIGNIFICANT * error
    share = f"± {format.percent(noise / abs(other.eval_loss or 1.0))}"
    if abs(one.eval_loss - other.eval_loss) <= noise:
        return f"{share}: less than the noise of the evaluation rows"
    return f"{share} by the same evaluation rows"


def _described(reports: Sequence[RoundReport]) -> dict[str, str]:
    report = reports[-1]
    facts = {
        "rounds": ", ".join(f"{each.record.name} ({each.max_train_steps})" for each in reports),
        "trials": format.counts(report.counts),
        "steps run": f"{sum(each.executed_steps for each in reports):,}",
        "base model's loss": format.loss(report.base_loss),
    }
    if report.ranked:
        trial, best = report.ranked[0]
        facts["best trial"] = trial.name
        if trial.answer_score is not None:
            facts[format.ANSWERS_HEADER] = format.answer_score(trial.answer_score)
        if best.objective is not None:
            facts[f"best {best.objective.metric}"] = format.loss(best.value)
        facts["best loss"] = format.loss(best.eval_loss)
        facts["best step"] = f"{best.step} of {report.max_train_steps}"
        facts |= {name: format.value(trial.hyperparameters.get(name)) for name in report.shown_names}
    return facts


def _searched(report: RoundReport) -> dict[str, str]:
    return {name: "searched" for name in report.shown_names if name not in report.fixed}


def _setting(report: RoundReport) -> dict[str, str]:
    model = report.record.spec.get("model", {})
    facts = {f"model.{key}": str(value) for key, value in model.items() if value not in (None, "none")}
    facts["training rows"] = f"{report.record.train_rows:,}"
    facts["evaluation rows"] = f"{report.record.eval_rows:,}"
    return facts


def comparison_summary(compared: Compared) -> RenderableType:
    """Render the comparison in the terminal."""
    parts: list[RenderableType] = [Text(compared.headline(), style="bold"), Text()]
    parts.append(_columns(compared, compared.rows()))
    if differences := compared.differences():
        parts += [Text("\nFixed and different", style="bold"), _columns(compared, differences)]
    return Group(*parts)


def _columns(compared: Compared, rows: Sequence[tuple[str, str, str]]) -> FittedTable:
    first = Column("", tuple(Text(row[0], style="dim") for row in rows), rank=0, is_number=False)
    sides = [
        column(compared.names[side], [row[side + 1] for row in rows], rank=side, min_width=8)
        for side in (0, 1)
    ]
    return FittedTable([first, *sides])


def comparison_page(compared: Compared) -> str:
    """Return the comparison as a self-contained HTML page."""
    rows = _html_table(compared.names, compared.rows())
    differences = compared.differences()
    different = _html_table(compared.names, differences) if differences else "<p>None.</p>"
    drawn = figure_block(
        "The best trial of each study, over the steps of its run.", curves_of_two(compared).to_json()
    )
    return page_around(
        f"{' and '.join(compared.names)}: tuner comparison",
        f'<article><header><p class="eyebrow">{escape(" and ".join(compared.names))}</p>'
        f"<h1>{escape(compared.headline())}</h1></header>"
        f"<section>{rows}</section><section><h2>The curves</h2>{drawn}</section>"
        f"<section><h2>Fixed and different</h2>{different}</section></article>",
        is_dry_run=any(report.is_dry_run for report in compared.last),
    )


def curves_of_two(compared: Compared) -> go.Figure:
    """Plot the best curve of each study."""
    figure = plots.figure_of("step", "evaluation loss", height=400)
    if compared.best is None:
        return plots.empty_figure(figure, "A study has no complete trial.")
    for name, (trial, best), color in zip(
        compared.names, compared.best, (plots.ACCENT, plots.WARNING), strict=True
    ):
        points = [e for e in trial.evaluations if abs(e.value) < float("inf")]
        figure.add_scatter(
            x=[e.step for e in points],
            y=[e.value for e in points],
            mode="lines",
            name=plots.safe(f"{name}, {trial.name}: {format.loss(best.value)}"),
            line={"color": color, "width": 2.5},
        )
    if metric := best.objective:
        figure.update_yaxes(title_text=plots.safe(metric.metric))
    return figure


def _html_table(names: Iterable[str], rows: Sequence[tuple[str, str, str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide compared">{table}</div>'
