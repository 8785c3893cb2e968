"""A round's comparison runs: which runs next, from where, and how its worker's events are recorded.

To a worker each is one more run, whose parent is the trial it is compared with. Its files are in a folder
of their own under the round's and are deleted when it has ended: it leaves a loss, not an adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tuner.playbook import RoundResults
from tuner.playbook.comparison_runs import branch_hyperparameters, branches_left
from tuner.records import (
    LOSS,
    Assignment,
    Attempt,
    Branch,
    BranchAdvanced,
    CheckpointKind,
    Ended,
    Evaluated,
    Progressed,
    RoundRecord,
    RunId,
    Saved,
    Started,
)
from tuner.report.format import loss
from tuner.store import Store
from tuner.study.plan import CheckpointFolder, RoundPlan, StartingPoint
from tuner.study.results import earlier_results, round_results
from tuner.study.round_state import has_open_attempt, have_failed


@dataclass(frozen=True)
class ComparisonRuns:
    """The comparison runs of a round being run; all of their state is in the facts."""

    plan: RoundPlan
    store: Store
    folder: CheckpointFolder
    clock: Callable[[], float]
    """Seconds since the epoch."""
    say: Callable[[str], None]
    """Receives a sentence for the user."""

    def left(self) -> tuple[Branch, ...]:
        """Return the comparison runs that have not ended; correct once every trial has."""
        rule = self.plan.comparison_rule
        if rule is False:
            return ()
        record = self._record
        results = round_results(record, self.store.trials(self.plan.name))
        return branches_left(results, self._earlier, rule=rule, begun=record.branches)

    def next_assignment(self) -> Assignment | None:
        """Return the next attempt of a run that no worker has: from its own checkpoint, else from its start.

        If the stable checkpoint is missing, the run to T/2 starts from scratch.
        """
        for branch in self.left():
            if has_open_attempt(branch):
                continue
            start = self._start(branch)
            if start is not None or branch.from_step == 0:
                return self._assign(branch, start)
            if self._goes_to_half(branch):
                return self._assign(replace(branch, from_step=0), None)
            self._advance(replace(branch, state="failed", reason="its stable checkpoint is missing"))
        return None

    def record(self, event: Started | Progressed | Evaluated | Saved | Ended) -> None:
        """Turn a worker's event about a comparison run into facts, then act on them."""
        branch = self._named(event.run)
        match event:
            case Progressed(step=step):
                self._advance(_ran(branch, step))
            case Evaluated(evaluation=evaluation):
                ran = _ran(branch, evaluation.step)
                is_last = evaluation.step == branch.max_train_steps
                self._advance(replace(ran, evaluation=evaluation) if is_last else ran)
            case Saved(checkpoint=checkpoint) if checkpoint.kind == CheckpointKind.LAST:
                self._advance(replace(_ran(branch, checkpoint.step), checkpoint=checkpoint))
                if branch.checkpoint is not None and branch.checkpoint.path != checkpoint.path:
                    self.folder.delete([branch.checkpoint.path])
            case Ended(outcome="complete" | "infeasible" as outcome, reason=reason, step=step):
                ended = self._ended(_ran(branch, step), outcome, reason)
                self._finish(replace(ended, state=outcome, reason=reason))
            case Ended(outcome=outcome, reason=reason, step=step):
                ran = _ran(branch, step)
                left = self._without_its_start(ran) if outcome == "failed" else ran
                self._try_again(self._ended(left, outcome, reason))
            case _:
                pass

    def died(self, runs: Collection[RunId], reason: str) -> None:
        """Record that a worker died, with the runs it had."""
        for branch in self._record.branches:
            if self._run(branch) in runs and has_open_attempt(branch):
                self._try_again(self._ended(branch, "died", reason))

    def recover(self) -> None:
        """Recover from what an earlier process left open."""
        for branch in self._record.branches:
            if has_open_attempt(branch):
                self._advance(self._ended(branch, "interrupted", None))
            if branch.state != "open":
                shutil.rmtree(self._directory(branch), ignore_errors=True)

    # --- an attempt starts ------------------------------------------------------------------------

    def _start(self, branch: Branch) -> StartingPoint | None:
        if branch.checkpoint is not None and (own := self.folder.point(branch.checkpoint)) is not None:
            return own
        trial = self.store.trial(self.plan.name, branch.trial)
        trunk = trial.checkpoint(CheckpointKind.TRUNK, branch.from_step)
        return None if trunk is None else self.folder.point(trunk)

    def _assign(self, branch: Branch, start: StartingPoint | None) -> Assignment:
        trial = self.store.trial(self.plan.name, branch.trial)
        step = start.step if start else 0
        attempt = Attempt(len(branch.attempts) + 1, step, step, self.clock())
        self._clean_up(branch)
        self._advance(replace(branch, attempts=(*branch.attempts, attempt)))
        begins = "resumes" if step > branch.from_step else "starts"
        self.say(f"{_name(branch)} {begins} at step {step}")
        return Assignment(
            round=self.plan.name,
            trial=branch.trial,
            attempt=attempt.number,
            hyperparameters=branch_hyperparameters(
                branch, trial.hyperparameters, self.plan.spec.max_train_steps
            ),
            max_train_steps=branch.max_train_steps,
            evaluate_every=self.plan.spec.evaluation.every_steps,
            directory=str(self._directory(branch)),
            resume_from=str(start.path) if start else None,
            resume_sha256=start.sha256 if start else None,
            is_comparison=True,
        )

    def _clean_up(self, branch: Branch) -> None:
        """Delete checkpoints without a fact, left by a crash."""
        kept = None if branch.checkpoint is None else self.folder.root / branch.checkpoint.path
        for leftover in self._directory(branch).glob("*/*"):
            if leftover != kept:
                shutil.rmtree(leftover, ignore_errors=True)

    # --- an attempt ends --------------------------------------------------------------------------

    def _ended(self, branch: Branch, outcome: str, message: str | None) -> Branch:
        *before, last = branch.attempts
        last = replace(last, ended_at=self.clock(), outcome=outcome, message=message)
        return replace(branch, attempts=(*before, last))

    def _try_again(self, branch: Branch) -> None:
        """Let the run wait for its next attempt, unless too many in a row made no progress."""
        newest = branch.from_step if branch.checkpoint is None else branch.checkpoint.step
        if have_failed(branch.attempts, newest_step=newest):
            reason = branch.attempts[-1].message or branch.attempts[-1].outcome
            self._finish(replace(branch, state="failed", reason=reason))
        else:
            self._advance(branch)

    def _without_its_start(self, branch: Branch) -> Branch:
        """Handle a failed attempt whose checkpoint, its own or the stable one, cannot be used."""
        if branch.checkpoint is not None:
            return replace(branch, checkpoint=None)
        return replace(branch, from_step=0) if self._goes_to_half(branch) else branch

    def _goes_to_half(self, branch: Branch) -> bool:
        """Return whether the run may also start from scratch."""
        return branch.max_train_steps == round(self.plan.spec.max_train_steps / 2)

    def _finish(self, branch: Branch) -> None:
        """Record the end of the run, then delete its files."""
        self._advance(branch)
        shutil.rmtree(self._directory(branch), ignore_errors=True)
        end = branch.evaluation
        came_to = branch.reason or ""
        if branch.state == "complete" and end:
            came_to = f"{(end.objective or LOSS).noun} {loss(end.value)}"
        self.say(f"{_name(branch)}: {branch.state}, {came_to}")

    # --- names and facts --------------------------------------------------------------------------

    @cached_property
    def _earlier(self) -> list[RoundResults]:
        """Return the rounds before this one; they do not change while it runs."""
        return earlier_results(self.store, self._record)

    @property
    def _record(self) -> RoundRecord:
        record = self.store.round(self.plan.name)
        assert record is not None
        return record

    def _advance(self, branch: Branch) -> None:
        self.store.record(BranchAdvanced(self.plan.name, branch))

    def _run(self, branch: Branch) -> RunId:
        return RunId(self.plan.name, branch.trial, branch.max_train_steps)

    def _named(self, run: RunId) -> Branch:
        return next(branch for branch in self._record.branches if self._run(branch) == run)

    def _directory(self, branch: Branch) -> Path:
        return self.folder.root / f"branch-{branch.trial:04d}-{branch.max_train_steps:06d}"


def _name(branch: Branch) -> str:
    return f"comparison run of trial {branch.trial} to step {branch.max_train_steps}"


def _ran(branch: Branch, to_step: int) -> Branch:
    """Return the run after its open attempt reached a step; the highest one counts."""
    *before, last = branch.attempts
    return replace(branch, attempts=(*before, replace(last, to_step=max(last.to_step, to_step))))
