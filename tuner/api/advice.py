"""Tell how long to train from the loss curves of finished runs, made by tuner or not."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import median
from typing import Any

from tuner.errors import InputError
from tuner.methods.registry import BUILT_IN
from tuner.methods.schedules import DECAY_STEPS
from tuner.methods.schedules import schedule as described
from tuner.playbook import Diagnosis, Finding, Reading, RoundResults, read_round
from tuner.records import Evaluation, Fixed, Trial, TrialState, Value

SCHEDULES = BUILT_IN["schedule"]
_DISTINCT = "curve"
"""Placeholder hyperparameter that distinguishes curves without known hyperparameters."""


@dataclass(frozen=True, repr=False)
class Advice:
    """What finished runs say about their horizon: was it right, and how long should the next ones be?"""

    reading: Reading
    """The full analysis of the curves."""
    max_train_steps: int
    """The horizon of the runs."""

    @property
    def diagnosis(self) -> Diagnosis:
        """One of too_long, right, too_short, saturated, overfitting, no_learning, undetermined."""
        return self.reading.diagnosis

    @property
    def suggested_max_train_steps(self) -> int | None:
        """The horizon to train for next; None where the runs suggest none."""
        return self.reading.suggested_max_train_steps

    @property
    def evidence(self) -> tuple[str, ...]:
        """Sentences: the observation, what follows from it, and what to do."""
        return self.reading.evidence

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Further findings, each with its rule, severity, message and numbers."""
        return self.reading.findings

    def gain(self, max_train_steps: int) -> float | None:
        """Return the expected relative drop in loss from this horizon to a longer one.

        0.03 means a loss 3% lower. Returns None if the runs do not show the gain of a doubling.
        The estimate is less certain further ahead: no suggestion exceeds three times the horizon. Raises
        InputError for a shorter horizon.
        """
        horizon = _whole(max_train_steps)
        if horizon is None or horizon < self.max_train_steps:
            raise InputError(
                f"gain({max_train_steps!r}): expects a whole number of steps; the runs have "
                f"{self.max_train_steps} steps; pass a longer horizon"
            )
        doubling = self.reading.doubling
        return None if doubling is None else doubling.to(horizon / self.max_train_steps)

    def __repr__(self) -> str:
        suggested = self.suggested_max_train_steps
        steps = "no suggestion" if suggested is None else f"{suggested} steps next"
        return f"Advice({self.diagnosis}): {self.max_train_steps} steps, {steps}"

    def __str__(self) -> str:
        return "\n".join(self.evidence)


def advise(
    curves: Sequence[Sequence[tuple[int, float]]],
    *,
    max_train_steps: int,
    schedule: str = "constant",
    decay_steps: int = 0,
    warmup_steps: int = 0,
    hyperparameters: Sequence[Mapping[str, Value]] | None = None,
    production_steps: int | None = None,
    worthwhile_gain: float = 0.005,
) -> Advice:
    """Analyse finished runs as `tuner study report` analyses a round, and advise how long to train next.

    All runs must have the same horizon and the same data, and each must have been evaluated at several steps.
    No tuner study is needed. Leave out runs that diverged.

    Args:
        curves: The evaluation losses of each run, as (step, loss) pairs in rising order of steps. If a pair
            at step 0 gives the base model's loss, runs that never beat it do not count.
        max_train_steps: The horizon of all runs, in optimizer updates.
        schedule: `constant`, `linear` (constant, then a linear decay over `decay_steps`), `cosine` or
            `inverse_sqrt`.
        decay_steps: Length of the linear decay at the end, in steps.
        warmup_steps: Length of the warmup, in steps.
        hyperparameters: The hyperparameters that differ between runs, for each run, such as
            `{"learning_rate": 1e-4}`. Runs with equal hyperparameters count once.
        production_steps: The longest affordable run: no suggestion is longer.
        worthwhile_gain: The relative drop in loss that doubling the steps must bring, in [0, 1).

    Raises:
        InputError: for a curve or an argument that cannot be used.
    """
    if schedule not in SCHEDULES:
        from tuner.config.wording import meant_value

        hint = meant_value(schedule, SCHEDULES)
        raise InputError(
            f"schedule={schedule!r}: expects one of {', '.join(SCHEDULES)}{hint and f'; {hint}'}"
        )
    max_train_steps = _steps("max_train_steps", max_train_steps, least=1, hint="pass the steps of the runs")
    within: dict[str, Any] = {"most": max_train_steps, "hint": "pass 0 for runs without one"}
    decay_steps = _steps("decay_steps", decay_steps, **within)
    warmup_steps = _steps("warmup_steps", warmup_steps, **within)
    if production_steps is not None:
        production_steps = _steps("production_steps", production_steps, least=1, hint="None sets no limit")
    if not _is_finite(worthwhile_gain) or not 0 <= worthwhile_gain < 1:
        expected = "a share of the loss from 0 to below 1; pass 0.005 for 0.5%"
        raise InputError(f"worthwhile_gain={worthwhile_gain!r}: expects {expected}")
    own_values = _hyperparameters(hyperparameters, curves)
    common: dict[str, Value] = {
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "decay_steps": decay_steps if DECAY_STEPS in described(schedule).hyperparameters else 0,
    }
    trials = tuple(
        Trial(
            round="runs",
            number=number,
            hyperparameters={**common, **own},
            state=TrialState.COMPLETE,
            evaluations=_evaluations(number, curve, max_train_steps),
        )
        for number, (curve, own) in enumerate(zip(curves, own_values, strict=True))
    )
    results = RoundResults(
        name="runs",
        max_train_steps=max_train_steps,
        evaluate_every=_interval(trials, max_train_steps),
        space={name: Fixed(value) for name, value in trials[0].hyperparameters.items()},
        trials=trials,
        production_steps=production_steps,
        worthwhile_gain=worthwhile_gain,
    )
    return Advice(read_round(results), max_train_steps)


