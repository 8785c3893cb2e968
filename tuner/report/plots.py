"""The three plots of a round, as plotly figures for light and dark pages.

The HTML report uses them, and optuna-dashboard through the study's page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuner.playbook.selection import best_evaluation, ranked, settled_step
from tuner.records import LOSS, Direction, Evaluation, Objective, Trial, TrialState
from tuner.report import format

if TYPE_CHECKING:
    import plotly.graph_objects as go

ACCENT = "#2a7de1"
"""Colour of the best."""
WARNING = "#d9822b"
"""Colour of infeasible trials and of regions where a best step says something about the horizon."""
QUIET = "#8a94a6"
"""Colour of everything else."""
EARLY_SHARE, LATE_SHARE = 0.10, 0.75
"""Best steps before the first share mean that the horizon is too long; after the second, too short."""


def best_steps_figure(trials: Sequence[Trial], *, max_train_steps: int) -> go.Figure:
    """Plot where in the run each complete trial was best and where it settled; the best on top."""
    order = ranked(trials)
    figure = _figure("step", "", height=140 + 26 * max(4, len(order)))
    if not order:
        return _say_empty(figure, "No trial is complete yet.")
    _draw_best_steps(figure, order, max_train_steps=max_train_steps)
    _mark_zones(figure, max_train_steps)
    figure.update_layout(margin_t=30)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(range=[-0.02 * max_train_steps, 1.02 * max_train_steps])
    return figure


def _draw_best_steps(
    figure: go.Figure, order: Sequence[tuple[Trial, Evaluation]], *, max_train_steps: int
) -> None:
    """Draw a line for each trial, from where it settled to its best step."""
    names = [f"trial {trial.number}  {format.loss(best.value)}" for trial, best in order]
    settled = [_settled(trial, best) for trial, best in order]
    for name, (_, best), done in zip(names, order, settled, strict=True):
        figure.add_scatter(
            x=[done, best.step],
            y=[name, name],
            mode="lines",
            line={"color": QUIET, "width": 2},
            hoverinfo="skip",
            showlegend=False,
        )
    figure.add_scatter(
        x=settled,
        y=names,
        mode="markers",
        cliponaxis=False,
        name="settled: within noise of the best",
        marker={"symbol": "circle-open", "size": 11, "color": QUIET, "line": {"width": 2}},
        hovertemplate="%{y}<br>settled at step %{x}<extra></extra>",
    )
    figure.add_scatter(
        x=[best.step for _, best in order],
        y=names,
        mode="markers",
        cliponaxis=False,
        name="best step",
        marker={"size": 11, "color": ACCENT},
        customdata=[format.percent(best.step / max_train_steps) for _, best in order],
        hovertemplate="%{y}<br>best at step %{x} (%{customdata} of the run)<extra></extra>",
    )


def curves_figure(trials: Sequence[Trial], *, max_train_steps: int) -> go.Figure:
    """Plot the objective's evaluations by step, a line for each trial; stars are best steps.

    The axis of a loss ends a little above the base model's loss, so that a divergence does not flatten the
    rest.
    """
    figure = _figure("step", _name(trials, "evaluation loss"), height=420, has_legend=False)
    order = ranked(trials)
    leader = order[0][0].number if order else None
    drawn = [trial for trial in trials if best_evaluation(trial.evaluations) is not None]
    if not drawn:
        return _say_empty(figure, "No trial has been evaluated yet.")
    for trial in sorted(drawn, key=lambda trial: trial.number == leader):
        _add_curve(figure, trial, is_leader=trial.number == leader)
    figure.update_xaxes(range=[-0.02 * max_train_steps, 1.02 * max_train_steps])
    figure.update_yaxes(range=_loss_range(drawn))
    return figure


def learning_rate_figure(trials: Sequence[Trial]) -> go.Figure:
    """Plot the best value by learning rate; infeasible trials have none and are at the worse end."""
    figure = _figure("learning rate", f"best {_name(trials, 'evaluation loss')}", height=380)
    done = [(trial, best.value) for trial, best in ranked(trials) if _rate(trial) is not None]
    lost = [t for t in trials if t.state is TrialState.INFEASIBLE and _rate(t) is not None]
    if not done and not lost:
        return _say_empty(figure, "No trial is complete yet.")
    losses = [loss for _, loss in done] or [1.0]
    margin = 0.08 * ((max(losses) - min(losses)) or abs(max(losses)) or 1.0)
    is_lower = _objective(trials).direction == Direction.MINIMIZE
    top = max(losses) + margin if is_lower else min(losses) - margin
    _add_rates(figure, "best", done[:1], color=ACCENT, symbol="circle")
    _add_rates(figure, "complete", done[1:], color=QUIET, symbol="circle")
    _add_rates(figure, "infeasible", [(trial, top) for trial in lost], color=WARNING, symbol="x")
    rates = [rate for trial, _ in [*done, *((t, top) for t in lost)] if (rate := _rate(trial)) is not None]
    ticks = _rate_ticks(rates)
    margins = [math.log10(min(rates)) - 0.15, math.log10(max(rates)) + 0.15]
    figure.update_xaxes(
        type="log", range=margins, tickvals=ticks, ticktext=[format.number(tick) for tick in ticks]
    )
    return figure


def _add_rates(
    figure: go.Figure, name: str, points: Sequence[tuple[Trial, float]], *, color: str, symbol: str
) -> None:
    if not points:
        return
    figure.add_scatter(
        x=[_rate(trial) for trial, _ in points],
        y=[loss for _, loss in points],
        name=name,
        mode="markers" if symbol == "x" else "markers+text",
        text=[str(trial.number) for trial, _ in points],
        textposition="top center",
        marker={"size": 11, "color": color, "symbol": symbol},
        cliponaxis=False,
        customdata=[_safe(trial.reason or _best_in_words(trial, value)) for trial, value in points],
        hovertemplate="trial %{text}<br>learning rate %{x:.3g}<br>%{customdata}<extra></extra>",
    )


def _rate_ticks(rates: Sequence[float]) -> list[float]:
    """Return round tick values around the rates: powers of ten, and more between them if there are few."""
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)))
    factors = (1,) if high - low > 2 else (1, 2, 5) if high - low > 1 else (1, 2, 3, 5, 7)
    return [factor * 10.0**power for power in range(low, high + 1) for factor in factors]


def _rate(trial: Trial) -> float | None:
    rate = trial.hyperparameters.get("learning_rate")
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    return float(rate) if is_number and float(rate) > 0 else None  # type: ignore[arg-type]


def _objective(trials: Sequence[Trial]) -> Objective:
    """Return what chose the best steps."""
    return next((e.objective for t in trials for e in t.evaluations[:1] if e.objective), LOSS)


def _best_in_words(trial: Trial, value: float) -> str:
    return f"best {_objective([trial]).noun} {format.loss(value)}"


def _name(trials: Sequence[Trial], loss: str) -> str:
    objective = _objective(trials)
    return loss if objective == LOSS else _safe(objective.metric)


def _settled(trial: Trial, best: Evaluation) -> int:
    step = settled_step(trial.evaluations)
    return best.step if step is None else step


def _add_curve(figure: go.Figure, trial: Trial, *, is_leader: bool) -> None:
    points = [(e.step, e.value) for e in trial.evaluations if math.isfinite(e.value)]
    best = best_evaluation(trial.evaluations)
    assert best is not None
    lost = trial.state is TrialState.INFEASIBLE
    color = ACCENT if is_leader else WARNING if lost else QUIET
    name = f"trial {trial.number}"
    about = [format.settings(trial.hyperparameters, ("learning_rate", "lora_r")), trial.reason or ""]
    figure.add_scatter(
        x=[step for step, _ in points],
        y=[loss for _, loss in points],
        mode="lines",
        name=name,
        line={"color": color, "width": 3 if is_leader else 1.5, "dash": "dot" if lost else "solid"},
        opacity=1 if is_leader else 0.7,
        showlegend=False,
        hovertemplate=f"{name}<br>step %{{x}}: %{{y:.4f}}<br>{_safe(' '.join(about))}<extra></extra>",
    )
    if not lost:
        figure.add_scatter(
            x=[best.step],
            y=[best.value],
            mode="markers",
            cliponaxis=False,
            name=name,
            showlegend=False,
            marker={"symbol": "star", "size": 14 if is_leader else 9, "color": color},
            hovertemplate=f"{name}, best<br>step %{{x}}: %{{y:.4f}}<extra></extra>",
        )


def _loss_range(trials: Sequence[Trial]) -> list[float]:
    """Return the range from below the best loss to above the base model's, or the largest if not measured."""
    losses = [e.value for t in trials for e in t.evaluations if math.isfinite(e.value)]
    if _objective(trials).direction == Direction.MAXIMIZE:
        low, high = min(losses), max(losses)
        margin = 0.06 * (high - low) or 0.01 * abs(high) or 0.1
        return [low - margin, high + margin]
    untouched = [t.evaluations[0].value for t in trials if t.evaluations[0].step == 0]
    finite = [loss for loss in untouched if math.isfinite(loss)]
    low, high = min(losses), max(finite) if finite else max(losses)
    margin = 0.06 * (high - low) or 0.01 * abs(high) or 0.1
    return [low - margin, high + margin]


