"""Plots of the search space: results by each hyperparameter, their importance, all of them side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import unescape
from typing import TYPE_CHECKING, TypeAlias

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

_Point: TypeAlias = tuple[Trial, float]
_MARGIN, _MARGIN_OF_NUMBERS = 0.06, 0.14
"""Room above and below the points, as a share of their height; on the better side for numbers below them."""


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The trials whose numbers are shown, and on which side of their points."""

    shown: set[int]
    where: str


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
    named = done[:NUM_HIGHLIGHTED] if many else done
    at_edge = [(trial, edge) for trial in lost]
    labelled = _labelled(named, [*done[len(named) :], *at_edge], axis, is_lower=is_lower)
    where = "middle right" if axis.choices else "bottom center" if is_lower else "top center"
    numbers = _Numbers(labelled, where)
    if many:
        _add(figure, axis, "other trials", done[NUM_HIGHLIGHTED:], QUIET, size=6, opacity=0.5)
        _add(figure, axis, "best ten", done[1:NUM_HIGHLIGHTED], ACCENT, numbers=numbers, size=9)
    else:
        _add(figure, axis, "complete", done[1:], QUIET, numbers=numbers)
    _add(figure, axis, "best", done[:1], ACCENT, numbers=numbers, size=14 if many else 11)
    _add(figure, axis, "infeasible", at_edge, WARNING, symbol="x")
    _scale(figure, axis, [x for t, _ in [*done, *at_edge] if (x := axis.x(t.hyperparameters))])
    figure.update_yaxes(range=_with_margins([*losses, edge], is_lower=is_lower))
    return figure


def _with_margins(values: Sequence[float], *, is_lower: bool) -> list[float]:
    below, above = (_MARGIN_OF_NUMBERS, _MARGIN) if is_lower else (_MARGIN, _MARGIN_OF_NUMBERS)
    span = max(values) - min(values)
    return [min(values) - below * span, max(values) + above * span]


def learning_rate_figure(trials: Sequence[Trial]) -> go.Figure:
    """Plot the best value by learning rate."""
    return hyperparameter_figure(trials, "learning_rate", Range(1e-6, 1.0, log=True))


_SMALLEST = (290, 220)
"""Width and height in pixels of the smallest plot, on a telephone."""
_NUMBER_SIZE = (26, 14)
"""Of a trial's number, in pixels."""
_POINT_RADIUS = 4


def _labelled(points: Sequence[_Point], others: Sequence[_Point], axis: _Axis, *, is_lower: bool) -> set[int]:
    """Return which trials have numbers that lie over no point and no number of a better trial."""
    spots = _in_pixels([*points, *others], axis)
    aside = (_NUMBER_SIZE[0] / 2 + 8, 0) if axis.choices else (0, -17 if is_lower else 17)
    room = [(size / 2 + _POINT_RADIUS) for size in _NUMBER_SIZE]
    placed: list[tuple[float, float]] = []
    shown: set[int] = set()
    for (trial, _), (x, y) in zip(points, spots, strict=False):
        at = (x + aside[0], y + aside[1])
        if _is_free(at, spots, room) and _is_free(at, placed, _NUMBER_SIZE):
            placed.append(at)
            shown.add(trial.number)
    return shown


def _is_free(at: tuple[float, float], others: Sequence[tuple[float, float]], apart: Sequence[float]) -> bool:
    return all(abs(at[0] - x) >= apart[0] or abs(at[1] - y) >= apart[1] for x, y in others)


def _in_pixels(points: Sequence[_Point], axis: _Axis) -> list[tuple[float, float]]:
    """Return where points are in the smallest plot, upwards and to the right of its corner."""
    xs = [axis.at(x) for trial, _ in points if (x := axis.x(trial.hyperparameters)) is not None]
    ys = [value for _, value in points]
    if not points:
        return []
    width = max(xs) - min(xs) + (1.2 if axis.choices else 0.3 if axis.is_log else 0.0)
    height = max(ys) - min(ys)
    across = _SMALLEST[0] / (1.12 * width or 1.0)
    up = _SMALLEST[1] / ((1 + _MARGIN_OF_NUMBERS + _MARGIN) * height or 1.0)
    return [((x - min(xs)) * across, (y - min(ys)) * up) for x, y in zip(xs, ys, strict=True)]


def _add(
    figure: go.Figure,
    axis: _Axis,
    name: str,
    points: Sequence[_Point],
    color: str,
    *,
    numbers: _Numbers | None = None,
    symbol: str = "circle",
    size: int = 11,
    opacity: float = 1.0,
) -> None:
    if not points:
        return
    shown = set() if numbers is None else numbers.shown
    figure.add_scatter(
        x=[axis.x(trial.hyperparameters) for trial, _ in points],
        y=[value for _, value in points],
        name=name,
        mode="markers+text" if shown else "markers",
        text=[str(trial.number) if trial.number in shown else "" for trial, _ in points],
        textposition=None if numbers is None else numbers.where,
        marker={"size": size, "color": color, "symbol": symbol, "opacity": opacity},
        cliponaxis=False,
        customdata=[
            [str(trial.number), safe(trial.reason or _best_in_words(trial, value))] for trial, value in points
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


SHORT_NAME = 8
"""Characters of a hyperparameter's name that stays on one line."""


def _on_lines(name: str) -> str:
    return name if len(name) <= SHORT_NAME else name.replace("_", "_<br>")


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
        showgrid=False,
        tickangle=0,
    )
    for place in range(len(names)):
        figure.add_shape(
            x0=place, x1=place, y0=0, y1=1, layer="below", line={"color": "rgba(128,128,128,0.5)", "width": 1}
        )
    figure.update_yaxes(visible=False, range=[-0.12, 1.12])
    for place, (bottom, top) in enumerate(ends):
        for y, text, anchor, shift in ((0.0, bottom, "top", -3), (1.0, top, "bottom", 3)):
            figure.add_annotation(
                x=place,
                y=y,
                yshift=shift,
                text=_short(text),
                showarrow=False,
                yanchor=anchor,
                font={"size": 11},
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