def _steps(name: str, value: Any, *, least: int = 0, most: int | None = None, hint: str) -> int:
    """Return an argument that is a number of steps. Raises InputError for another value."""
    number = _whole(value)
    if number is None or number < least or (most is not None and number > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}, the steps of the runs"
        raise InputError(f"{name}={value!r}: expects a whole number {allowed}; {hint}")
    return number


def _whole(value: Any) -> int | None:
    """Return a whole number, also one of numpy or one that a table has made a float; None for others."""
    return int(value) if _is_finite(value) and int(value) == value else None


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)


def _hyperparameters(
    given: Sequence[Mapping[str, Value]] | None, curves: Sequence[Sequence[tuple[int, float]]]
) -> Sequence[Mapping[str, Value]]:
    """Return those of each curve, different ones if none are given."""
    if not isinstance(curves, Iterable) or len(curves) == 0:
        expected = "a curve of at least one run; pass a list of (step, loss) pairs for each"
        raise InputError(f"curves={curves!r}: expects {expected}")
    if given is None:
        return [{_DISTINCT: number} for number in range(len(curves))]
    if len(given) != len(curves):
        raise InputError(f"hyperparameters: {len(given)} for {len(curves)} curves; pass one for each run")
    for number, own in enumerate(given):
        if not isinstance(own, Mapping) or not all(isinstance(value, Hashable) for value in own.values()):
            raise InputError(
                f"hyperparameters of curve {number}: expects names with numbers or texts, such as "
                f"{{'learning_rate': 1e-4}}; got {own!r}"
            )
    return given


def _evaluations(
    number: int, curve: Sequence[tuple[int, float]], max_train_steps: int
) -> tuple[Evaluation, ...]:
    try:
        points = [(_whole(step), float(loss)) for step, loss in curve]
    except (TypeError, ValueError) as error:
        raise InputError(f"curve {number}: expects (step, loss) pairs: {error}") from error
    steps = [step for step, _ in points if step is not None]
    if len(steps) < len(points):
        given = _brief([step for step, _ in curve])
        raise InputError(f"curve {number}: steps must be whole numbers of updates; got {given}")
    if not points:
        raise InputError(f"curve {number}: empty; leave the run out, or pass its (step, loss) pairs")
    if steps != sorted(set(steps)):
        raise InputError(f"curve {number}: steps must rise; got {_brief(steps)}; sort the pairs by step")
    if steps[0] < 0 or steps[-1] > max_train_steps:
        raise InputError(
            f"curve {number}: steps range from {steps[0]} to {steps[-1]}, but max_train_steps is "
            f"{max_train_steps}; pass the horizon of the runs"
        )
    return tuple(Evaluation(step, loss) for step, (_, loss) in zip(steps, points, strict=True))


def _brief(steps: Sequence[Any]) -> str:
    shown = ", ".join(str(step) for step in steps[:6])
    return shown if len(steps) <= 6 else f"{shown}, ..."


def _interval(trials: Sequence[Trial], max_train_steps: int) -> int:
    """Return the most common number of steps between evaluations."""
    between = [
        later.step - sooner.step
        for trial in trials
        for sooner, later in zip(trial.evaluations, trial.evaluations[1:], strict=False)
    ]
    return max(1, round(median(between))) if between else max_train_steps
