"""`study check --probe` of a command: run one trial to its second evaluation, and say what arrived."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tuner.commands.launch import stable_step
from tuner.config import RoundSpec
from tuner.errors import InputError
from tuner.records import (
    Assignment,
    Choices,
    Ended,
    Evaluated,
    Event,
    Hyperparameters,
    Range,
    Saved,
    Value,
    complete_hyperparameters,
    searched,
)

_ENOUGH = 2
"""Evaluations after step 0."""


@dataclass(frozen=True)
class Probed:
    """What a trial of the command showed."""

    seconds_per_step: float
    """Evaluations and checkpoints included."""
    checkpoint_bytes: int | None
    """Of one checkpoint; None if none was reported."""
    remarks: tuple[str, ...]


@dataclass
class _Heard:
    steps: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    metrics: set[str] = field(default_factory=set)
    sizes: list[int] = field(default_factory=list)
    saved: set[int] = field(default_factory=set)
    end: Ended | None = None

    def say(self, event: Event) -> None:
        match event:
            case Evaluated(evaluation=made):
                self.steps.append(made.step)
                self.times.append(time.monotonic())
                self.metrics |= {"eval_loss", *made.metrics}
            case Saved(checkpoint=checkpoint):
                self.sizes.append(checkpoint.size_bytes)
                self.saved.add(checkpoint.step)
            case Ended():
                self.end = event

    def is_enough(self) -> bool:
        after_start = [step for step in self.steps if step]
        return len(after_start) >= _ENOUGH and after_start[0] in self.saved | {after_start[0]}


Run = Callable[[Callable[[Path], Assignment], Callable[[Event], None], Callable[[], bool]], None]
"""Runs the assignment that is made for a folder, and hands on what is said, until it is enough."""


def probed(spec: RoundSpec, run: Run) -> Probed:
    """Run a trial by `run` to its second evaluation. Raises InputError if it does not work."""
    heard = _Heard()
    hyperparameters = complete_hyperparameters(spec.space(), middle(spec))
    end = stable_step(hyperparameters, spec.max_train_steps)

    def assignment(folder: Path) -> Assignment:
        return Assignment(
            round=spec.round,
            trial=0,
            attempt=1,
            hyperparameters=hyperparameters,
            max_train_steps=spec.max_train_steps,
            evaluate_every=spec.evaluation.every_steps,
            directory=str(folder / "trial-0000"),
            trunk_steps=(end,) if end is not None else (),
        )

    started = time.monotonic()
    run(assignment, heard.say, heard.is_enough)
    assert heard.end is not None
    if heard.end.outcome in ("failed", "infeasible"):
        raise InputError(f"command: the probe's trial is {heard.end.outcome}: {heard.end.reason}")
    return Probed(
        _pace(heard, started),
        max(heard.sizes, default=None),
        tuple(_remarks(heard, spec.evaluation.every_steps)),
    )


def _remarks(heard: _Heard, every: int) -> Iterator[str]:
    yield (
        f"the command reported {', '.join(sorted(heard.metrics))} at steps {', '.join(map(str, heard.steps))}"
    )
    if 0 not in heard.steps:
        yield (
            "it reported no evaluation at step 0, so the base model's value is unknown: the first evaluation "
            "stands for it"
        )
    off = [step for step in heard.steps if step % every]
    if off:
        yield f"steps {', '.join(map(str, off))} are not multiples of evaluation.every_steps ({every})"
    if heard.saved:
        yield f"its checkpoints arrive: steps {', '.join(map(str, sorted(heard.saved)))} were kept"
    else:
        yield "it reported no checkpoint, so trials have no adapter, and cannot resume"


def _pace(heard: _Heard, started: float) -> float:
    last = next(at for at, step in enumerate(heard.steps) if step == max(heard.steps))
    first = next((at for at, step in enumerate(heard.steps) if step), last)
    if first == last:
        return (heard.times[last] - started) / max(1, heard.steps[last])
    return (heard.times[last] - heard.times[first]) / max(1, heard.steps[last] - heard.steps[first])


def middle(spec: RoundSpec) -> Hyperparameters:
    """Return a point in the middle of the space, where nothing should diverge."""
    chosen: dict[str, Value] = {}
    for name, dimension in searched(spec.space()).items():
        match dimension:
            case Choices(values=values):
                chosen[name] = values[len(values) // 2]
            case Range(low=low, high=high, log=log, integer=integer):
                middle = (low * high) ** 0.5 if log else (low + high) / 2
                chosen[name] = round(middle) if integer else middle
    return chosen
