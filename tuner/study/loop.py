"""The loop of a round: ask, assign, record, tell.

The order is always: file, then fact, then tell. The loop keeps no state that is not in the facts, so running
it again resumes after any interruption.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

from tuner.engines import Worker
from tuner.errors import Interrupted, RoundStopped, WorkerError
from tuner.playbook.pruning import reason_to_prune
from tuner.playbook.schedule import evaluation_steps
from tuner.process_log import about
from tuner.records import (
    Answered,
    Assignment,
    AttemptFact,
    AttemptStarted,
    Checkpoint,
    CheckpointKind,
    CheckpointsRemoved,
    Continuation,
    Died,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    Hyperparameters,
    Measured,
    NodeChanged,
    Outcome,
    Preparing,
    Progressed,
    Ready,
    Remarked,
    Saved,
    Started,
    Trial,
    TrialAsked,
    TrialEnded,
    TrialNoted,
    TrialState,
    complete_hyperparameters,
)
from tuner.report import View
from tuner.store import Store
from tuner.study.branches import ComparisonRuns
from tuner.study.continuation import Continuations
from tuner.study.disk import not_retained, num_carried_over, promised_trials
from tuner.study.lookup import at_rest
from tuner.study.optuna_rows import RowsChanged
from tuner.study.plan import CheckpointFolder, RoundPlan, StartingPoint
from tuner.study.proposals import SamplerStopped
from tuner.study.round_state import MAX_ATTEMPTS, RoundState, has_failed, has_open_attempt, unreplaced
from tuner.study.sampling import Proposal, RoundStudy

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Through(Protocol):
    """Does what needs the database."""

    def __call__(self, act: Callable[[], T]) -> T:
        """Return what `act` does, which must be right to do again."""
        ...


MAX_RENEWALS = 3
"""How often Optuna's rows are made anew for one question, should somebody change them each time."""
MAX_STILLBORN = 3
"""Workers in a row that may die before they are ready."""


