"""What replays say together: costs with intervals, regret, a Markdown page and a plot."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from .task import CLOSE, Task

RESAMPLES = 1000
FEWEST = 5
"""Seeds from which on an interval means something."""
AT_RUNS = (1, 3, 10, 30, 100, 300)
"""Full-length runs at which the regret is shown."""
COLOURS = (
    "#d62728", "#ff7f0e", "#8c1a1a", "#1f77b4", "#2ca02c", "#17becf",
    "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#000000",
)  # fmt: skip


class Replay(NamedTuple):
    """One method on one task with one seed."""

    task: str
    method: str
    seed: int
    budget: int
    """Full-length runs."""
    trace: Sequence[Sequence[float]]
    """(intervals spent, best loss) at each improvement."""

    def cost(self, task: Task, closeness: float) -> float:
        """Full-length runs until within `closeness` of the table's best; the budget if never."""
        limit = task.best * (1 + closeness)
        reached = next((spent for spent, loss in self.trace if loss <= limit), None)
        return float(self.budget) if reached is None else max(1.0, reached) / task.full

    def regret(self, task: Task, runs: float) -> float:
        """(best so far - table's best) / (untrained - table's best), after so many full-length runs."""
        found = [loss for spent, loss in self.trace if spent <= runs * task.full]
        best = min(found[-1] if found else task.start, task.start)
        return (best - task.best) / (task.start - task.best)


def costs(
    replays: Sequence[Replay],
    tasks: Sequence[Task],
    method: str,
    closeness: float,
    *,
    beside: str | None = None,
) -> np.ndarray:
    """[tasks, seeds], of the seeds that the method, and the one `beside` it, have on all tasks."""
    seeds = _seeds(replays, tasks, method)
    if beside is not None:
        seeds &= _seeds(replays, tasks, beside)
    by_task = {task.name: task for task in tasks}
    found = {
        (r.task, r.seed): r.cost(by_task[r.task], closeness)
        for r in replays
        if r.method == method and r.task in by_task
    }
    return np.array([[found[task.name, seed] for seed in sorted(seeds)] for task in tasks])


def _seeds(replays: Sequence[Replay], tasks: Sequence[Task], method: str) -> set[int]:
    """Those that the method has on all tasks."""
    found = {(r.task, r.seed) for r in replays if r.method == method}
    return {seed for _, seed in found if all((task.name, seed) in found for task in tasks)}


def typical(table: np.ndarray) -> float:
    """The geometric mean over tasks of the median over seeds."""
    return float(np.exp(np.log(np.median(table, axis=1)).mean()))


def interval(tables: Sequence[np.ndarray], number: Callable[..., float]) -> tuple[float, float]:
    """95% of the bootstrap over seeds, which all the tables share in their order."""
    random = np.random.default_rng(0)
    seeds = min(table.shape[1] for table in tables)
    drawn = [random.integers(seeds, size=seeds) for _ in range(RESAMPLES)]
    found = [number(*(table[:, places] for table in tables)) for places in drawn]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def markdown(
    replays: Sequence[Replay],
    tasks: Sequence[Task],
    *,
    methods: Sequence[str],
    describe: Mapping[str, str],
    reference: str,
    command: str,
    minutes: float | None,
    plot: str,
) -> str:
    """The page: costs first, then tasks, regret and how it was run; no minutes when nothing was run."""
    took = "" if minutes is None else f", {minutes:.0f} minutes"
    run = [name for name in methods if costs(replays, tasks, name, min(CLOSE)).size]
    sizes = " or ".join(map(str, sorted({len(task.values) for task in tasks})))
    lines = [
        "# Replayed learning curves: full-length runs until near the best",
        "",
        f"{len(tasks)} tasks of {sizes} recorded configurations. Geometric mean over tasks of",
        "the median over seeds, with 95% bootstrap intervals over seeds; lower is better. What does not get",
        f"there costs its budget. The last columns are {reference}'s costs over the method's, on the",
        "seeds that both have.",
        "",
        f"| method | seeds | within 1% | within 5% | {reference} / it, 1% | {reference} / it, 5% |",
        "|---|---|---|---|---|---|",
    ]
    for name in run:
        near, nearer = (costs(replays, tasks, name, closeness) for closeness in CLOSE)
        to_near, to_nearer = (_ratio(replays, tasks, reference, name, closeness) for closeness in CLOSE)
        lines.append(
            f"| {name} | {nearer.shape[1]} | {_with_interval(nearer)} | {_with_interval(near)} "
            f"| {to_nearer} | {to_near} |"
        )
    lines += ["", "## Each task: median cost to come within 1% (5%)", ""]
    lines += [f"| method | {' | '.join(task.name for task in tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for name in run:
        near, nearer = (np.median(costs(replays, tasks, name, c), axis=1) for c in CLOSE)
        cells = " | ".join(f"{_short(a)} ({_short(b)})" for a, b in zip(nearer, near, strict=True))
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        "## Normalised regret: mean over tasks of the median over seeds",
        "",
        "(best so far - best of the table) / (untrained - best of the table). A replay stops within 1% of",
        f"the best and keeps its last regret. The plot: [{plot}]({plot}).",
        "",
        f"| method | {' | '.join(f'{runs} runs' for runs in AT_RUNS)} |",
        "|---" * (len(AT_RUNS) + 1) + "|",
    ]
    for name in run:
        found = " | ".join(f"{regret(replays, tasks, name, runs):.3f}" for runs in AT_RUNS)
        lines.append(f"| {name} | {found} |")
    lines += ["", "## The methods", ""]
    lines += [f"- **{name}**: {describe.get(name, '')}" for name in run]
    lines += [
        "",
        f"`{command}`, on {_machine()}{took}.",
        "",
        "The search space of TaskSet is wide (a learning rate of 1e-8 to 10): what screening gains here is",
        "more than it gains in a sane space.",
        "",
    ]
    return "\n".join(lines)


