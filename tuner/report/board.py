"""What is known of a round while it runs: each trial's step and losses, and how long it will take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tuner.playbook.selection import best_evaluation
from tuner.records import (
    Answered,
    AnswerScore,
    Died,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    Hyperparameters,
    Preparing,
    Progressed,
    Ready,
    Started,
    Trial,
    TrialState,
)


@dataclass
class Row:
    """One trial as the last event left it."""

    number: int
    hyperparameters: Hyperparameters = field(default_factory=dict)
    state: TrialState = TrialState.WAITING
    reason: str | None = None
    step: int = 0
    train_loss: float | None = None
    by_step: dict[int, Evaluation] = field(default_factory=dict)
    answers: AnswerScore | None = None

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """Those made so far, by step."""
        return tuple(self.by_step[step] for step in sorted(self.by_step))

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation so far."""
        return best_evaluation(self.evaluations)


class Board:
    """The trials of one round, kept up by facts and events.

    Events say things first, facts say them for good: `sync` overrules a state that an event
    suggested.
    """

    def __init__(self, *, trials_total: int, max_train_steps: int) -> None:
        self.trials_total = trials_total
        self.max_train_steps = max_train_steps
        self.rows: dict[int, Row] = {}
        self.preparing: str | None = None
        """What a worker does until it is ready."""
        self._executed_steps = 0
        self._started_at: float | None = None

    def sync(self, trials: Sequence[Trial]) -> None:
        """Take over the recorded facts."""
        for trial in trials:
            row = self.rows.setdefault(trial.number, Row(trial.number))
            row.hyperparameters, row.state, row.reason = trial.hyperparameters, trial.state, trial.reason
            row.by_step |= {evaluation.step: evaluation for evaluation in trial.evaluations}
            row.step = max([row.step, *row.by_step])
            row.answers = trial.answer_score

    def take(self, event: Event, *, now: float) -> None:
        """Take over what a worker said at `now`, seconds on any clock."""
        match event:
            case Preparing(doing=doing):
                self.preparing = doing
            case Ready():
                self.preparing = None
            case Started():
                self._started_at = now if self._started_at is None else self._started_at
                row = self._row(event.trial)
                row.state, row.step = TrialState.RUNNING, event.step
            case Progressed():
                row = self._advance(event.trial, event.step)
                row.train_loss = event.train_loss
            case Evaluated():
                row = self._advance(event.trial, event.evaluation.step)
                row.by_step[event.evaluation.step] = event.evaluation
            case Answered():
                self._row(event.trial).answers = event.score
            case Ended():
                row = self._advance(event.trial, event.step)
                row.state, row.reason = _state_after(event), event.reason
            case Died(trials=numbers):
                self.preparing = None
                for row in self.rows.values():
                    if row.state is TrialState.RUNNING and row.number in numbers:
                        row.state = TrialState.WAITING
            case _:
                pass

    def _row(self, number: int) -> Row:
        return self.rows.setdefault(number, Row(number))

    def _advance(self, number: int, step: int) -> Row:
        row = self._row(number)
        self._executed_steps += max(0, step - row.step)
        row.step = max(row.step, step)
        return row

    @property
    def best(self) -> Row | None:
        """The trial with the best answers where they are the objective, else the lowest loss so far.

        Infeasible ones are left out.
        """
        able = [r for r in self.rows.values() if r.state is not TrialState.INFEASIBLE and r.best is not None]
        return min(able, key=_merit, default=None)

    @property
    def num_results(self) -> int:
        """Trials that count towards the promise."""
        return sum(row.state.is_result for row in self.rows.values())

    @property
    def remaining_steps(self) -> int:
        """Steps still to run, if every unfinished trial goes to the horizon."""
        unfinished = [row for row in self.rows.values() if not row.state.is_final]
        to_come = max(0, self.trials_total - self.num_results - len(unfinished))
        begun = sum(max(0, self.max_train_steps - row.step) for row in unfinished)
        return begun + to_come * self.max_train_steps

    @property
    def done_share(self) -> float:
        """Part of the round's steps that need not be run any more, 0 to 1."""
        total = self.trials_total * self.max_train_steps
        return min(1.0, max(0.0, 1 - self.remaining_steps / total)) if total else 1.0

    def steps_per_second(self, now: float) -> float | None:
        """Steps of all trials together since the first one started; None before any."""
        if self._started_at is None or self._executed_steps == 0 or now <= self._started_at:
            return None
        return self._executed_steps / (now - self._started_at)

    def eta_seconds(self, now: float) -> float | None:
        """Seconds until the round is done, at the pace so far; None before there is a pace."""
        pace = self.steps_per_second(now)
        return None if pace is None else self.remaining_steps / pace


def _merit(row: Row) -> tuple[float, float, int]:
    assert row.best is not None
    score = row.answers.mean if row.answers is not None and row.answers.is_objective else -math.inf
    return -score, row.best.eval_loss, row.number


def _state_after(event: Ended) -> TrialState:
    """A stopped or failed attempt leaves its trial waiting, until the facts say that it was the last."""
    match event.outcome:
        case "complete" | "pruned" | "infeasible":
            return TrialState(event.outcome)
        case _:
            return TrialState.WAITING
