"""Plots of the search space: results by each hyperparameter, their importance, all of them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from typing import TYPE_CHECKING

from tuner.playbook.selection import ranked
from tuner.records import Choices, Dimension, Direction, Hyperparameters, Range, Trial, TrialState, Value
from tuner.report import format
from tuner.report.plots import (
    ACCENT,
    MANY_TRIALS,
    NUM_HIGHLIGHTED,
    QUIET,
    WARNING,
    empty_figure,
    figure_of,
    name_of,
    objective_of,
    safe,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True)
class _Axis:
    """Where the values of one hyperparameter lie: on a scale of numbers, or as choices side by side."""

    name: str
    is_log: bool = False
    choices: tuple[str, ...] = ()
    """Choices as text that plotly takes as it is, in order; empty for a scale."""

    def x(self, hyperparameters: Hyperparameters) -> float | str | None:
        """Return what plotly calls the place of a value; None if it has none."""
        value = hyperparameters.get(self.name)
        if self.choices:
            return None if value is None else safe(format.value(value))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return None if self.is_log and value <= 0 else float(value)
        return None

    def at(self, x: float | str) -> float:
        """Return a place as a number, evenly spaced on the plot."""
        if isinstance(x, str):
            return float(self.choices.index(x))
        return math.log10(x) if self.is_log else x


def _axis(name: str, dimension: Dimension | None, trials: Sequence[Trial]) -> _Axis:
    seen = [trial.hyperparameters.get(name) for trial in trials]
    match dimension:
        case Range(log=log):
            return _Axis(name, is_log=log)
        case Choices(values=values):
            return _Axis(name, choices=_texts([*values, *sorted_values(seen)]))
        case _ if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in seen if v is not None):
            return _Axis(name)
        case _:
            return _Axis(name, choices=_texts(sorted_values(seen)))


def sorted_values(values: Sequence[Value | None]) -> list[Value]:
    """Return the values in a stable order: numbers by size, others by their text."""
    known = [value for value in values if value is not None]
    return sorted(known, key=lambda v: (0, float(v), "") if isinstance(v, (int, float)) else (1, 0.0, str(v)))


def _texts(values: Sequence[Value]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(safe(format.value(value)) for value in values))


# --- one hyperparameter ---------------------------------------------------------------------------


def hyperparameter_figure(
    trials: Sequence[Trial], name: str, dimension: Dimension | None = None
) -> go.Figure:
    """Plot the best value by one hyperparameter, on the scale that it is searched on.

    Infeasible trials have no value and are at the worse end. Of many trials, the best ten stand out.
    """
    axis = _axis(name, dimension, trials)
    figure = figure_of(name, f"best {name_of(trials, 'evaluation loss')}", height=340)
    done = [
        (trial, best.value) for trial, best in ranked(trials) if axis.x(trial.hyperparameters) is not None
    ]
    lost = [
        trial
        for trial in trials
        if trial.state is TrialState.INFEASIBLE and axis.x(trial.hyperparameters) is not None
    ]
    if not done and not lost:
        return empty_figure(figure, "No trial is complete yet.")
    losses = [loss for _, loss in done] or [1.0]
    margin = 0.08 * ((max(losses) - min(losses)) or abs(max(losses)) or 1.0)
    is_lower = objective_of(trials).direction == Direction.MINIMIZE
    edge = max(losses) + margin if is_lower else min(losses) - margin
    many = len(done) + len(lost) > MANY_TRIALS
    labelled = _labelled(done, axis, first=NUM_HIGHLIGHTED if many else len(done))
    if many:
        _add(figure, axis, "other trials", done[NUM_HIGHLIGHTED:], QUIET, size=6, opacity=0.5)
        _add(figure, axis, "best ten", done[1:NUM_HIGHLIGHTED], ACCENT, labelled=labelled, size=9)
    else:
        _add(figure, axis, "complete", done[1:], QUIET, labelled=labelled)
    _add(figure, axis, "best", done[:1], ACCENT, labelled=labelled, size=14 if many else 11)
    _add(figure, axis, "infeasible", [(trial, edge) for trial in lost], WARNING, symbol="x")
    _scale(
        figure, axis, [x for t, _ in [*done, *((t, 0.0) for t in lost)] if (x := axis.x(t.hyperparameters))]
    )
    return figure


def learning_rate_figure(trials: Sequence[Trial]) -> go.Figure:
    """Plot the best value by learning rate."""
    return hyperparameter_figure(trials, "learning_rate", Range(1e-6, 1.0, log=True))


def _labelled(points: Sequence[tuple[Trial, float]], axis: _Axis, *, first: int) -> set[int]:
    """Return which of the first trials have numbers that fit; where two would overlap, the better one's."""
    if not points:
        return set()
    xs = [axis.at(x) for trial, _ in points if (x := axis.x(trial.hyperparameters)) is not None]
    ys = [value for _, value in points]
    width, height = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    placed: list[tuple[float, float]] = []
    shown: set[int] = set()
    for (trial, value), x in zip(points[:first], xs, strict=False):
        place = (x / width, value / height)
        if all(abs(place[0] - a) > 0.07 or abs(place[1] - b) > 0.09 for a, b in placed):
            placed.append(place)
            shown.add(trial.number)
    return shown