def regret(replays: Sequence[Replay], tasks: Sequence[Task], method: str, runs: float) -> float:
    """Mean over tasks of the median over seeds, after so many full-length runs."""
    by_task = [
        [r.regret(task, runs) for r in replays if r.method == method and r.task == task.name]
        for task in tasks
    ]
    return float(np.mean([np.median(found) for found in by_task if found]))


def svg(replays: Sequence[Replay], tasks: Sequence[Task], *, methods: Sequence[str]) -> str:
    """Regret against full-length runs, both logarithmic, one line a method."""
    width, height, left, bottom, legend = 900, 520, 70, 50, 210
    runs = np.geomspace(0.3, 600, 60)
    floor = 3e-3

    def x(value: float) -> float:
        return left + (width - left - legend) * math.log(value / runs[0]) / math.log(runs[-1] / runs[0])

    def y(value: float) -> float:
        return 20 + (height - bottom - 20) * math.log(max(value, floor)) / math.log(floor)

    def line(x1: float, x2: float, y1: float, y2: float) -> str:
        return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="#ddd"/>'

    def text(x: float, y: float, said: str, more: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(said)}</text>'

    right, foot = width - legend, height - bottom
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(left, height - 12, "full-length runs"),
        text(14, foot, "normalised regret", f'transform="rotate(-90 14 {foot})"'),
    ]
    for tick in (1, 10, 100, 600):
        parts += [
            line(x(tick), x(tick), 20, foot),
            text(x(tick), foot + 16, str(tick), 'text-anchor="middle"'),
        ]
    for level in (1.0, 0.3, 0.1, 0.03, 0.01):
        parts.append(line(left, right, y(level), y(level)))
        parts.append(text(left - 6, y(level) + 4, str(level), 'text-anchor="end"'))
    shown = [name for name in methods if any(r.method == name for r in replays)]
    for place, name in enumerate(shown):
        colour = COLOURS[place % len(COLOURS)]
        points = " ".join(f"{x(r):.1f},{y(regret(replays, tasks, name, r)):.1f}" for r in runs)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = 34 + 18 * place
        parts.append(f'<rect x="{right + 12}" y="{at - 9}" width="14" height="4" fill="{colour}"/>')
        parts.append(text(right + 32, at - 2, name))
    return "\n".join([*parts, "</svg>", ""])


def _with_interval(table: np.ndarray) -> str:
    if table.shape[1] < FEWEST:
        return f"{_short(typical(table))} (too few seeds)"
    low, high = interval([table], typical)
    return f"{_short(typical(table))} ({_short(low)} to {_short(high)})"


def _ratio(replays: Sequence[Replay], tasks: Sequence[Task], method: str, to: str, closeness: float) -> str:
    if method == to:
        return "1"
    both = [
        costs(replays, tasks, method, closeness, beside=to),
        costs(replays, tasks, to, closeness, beside=method),
    ]
    if both[0].shape[1] < FEWEST:
        return "-"
    low, high = interval(both, lambda a, b: typical(a) / typical(b))
    return f"{typical(both[0]) / typical(both[1]):.2f} ({low:.2f} to {high:.2f})"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}"


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
