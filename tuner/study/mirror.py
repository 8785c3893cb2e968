"""Facts kept in the database and read from memory: the loop reads them at every event."""

from __future__ import annotations

from tuner.records import Promotion, RoundRecord, Trial
from tuner.store import MemoryStore, Store
from tuner.store.facts import (
    AttemptEnded,
    AttemptPlaced,
    AttemptStarted,
    BranchAdvanced,
    CheckpointSaved,
    EvaluationMade,
    Fact,
    RoundBegun,
    StepsRun,
    TrialAnswered,
    TrialAsked,
    TrialEnded,
    TrialNoted,
    TrialScored,
    WorkMeasured,
)


class MirroredStore:
    """A Store whose facts are recorded in `inner` first; what is read is a replay of what `inner` holds.

    Right only while this process is the one that writes, which the study's lock ensures.
    """

    def __init__(self, inner: Store) -> None:
        self._inner = inner
        self._memory = MemoryStore()
        for record in inner.rounds():
            worked = [WorkMeasured(record.name, throughput) for throughput in record.throughputs]
            self._memory.record(RoundBegun(record), *worked)
            for trial in inner.trials(record.name):
                self._memory.record(*history(trial))
            self._memory.record(*(BranchAdvanced(record.name, branch) for branch in record.branches))

    def record(self, *facts: Fact) -> None:
        """As `Store` says."""
        self._inner.record(*facts)
        self._memory.record(*facts)

    def rounds(self) -> tuple[RoundRecord, ...]:
        """As `Store` says."""
        return self._memory.rounds()

    def trials(self, round: str) -> tuple[Trial, ...]:
        """As `Store` says."""
        return self._memory.trials(round)

    def promotions(self) -> tuple[Promotion, ...]:
        """As `Store` says."""
        return self._inner.promotions()

    def close(self) -> None:
        """As `Store` says."""
        self._inner.close()


def history(trial: Trial) -> list[Fact]:
    """Facts from which a trial follows."""
    facts: list[Fact] = [TrialAsked(trial)]
    for attempt in trial.attempts:
        name = (trial.round, trial.number, attempt.number)
        facts += [
            AttemptStarted(*name, attempt.from_step, attempt.started_at),
            StepsRun(*name, attempt.to_step),
        ]
        if attempt.environment:
            facts.append(AttemptPlaced(*name, attempt.environment))
    facts += [EvaluationMade(trial.round, trial.number, evaluation) for evaluation in trial.evaluations]
    newest = max((attempt.number for attempt in trial.attempts), default=1)
    facts += [CheckpointSaved(trial.round, trial.number, newest, c) for c in trial.checkpoints]
    for attempt in trial.attempts:
        if attempt.ended_at is not None and attempt.outcome is not None:
            name = (trial.round, trial.number, attempt.number)
            facts.append(
                AttemptEnded(*name, attempt.to_step, attempt.ended_at, attempt.outcome, attempt.message)
            )
    ended = max((a.ended_at or 0.0 for a in trial.attempts), default=0.0)
    if trial.state.is_final:
        facts.append(TrialEnded(trial.round, trial.number, trial.state, trial.reason, ended))
    elif trial.reason is not None:
        facts.append(TrialNoted(trial.round, trial.number, trial.reason))
    if trial.final_score is not None:
        facts.append(TrialScored(trial.round, trial.number, trial.final_score))
    if trial.answer_score is not None:
        facts.append(TrialAnswered(trial.round, trial.number, trial.answer_score))
    return facts
