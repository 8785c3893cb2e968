"""Plots of a round's curves and best steps, as plotly figures for light and dark pages.

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
MANY_TRIALS = 30
"""Above this number of trials, plots show how they are distributed, and the best ones by name."""
NUM_HIGHLIGHTED = 10
EARLY_SHARE, LATE_SHARE = 0.10, 0.75
"""Best steps before the first share mean that the horizon is too long; after the second, too short."""


def best_steps_figure(trials: Sequence[Trial], *, max_train_steps: int) -> go.Figure:
    """Plot where in the run each complete trial was best and where it settled; the best on top.

    Of many trials, plot how many were best in each part of the run.
    """
    order = ranked(trials)
    if len(order) > MANY_TRIALS:
        return _best_steps_histogram(order, max_train_steps=max_train_steps)
    figure = figure_of("step", "", height=140 + 26 * max(4, len(order)))
    if not order:
        return empty_figure(figure, "No trial is complete yet.")
    _draw_best_steps(figure, order, max_train_steps=max_train_steps)
    _mark_zones(figure, max_train_steps)
    figure.update_layout(margin_t=30)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(range=[-0.02 * max_train_steps, 1.02 * max_train_steps])
    return figure


def _best_steps_histogram(order: Sequence[tuple[Trial, Evaluation]], *, max_train_steps: int) -> go.Figure:
    figure = figure_of("best step", "trials", height=300)
    size = max_train_steps / 20
    good = [best.step for _, best in order[:NUM_HIGHLIGHTED]]
    for name, steps, color in (
        ("best ten", good, ACCENT),
        ("other trials", [best.step for _, best in order[NUM_HIGHLIGHTED:]], QUIET),
    ):
        bins = [min(19, int(step / size)) for step in steps]
        figure.add_bar(
            x=[(place + 0.5) * size for place in range(20)],
            y=[bins.count(place) for place in range(20)],
            width=0.92 * size,
            name=name,
            marker={"color": color},
            customdata=[
                f"steps {math.ceil(place * size)} to {math.floor((place + 1) * size)}" for place in range(20)
            ],
            hovertemplate=f"%{{y}} of the {name}<br>%{{customdata}}<extra></extra>",
        )
    _mark_zones(figure, max_train_steps)
    figure.update_layout(margin_t=30, barmode="stack")
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

    Of many trials, the best ten have lines, and bands show where the others are. The axis of a loss ends a
    little above the base model's loss, so that a divergence does not flatten the rest.
    """
    return _curves(trials, max_train_steps=max_train_steps, from_share=0.0)


def ends_figure(trials: Sequence[Trial], *, max_train_steps: int) -> go.Figure:
    """Plot the second half of the same curves, as high as the better half of the trials needs."""
    return _curves(trials, max_train_steps=max_train_steps, from_share=0.5)


def _curves(trials: Sequence[Trial], *, max_train_steps: int, from_share: float) -> go.Figure:
    drawn = [trial for trial in trials if best_evaluation(trial.evaluations) is not None]
    many = len(drawn) > MANY_TRIALS
    title = name_of(trials, "evaluation loss")
    figure = figure_of("step", title, height=420 if not from_share else 380, has_legend=many)
    order = ranked(trials)
    leader = order[0][0].number if order else None
    if not drawn:
        return empty_figure(figure, "No trial has been evaluated yet.")
    named = drawn
    if many:
        best_ones = {trial.number for trial, _ in order[:NUM_HIGHLIGHTED]}
        named = [trial for trial in drawn if trial.number in best_ones]
        _add_bands(figure, drawn)
    for trial in sorted(named, key=lambda trial: trial.number == leader):
        _add_curve(figure, trial, is_leader=trial.number == leader, color=ACCENT if many else None)
    start = from_share * max_train_steps
    figure.update_xaxes(range=[start - 0.02 * (max_train_steps - start), 1.02 * max_train_steps])
    figure.update_yaxes(range=_end_range(order, start) if from_share and order else _loss_range(drawn))
    return figure