@dataclass
class RoundLoop:
    """A running round, with one method for each part of the loop."""

    plan: RoundPlan
    store: Store
    round_study: RoundStudy
    worker: Worker
    folder: CheckpointFolder
    continuations: Continuations
    view: View
    clock: Callable[[], float]
    """Seconds since the epoch."""
    stopping: Callable[[], bool] = lambda: False
    """Whether the user asked to stop."""
    through: Through = lambda act: act()
    """Does what needs the database, and waits while that is away."""
    room_bytes: int = 0
    """Free bytes below which workers pause training."""
    passes: int = 1
    """Of `study auto`: how often longer rounds take up what this one leaves."""

    @cached_property
    def state(self) -> RoundState:
        """The round's trials, updated by what is recorded here."""
        return RoundState(self.store, self.plan.name)

    @cached_property
    def branches(self) -> ComparisonRuns:
        """The round's comparison runs, after its last trial."""
        return ComparisonRuns(self.plan, self.store, self.folder, self.clock, self.view.message)

    def run(self) -> None:
        """Run until every promised trial has ended, and then every comparison run.

        Raises Interrupted when asked to stop, RoundStopped when model, data or metric cannot be used any
        more, WorkerError when the round cannot be completed.
        """
        self._recover()
        stillborn = 0
        while not self._is_over():
            if self.stopping():
                self._close()
                raise Interrupted("stopped; all progress is saved")
            while self.worker.capacity() > 0 and (assignment := self._next_assignment()) is not None:
                # First, so that the view knows what the trial was given when it hears that it starts.
                self.view.trials(self.state.changed())
                self.worker.start(replace(assignment, room_bytes=self.room_bytes))
            for event in self.worker.events(1.0):
                self._record(event)
                stillborn = _count_stillborn(stillborn, event)
            self.view.trials(self.state.changed())
        self._close()
        # An answer that got lost on the way may have left a trial open that no fact knows.
        self._recover_optuna()

    # --- what to run next -------------------------------------------------------------------------

    def _next_assignment(self) -> Assignment | None:
        """Return an interrupted trial, then the remaining trials, then comparison runs; None if none is
        left."""
        if self._have_ended():
            return self.branches.next_assignment()
        waiting = next((trial for trial in self.state.open if trial.state == TrialState.WAITING), None)
        if waiting is None and self.state.num_promised < self.num_trials:
            waiting = self._ask(self.state.trials)
        return self._assign(waiting) if waiting is not None else None

    @property
    def num_trials(self) -> int:
        """Return the number of trials in the round: a grid may have fewer points."""
        return int(min(self.plan.spec.search.trials, self.round_study.num_points))

    def _ask(self, trials: Sequence[Trial]) -> Trial:
        """Ask for a new trial: a repetition of a failed one, or the next proposal."""
        to_replace = unreplaced(trials)
        ordinal = len(trials) - (sum(t.state == TrialState.FAILED for t in trials) - len(to_replace))
        again = to_replace[0].hyperparameters if to_replace else None
        try:
            proposal = self.through_optuna(lambda: self._proposed(ordinal, trials, again))
        except SamplerStopped as error:
            self._close()
            raise RoundStopped(f"{error}. All progress is saved. Fix the sampler") from error
        hyperparameters = complete_hyperparameters(self.plan.space, proposal.chosen)
        continues: Continuation | None
        why_not: str | None
        if to_replace:
            continues, why_not = (
                to_replace[0].continues,
                f"repeats trial {to_replace[0].number}, which failed",
            )
        else:
            continues, why_not = self.continuations.find(ordinal, hyperparameters)
        trial = Trial(
            self.plan.name,
            number=len(trials),
            hyperparameters=hyperparameters,
            continues=continues,
            optuna_trial=proposal.optuna_trial,
        )
        note = [] if why_not is None else [TrialNoted(trial.round, trial.number, why_not)]
        self.state.record(TrialAsked(trial), *note)
        if why_not is not None:
            self.view.message(f"trial {trial.number}  {why_not}")
        return trial

    def _proposed(self, ordinal: int, trials: Sequence[Trial], again: Hyperparameters | None) -> Proposal:
        proposal = self.round_study.propose(ordinal, trials, again=again)
        if proposal.optuna_trial in {trial.optuna_trial for trial in trials}:
            raise RowsChanged(f"Optuna's trial {proposal.optuna_trial} was deleted")
        return proposal

    def _assign(self, trial: Trial) -> Assignment:
        """Assign the trial's next attempt, from its newest valid checkpoint."""
        self.folder.clean_up(trial)
        start = self.folder.newest(trial) or self._start_of_another(trial)
        attempt = max((a.number for a in trial.attempts), default=0) + 1
        from_step = start.step if start else 0
        self._note_a_damaged_checkpoint(trial, from_step)
        self.state.record(AttemptStarted(trial.round, trial.number, attempt, from_step, self.clock()))
        return Assignment(
            round=trial.round,
            trial=trial.number,
            attempt=attempt,
            hyperparameters=trial.hyperparameters,
            max_train_steps=self.plan.spec.max_train_steps,
            evaluate_every=self.plan.spec.evaluation.every_steps,
            directory=str(self.folder.trial_directory(trial.number)),
            resume_from=str(start.path) if start else None,
            resume_sha256=start.sha256 if start else None,
            trunk_steps=self.plan.trunk_steps(trial.hyperparameters),
        )

    def _note_a_damaged_checkpoint(self, trial: Trial, from_step: int) -> None:
        """Record, and say, that an attempt starts from an older step since its checkpoint cannot be used."""
        last = trial.attempts[-1] if trial.attempts else None
        if last is None or last.outcome != "failed" or not from_step < last.from_step:
            return
        if trial.continues is not None and last.from_step == trial.continues.step:
            return  # noted where it is looked for
        note = f"resumed from step {from_step} instead of {last.from_step}: {last.message or 'it failed'}"
        self.state.record(TrialNoted(trial.round, trial.number, note))
        self.view.message(f"trial {trial.number}  {note}")

    def _start_of_another(self, trial: Trial) -> StartingPoint | None:
        """The checkpoint that the trial continues; None, and noted why, where it is gone or cannot be read.

        From step 0 it is the same run.
        """
        if trial.continues is None:
            return None
        start, why = self.continuations.checkpoint(trial), "its checkpoint is missing"
        for attempt in trial.attempts:
            if attempt.outcome == "failed" and attempt.from_step == trial.continues.step:
                start, why = None, attempt.message or "it failed"
        if start is None:
            note = f"started over instead of continuing {trial.continues}: {why}"
            self.state.record(TrialNoted(trial.round, trial.number, note))
            self.view.message(f"trial {trial.number}  {note}")
        return start

    # --- what has happened ------------------------------------------------------------------------

    def _record(self, event: Event) -> None:
        """Turn a worker's event into facts, then act on them."""
        with about(event.trial) if isinstance(event, AttemptFact) else nullcontext():
            if (line := _logged(event)) is not None:
                _log.info("%s", line)
            self._act_on(event)

    def _act_on(self, event: Event) -> None:
        match event:
            case Started() | Progressed() | Evaluated() | Saved() | Ended() if event.horizon is not None:
                self.branches.record(event)
                return
            case Preparing() | Ready():
                pass
            case Remarked(text=text):
                self.view.message(text)
            case Evaluated(evaluation=Evaluation(step=step)) | Saved(checkpoint=Checkpoint(step=step)) if (
                self.state.trial(event.trial).state == TrialState.PRUNED
            ):
                # Said before the worker heard that it is to stop: how much, depends on who is faster.
                self.state.record(Progressed(event.round, event.trial, event.attempt, step))
                return
            case Started(environment=environment):
                self._warn_of_another_metric(environment)
                if environment:
                    self.state.record(event)
            case Progressed() | Answered():
                self.state.record(event)
            case Measured() | NodeChanged():
                self.state.record(replace(event, round=self.plan.name))
            case Evaluated():
                self._record_evaluation(event)
            case Saved():
                self._record_checkpoint(event)
            case Ended():
                event = self._as_decided(event)
                self._record_end(event)
            case Died():
                self._record_death(event)
        self.view.event(event)

    def _record_evaluation(self, event: Evaluated) -> None:
        self.state.record(event)
        self.through_optuna(
            lambda: self.round_study.report(
                self.state.trial(event.trial), event.evaluation, self._planned_steps()
            )
        )
        if self._prune(self.state.trial(event.trial)):
            self.worker.stop(event.run)

    def _record_checkpoint(self, event: Saved) -> None:
        before = self.state.trial(event.trial).checkpoints
        self.state.record(event)
        if event.checkpoint.kind == CheckpointKind.BEST:
            self.folder.switch_best(self.state.trial(event.trial))
        self._remove_superseded(self.state.trial(event.trial), before)

    def _record_death(self, event: Died) -> None:
        for number in event.trials:
            if has_open_attempt(self.state.trial(number)):
                self._end_attempt(self.state.trial(number), "died", event.reason)
        self.branches.died(event.runs, event.reason)
        if event.is_input_error:
            raise RoundStopped(event.reason)

    def _warn_of_another_metric(self, environment: Mapping[str, str]) -> None:
        """Warn once that the function that scores answers was edited since earlier trials were scored."""
        answers, now = self.plan.spec.evaluation.answers, environment.get("metric")
        if answers is None or now is None:
            return
        before = {a.environment.get("metric") for trial in self.state.trials for a in trial.attempts} - {None}
        if before and now not in before:
            self.view.message(
                f"warning: evaluation.answers.metric: the file of {answers.metric} has changed since "
                f"trials of {self.plan.name} were scored: scores before and after the change may not be "
                "comparable"
            )

    def _prune(self, trial: Trial) -> bool:
        """End a trial that is clearly behind, and return whether it was. Its attempt ends with the worker's
        event."""
        if trial.state.is_final:
            return False
        spec = self.plan.spec
        reason = reason_to_prune(
            trial,
            self.state.trials,
            pruner=spec.run.pruner,
            max_train_steps=spec.max_train_steps,
            evaluate_every=spec.evaluation.every_steps,
        )
        if reason is None:
            return False
        self.state.record(
            TrialEnded(
                trial.round, trial.number, TrialState.PRUNED, f"{spec.run.pruner}: {reason}", self.clock()
            )
        )
        return True

    def _as_decided(self, event: Ended) -> Ended:
        """Return the event with the state pruned if the trial was stopped by the pruner."""
        trial = self.state.trial(event.trial)
        if trial.state != TrialState.PRUNED:
            return event
        return replace(event, outcome="pruned", reason=trial.reason)

    def _record_end(self, event: Ended) -> None:
        trial = self.state.trial(event.trial)
        if trial.state == TrialState.PRUNED:
            self._end_attempt(trial, "pruned", None, step=event.step)
            return
        match event.outcome:
            case "complete" | "infeasible" | "pruned":
                now = self.clock()
                self.state.record(
                    replace(event, reason=None, at=now),
                    TrialEnded(trial.round, trial.number, TrialState(event.outcome), event.reason, now),
                )
                self._tell(trial.number)
                self._clean_up(trial.number)
                self._remove_not_retained()
            case "stopped":
                self._end_attempt(trial, "stopped", None, step=event.step)
            case "failed":
                # Its checkpoint cannot be used: the next attempt uses an older one, or starts over.
                unusable = tuple(c.path for c in self.folder.resumable(trial)[:1])
                self.state.record(CheckpointsRemoved(trial.round, trial.number, unusable))
                self._end_attempt(trial, "failed", event.reason)

    def _end_attempt(
        self, trial: Trial, outcome: Outcome, message: str | None, *, step: int | None = None
    ) -> None:
        """End a trial's open attempt; fail the trial when too many in a row came to nothing.

        A pruned trial has ended already: Optuna is told when nothing runs any more.
        """
        attempt = trial.attempts[-1]
        to_step = max(attempt.to_step, step or 0)
        self.state.record(
            Ended(trial.round, trial.number, attempt.number, to_step, outcome, message, self.clock())
        )
        trial = self.state.trial(trial.number)
        if trial.state == TrialState.PRUNED:
            self._tell(trial.number)
            self._clean_up(trial.number)
            return
        if not has_failed(trial):
            return
        self.state.record(
            TrialEnded(trial.round, trial.number, TrialState.FAILED, message or outcome, self.clock())
        )
        self._tell(trial.number)
        same = [t for t in self.state.trials if t.hyperparameters == trial.hyperparameters]
        if sum(t.state == TrialState.FAILED for t in same) > 1:
            self._close()
            raise WorkerError(
                f"{self.plan.name}: trial {trial.number} and its repetition failed {MAX_ATTEMPTS} times "
                f"each, so the round cannot be completed. The last time: {message or outcome}"
            )

    def _tell(self, number: int) -> None:
        steps = self.plan.spec.max_train_steps
        self.through_optuna(lambda: self.round_study.tell(self.state.trial(number), max_train_steps=steps))

    def through_optuna(self, act: Callable[[], T]) -> T:
        """Ask, tell or write to Optuna; where rows were changed, make them anew from the facts first."""
        return self.through(lambda: self._renewing_rows(act))

    def _renewing_rows(self, act: Callable[[], T]) -> T:
        for _ in range(MAX_RENEWALS):
            try:
                return act()
            except RowsChanged as changed:
                aside = self.round_study.made_anew(self.state.trials, at=self.clock())
                kept = f"set aside as {aside!r}" if aside else "missing"
                self.view.message(
                    f"warning: somebody else changed Optuna's rows of {self.plan.name}: {changed}. Its "
                    f"Optuna study was {kept}, and is made anew from tuner's facts"
                )
        return act()

    def _clean_up(self, number: int) -> None:
        """Delete what an ended trial does not need: all but its last checkpoint, and files without a fact."""
        self._remove_superseded(self.state.trial(number), ())
        self.folder.clean_up(self.state.trial(number))

    def _remove_superseded(self, trial: Trial, before: Sequence[Checkpoint]) -> None:
        """Delete checkpoints that a recorded successor replaces."""
        surplus = self.folder.surplus(trial, keep_best=self.plan.spec.checkpoints.keep_best)
        kept = {checkpoint.path for checkpoint in trial.checkpoints}
        self.folder.delete([c.path for c in (*surplus, *before) if c in surplus or c.path not in kept])
        if surplus:
            self.state.record(CheckpointsRemoved(trial.round, trial.number, tuple(c.path for c in surplus)))

    def _remove_not_retained(self) -> None:
        """Give up what `checkpoints.keep_best_trials` does not keep: fact, then file.

        Whoever finds the fact alone tidies the directory up; a file half deleted is in no fact.
        """
        name = self.plan.name
        limit, record = self.plan.spec.checkpoints.most_kept_trials, self.store.round(name)
        if limit is None or record is None or record.is_sweep:
            return
        promotions = self.store.promotions()
        given_up = not_retained(
            self.state.trials,
            keep_best_trials=limit,
            carried=num_carried_over(self.num_trials, passes=self.passes, promotions=promotions),
            promised=promised_trials(promotions, name),
        )
        for unneeded in given_up:
            self.state.record(CheckpointsRemoved(name, unneeded.trial.number, unneeded.paths))
            self.folder.clean_up(self.state.trial(unneeded.trial.number))

    # --- beginning and ending ---------------------------------------------------------------------

    def _recover(self) -> None:
        """Recover from what an earlier process left open, before asking for trials."""
        for trial in self.state.trials:
            if has_open_attempt(trial):
                self._end_attempt(trial, "interrupted", None)
            # It died between the evaluation and the decision that follows from it.
            self._prune(self.state.trial(trial.number))
        self._recover_optuna()
        for trial in self.state.trials:
            if trial.state.is_final:
                self._clean_up(trial.number)
        self._remove_not_retained()
        self.branches.recover()

    def _recover_optuna(self) -> None:
        steps = self.plan.spec.max_train_steps
        self.through_optuna(lambda: self.round_study.recover(self.state.trials, max_train_steps=steps))

    def _close(self) -> None:
        """Let the worker save its trials, and record its events."""
        self.worker.close()
        for event in self.worker.events(0.0):
            self._record(event)
        self.view.trials(self.state.changed())
        # One that the worker had not begun to train has no end, and would be shown as running.
        self.view.trials([at_rest(trial, is_running=False) for trial in self.state.open])

    def _is_over(self) -> bool:
        return self._have_ended() and not self.branches.left()

    def _have_ended(self) -> bool:
        return not self.state.open and self.state.num_promised >= self.num_trials

    def _planned_steps(self) -> tuple[int, ...]:
        spec = self.plan.spec
        return evaluation_steps(spec.max_train_steps, spec.evaluation.every_steps)


def _logged(event: Event) -> str | None:
    """Return what the log says of an event; None for signs of life."""
    match event:
        case Ready():
            return f"a worker is ready: {event.device}, {event.slots} slots"
        case Started():
            return f"attempt {event.attempt} starts at step {event.step}"
        case Evaluated(evaluation=evaluation):
            return f"step {evaluation.step}: eval loss {evaluation.eval_loss!r}"
        case Saved(checkpoint=checkpoint):
            return f"step {checkpoint.step}: {checkpoint.kind} is at {checkpoint.path}"
        case Ended():
            return (
                f"attempt {event.attempt}: {event.outcome} at step {event.step} {event.reason or ''}".rstrip()
            )
        case Died(reason=text) | Remarked(text=text):
            return text
        case _:
            return None


def _count_stillborn(so_far: int, event: Event) -> int:
    """Deaths in a row without a sign of life between. Raises WorkerError at `MAX_STILLBORN`."""
    if not isinstance(event, Died):
        return 0
    if so_far + 1 >= MAX_STILLBORN:
        raise WorkerError(f"{MAX_STILLBORN} workers in a row ended before they could start. {event.reason}")
    return so_far + 1