def _mark_zones(figure: go.Figure, max_train_steps: int) -> None:
    early, late = EARLY_SHARE * max_train_steps, LATE_SHARE * max_train_steps
    for start, end, text in ((0, early, "first 10%"), (late, max_train_steps, "last 25%")):
        figure.add_vrect(x0=start, x1=end, fillcolor=WARNING, opacity=0.12, line_width=0, layer="below")
        figure.add_annotation(
            x=(start + end) / 2,
            y=1,
            yref="paper",
            yanchor="bottom",
            text=text,
            showarrow=False,
            font={"size": 11, "color": WARNING},
        )
    figure.add_vline(x=max_train_steps, line={"color": QUIET, "dash": "dash", "width": 1})


def _figure(x_title: str, y_title: str, *, height: int, has_legend: bool = True) -> go.Figure:
    import plotly.graph_objects as go  # slow import (half a second)

    grid = {"gridcolor": "rgba(128,128,128,0.18)", "zeroline": False, "automargin": True}
    return go.Figure(
        layout={
            "height": height,
            "margin": {"l": 10, "r": 10, "t": 12, "b": 70 if has_legend else 40},
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": QUIET},
            "xaxis": {"title": {"text": x_title}, **grid},
            "yaxis": {"title": {"text": y_title}, **grid},
            "legend": {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
            "hovermode": "closest",
        }
    )


def _say_empty(figure: go.Figure, text: str) -> go.Figure:
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", text=text, showarrow=False)
    return figure


def _safe(text: str) -> str:
    """Escape text for a hover label, in which plotly reads some HTML tags and its own %{} fields."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")