def _add_bands(figure: go.Figure, trials: Sequence[Trial]) -> None:
    """Draw the bands that hold the middle half and the middle 80% of the trials, and their median."""
    by_step: dict[int, list[float]] = {}
    for trial in trials:
        for e in trial.evaluations:
            # A diverged trial stays at the worse end instead of leaving the band.
            by_step.setdefault(e.step, []).append(e.value if math.isfinite(e.value) else math.inf)
    steps = sorted(step for step, values in by_step.items() if len(values) >= len(trials) / 2)
    at = {share: [_quantile(by_step[step], share) for step in steps] for share in (0.1, 0.25, 0.5, 0.75, 0.9)}
    for name, low, high, opacity in (("10% to 90%", 0.1, 0.9, 0.12), ("25% to 75%", 0.25, 0.75, 0.22)):
        figure.add_scatter(
            x=[*steps, *reversed(steps)],
            y=[*at[high], *reversed(at[low])],
            fill="toself",
            fillcolor=f"rgba(138,148,166,{opacity})",
            line={"width": 0},
            hoverinfo="skip",
            name=f"{name} of all trials",
        )
    figure.add_scatter(
        x=steps,
        y=at[0.5],
        mode="lines",
        name="median",
        line={"color": QUIET, "width": 1.5, "dash": "dash"},
        hovertemplate="median<br>step %{x}: %{y:.4f}<extra></extra>",
    )


def _quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which a share of the values lies; the largest finite one at most."""
    finite = [value for value in values if math.isfinite(value)]
    found = sorted(values)[min(len(values) - 1, int(share * len(values)))]
    return found if math.isfinite(found) else max(finite, default=0.0)


def _end_range(order: Sequence[tuple[Trial, Evaluation]], start: float) -> list[float]:
    """Return the range of the better half's values after a step; of many trials, of the best quarter's."""
    parts = 4 if len(order) > MANY_TRIALS else 2
    better = [trial for trial, _ in order[: max(3, len(order) // parts)]]
    values = [e.value for t in better for e in t.evaluations if e.step >= start and math.isfinite(e.value)]
    values = values or [best.value for _, best in order]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.01 * abs(high) or 0.1
    return [low - margin, high + margin]


def objective_of(trials: Sequence[Trial]) -> Objective:
    """Return what chose the best steps."""
    return next((e.objective for t in trials for e in t.evaluations[:1] if e.objective), LOSS)


def name_of(trials: Sequence[Trial], loss: str) -> str:
    """Return what an axis calls the objective's values; `loss` for the loss."""
    objective = objective_of(trials)
    return loss if objective == LOSS else safe(objective.metric)


def _settled(trial: Trial, best: Evaluation) -> int:
    step = settled_step(trial.evaluations)
    return best.step if step is None else step


def _add_curve(figure: go.Figure, trial: Trial, *, is_leader: bool, color: str | None = None) -> None:
    points = [(e.step, e.value) for e in trial.evaluations if math.isfinite(e.value)]
    best = best_evaluation(trial.evaluations)
    assert best is not None
    lost = trial.state is TrialState.INFEASIBLE
    color = color or (ACCENT if is_leader else WARNING if lost else QUIET)
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
        hovertemplate=f"{name}<br>step %{{x}}: %{{y:.4f}}<br>{safe(' '.join(about))}<extra></extra>",
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
    if objective_of(trials).direction == Direction.MAXIMIZE:
        low, high = min(losses), max(losses)
        margin = 0.06 * (high - low) or 0.01 * abs(high) or 0.1
        return [low - margin, high + margin]
    at_start = [t.evaluations[0].value for t in trials if t.evaluations[0].step == 0]
    finite = [loss for loss in at_start if math.isfinite(loss)]
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


def figure_of(x_title: str, y_title: str, *, height: int, has_legend: bool = True) -> go.Figure:
    """Return an empty figure in the look of the page."""
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


def empty_figure(figure: go.Figure, text: str) -> go.Figure:
    """Show a text instead of axes."""
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", text=text, showarrow=False)
    return figure


def safe(text: str) -> str:
    """Escape text for a hover label, in which plotly reads some HTML tags and its own %{} fields."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("%{", "% {")
