"""Which checkpoint of an earlier round a trial continues from, or why it starts over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.playbook import best_evaluation, can_continue
from tuner.playbook.schedule import evaluation_steps
from tuner.records import (
    LOSS,
    Checkpoint,
    CheckpointKind,
    Continuation,
    Evaluation,
    Hyperparameters,
    Objective,
    RoundRecord,
    Trial,
    TrialState,
)
from tuner.store import Store
from tuner.study.plan import CheckpointFolder, RoundPlan, StartingPoint


@dataclass(frozen=True)
class Continuations:
    """The `continues:` entries of a round's file, looked up in the facts of earlier rounds."""

    plan: RoundPlan
    store: Store
    workload: str
    """Fingerprint of this round's base model, data, evaluation set and length."""
    objective: Objective = LOSS
    """What this round ranks by."""

    def find(self, ordinal: int, hyperparameters: Hyperparameters) -> tuple[Continuation | None, str | None]:
        """Return the checkpoint that proposal `ordinal` continues from, or why it starts over instead."""
        enqueue = self.plan.spec.search.enqueue
        wish = enqueue[ordinal].get("continues") if ordinal < len(enqueue) else None
        if wish is None:
            return None, None
        round_name, _, number = str(wish).partition("/")
        found = self._find(round_name, int(number), hyperparameters)
        if isinstance(found, Continuation):
            return found, None
        return None, f"started over instead of continuing {wish}: {found}"

    def checkpoint(self, trial: Trial) -> StartingPoint | None:
        """Return the checkpoint that a trial's `continues` names; None if it has none or it is missing."""
        if trial.continues is None:
            return None
        return continued_checkpoint(self.store, self._folder(trial.continues.round), trial.continues)

    def _find(self, round_name: str, number: int, hyperparameters: Hyperparameters) -> Continuation | str:
        record = self.store.round(round_name)
        trial = self._trial(round_name, number)
        if record is None or trial is None:
            return f"the study has no trial {round_name}/{number}"
        if trial.state != TrialState.COMPLETE:
            return f"that trial is {trial.state}"
        if record.workload != self.workload:
            if self.plan.spec.command is not None:
                return "the command, its configuration, a script that it names or run.gpus_per_worker changed"
            return (
                "model, data, evaluation set or length changed since then, or this version of tuner reads "
                "some rows differently (see the changelog)"
            )
        own = LOSS if self.objective.per == "trial" else self.objective
        its = next((made.objective for made in trial.evaluations), None) or LOSS
        if its != own:
            return f"its best adapter was chosen by {its.metric}, and this round chooses by {own.metric}"
        reasons = []
        for checkpoint in self._candidates(record, trial):
            reason = self._reason_against(record, trial, checkpoint, hyperparameters)
            if reason is None:
                return Continuation(round_name, number, checkpoint.step)
            reasons.append(reason)
        return reasons[0] if reasons else "it has no resumable checkpoint any more"

    def _candidates(self, record: RoundRecord, trial: Trial) -> list[Checkpoint]:
        """Return the stable checkpoints, and the end of the run if this round ends there, too."""
        same_horizon = record.max_train_steps == self.plan.spec.max_train_steps
        folder = self._folder(record.name)
        return [
            checkpoint
            for checkpoint in folder.resumable(trial)
            if folder.point(checkpoint) is not None
            and (
                checkpoint.kind == CheckpointKind.TRUNK
                or (same_horizon and checkpoint.step == record.max_train_steps)
            )
        ]

    def _reason_against(
        self, record: RoundRecord, trial: Trial, checkpoint: Checkpoint, hyperparameters: Hyperparameters
    ) -> str | None:
        spec = self.plan.spec
        reason = can_continue(
            trial.hyperparameters,
            record.max_train_steps,
            hyperparameters,
            spec.max_train_steps,
            checkpoint.step,
        )
        if spec.command is not None:  # which keeps every evaluation
            return reason
        return reason or lost_best(
            trial.evaluations,
            evaluation_steps(spec.max_train_steps, spec.evaluation.every_steps),
            checkpoint.step,
        )

    def _trial(self, round_name: str, number: int) -> Trial | None:
        return next((t for t in self.store.trials(round_name) if t.number == number), None)

    def _folder(self, round_name: str) -> CheckpointFolder:
        return CheckpointFolder(Path(self.plan.absolute.checkpoints.directory) / round_name)


def continued_checkpoint(store: Store, folder: CheckpointFolder, wish: Continuation) -> StartingPoint | None:
    """Return the checkpoint to continue from, in the folder of its round; None if it is missing."""
    earlier = next((t for t in store.trials(wish.round) if t.number == wish.trial), None)
    points = [c for c in folder.resumable(earlier) if c.step == wish.step] if earlier else []
    return next((point for c in points if (point := folder.point(c)) is not None), None)


def lost_best(evaluations: Sequence[Evaluation], planned: Sequence[int], step: int) -> str | None:
    """Return why the best adapter in a checkpoint would not be the best of the inherited evaluations.

    The checkpoint has the adapter of one evaluation; a round that evaluates at other steps drops evaluations,
    perhaps that one.
    """
    before = [evaluation for evaluation in evaluations if evaluation.step <= step]
    best = best_evaluation(before)
    if best is None or best.step in planned:
        return None
    return f"its best adapter up to step {step} is from step {best.step}, which this round does not evaluate"