def _add(
    figure: go.Figure,
    axis: _Axis,
    name: str,
    points: Sequence[tuple[Trial, float]],
    color: str,
    *,
    labelled: set[int] | None = None,
    symbol: str = "circle",
    size: int = 11,
    opacity: float = 1.0,
) -> None:
    if not points:
        return
    numbers = [str(trial.number) for trial, _ in points]
    figure.add_scatter(
        x=[axis.x(trial.hyperparameters) for trial, _ in points],
        y=[value for _, value in points],
        name=name,
        mode="markers+text" if labelled else "markers",
        text=[n if labelled and int(n) in labelled else "" for n in numbers],
        textposition="top center",
        marker={"size": size, "color": color, "symbol": symbol, "opacity": opacity},
        cliponaxis=False,
        customdata=[
            [number, safe(trial.reason or _best_in_words(trial, value))]
            for number, (trial, value) in zip(numbers, points, strict=True)
        ],
        hovertemplate="trial %{customdata[0]}<br>%{x}<br>%{customdata[1]}<extra></extra>",
    )


def _best_in_words(trial: Trial, value: float) -> str:
    return f"best {objective_of([trial]).noun} {format.loss(value)}"


def _scale(figure: go.Figure, axis: _Axis, values: Sequence[float | str]) -> None:
    if axis.choices:
        used = [choice for choice in axis.choices if choice in set(values)]
        figure.update_xaxes(
            type="category",
            categoryorder="array",
            categoryarray=used,
            range=[-0.6, len(used) - 0.4],
            tickvals=used,
            ticktext=[_short(choice) for choice in used],
        )
    elif axis.is_log:
        numbers = [float(value) for value in values]
        ticks = log_ticks(numbers)
        margins = [math.log10(min(numbers)) - 0.15, math.log10(max(numbers)) + 0.15]
        named = [format.number(tick) for tick in ticks]
        figure.update_xaxes(type="log", range=margins, tickvals=ticks, ticktext=named)


def _short(text: str) -> str:
    """Shorten text that is already safe."""
    plain = unescape(text)
    return text if len(plain) <= 14 else safe(f"{plain[:13]}…")


