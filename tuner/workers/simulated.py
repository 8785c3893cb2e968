"""A worker that replays curves on a virtual clock: rehearsals, benchmarks and tests without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tuner.playbook import is_diverged
from tuner.playbook.schedule import evaluation_steps
from tuner.records import (
    Assignment,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    Hyperparameters,
    Ready,
    Started,
)

Curve = Callable[[Hyperparameters, int, int], Evaluation]
"""(hyperparameters, step, horizon) -> the evaluation there."""


@dataclass
class _Run:
    assignment: Assignment
    step: int
    evaluations: list[Evaluation] = field(default_factory=list)


class SimulatedWorker:
    """Trials whose evaluations come from a function; each call of `events` is one evaluation of each.

    `seconds` counts simulated time: steps of all trials at `seconds_per_step`, whoever runs them.
    """

    def __init__(
        self, curve: Curve, *, slots: int, vocabulary_size: int = 32_000, seconds_per_step: float = 1.0
    ) -> None:
        self._curve = curve
        self._slots = slots
        self._vocabulary_size = vocabulary_size
        self._seconds_per_step = seconds_per_step
        self._runs: dict[int, _Run] = {}
        self._said: list[Event] = [Ready(slots, "simulated")]
        self.seconds = 0.0

    def capacity(self) -> int:
        """Slots that are free now."""
        return self._slots - len(self._runs)

    def start(self, assignment: Assignment) -> None:
        """Begin at step 0, or where the checkpoint's name `simulated:STEP` says."""
        step = int(assignment.resume_from.partition(":")[2]) if assignment.resume_from else 0
        run = _Run(assignment, step)
        self._runs[assignment.trial] = run
        self._say(Started(assignment.round, assignment.trial, assignment.attempt, step))
        for earlier in evaluation_steps(assignment.max_train_steps, assignment.evaluate_every):
            if earlier <= step:
                self._evaluate(run, earlier)

    def stop(self, trial: int) -> None:
        """End the trial's attempt where it is."""
        run = self._runs.pop(trial, None)
        if run is not None:
            self._say(self._ended(run, "stopped", None))

    def events(self, timeout_seconds: float) -> list[Event]:
        """What was said, after advancing every trial to its next evaluation. Never waits."""
        if not self._said:
            for run in list(self._runs.values()):
                self._advance(run)
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        """Stop every trial."""
        for trial in list(self._runs):
            self.stop(trial)

    def _advance(self, run: _Run) -> None:
        assignment = run.assignment
        reason = is_diverged(run.evaluations, self._vocabulary_size)
        if reason is not None or run.step >= assignment.max_train_steps:
            self._say(self._ended(run, "infeasible" if reason else "complete", reason))
            del self._runs[assignment.trial]
            return
        steps = evaluation_steps(assignment.max_train_steps, assignment.evaluate_every)
        following = next(step for step in steps if step > run.step)
        self.seconds += (following - run.step) * self._seconds_per_step
        run.step = following
        self._evaluate(run, following)

    def _evaluate(self, run: _Run, step: int) -> None:
        assignment = run.assignment
        evaluation = self._curve(assignment.hyperparameters, step, assignment.max_train_steps)
        run.evaluations.append(evaluation)
        self._say(Evaluated(assignment.round, assignment.trial, assignment.attempt, evaluation))

    def _ended(self, run: _Run, outcome: str, reason: str | None) -> Ended:
        assignment = run.assignment
        return Ended(assignment.round, assignment.trial, assignment.attempt, run.step, outcome, reason)  # type: ignore[arg-type]

    def _say(self, event: Event) -> None:
        self._said.append(event)