def log_ticks(values: Sequence[float]) -> list[float]:
    """Return round tick values around positive numbers: powers of ten, and more between them if few."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    factors = (1,) if high - low > 2 else (1, 2, 5) if high - low > 1 else (1, 2, 3, 5, 7)
    return [factor * 10.0**power for power in range(low, high + 1) for factor in factors]


# --- all hyperparameters --------------------------------------------------------------------------


def importance_figure(importance: Mapping[str, float]) -> go.Figure:
    """Plot the share of each hyperparameter in the differences between trials, the largest on top."""
    order = sorted(importance.items(), key=lambda item: item[1])
    figure = figure_of("importance", "", height=90 + 30 * len(order), has_legend=False)
    figure.add_bar(
        x=[share for _, share in order],
        y=[name for name, _ in order],
        orientation="h",
        width=0.6,
        text=[format.percent(share) for _, share in order],
        textposition="outside",
        cliponaxis=False,
        marker={"color": ACCENT},
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    figure.update_xaxes(range=[0, 1.15 * max([*importance.values(), 0.01])], tickformat=".0%", nticks=5)
    figure.update_yaxes(showgrid=False)
    return figure


def parallel_figure(
    trials: Sequence[Trial], names: Sequence[str], space: Mapping[str, Dimension]
) -> go.Figure:
    """Plot each complete trial as a line through its hyperparameters and its result; the best ten stand out.

    The best result is at the top. Infeasible trials end at the bottom, dotted.
    """
    figure = figure_of("", "", height=360)
    axes = [_axis(name, space.get(name), trials) for name in names]
    order = ranked(trials)
    if not order or not axes:
        return empty_figure(figure, "No trial is complete yet.")
    values = [best.value for _, best in order]
    low, high = min(values), max(values)
    heights = [_heights(axis, trials) for axis in axes]
    columns = [axis.name for axis in axes]

    def line(trial: Trial, end: float) -> list[float | None]:
        return [*(height.get(trial.number) for height in heights), end]

    def result(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.0
        return 1 - share if objective_of(trials).direction == Direction.MINIMIZE else share

    lost = [line(trial, 0.0) for trial in trials if trial.state is TrialState.INFEASIBLE]
    rest = [line(trial, result(best.value)) for trial, best in order[NUM_HIGHLIGHTED:]]
    _add_lines(figure, "infeasible", lost, color=WARNING, dash="dot", opacity=0.6)
    _add_lines(figure, "other trials", rest, color=QUIET, opacity=0.25 if len(rest) > 50 else 0.5)
    for place, (trial, best) in reversed(list(enumerate(order[:NUM_HIGHLIGHTED]))):
        figure.add_scatter(
            x=list(range(len(columns) + 1)),
            y=line(trial, result(best.value)),
            mode="lines",
            name="best" if place == 0 else "best ten" if len(order) > NUM_HIGHLIGHTED else "complete",
            legendgroup="best" if place == 0 else "good",
            showlegend=place in (0, 1),
            opacity=1 if place == 0 else 0.6,
            line={"color": ACCENT, "width": 3.5 if place == 0 else 1.5},
            hovertemplate=f"trial {trial.number}: {format.loss(best.value)}<br>"
            f"{safe(format.settings(trial.hyperparameters, names))}<extra></extra>",
        )
    _label_axes(figure, axes, trials, name_of(trials, "loss"), low=low, high=high)
    return figure


def _heights(axis: _Axis, trials: Sequence[Trial]) -> dict[int, float]:
    """Return the height of each trial on an axis, 0 to 1."""
    places = {t.number: axis.at(x) for t in trials if (x := axis.x(t.hyperparameters)) is not None}
    low, high = min(places.values(), default=0.0), max(places.values(), default=1.0)
    return {n: (place - low) / (high - low) if high > low else 0.5 for n, place in places.items()}


def _add_lines(
    figure: go.Figure,
    name: str,
    lines: Sequence[Sequence[float | None]],
    *,
    color: str,
    opacity: float,
    dash: str = "solid",
) -> None:
    """Draw many lines as one trace, with gaps between them."""
    if not lines:
        return
    figure.add_scatter(
        x=[x for line in lines for x in [*range(len(line)), None]],
        y=[y for line in lines for y in [*line, None]],
        mode="lines",
        name=name,
        opacity=opacity,
        line={"color": color, "width": 1, "dash": dash},
        hoverinfo="skip",
    )


_SHORT_NAME = 8
"""Characters of a name that stays on one line below an axis."""


def _on_lines(name: str) -> str:
    return name if len(name) <= _SHORT_NAME else name.replace("_", "_<br>")


def _label_axes(
    figure: go.Figure, axes: Sequence[_Axis], trials: Sequence[Trial], result: str, *, low: float, high: float
) -> None:
    best, worst = (low, high) if objective_of(trials).direction == Direction.MINIMIZE else (high, low)
    names = [*(_on_lines(axis.name) for axis in axes), result]
    ends = [*(_ends(axis, trials) for axis in axes), (format.loss(worst), format.loss(best))]
    figure.update_xaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        range=[-0.35, len(names) - 0.65],
        gridcolor="rgba(128,128,128,0.5)",
        tickangle=0,
    )
    figure.update_yaxes(visible=False, range=[-0.12, 1.12])
    for place, (bottom, top) in enumerate(ends):
        for y, text, anchor in ((0.0, bottom, "top"), (1.0, top, "bottom")):
            figure.add_annotation(
                x=place, y=y, text=_short(text), showarrow=False, yanchor=anchor, font={"size": 11}
            )


def _ends(axis: _Axis, trials: Sequence[Trial]) -> tuple[str, str]:
    """Return the text at the bottom and at the top of an axis."""
    seen = [x for trial in trials if (x := axis.x(trial.hyperparameters)) is not None]
    if not seen:
        return "", ""
    low, high = min(seen, key=axis.at), max(seen, key=axis.at)
    if low == high:
        return "", _named(high)
    return _named(low), _named(high)


def _named(x: float | str) -> str:
    return x if isinstance(x, str) else format.number(x)
